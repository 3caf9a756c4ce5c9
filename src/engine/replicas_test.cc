#include "engine/replicas.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <thread>

namespace dsla {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Keeps what it is given until the test ends it, as an engine whose queue is bounded elsewhere.
class ManualEngine : public Engine {
 public:
  explicit ManualEngine(std::shared_ptr<QueueBound> queue) : queue_(std::move(queue)) {}
  ~ManualEngine() override { EndAll(Status(StatusCode::kCancelled, "the end")); }

  std::optional<Rejection> SubmitAll(std::vector<Submission> group) override {
    const std::lock_guard lock(mutex_);
    if (throws) throw std::bad_alloc();
    if (draining_ || closes) return Closed();
    for (Submission& submission : group)
      running_.emplace(submission.request.id, std::move(submission));
    return std::nullopt;
  }
  std::optional<Rejection> Check(const Request& request) const override {
    if (!request.prompt.empty()) return std::nullopt;
    return Rejection{.message = "the prompt has no tokens", .param = "prompt"};
  }
  int LongestReply(int64_t, Tier, int) const override { return 17; }
  std::optional<Rejection> RefusesAll() const override {
    const std::lock_guard lock(mutex_);
    if (draining_) return Closed();
    return std::nullopt;
  }
  void Cancel(const std::string& id) override { Finish(id, Status(StatusCode::kCancelled, id)); }
  void CancelAll() override { EndAll(Status(StatusCode::kCancelled, "all")); }
  EngineState state() const override {
    const std::lock_guard lock(mutex_);
    EngineState state = state_;
    state.running = static_cast<int>(running_.size());
    state.idle = running_.empty();
    state.draining = draining_;
    return state;
  }
  bool device_failed() const override { return !state().device_error.empty(); }
  void SetFinishObserver(FinishObserver observer) override { observer_ = std::move(observer); }
  void SetPolicy(const PolicyMaker& make) override { policy = make(0); }
  void SetMaxLevel(int level) override { max_level = level; }
  void Drain() override {
    const std::lock_guard lock(mutex_);
    draining_ = true;
  }

  // What an engine does.
  void Start(const std::string& id) {  // its first step, and its first token
    std::shared_ptr<RequestSink> sink;
    int64_t tokens = 0;
    {
      const std::lock_guard lock(mutex_);
      sink = running_.at(id).sink;
      tokens = static_cast<int64_t>(running_.at(id).request.prompt.size());
      started_.insert(id);
    }
    queue_->Leave(1, tokens);
    sink->OnToken({});
  }
  void Finish(const std::string& id, Status status = Status::Ok()) {
    Submission submission;
    bool started = false;
    {
      const std::lock_guard lock(mutex_);
      const auto found = running_.find(id);
      if (found == running_.end()) return;
      submission = std::move(found->second);
      running_.erase(found);
      started = started_.erase(id) > 0;
    }
    if (!started) queue_->Leave(1, static_cast<int64_t>(submission.request.prompt.size()));
    RequestResult result;
    result.id = id;
    result.status = std::move(status);
    submission.sink->OnFinish(result);
    if (observer_) observer_(result);
  }
  void EndAll(const Status& status) {
    for (const std::string& id : ids()) Finish(id, status);
  }
  void FailDevice() {
    {
      const std::lock_guard lock(mutex_);
      state_.device_error = "an illegal access";
    }
    EndAll(Status(StatusCode::kInternal, "the device failed: an illegal access"));
  }
  std::vector<std::string> ids() const {
    const std::lock_guard lock(mutex_);
    std::vector<std::string> ids;
    for (const auto& [id, submission] : running_) ids.push_back(id);
    return ids;
  }

  bool throws = false, closes = false;  // what Submit comes upon
  std::unique_ptr<LevelPolicy> policy;
  int max_level = -1;
  EngineState state_;

 private:
  static Rejection Closed() {
    return {.kind = Rejection::Kind::kUnavailable, .message = "the server is shutting down"};
  }

