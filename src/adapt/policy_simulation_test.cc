// Thousands of random traces through the policies: what must hold after every decision, whatever
// the load; and that ours beats level 0 on a burst.
#include <gmock/gmock.h>

#include <algorithm>
#include <cstdio>
#include <random>

#include "adapt/load_estimate.h"
#include "adapt/make_policy.h"
#include "adapt/testing/load_simulator.h"
#include "base/quantile.h"

namespace dsla {
namespace {

constexpr int kLayers = 30;

CostModel Cost(double speed = 1) {
  return CostModel::FromCoefficients(
      kLayers, {2e-2 / speed, 5e-5 / speed, 4.5e-5 / speed, 1.6e-8 / speed},
      {8e-3 / speed, 4e-5 / speed, 4.5e-5 / speed, 1.8e-8 / speed}, {2e-4 / speed, 3.7e-6 / speed});
}

SimOptions Server(int64_t budget_tokens, double speed = 1) {
  SimOptions o;
  o.cost = Cost(speed);
  o.sizes = {.layers = kLayers, .page_size = 64, .page_bytes = 64 * 768, .slot_bytes = 328 * 768};
  o.budget_bytes = budget_tokens * 768 * kLayers;
  return o;
}

PolicyOptions Policy(const std::string& name, const SimOptions& server, int max_level) {
  PolicyOptions p;
  p.policy = name;
  p.layers = kLayers;
  p.max_level = max_level;
  p.cost.model = server.cost;
  p.slo.prefill_chunk = server.chunk;
  return p;
}

std::unique_ptr<LevelPolicy> Make(const PolicyOptions& options) {
  auto policy = MakePolicy(options);
  EXPECT_TRUE(policy.ok()) << policy.status().message();
  return std::move(policy).value();
}

// Bursts of short chats and documents with quiet between them.
std::vector<SimRequest> RandomTrace(std::mt19937& random, int requests, int max_level) {
  std::uniform_real_distribution<double> u(0, 1);
  std::vector<SimRequest> trace;
  double now = 0;
  while (static_cast<int>(trace.size()) < requests) {
    const int burst = 1 + static_cast<int>(u(random) * u(random) * 20);
    for (int i = 0; i < burst; ++i) {
      const bool document = u(random) < 0.3;
      SimRequest r;
      r.arrival = now;
      r.prompt = document ? 1000 + static_cast<int>(u(random) * 6000)
                          : 1 + static_cast<int>(u(random) * 300);
      r.reply = 1 + static_cast<int>(u(random) * u(random) * 150);
      r.max_level = u(random) < 0.15 ? 0 : max_level;
      trace.push_back(r);
      now += u(random) * u(random) * 0.5;
    }
    now += u(random) < 0.2 ? 60 * u(random) : 5 * u(random);
  }
  return trace;
}

// What every decision must keep to.
class Invariants {
 public:
  Invariants(const PolicyOptions& options, int most_per_minute)
      : options_(options), most_per_minute_(most_per_minute) {}

