#include "server/dsla_state.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

namespace dsla {
namespace {

using testing::HasSubstr;

class FakeEngine final : public Engine {
 public:
  std::optional<Rejection> SubmitAll(std::vector<Submission>) override { return {}; }
  std::optional<Rejection> Check(const Request&) const override { return {}; }
  std::optional<Rejection> RefusesAll() const override { return {}; }
  int LongestReply(int64_t, Tier, int) const override { return 0; }
  void Cancel(const std::string&) override {}
  void CancelAll() override {}
  EngineState state() const override { return state_; }
  bool device_failed() const override { return false; }
  void SetFinishObserver(FinishObserver) override {}
  void SetPolicy(const PolicyMaker& make) override {
    policies_.clear();
    for (int r = 0; r < replicas_; ++r) policies_.push_back(make(r));
    policy_ = policies_.front().get();
  }
  void SetMaxLevel(int level) override { state_.max_level = level; }
  void Drain() override {}

  EngineState state_;
  int replicas_ = 1;
  std::vector<std::unique_ptr<LevelPolicy>> policies_;
  LevelPolicy* policy_ = nullptr;  // the first one's
};

LadderInfo SomeLadder() {
  return {.model = "m", .adapter = "a", .ladder = {2, 0, 3, 1}, .top_level = 3, .max_level = 4};
}

PolicyOptions SomeOptions() {
  PolicyOptions options;
  options.policy = "slo";
  options.layers = 4;
  options.max_level = 3;
  options.cost.model = CostModel::FromCoefficients(4, {1e-3, 1e-5, 1e-5, 1e-9},
                                                   {1e-3, 1e-5, 1e-5, 1e-9}, {1e-3, 1e-6});
  return options;
}

TEST(DslaControl, AppliesAndKeepsTheRest) {
  FakeEngine engine;
  PolicyOptions options = SomeOptions();
  options.slo.ttft = 7;
  DslaControl control(&engine, SomeLadder(), options);

  ASSERT_TRUE(control.Apply({.policy = "fixed", .level = 2, .max_level = {}}).ok());
  ASSERT_NE(engine.policy_, nullptr);
  EXPECT_STREQ(engine.policy_->name(), "fixed");
  EXPECT_EQ(engine.policy_->Decide({}).target, 2);
  EXPECT_EQ(engine.state_.max_level, 3);

  ASSERT_TRUE(control.Apply({.policy = "slo", .level = {}, .max_level = 4}).ok());
  EXPECT_STREQ(engine.policy_->name(), "slo");
  EXPECT_EQ(engine.state_.max_level, 4);
  EXPECT_EQ(control.options().slo.ttft, 7);

  engine.state_.target_level = 3;
  ASSERT_TRUE(control.Apply({.policy = "fixed", .level = {}, .max_level = {}}).ok());
  EXPECT_EQ(engine.policy_->Decide({}).target, 3);  // where it stood
}

TEST(DslaControl, ABoundAloneKeepsThePolicy) {
  FakeEngine engine;
  DslaControl control(&engine, SomeLadder(), SomeOptions());
  ASSERT_TRUE(control.Apply({.policy = {}, .level = {}, .max_level = 1}).ok());
  EXPECT_EQ(engine.state_.max_level, 1);
  EXPECT_EQ(engine.policy_, nullptr) << "the one that runs";
  EXPECT_EQ(control.options().max_level, 1);

  ASSERT_TRUE(control.Apply({.policy = {}, .level = 1, .max_level = {}}).ok());
  const Status status = control.Apply({.policy = {}, .level = {}, .max_level = 0});
  EXPECT_THAT(status.message(), HasSubstr("fixed level 1"));
  EXPECT_EQ(engine.state_.max_level, 1);
}

// Whatever the server was started with, an operator can go to any other policy and back.
TEST(DslaControl, FromEveryPolicyToEveryOther) {
  for (const char* from : {"fixed", "paper", "slo"}) {
    for (const char* to : {"fixed", "paper", "slo"}) {
      FakeEngine engine;
      engine.state_.target_level = 3;
      PolicyOptions options = SomeOptions();
      options.policy = from;
      DslaControl control(&engine, SomeLadder(), options);
      const Status status = control.Apply({.policy = to, .level = {}, .max_level = {}});
      ASSERT_TRUE(status.ok()) << from << " to " << to << ": " << status.message();
      EXPECT_STREQ(engine.policy_->name(), to) << from;
      EXPECT_EQ(control.options().policy, to);
      const auto shown = nlohmann::json::parse(control.StateJson());
      EXPECT_EQ(shown["controller"]["policy"], to);  // before the engine's next step, too
      ASSERT_TRUE(control.Apply({.policy = from, .level = {}, .max_level = {}}).ok());
      EXPECT_STREQ(engine.policy_->name(), from) << to;
    }
  }
}

TEST(DslaControl, ARefusalChangesNothing) {
  FakeEngine engine;
  DslaControl control(&engine, SomeLadder(), SomeOptions());
  const Status status = control.Apply({.policy = {}, .level = 4, .max_level = {}});
  EXPECT_THAT(status.message(), HasSubstr("fixed level 4"));
  EXPECT_EQ(engine.policy_, nullptr);
  EXPECT_EQ(control.options().policy, "slo");

  PolicyOptions uncalibrated = SomeOptions();
  uncalibrated.policy = "fixed";
  uncalibrated.cost = {};
  DslaControl other(&engine, SomeLadder(), uncalibrated);
  EXPECT_THAT(other.Apply({.policy = "slo", .level = {}, .max_level = {}}).message(),
              HasSubstr("no cost model"));
}

TEST(DslaControl, EveryReplicaGetsAPolicyOfItsOwn) {
  FakeEngine engine;
  engine.replicas_ = 2;
  const MeasuredCost cost = SomeOptions().cost;
  PolicyOptions options = SomeOptions();
  options.cost = {};
  DslaControl control(&engine, SomeLadder(), options, {cost, cost});
  for (const char* policy : {"slo", "paper", "fixed"}) {
    ASSERT_TRUE(control.Apply({.policy = policy, .level = {}, .max_level = {}}).ok());
    ASSERT_EQ(engine.policies_.size(), 2u);
    EXPECT_NE(engine.policies_[0], nullptr);
    EXPECT_STREQ(engine.policies_[1]->name(), policy);
  }
  DslaControl other(&engine, SomeLadder(), options, {cost, MeasuredCost()});
  EXPECT_THAT(other.Apply({.policy = "slo", .level = {}, .max_level = {}}).message(),
              HasSubstr("no cost model"));
  EXPECT_STREQ(engine.policies_[0]->name(), "fixed") << "neither has changed";
}

TEST(DslaState, NamesEachReplica) {
  EngineState all;
  EXPECT_FALSE(nlohmann::json::parse(DslaStateJson(all, SomeLadder(), {})).contains("replicas"));
  all.replicas.resize(2);
  all.replicas[1].device = "cuda:1 (some GPU)";
  all.replicas[1].device_error = "an illegal access";
  all.replicas[1].target_level = 3;
  all.replicas[1].running = 7;
  LevelEvent event;
  event.replica = 1;
  all.events = {event};
  const auto json = nlohmann::json::parse(DslaStateJson(all, SomeLadder(), {}));
  EXPECT_EQ(json["events"][0]["replica"], 1);
  ASSERT_EQ(json["replicas"].size(), 2u);
  EXPECT_EQ(json["replicas"][0]["failed"], nullptr);
  const auto& second = json["replicas"][1];
  EXPECT_EQ(second["replica"], 1);
  EXPECT_EQ(second["device"], "cuda:1 (some GPU)");
  EXPECT_EQ(second["failed"], "an illegal access");
  EXPECT_EQ(second["target_level"], 3);
  EXPECT_EQ(second["running"]["count"], 7);
  EXPECT_TRUE(second.contains("cost_factors") && second.contains("totals"));
  EXPECT_FALSE(second.contains("cost_model"));
}

TEST(DslaState, SaysWhereCostsComeFrom) {
  EngineState state;
  state.replicas.resize(2);
  state.cost_doubtful = state.replicas[1].cost_doubtful = true;
  PolicyOptions options = SomeOptions();
  const auto json = [&](const std::vector<MeasuredCost>& costs) {
    return nlohmann::json::parse(DslaStateJson(state, SomeLadder(), options, costs));
  };
  EXPECT_FALSE(json({})["controller"].contains("cost_model")) << "there is none";
  options.cost.source = CostSource::kKept;
  options.cost.measured_at = 1700000000;
  const MeasuredCost named{.model = {}, .usual = {}, .source = CostSource::kFile};
  const auto shown = json({options.cost, named});
  const nlohmann::json kept{{"source", "kept"}, {"measured_at", 1700000000}, {"doubtful", true}};
  EXPECT_EQ(shown["controller"]["cost_model"], kept);
  EXPECT_EQ(shown["replicas"][0]["cost_model"]["doubtful"], false);
  const nlohmann::json second{{"source", "file"}, {"measured_at", nullptr}, {"doubtful", true}};
  EXPECT_EQ(shown["replicas"][1]["cost_model"], second);
}

TEST(DslaState, SaysWhatTheEngineIsDoing) {
  EngineState s;
  s.now = 50;
  s.last_progress = 49;
  s.idle = false;
  s.policy = "slo";
  s.target_level = 2;
  s.max_level = 3;
  s.rows_per_level = {1, 0, 5, 0, 0};
  s.running = 6;
  s.queued = 9;
  s.page_bytes = 123;
  s.decode_tokens_per_second = 55.5;
  s.cost_factors = {.prefill = 0.5, .decode = 2, .fold = 1};
  LevelEvent target;
  target.time = 40;
  target.to = 2;
  target.reason = "ttft: 9 waiting";
  LevelEvent raise = target;
  raise.request_id = "r\xff";  // not UTF-8
  raise.position = 77;
  raise.seconds = 0.5;
  s.events = {target, raise};

  const auto json = nlohmann::json::parse(DslaStateJson(s, SomeLadder(), SomeOptions()));
  EXPECT_EQ(json["ladder"]["layers"], (std::vector<int>{2, 0, 3, 1}));
  EXPECT_EQ(json["ladder"]["top_level"], 3);
  EXPECT_EQ(json["kinds_at_target"],
            (std::vector<std::string>{"dsla", "softmax", "dsla", "softmax"}));
  EXPECT_EQ(json["controller"]["policy"], "slo");
  EXPECT_EQ(json["controller"]["target_level"], 2);
  EXPECT_EQ(json["controller"]["slo"]["ttft_seconds"], 2.0);
  EXPECT_EQ(json["controller"]["cost_factors"]["decode"], 2.0);
  EXPECT_FALSE(json["controller"].contains("paper"));
  EXPECT_EQ(json["running"]["by_level"], s.rows_per_level);
  EXPECT_EQ(json["queue"]["requests"], 9);
  EXPECT_EQ(json["memory"]["page_bytes"], 123);
  EXPECT_EQ(json["throughput"]["decode_tokens_per_second"], 55.5);
  EXPECT_EQ(json["seconds_since_progress"], 1.0);
  ASSERT_EQ(json["events"].size(), 2u);
  EXPECT_EQ(json["events"][0]["age_seconds"], 10.0);
  EXPECT_EQ(json["events"][0]["scope"], "target");
  EXPECT_TRUE(json["events"][0]["request_id"].is_null());
  EXPECT_EQ(json["events"][0]["reason"], "ttft: 9 waiting");
  EXPECT_EQ(json["events"][1]["scope"], "sequence");
  EXPECT_EQ(json["events"][1]["request_id"], "r\xef\xbf\xbd");
  EXPECT_EQ(json["events"][1]["position"], 77);
}

TEST(DslaState, WithoutAnAdapter) {
  PolicyOptions options;
  options.policy = "fixed";
  EngineState state;
  state.policy = "fixed";
  LadderInfo ladder{.model = "m", .adapter = "", .ladder = {0, 1}, .top_level = 0, .max_level = 0};
  const auto json = nlohmann::json::parse(DslaStateJson(state, ladder, options));
  EXPECT_EQ(json["kinds_at_target"], (std::vector<std::string>{"softmax", "softmax"}));
  EXPECT_EQ(json["controller"]["fixed_level"], 0);
  EXPECT_TRUE(json["events"].is_array());
}

}  // namespace
}  // namespace dsla