  const std::shared_ptr<QueueBound> queue_;
  mutable std::mutex mutex_;
  std::map<std::string, Submission> running_;
  std::set<std::string> started_;
  bool draining_ = false;
  FinishObserver observer_;
};

class KeepingSink : public RequestSink {
 public:
  void OnPlaced(int replica) override { placed = replica; }
  void OnPromptLogprobs(std::vector<PromptLogprob>) override {}
  void OnToken(TokenOutput) override { ++tokens; }
  void OnFinish(const RequestResult& of) override {
    result = of;
    ++ends;
  }
  int placed = -1, tokens = 0, ends = 0;
  RequestResult result;
};

class ReplicasTest : public ::testing::Test {
 protected:
  static constexpr int kBlock = 4;

  explicit ReplicasTest(int replicas = 2, int max_queued = 1000) {
    queue_ = std::make_shared<QueueBound>(max_queued, 0);
    std::vector<Replica> all;
    for (int r = 0; r < replicas; ++r) {
      auto engine = std::make_unique<ManualEngine>(queue_);
      engines_.push_back(engine.get());
      all.push_back({std::move(engine), fmt::format("cuda:{}", r)});
    }
    front_ = JoinReplicas(std::move(all), queue_, {.block_tokens = kBlock});
  }
  static Request Ask(const std::string& id, int tokens = 8, int32_t first = -1) {
    Request request;
    request.id = id;
    request.prompt.resize(static_cast<size_t>(tokens));
    const int32_t begin = first >= 0 ? first : static_cast<int32_t>(std::hash<std::string>()(id));
    for (int i = 0; i < tokens; ++i) request.prompt[static_cast<size_t>(i)] = begin + i;
    return request;
  }
  std::shared_ptr<KeepingSink> Submit(const Request& request) {
    auto sink = std::make_shared<KeepingSink>();
    const auto rejected = front_->Submit(request, sink);
    EXPECT_FALSE(rejected) << rejected->message;
    return sink;
  }
  std::optional<Rejection> Refused(const Request& request) {
    return front_->Submit(request, std::make_shared<KeepingSink>());
  }

  std::shared_ptr<QueueBound> queue_;
  std::vector<ManualEngine*> engines_;
  std::unique_ptr<Engine> front_;
};

TEST_F(ReplicasTest, RequestsAreSharedAndTheirEventsComeThrough) {
  const auto a = Submit(Ask("a")), b = Submit(Ask("b"));
  EXPECT_EQ(a->placed, 0);
  EXPECT_EQ(b->placed, 1);
  EXPECT_THAT(engines_[0]->ids(), ElementsAre("a"));
  EXPECT_THAT(engines_[1]->ids(), ElementsAre("b"));
  std::vector<std::pair<std::string, int>> observed;
  front_->SetFinishObserver(
      [&](const RequestResult& result) { observed.emplace_back(result.id, result.replica); });
  engines_[1]->Start("b");
  EXPECT_EQ(b->tokens, 1);
  engines_[1]->Finish("b");
  EXPECT_TRUE(b->result.status.ok());
  EXPECT_EQ(b->result.replica, 1);
  EXPECT_THAT(observed, ElementsAre(std::pair{"b", 1}));
  EXPECT_EQ(a->ends, 0);
  engines_[0]->Finish("a");  // while there is who observes it
}

TEST_F(ReplicasTest, APrefixGoesWhereItIs) {
  Submit(Ask("a", 400, 0));
  engines_[0]->Start("a");
  engines_[0]->Finish("a");
  Submit(Ask("b"));
  engines_[1]->Finish("b");
  for (const char* id : {"c", "d", "e"}) {
    EXPECT_EQ(Submit(Ask(id, 410, 0))->placed, 0);
    engines_[0]->Start(id);
    engines_[0]->Finish(id);
  }
  Request other = Ask("f", 400, 0);
  other.cache_salt = "another client's";
  EXPECT_EQ(Submit(other)->placed, 1);
}

TEST_F(ReplicasTest, ACancelGoesToWhoHasIt) {
  const auto a = Submit(Ask("a")), b = Submit(Ask("b"));
  front_->Cancel("b");
  front_->Cancel("nobody");
  EXPECT_EQ(b->result.status.code(), StatusCode::kCancelled);
  EXPECT_EQ(a->ends, 0);
  front_->CancelAll();
  EXPECT_EQ(a->ends, 1);
}

TEST_F(ReplicasTest, AnIdIsOneRequestOfAll) {
  Submit(Ask("a"));
  const auto rejected = Refused(Ask("a"));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->kind, Rejection::Kind::kInvalid);
  EXPECT_THAT(rejected->message, HasSubstr("'a' is in use"));
  std::vector<Submission> group;
  for (const char* id : {"x", "y", "x"})
    group.push_back({Ask(id), std::make_shared<KeepingSink>()});
  const auto twice = front_->SubmitAll(std::move(group));
  ASSERT_TRUE(twice);
  EXPECT_EQ(twice->index, 2u);
  Submit(Ask("x"));  // nothing of it is left
  Submit(Ask("y"));
  engines_[0]->Finish("a");
  EXPECT_EQ(Submit(Ask("a"))->ends, 0) << "free again";
}