  void operator()(const LoadSnapshot& load, const LevelDecision& decision) {
    ASSERT_GE(decision.target, 0);
    ASSERT_LE(decision.target, options_.max_level);
    ASSERT_EQ(decision.reason.find('\n'), std::string::npos);
    if (decision.target != target_ || !decision.raises.empty()) {
      const std::string word = decision.reason.substr(0, decision.reason.find(':'));
      ASSERT_NE(std::find(std::begin(kReasonWords), std::end(kReasonWords), word),
                std::end(kReasonWords))
          << decision.reason;
    }
    double folds = 0;
    for (const LevelDecision::Raise& raise : decision.raises) {
      const auto s = std::find_if(load.running.begin(), load.running.end(),
                                  [&](const SequenceLoad& q) { return q.id == raise.id; });
      ASSERT_NE(s, load.running.end());
      ASSERT_GT(raise.level, s->level);
      ASSERT_LE(raise.level, s->max_level);
      ASSERT_LE(raise.level, decision.target);
      if (options_.policy == "slo") {
        const int64_t before =
            SequenceBytes(load.sizes, s->level, s->cached_tokens + s->pending_tokens);
        const int64_t after =
            SequenceBytes(load.sizes, raise.level, s->cached_tokens + s->pending_tokens);
        ASSERT_LT(after, before);
        longest_fold_ =
            std::max(longest_fold_, options_.cost.model.FoldSeconds(0, 1, s->cached_tokens));
      }
      folds += options_.cost.model.FoldSeconds(s->level, raise.level, s->cached_tokens);
    }
    if (options_.policy == "slo") {
      ASSERT_LE(folds, options_.slo.raise_seconds + longest_fold_);
    }
    if (decision.target != target_) changes_.push_back(load.now);
    if (decision.target < target_) drops_.push_back(load.now);
    target_ = decision.target;
    for (std::vector<double>* times : {&changes_, &drops_})
      std::erase_if(*times, [&](double time) { return time < load.now - 60; });
    ASSERT_LE(static_cast<int>(changes_.size()), most_per_minute_) << "flapping";
    // Before each drop the lower level must have sufficed for calm_seconds.
    if (options_.policy == "slo") {
      ASSERT_LE(static_cast<double>(drops_.size()), 60 / options_.slo.calm_seconds + 1);
    }
    // Nothing to do for a minute: level 0.
    if (!load.running.empty() || !load.waiting.empty()) calm_since_ = load.now;
    if (options_.policy == "slo" && load.now - calm_since_ > 60) {
      ASSERT_EQ(decision.target, 0);
    }
  }