TEST_F(ReplicasTest, WhatIsWrongIsSaidOfTheOneInTheGroup) {
  std::vector<Submission> group;
  group.push_back({Ask("a"), std::make_shared<KeepingSink>()});
  group.push_back({Ask("b", 0), std::make_shared<KeepingSink>()});
  const auto rejected = front_->SubmitAll(std::move(group));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->index, 1u);
  EXPECT_EQ(rejected->param, "prompt");
  EXPECT_TRUE(front_->state().idle);
  EXPECT_EQ(front_->LongestReply(1, Tier::kAuto, 0), 17);
}

TEST_F(ReplicasTest, AGroupIsSpread) {
  std::vector<Submission> group;
  for (int i = 0; i < 6; ++i)
    group.push_back({Ask(fmt::format("g{}", i), 100), std::make_shared<KeepingSink>()});
  EXPECT_FALSE(front_->SubmitAll(std::move(group)));
  EXPECT_EQ(engines_[0]->ids().size(), 3u);
  EXPECT_EQ(engines_[1]->ids().size(), 3u);
}

class BoundedReplicasTest : public ReplicasTest {
 protected:
  BoundedReplicasTest() : ReplicasTest(2, /*max_queued=*/3) {}
};

TEST_F(BoundedReplicasTest, TheQueueIsOne) {
  for (const char* id : {"a", "b", "c"}) Submit(Ask(id));
  ASSERT_TRUE(front_->RefusesAll());
  EXPECT_EQ(front_->RefusesAll()->kind, Rejection::Kind::kQueueFull);
  const auto rejected = Refused(Ask("d"));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->message, "the queue is full: 3 of at most 3 requests wait, and 1 more came");
  engines_[1]->Start("b");
  EXPECT_FALSE(front_->RefusesAll()) << "a place at one is a place for all";
  Submit(Ask("d"));
  EXPECT_TRUE(Refused(Ask("e")));
  engines_[0]->Finish("a", Status(StatusCode::kCancelled, ""));
  Submit(Ask("e"));
}

TEST_F(BoundedReplicasTest, WhatIsRefusedLeavesNothingBehind) {
  for (int i = 0; i < 5; ++i) {
    engines_[0]->throws = engines_[1]->throws = true;
    EXPECT_THROW(Refused(Ask("a")), std::bad_alloc);
    engines_[0]->throws = engines_[1]->throws = false;
    engines_[0]->closes = engines_[1]->closes = true;
    const auto rejected = Refused(Ask("a"));
    ASSERT_TRUE(rejected);
    EXPECT_EQ(rejected->kind, Rejection::Kind::kUnavailable);
    engines_[0]->closes = engines_[1]->closes = false;
  }
  for (const char* id : {"a", "b", "c"}) Submit(Ask(id));
  EXPECT_EQ(engines_[0]->ids().size() + engines_[1]->ids().size(), 3u);
  EXPECT_TRUE(Refused(Ask("d"))) << "three wait";
}

// One engine takes its part of a group, the other does not any more.
TEST_F(BoundedReplicasTest, APartThatIsRefusedEnds) {
  for (const bool memory : {false, true}) {
    std::vector<std::shared_ptr<KeepingSink>> sinks;
    std::vector<Submission> group;
    for (const char* id : {"a", "b"}) {
      sinks.push_back(std::make_shared<KeepingSink>());
      group.push_back({Ask(id), sinks.back()});
    }
    (memory ? engines_[1]->throws : engines_[1]->closes) = true;
    EXPECT_FALSE(front_->SubmitAll(std::move(group)));
    (memory ? engines_[1]->throws : engines_[1]->closes) = false;
    int refused = 0;
    for (const auto& sink : sinks) {
      if (sink->ends == 0) continue;
      ++refused;
      EXPECT_EQ(sink->placed, 1);
      EXPECT_EQ(sink->result.status.code(),
                memory ? StatusCode::kResourceExhausted : StatusCode::kUnavailable);
    }
    EXPECT_EQ(refused, 1);
    engines_[0]->EndAll(Status::Ok());
    EXPECT_FALSE(front_->RefusesAll());
  }
  for (const char* id : {"a", "b", "c"}) Submit(Ask(id));
}

TEST_F(BoundedReplicasTest, ARefusalNamesTheRequestOfTheGroup) {
  std::vector<Submission> group;
  for (const char* id : {"a", "b"}) group.push_back({Ask(id), std::make_shared<KeepingSink>()});
  engines_[0]->closes = engines_[1]->closes = true;
  const auto rejected = front_->SubmitAll(std::move(group));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->index, 1u) << "the last engine's first";
}

TEST_F(ReplicasTest, AFailedReplicaLeavesTheOthersServing) {
  const auto a = Submit(Ask("a", 400, 0)), b = Submit(Ask("b"));
  engines_[0]->FailDevice();
  EXPECT_EQ(a->result.status.code(), StatusCode::kInternal);
  EXPECT_EQ(b->ends, 0);
  EXPECT_FALSE(front_->device_failed());
  EngineState state = front_->state();
  EXPECT_EQ(state.device_error, "");
  EXPECT_EQ(state.replicas[0].device_error, "an illegal access");
  EXPECT_EQ(state.replicas[0].device, "cuda:0");
  for (int i = 0; i < 4; ++i)
    EXPECT_EQ(Submit(Ask(fmt::format("c{}", i), 400, 0))->placed, 1) << "its prefix is lost";
  EXPECT_FALSE(front_->RefusesAll());

  engines_[1]->FailDevice();
  EXPECT_TRUE(front_->device_failed());
  state = front_->state();
  EXPECT_EQ(state.device_error, "an illegal access");
  EXPECT_EQ(state.running, 0);
  EXPECT_FALSE(Refused(Ask("d"))) << "it fails as with one engine";
}

TEST_F(ReplicasTest, WhoDrainsGetsNone) {
  const auto a = Submit(Ask("a"));
  engines_[1]->Drain();
  for (int i = 0; i < 4; ++i) EXPECT_EQ(Submit(Ask(fmt::format("b{}", i)))->placed, 0);
  EXPECT_FALSE(front_->state().draining);
  front_->Drain();
  EXPECT_TRUE(front_->state().draining);
  ASSERT_TRUE(front_->RefusesAll());
  EXPECT_EQ(front_->RefusesAll()->kind, Rejection::Kind::kUnavailable);
  EXPECT_EQ(Refused(Ask("c"))->kind, Rejection::Kind::kUnavailable);
  EXPECT_FALSE(front_->state().idle);
  engines_[0]->EndAll(Status::Ok());
  EXPECT_TRUE(a->result.status.ok()) << "what runs goes on";
  EXPECT_TRUE(front_->state().idle);
}

class NamedPolicy : public LevelPolicy {
 public:
  explicit NamedPolicy(int replica) : replica_(replica) {}
  const char* name() const override { return "named"; }
  LevelDecision Decide(const LoadSnapshot&) override {
    return {.target = replica_, .raises = {}, .reason = {}};
  }

 private:
  int replica_;
};