 private:
  const PolicyOptions options_;
  const int most_per_minute_;
  int target_ = 0;
  double longest_fold_ = 0;
  double calm_since_ = 0;
  std::vector<double> changes_, drops_;  // when, in the last minute
};

void RunTraces(const std::string& name, int traces, int most_per_minute) {
  for (int i = 0; i < traces && !testing::Test::HasFatalFailure(); ++i) {
    const unsigned seed = 1000 + i;
    SCOPED_TRACE(fmt::format("policy {} seed {}", name, seed));
    std::mt19937 random(seed);
    const int max_level = std::vector<int>{0, 5, 22, 30}[random() % 4];
    SimOptions server = Server(8000 + random() % 60000, 1 + random() % 8);
    const std::vector<SimRequest> trace = RandomTrace(random, 10 + random() % 20, max_level);
    server.end = trace.back().arrival + 200;
    PolicyOptions options = Policy(name, server, max_level);
    options.slo.ttft = std::vector<double>{0.2, 2, 20}[random() % 3];
    options.slo.tpot = std::vector<double>{0.02, 0.2, 2}[random() % 3];
    options.paper.raise_running = random() % 2 == 0;
    const auto policy = Make(options);
    Invariants invariants(options, most_per_minute);
    const SimResult result =
        Simulate(server, trace, *policy,
                 [&](const LoadSnapshot& l, const LevelDecision& d) { invariants(l, d); });
    ASSERT_TRUE(result.finished);
    if (name == "slo") {
      ASSERT_EQ(result.targets.back().second, 0);
    }
    for (size_t r = 0; r < trace.size(); ++r) {
      ASSERT_LE(result.requests[r].level, trace[r].max_level);
      ASSERT_GT(result.requests[r].ttft, 0);
    }
  }
  std::printf("%s: %d traces, seeds 1000 to %d\n", name.c_str(), traces, 1000 + traces - 1);
}

// A change needs up_cooldown (2 s) since the last one: 30 a minute and the one that opens it.
TEST(PolicySimulation, SloOnRandomTraces) { RunTraces("slo", 2000, 31); }
TEST(PolicySimulation, PaperOnRandomTraces) { RunTraces("paper", 500, 2); }

double P95(const SimResult& result) {
  std::vector<double> ttft;
  for (const SimResult::Done& r : result.requests) ttft.push_back(r.ttft);
  return Quantile(std::move(ttft), 0.95);
}
double Mean(const SimResult& result) {
  double sum = 0;
  for (const SimResult::Done& r : result.requests) sum += r.ttft;
  return sum / static_cast<double>(result.requests.size());
}
double LastEnd(const SimResult& result) {
  double end = 0;
  for (const SimResult::Done& r : result.requests) end = std::max(end, r.end);
  return end;
}

// Documents and chats at once, and memory for few of the documents at level 0.
std::vector<SimRequest> BurstTrace(unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> u(0, 1);
  std::vector<SimRequest> trace;
  for (int i = 0; i < 48; ++i) {
    const bool document = i % 2 == 0;
    trace.push_back({.arrival = 0.1 * i,
                     .prompt = document ? 4000 + static_cast<int>(4000 * u(random)) : 60,
                     .reply = document ? 200 : 100,
                     .max_level = 22});
  }
  return trace;
}

TEST(PolicySimulation, SloBeatsLevelZeroOnABurst) {
  constexpr unsigned kSeed = 42;
  const SimOptions server = Server(30000);
  const std::vector<SimRequest> trace = BurstTrace(kSeed);
  const auto run = [&](const std::string& name) {
    const auto policy = Make(Policy(name, server, 22));
    const SimResult result = Simulate(server, trace, *policy);
    EXPECT_TRUE(result.finished);
    std::printf(
        "seed %u %-5s: done after %.1f s, TTFT mean %.1f s, p95 %.1f s, %ld pre-emptions, "
        "%ld raises (%.1f s), %zu target changes\n",
        kSeed, name.c_str(), LastEnd(result), Mean(result), P95(result),
        static_cast<long>(result.preemptions), static_cast<long>(result.raises),
        result.fold_seconds, result.targets.size() - 1);
    return result;
  };
  const SimResult zero = run("fixed"), paper = run("paper"), slo = run("slo");
  EXPECT_LT(LastEnd(slo), 0.8 * LastEnd(zero));
  EXPECT_LT(Mean(slo), 0.8 * Mean(zero));
  EXPECT_LT(P95(slo), 0.8 * P95(zero));
  EXPECT_LT(LastEnd(slo), LastEnd(paper));
  EXPECT_LE(slo.preemptions, zero.preemptions);
}

TEST(PolicySimulation, BackAtZeroWithinAMinuteOfCalm) {
  SimOptions server = Server(30000);
  const std::vector<SimRequest> burst = BurstTrace(3);
  std::vector<SimRequest> trace = burst;
  const auto busy = Make(Policy("slo", server, 22));
  const double end = LastEnd(Simulate(server, burst, *busy));
  // Then a chat every ten seconds: calm, not idle.
  for (int i = 0; i < 12; ++i) {
    trace.push_back({.arrival = end + 10.0 * i, .prompt = 60, .reply = 50, .max_level = 22});
  }
  server.end = end + 120;
  const auto policy = Make(Policy("slo", server, 22));
  const SimResult result = Simulate(server, trace, *policy);
  ASSERT_TRUE(result.finished);
  int highest = 0;
  for (const auto& [time, target] : result.targets) highest = std::max(highest, target);
  EXPECT_GT(highest, 0);
  EXPECT_EQ(result.targets.back().second, 0);
  EXPECT_LT(result.targets.back().first, end + 60);
  EXPECT_EQ(result.requests.back().level, 0);
}

// --- A calibration gone wrong ---

// Passes on all but what steps and folds took.
class Deaf final : public LevelPolicy {
 public:
  explicit Deaf(std::unique_ptr<LevelPolicy> policy) : policy_(std::move(policy)) {}
  const char* name() const override { return policy_->name(); }
  LevelDecision Decide(const LoadSnapshot& load) override { return policy_->Decide(load); }
  void ObserveFirstToken(const FirstToken& token) override { policy_->ObserveFirstToken(token); }
  void ObserveToken(double now, double seconds) override { policy_->ObserveToken(now, seconds); }