TEST_F(ReplicasTest, WhatIsSetIsSetAtAll) {
  front_->SetMaxLevel(3);
  front_->SetPolicy([](int replica) { return std::make_unique<NamedPolicy>(replica); });
  for (int r = 0; r < 2; ++r) {
    EXPECT_EQ(engines_[r]->max_level, 3);
    EXPECT_EQ(engines_[r]->policy->Decide({}).target, r) << "each has its own";
  }
}

TEST(Together, SumsAndExtremes) {
  std::vector<EngineState> states(3);
  for (int r = 0; r < 3; ++r) {
    EngineState& s = states[r];
    s.now = 100 + r;
    s.last_progress = 50 + r;
    s.idle = r == 0;  // so that its progress does not matter
    s.policy = "slo";
    s.max_level = 4;
    s.target_level = r == 1 ? 3 : 1;
    s.rows_per_level = {r, 1, 0};
    s.running = r + 1;
    s.queued_tokens = 10 * r;
    s.budget_bytes = 1000;
    s.oldest_wait_seconds = r == 1 ? 9 : 2;
    s.generated_tokens = 7;
    s.busy_seconds = 0.5;
    s.cost_factors = {.prefill = 1.0 + r, .decode = 1, .fold = 1};
    s.cost_doubtful = r == 1;
    for (int i = 0; i < 40; ++i)
      s.events.push_back({.sequence = i + 1, .time = 10.0 * i + r, .request_id = {}, .reason = {}});
  }
  const EngineState all = Together(states);
  EXPECT_EQ(all.now, 102);
  EXPECT_EQ(all.last_progress, 51);
  EXPECT_FALSE(all.idle);
  EXPECT_EQ(all.policy, "slo");
  EXPECT_EQ(all.max_level, 4);
  EXPECT_EQ(all.target_level, 3);
  EXPECT_THAT(all.rows_per_level, ElementsAre(3, 3, 0));
  EXPECT_EQ(all.running, 6);
  EXPECT_EQ(all.queued_tokens, 30);
  EXPECT_EQ(all.budget_bytes, 3000);
  EXPECT_EQ(all.oldest_wait_seconds, 9);
  EXPECT_EQ(all.generated_tokens, 21);
  EXPECT_EQ(all.busy_seconds, 1.5);
  EXPECT_EQ(all.cost_factors.prefill, 2);
  EXPECT_TRUE(all.cost_doubtful);
  ASSERT_EQ(all.events.size(), 64u);
  EXPECT_EQ(all.events.back().time, 392);
  EXPECT_EQ(all.events.back().replica, 2);
  ASSERT_EQ(all.replicas.size(), 3u);
  EXPECT_EQ(all.replicas[1].running, 2);
  EXPECT_EQ(all.replicas[1].events.size(), 40u);
}

// Clients on several threads, engines that run on threads of their own.
TEST_F(ReplicasTest, ManyClientsAtOnce) {
  constexpr int kClients = 4, kEach = 200;
  std::atomic<bool> stop = false;
  std::atomic<int> ended = 0;
  std::vector<std::thread> runs, clients;
  front_->SetFinishObserver([&](const RequestResult&) { ++ended; });
  for (ManualEngine* engine : engines_) {
    runs.emplace_back([&, engine] {
      while (!stop || !engine->ids().empty()) {
        for (const std::string& id : engine->ids()) {
          engine->Start(id);
          engine->Finish(id);
        }
        std::this_thread::yield();
      }
    });
  }
  for (int c = 0; c < kClients; ++c) {
    clients.emplace_back([&, c] {
      for (int i = 0; i < kEach; ++i) {
        EXPECT_FALSE(Refused(Ask(fmt::format("{}-{}", c, i), 20, i % 5)));
        EXPECT_GE(front_->state().running, 0);
      }
    });
  }
  for (std::thread& client : clients) client.join();
  stop = true;
  for (std::thread& run : runs) run.join();
  EXPECT_EQ(ended, kClients * kEach);
  EXPECT_TRUE(front_->state().idle);
  EXPECT_FALSE(front_->RefusesAll());
}

}  // namespace
}  // namespace dsla