 private:
  const std::unique_ptr<LevelPolicy> policy_;
};

// A policy that takes the server for `speed` times as fast as it is.
std::unique_ptr<LevelPolicy> Mistaken(const SimOptions& server, double speed, double ttft = 2) {
  PolicyOptions options = Policy("slo", server, 22);
  options.cost.model = Cost(speed);
  options.slo.ttft = ttft;
  return Make(options);
}

// Requests that come a little less fast than the server can take them. A model that is several
// times too slow sees them pile up, and levels that would help.
TEST(PolicySimulation, ATooSlowModelDoesNotKeepTheLevelUp) {
  SimOptions server = Server(400000);
  std::vector<SimRequest> trace;
  for (int i = 0; i < 300; ++i) {
    trace.push_back({.arrival = 3.0 * i, .prompt = 1500, .reply = 60, .max_level = 22});
  }
  const auto level_seconds = [&](LevelPolicy& policy) {
    const SimResult result = Simulate(server, trace, policy);
    EXPECT_TRUE(result.finished);
    double sum = 0;
    for (size_t i = 0; i < result.targets.size(); ++i) {
      const double end = i + 1 < result.targets.size() ? result.targets[i + 1].first : result.end;
      sum += result.targets[i].second * (end - result.targets[i].first);
    }
    return sum / result.end;  // mean target
  };
  const auto right = Make(Policy("slo", server, 22));
  const double mean = level_seconds(*right);
  for (const double speed : {0.25, 0.125}) {
    const auto corrected = Mistaken(server, speed);
    Deaf deaf(Mistaken(server, speed));
    const double with = level_seconds(*corrected), without = level_seconds(deaf);
    std::printf(
        "model %.0f times too slow: mean target %.2f, %.2f without correction, %.2f right\n",
        1 / speed, with, without, mean);
    EXPECT_LT(with, mean + 1);
    EXPECT_GT(without, mean + 6);
  }
}

// A model that is many times too fast sees no need to do anything about a burst.
TEST(PolicySimulation, ATooFastModelDoesNotMissABurst) {
  constexpr unsigned kSeed = 42;
  constexpr double kTtft = 20;
  const SimOptions server = Server(200000);  // memory does not bind: time alone does
  const std::vector<SimRequest> trace = BurstTrace(kSeed);
  const auto end = [&](LevelPolicy& policy) { return LastEnd(Simulate(server, trace, policy)); };
  const double zero = end(*Make(Policy("fixed", server, 22)));
  const double right = end(*Mistaken(server, 1, kTtft));
  for (const double speed : {8.0, 48.0}) {
    Deaf deaf(Mistaken(server, speed, kTtft));
    const double with = end(*Mistaken(server, speed, kTtft)), without = end(deaf);
    std::printf(
        "model %.0f times too fast: done after %.1f s, %.1f s without correction, %.1f s right, "
        "%.1f s at level 0\n",
        speed, with, without, right, zero);
    EXPECT_LT(with, right + 0.2 * (zero - right));
    if (speed > 8) {
      EXPECT_GT(without, right + 0.5 * (zero - right));
    }
  }
}

TEST(PolicySimulation, WithoutLoadNobodyIsConverted) {
  SimOptions server = Server(60000);
  std::vector<SimRequest> trace;
  for (int i = 0; i < 40; ++i) {
    trace.push_back(
        {.arrival = 60.0 * i, .prompt = i % 4 == 0 ? 6000 : 80, .reply = 60, .max_level = 22});
  }
  const auto policy = Make(Policy("slo", server, 22));
  const SimResult result = Simulate(server, trace, *policy);
  for (const SimResult::Done& r : result.requests) EXPECT_EQ(r.level, 0);
  EXPECT_EQ(result.raises, 0);
}

}  // namespace
}  // namespace dsla
