#include <gmock/gmock.h>

#include <algorithm>

#include "adapt/load_estimate.h"
#include "adapt/make_policy.h"

namespace dsla {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

constexpr int kLayers = 30, kTop = 22;

// About what the default model takes on two cores.
CostModel Cost() {
  return CostModel::FromCoefficients(kLayers, {2e-2, 5e-5, 6e-5, 1.6e-8},
                                     {8e-3, 4e-5, 4.5e-5, 1.8e-8}, {2e-4, 3.7e-6});
}

// In which chunks prompts come with that where replies may run, at any target per token.
constexpr int kChunk = 256;

PolicyOptions Options(const std::string& policy) {
  PolicyOptions options;
  options.policy = policy;
  options.layers = kLayers;
  options.max_level = kTop;
  options.cost.model = Cost();
  return options;
}

std::unique_ptr<LevelPolicy> Make(const PolicyOptions& options) {
  auto policy = MakePolicy(options);
  EXPECT_TRUE(policy.ok()) << policy.status().message();
  return std::move(policy).value();
}

// 64 tokens a page, a slot worth 328 tokens: the break-even length lies there.
LoadSnapshot Snapshot(double now, int64_t budget = 1'000'000'000) {
  LoadSnapshot load;
  load.now = now;
  load.budget_bytes = budget;
  load.sizes = {
      .layers = kLayers, .page_size = 64, .page_bytes = 64 * 768, .slot_bytes = 328 * 768};
  return load;
}

SequenceLoad Waiting(int64_t id, int prompt, double arrival, int reply = 64) {
  return {.id = id,
          .cached_tokens = 0,
          .pending_tokens = prompt,
          .remaining_tokens = reply,
          .level = 0,
          .max_level = kTop,
          .arrival = arrival};
}
SequenceLoad Running(int64_t id, int cached, int level = 0, int reply = 256) {
  return {.id = id,
          .cached_tokens = cached,
          .pending_tokens = 0,
          .remaining_tokens = reply,
          .level = level,
          .max_level = kTop,
          .arrival = 0};
}

LoadSnapshot Burst(double now) {  // far more than the targets allow
  LoadSnapshot load = Snapshot(now);
  for (int i = 0; i < 8; ++i) load.waiting.push_back(Waiting(i, 6000, now));
  return load;
}

// --- The estimate ---

TEST(LoadEstimate, LevelsKeepToTheTier) {
  SequenceLoad s = Running(1, 100, 3);
  EXPECT_EQ(LevelAt(s, 0), 3);
  EXPECT_EQ(LevelAt(s, 5), 5);
  EXPECT_EQ(LevelAt(s, 30), kTop);
  s.max_level = s.level;
  EXPECT_EQ(LevelAt(s, 30), 3);
}

TEST(LoadEstimate, ALonePromptIsNotDelayedByItself) {
  LoadSnapshot load = Snapshot(10);
  load.waiting = {Waiting(1, 8000, 10)};
  EXPECT_NEAR(EstimateLoad(load, Cost(), {}, 0, true).ttft, 0, 1e-9);
  load.waiting.push_back(Waiting(2, 100, 10));  // waits for the first
  EXPECT_NEAR(EstimateLoad(load, Cost(), {}, 0, true).ttft, Cost().PromptSeconds(0, 8000, 0, 512),
              1e-9);

  // Nor by what of it is done already.
  load = Snapshot(10);
  load.running = {Running(1, 4096)};
  load.running[0].pending_tokens = 3904;
  load.running[0].arrival = 10 - Cost().PromptSeconds(0, 4096, 0, 512);
  EXPECT_NEAR(EstimateLoad(load, Cost(), {}, 0, true).ttft, 0, 1e-9);
}

TEST(LoadEstimate, WhoHasAFirstTokenWaitsForNone) {
  LoadSnapshot load = Snapshot(100);
  load.waiting = {Waiting(1, 4000, 0), Waiting(2, 1000, 100)};
  EXPECT_GT(EstimateLoad(load, Cost(), {}, 0, true).ttft, 90);
  load.waiting[0].has_first_token = true;  // pre-empted long after it: the other waits for it
  EXPECT_NEAR(EstimateLoad(load, Cost(), {}, 0, true).ttft, Cost().PromptSeconds(0, 4000, 0, 512),
              1e-9);
  load.waiting.pop_back();
  EXPECT_EQ(EstimateLoad(load, Cost(), {}, 0, true).ttft, 0);
}

TEST(LoadEstimate, DecodeRowsSlowPrefillDown) {
  LoadSnapshot load = Snapshot(0);
  load.waiting = {Waiting(1, 1024, 0)};
  load.running = {Running(2, 4000), Running(3, 4000)};
  EXPECT_NEAR(EstimateLoad(load, Cost(), {}, 0, true).ttft, 2 * 2 * Cost().RowSeconds(0, 4000),
              1e-9);
}

// --- MakePolicy ---

TEST(MakePolicy, NamesWhatIsWrong) {
  const auto error = [](const std::function<void(PolicyOptions&)>& change, const char* base) {
    PolicyOptions options = Options(base);
    change(options);
    const auto policy = MakePolicy(options);
    return policy.ok() ? std::string("none") : policy.status().message();
  };
  EXPECT_THAT(error([](auto& o) { o.policy = "best"; }, "slo"), HasSubstr("policy 'best'"));
  EXPECT_THAT(error([](auto& o) { o.max_level = 31; }, "slo"), HasSubstr("max level 31"));
  EXPECT_THAT(error([](auto& o) { o.fixed_level = 23; }, "fixed"), HasSubstr("fixed level 23"));
  EXPECT_THAT(error([](auto& o) { o.cost = {}; }, "slo"), HasSubstr("no cost model"));
  EXPECT_THAT(error([](auto& o) { o.slo.ttft = 0; }, "slo"), HasSubstr("slo ttft is 0"));
  EXPECT_THAT(error([](auto& o) { o.slo.tpot = NAN; }, "slo"), HasSubstr("slo tpot"));
  EXPECT_THAT(error([](auto& o) { o.paper.queue = 0; }, "paper"), HasSubstr("paper queue"));
  for (const char* name : {"slo", "paper", "fixed"}) {
    EXPECT_STREQ(Make(Options(name))->name(), name);
  }
}

// --- Fixed ---

TEST(FixedPolicy, StaysAndSaysSoOnce) {
  PolicyOptions options = Options("fixed");
  options.fixed_level = 5;
  const auto policy = Make(options);
  const LevelDecision first = policy->Decide(Burst(0));
  EXPECT_EQ(first.target, 5);
  EXPECT_THAT(first.reason, StartsWith("fixed: "));
  const LevelDecision second = policy->Decide(Burst(100));
  EXPECT_EQ(second.target, 5);
  EXPECT_TRUE(second.raises.empty() && second.reason.empty());
}

// --- Paper ---

TEST(PaperPolicy, OneLayerPerCooldown) {
  const auto policy = Make(Options("paper"));
  EXPECT_EQ(policy->Decide(Snapshot(0)).target, 0);
  const LevelDecision up = policy->Decide(Burst(1));
  EXPECT_EQ(up.target, 1);
  EXPECT_THAT(up.reason, StartsWith("prompt: 6000 tokens"));
  EXPECT_EQ(policy->Decide(Burst(60)).target, 1);
  EXPECT_EQ(policy->Decide(Burst(61)).target, 2);
}

TEST(PaperPolicy, Thresholds) {
  const auto target = [](int waiting, int prompt) {
    const auto policy = Make(Options("paper"));
    LoadSnapshot load = Snapshot(0);
    for (int i = 0; i < waiting; ++i) load.waiting.push_back(Waiting(i, prompt, 0));
    return policy->Decide(load).target;
  };
  EXPECT_EQ(target(49, 1023), 0);
  EXPECT_EQ(target(50, 10), 1);
  EXPECT_EQ(target(1, 1024), 1);
}

TEST(PaperPolicy, GoesBackOnlyBelowBothLowerThresholds) {
  const auto policy = Make(Options("paper"));
  EXPECT_EQ(policy->Decide(Burst(0)).target, 1);
  const auto quiet = [](double now, int waiting, int prompt) {
    LoadSnapshot load = Snapshot(now);
    for (int i = 0; i < waiting; ++i) load.waiting.push_back(Waiting(i, prompt, now));
    return load;
  };
  EXPECT_EQ(policy->Decide(quiet(100, 26, 10)).target, 1);  // over half of 50
  EXPECT_EQ(policy->Decide(quiet(200, 1, 900)).target, 1);  // over 0.8 of 1024
  const LevelDecision down = policy->Decide(quiet(300, 25, 819));
  EXPECT_EQ(down.target, 0);
  EXPECT_THAT(down.reason, StartsWith("calm: "));
}

TEST(PaperPolicy, AtMostItsShareOfLayersAndTheBound) {
  PolicyOptions options = Options("paper");
  options.max_level = 30;
  auto policy = Make(options);
  int target = 0;
  for (int i = 0; i < 60; ++i) target = policy->Decide(Burst(60.0 * i)).target;
  EXPECT_EQ(target, 22);  // three quarters of 30
  options.max_level = 4;
  policy = Make(options);
  for (int i = 0; i < 60; ++i) target = policy->Decide(Burst(60.0 * i)).target;
  EXPECT_EQ(target, 4);
}

TEST(PaperPolicy, ABoundIsMovedWithinItsShare) {
  PolicyOptions options = Options("paper");
  options.max_level = 30;
  const auto policy = Make(options);
  for (int i = 0; i < 5; ++i) policy->Decide(Burst(60.0 * i));
  policy->SetMaxLevel(3);
  EXPECT_EQ(policy->Decide(Burst(300)).target, 3);
  policy->SetMaxLevel(30);
  int target = 0;
  for (int i = 6; i < 60; ++i) target = policy->Decide(Burst(60.0 * i)).target;
  EXPECT_EQ(target, 22);
}

TEST(PaperPolicy, RunningSequencesFollowOnlyIfAsked) {
  LoadSnapshot load = Burst(0);
  load.running = {Running(7, 3000)};
  EXPECT_TRUE(Make(Options("paper"))->Decide(load).raises.empty());
  PolicyOptions options = Options("paper");
  options.paper.raise_running = true;
  const LevelDecision decision = Make(options)->Decide(load);
  ASSERT_EQ(decision.raises.size(), 1u);
  EXPECT_EQ(decision.raises[0].id, 7);
  EXPECT_EQ(decision.raises[0].level, 1);
}

// --- SLO: the target ---

TEST(SloPolicy, NoLoadNoLevel) {
  const auto policy = Make(Options("slo"));
  EXPECT_EQ(policy->Decide(Snapshot(0)).target, 0);
  LoadSnapshot load = Snapshot(1);
  load.waiting = {Waiting(1, 8000, 1)};  // a long document alone
  const LevelDecision decision = policy->Decide(load);
  EXPECT_EQ(decision.target, 0);
  EXPECT_TRUE(decision.reason.empty());
}

TEST(SloPolicy, RisesAtOnceWithFigures) {
  const auto policy = Make(Options("slo"));
  const LevelDecision decision = policy->Decide(Burst(0));
  EXPECT_GT(decision.target, 0);
  EXPECT_LE(decision.target, kTop);
  EXPECT_THAT(decision.reason, StartsWith("ttft: "));
  EXPECT_THAT(decision.reason, HasSubstr("8 waiting"));
  EXPECT_EQ(decision.reason.find('\n'), std::string::npos);
}

TEST(SloPolicy, LowestLevelThatMeetsTheTarget) {
  // For every target that some level meets, the level below the chosen one must miss it.
  LoadSnapshot load = Burst(0);
  load.budget_bytes *= 10;
  std::vector<double> delay;
  for (int k = 0; k <= kTop; ++k)
    delay.push_back(EstimateLoad(load, Cost(), {kChunk}, k, true).ttft);
  for (const int k : {1, 7, 15, 22}) {
    ASSERT_LT(delay[k], delay[k - 1]);
    PolicyOptions options = Options("slo");
    options.slo.tpot = 100;
    options.slo.ttft = (delay[k] + delay[k - 1]) / 2;
    EXPECT_EQ(Make(options)->Decide(load).target, k);
  }
}

// In mid-burst it goes on with what it has learnt.
TEST(SloPolicy, ABoundIsMovedWithoutStartingAnew) {
  const auto policy = Make(Options("slo"));
  StepTime step{.prefill = {{.level = 0, .tokens = 512, .context = 0}}, .decode = {}, .seconds = 0};
  step.seconds = 3 * Cost().PrefillSeconds(0, 512, 0);
  for (int i = 0; i < 100; ++i) policy->ObserveStep(step);
  const double factor = policy->cost_factors().prefill;
  ASSERT_GT(factor, 2);
  const int high = policy->Decide(Burst(0)).target;
  ASSERT_GT(high, 5);
  policy->SetMaxLevel(5);
  EXPECT_EQ(policy->Decide(Burst(0.01)).target, 5) << "between two looks, too";
  EXPECT_EQ(policy->Decide(Burst(5)).target, 5);
  policy->SetMaxLevel(kTop);
  EXPECT_EQ(policy->cost_factors().prefill, factor);
  EXPECT_EQ(policy->Decide(Burst(6)).target, high);
}

TEST(SloPolicy, SaysWhereItsCostModelIsDoubtful) {
  StepTime step{.prefill = {{.level = 0, .tokens = 512, .context = 0}}, .decode = {}, .seconds = 0};
  step.seconds = 3 * Cost().PrefillSeconds(0, 512, 0);
  for (const double usual : {1.0, 3.0}) {
    PolicyOptions options = Options("slo");
    options.cost.usual.prefill = usual;
    const auto policy = Make(options);
    EXPECT_FALSE(policy->cost_doubtful());
    for (double done = 0; done < 60; done += step.seconds) policy->ObserveStep(step);
    EXPECT_EQ(policy->cost_doubtful(), usual == 1) << usual;
  }
}

TEST(SloPolicy, QualityIsNotSpentOnWhatLevelsCannotHelp) {
  PolicyOptions options = Options("slo");
  options.slo.ttft = 0.01;
  options.slo.tpot = 0.001;
  LoadSnapshot load = Snapshot(0);
  for (int i = 0; i < 40; ++i) load.waiting.push_back(Waiting(i, 30, 0));  // short: no gain
  EXPECT_EQ(Make(options)->Decide(load).target, 0);
}

TEST(SloPolicy, MemoryOfTheQueueCounts) {
  PolicyOptions options = Options("slo");
  options.slo.ttft = options.slo.tpot = 1e4;
  LoadSnapshot load = Snapshot(0);
  for (int i = 0; i < 8; ++i) load.running.push_back(Running(i, 6000));
  load.budget_bytes = SequenceBytes(load.sizes, 0, 6256) * 8 / 2;
  const LevelDecision decision = Make(options)->Decide(load);
  EXPECT_THAT(decision.reason, StartsWith("memory: "));
  const double room = 0.95 * static_cast<double>(load.budget_bytes);
  EXPECT_LE(8.0 * SequenceBytes(load.sizes, decision.target, 6256), room);
  EXPECT_GT(8.0 * SequenceBytes(load.sizes, decision.target - 1, 6256), room);
}

TEST(SloPolicy, ShortSequencesAreNotRaisedForMemory) {
  PolicyOptions options = Options("slo");
  options.slo.ttft = options.slo.tpot = 1e4;
  options.slo.growth_tokens = 0;
  LoadSnapshot load = Snapshot(0);
  for (int i = 0; i < 8; ++i) load.running.push_back(Running(i, 100));
  load.budget_bytes = SequenceBytes(load.sizes, 0, 100) * 4;  // full, and levels make it worse
  const LevelDecision decision = Make(options)->Decide(load);
  EXPECT_EQ(decision.target, 0);
  EXPECT_TRUE(decision.raises.empty());
}

TEST(SloPolicy, FullTierIsLeftAlone) {
  LoadSnapshot load = Burst(0);
  for (SequenceLoad& s : load.waiting) s.max_level = 0;
  load.running = {Running(99, 8000)};
  load.running[0].max_level = 0;
  const LevelDecision decision = Make(Options("slo"))->Decide(load);
  EXPECT_EQ(decision.target, 0);  // no level would help anybody
  EXPECT_TRUE(decision.raises.empty());
}

TEST(SloPolicy, CooldownBetweenRises) {
  PolicyOptions options = Options("slo");
  options.slo.up_cooldown = 5;
  LoadSnapshot load = Burst(0);
  load.budget_bytes *= 10;
  options.slo.tpot = 100;
  options.slo.ttft = EstimateLoad(load, Cost(), {kChunk}, 9, true).ttft;
  const auto policy = Make(options);
  EXPECT_EQ(policy->Decide(load).target, 9);
  for (int i = 100; i < 110; ++i) load.waiting.push_back(Waiting(i, 6000, 0));
  load.now = 4.9;
  EXPECT_EQ(policy->Decide(load).target, 9);
  load.now = 5.1;
  EXPECT_GT(policy->Decide(load).target, 9);
}

TEST(SloPolicy, DownOnlyAfterCalmWithoutABreak) {
  const auto policy = Make(Options("slo"));
  const int high = policy->Decide(Burst(0)).target;
  ASSERT_GT(high, 0);
  double now = 1;
  for (; now < 9; now += 1) EXPECT_EQ(policy->Decide(Snapshot(now)).target, high);
  EXPECT_EQ(policy->Decide(Burst(9)).target, high);  // a break
  for (now = 10; now < 19.5; now += 1) EXPECT_EQ(policy->Decide(Snapshot(now)).target, high);
  const LevelDecision down = policy->Decide(Snapshot(20.5));
  EXPECT_EQ(down.target, 0);
  EXPECT_THAT(down.reason, StartsWith("calm: level 0 has sufficed"));
}

TEST(SloPolicy, DownNeedsAMargin) {
  // Level 0 meets the target, but not with the margin: the target does not go back to it.
  PolicyOptions options = Options("slo");
  options.slo.tpot = 1e4;
  const auto policy = Make(options);
  ASSERT_GT(policy->Decide(Burst(0)).target, 0);
  LoadSnapshot load = Snapshot(0);
  for (int i = 0; i < 3; ++i) load.waiting.push_back(Waiting(i, 4000, 0));
  const double delay = EstimateLoad(load, Cost(), {kChunk}, 0, true).ttft;
  for (double now = 1; now < 40; now += 0.5) {
    load.now = now;
    // Kept at 0.85 of the target, over the margin of 0.7.
    for (SequenceLoad& s : load.waiting) s.arrival = now - (0.85 * options.slo.ttft - delay);
    EXPECT_GT(policy->Decide(load).target, 0) << now;
  }
  EXPECT_EQ(Make(options)->Decide(load).target, 0);  // and does not leave it
}

TEST(SloPolicy, AfterAPauseWithNothingToDo) {
  const auto policy = Make(Options("slo"));
  ASSERT_GT(policy->Decide(Burst(0)).target, 0);
  LoadSnapshot load = Snapshot(300);  // not asked in between
  load.waiting = {Waiting(1, 50, 300)};
  EXPECT_EQ(policy->Decide(load).target, 0);
}

TEST(SloPolicy, MeasurementsOverrideEstimatesNearTheTarget) {
  PolicyOptions options = Options("slo");
  LoadSnapshot load = Snapshot(0);
  for (int i = 0; i < 4; ++i) load.running.push_back(Running(i, 6000));
  const double estimated = EstimateLoad(load, Cost(), {}, 0, true).tpot;
  options.slo.tpot = estimated * 1.2;  // the model says all is well
  EXPECT_EQ(Make(options)->Decide(load).target, 0);
  const auto measured = [&](double seconds) {
    const auto policy = Make(options);
    policy->ObserveToken(-1, seconds);
    return policy->Decide(load);
  };
  const LevelDecision decision = measured(estimated * 1.5);  // it is not
  EXPECT_EQ(decision.target, kTop / 8);
  EXPECT_THAT(decision.reason, StartsWith("tpot: "));
  options.slo.tpot = estimated * 10;  // far from the target: a stale measurement
  EXPECT_EQ(measured(estimated * 15).target, 0);
}

// By the model a little less than the target is added to the time to the first token, and nothing
// else matters.
LoadSnapshot NearTtft(PolicyOptions& options) {
  options.slo.tpot = 1e4;
  LoadSnapshot load = Snapshot(0);
  for (int i = 0; i < 3; ++i) load.waiting.push_back(Waiting(i, 4000, 0));
  const double delay = EstimateLoad(load, Cost(), {kChunk}, 0, true).ttft;
  for (SequenceLoad& s : load.waiting) s.arrival = -(0.8 * options.slo.ttft - delay);
  return load;
}

// A long prompt on an idle server takes its time at level 0; that is no reason to raise anybody.
TEST(SloPolicy, OfAMeasuredFirstTokenCountsWhatTheLoadAdded) {
  PolicyOptions options = Options("slo");
  const LoadSnapshot load = NearTtft(options);
  const auto target = [&](double seconds, int cached) {
    const auto policy = Make(options);
    policy->ObserveFirstToken(
        {.now = -1, .seconds = seconds, .prompt_tokens = 8000, .cached_tokens = cached});
    return policy->Decide(load).target;
  };
  const double alone = Cost().PromptSeconds(0, 8000, 0, 512);
  ASSERT_GT(alone, options.slo.ttft);
  EXPECT_EQ(target(alone + 0.9 * options.slo.ttft, 0), 0);
  EXPECT_EQ(target(alone + 1.1 * options.slo.ttft, 0), kTop / 8);
  const double rest = Cost().PromptSeconds(0, 64, 7936, 512);
  EXPECT_EQ(target(rest + 0.9 * options.slo.ttft, 7936), 0);
  EXPECT_EQ(target(rest + 1.1 * options.slo.ttft, 7936), kTop / 8) << "most of it was cached";
}

TEST(SloPolicy, WhatWasMeasuredBeforeARiseDrivesNoOther) {
  PolicyOptions options = Options("slo");
  LoadSnapshot load = NearTtft(options);
  const auto policy = Make(options);
  const auto decide = [&](double now) {
    for (SequenceLoad& s : load.waiting) s.arrival += now - load.now;
    load.now = now;
    return policy->Decide(load).target;
  };
  for (int i = 0; i < 20; ++i)
    policy->ObserveFirstToken({.now = -1, .seconds = 60, .prompt_tokens = 100});
  EXPECT_EQ(decide(0), kTop / 8);
  for (double now = 0.5; now < 8; now += 0.5) {
    policy->ObserveFirstToken({.now = now, .seconds = 60, .prompt_tokens = 100});  // in part
    EXPECT_EQ(decide(now), kTop / 8) << now;
  }
  policy->ObserveFirstToken({.now = 8, .seconds = 7.5, .prompt_tokens = 100});
  EXPECT_EQ(decide(8.5), 2 * (kTop / 8));
}

TEST(SloPolicy, PreemptionsRaiseTheTarget) {
  PolicyOptions options = Options("slo");
  options.slo.ttft = options.slo.tpot = 1e4;
  const auto policy = Make(options);
  LoadSnapshot load = Snapshot(0);
  for (int i = 0; i < 4; ++i) load.running.push_back(Running(i, 6000));
  EXPECT_EQ(policy->Decide(load).target, 0);
  load.now = 1;
  load.preemptions = 1;
  const LevelDecision decision = policy->Decide(load);
  EXPECT_GT(decision.target, 0);
  EXPECT_THAT(decision.reason, HasSubstr("pre-empted"));
}

// --- SLO: raises ---

// Memory short by half; the target is high from the first look on.
LoadSnapshot Crowded(double now) {
  LoadSnapshot load = Snapshot(now);
  for (int i = 0; i < 4; ++i) load.running.push_back(Running(i, 2000 + 1500 * i));
  load.running.push_back(Running(10, 200));  // short of its break-even length
  load.running.push_back(Running(11, 6000));
  load.running.back().max_level = 0;  // tier full
  int64_t bytes = 0;
  for (const SequenceLoad& s : load.running) bytes += SequenceBytes(load.sizes, 0, s.cached_tokens);
  load.budget_bytes = bytes * 7 / 10;
  return load;
}

TEST(SloPolicy, RaisesWhatFreesMemoryAndNothingElse) {
  PolicyOptions options = Options("slo");
  options.slo.ttft = options.slo.tpot = 1e4;
  options.slo.raise_seconds = 60;
  options.slo.raise_share = 1;
  const LevelDecision decision = Make(options)->Decide(Crowded(0));
  ASSERT_FALSE(decision.raises.empty());
  for (const LevelDecision::Raise& raise : decision.raises) {
    EXPECT_LT(raise.id, 4);
    EXPECT_GT(raise.level, 0);
    EXPECT_LE(raise.level, decision.target);
  }
}

TEST(SloPolicy, LargestSavingFirst) {
  // Bytes per second of folding rise with the length here: a fold has a fixed cost, a slot too.
  PolicyOptions options = Options("slo");
  options.slo.ttft = options.slo.tpot = 1e4;
  options.slo.raise_seconds = 60;
  const LevelDecision decision = Make(options)->Decide(Crowded(0));
  ASSERT_GE(decision.raises.size(), 2u);
  std::vector<int64_t> ids;
  for (const auto& raise : decision.raises) ids.push_back(raise.id);
  EXPECT_TRUE(std::is_sorted(ids.rbegin(), ids.rend())) << testing::PrintToString(ids);
}

TEST(SloPolicy, FoldsTakeABoundedShareOfTime) {
  PolicyOptions options = Options("slo");
  options.slo.ttft = options.slo.tpot = 1e4;
  options.slo.raise_seconds = 0.1;
  options.slo.raise_share = 0.25;
  const auto policy = Make(options);
  LoadSnapshot load = Crowded(0);
  load.budget_bytes /= 2;
  double total = 0;
  const double layer = Cost().FoldSeconds(0, 1, 6500);  // the longest that there is
  for (double now = 0; now <= 10; now += 0.1) {
    load.now = now;
    double pause = 0;
    for (const LevelDecision::Raise& raise : policy->Decide(load).raises) {
      SequenceLoad& s = load.running[raise.id];
      ASSERT_GT(raise.level, s.level);
      pause += Cost().FoldSeconds(s.level, raise.level, s.cached_tokens);
      s.level = raise.level;
    }
    EXPECT_LE(pause, 0.1 + layer) << now;
    total += pause;
    EXPECT_LE(total, 0.1 + 0.25 * now + layer) << now;
  }
  EXPECT_GT(total, 0);
}

TEST(SloPolicy, RaisesForTimeOnlyWhatPaysBack) {
  PolicyOptions options = Options("slo");
  options.slo.raise_seconds = 60;
  LoadSnapshot load = Burst(0);
  load.running = {Running(100, 7000, 0, 2),     // almost done: a fold would cost more than it saves
                  Running(101, 7000, 0, 4000),  // pays
                  Running(102, 200, 0, 4000)};  // short
  options.slo.growth_tokens = 4000;
  options.cost.model = CostModel::FromCoefficients(kLayers, {2e-2, 5e-5, 6e-5, 1.6e-8},
                                                   {8e-3, 4e-5, 4.5e-5, 1.8e-7}, {2e-4, 3.7e-6});
  const LevelDecision decision = Make(options)->Decide(load);
  ASSERT_EQ(decision.raises.size(), 1u);
  EXPECT_EQ(decision.raises[0].id, 101);
}

TEST(SloPolicy, PromptsBesideRepliesComeInTheFewestPagesThatCostLittle) {
  const auto limit = [](double step_seconds, double tpot) {
    PolicyOptions options = Options("slo");
    options.cost.model = CostModel::FromCoefficients(kLayers, {step_seconds, 5e-5, 6e-5, 1.6e-8},
                                                     {8e-3, 4e-5, 4.5e-5, 1.8e-8}, {2e-4, 3.7e-6});
    options.slo.tpot = tpot;
    LoadSnapshot load = Snapshot(0);
    load.running.push_back(Running(1, 1000));
    load.waiting.push_back(Waiting(2, 6000, 0));
    return Make(options)->Decide(load).prefill_limit;
  };
  EXPECT_EQ(limit(0, 2), 64) << "a step costs nothing of itself";
  EXPECT_EQ(limit(2e-2, 2), 256) << "as much as 13 tokens";
  EXPECT_EQ(limit(2e-2, 0.2), 128) << "the target per token is worth a larger loss";
  EXPECT_EQ(limit(0.2, 2), 512) << "as much as 130 tokens";
  EXPECT_EQ(limit(0.2, 0.2), 512) << "but not any loss";
}

TEST(SloPolicy, LooksOncePerInterval) {
  PolicyOptions options = Options("slo");
  options.slo.evaluate_interval = 0.5;
  const auto policy = Make(options);
  EXPECT_EQ(policy->Decide(Snapshot(0)).target, 0);
  EXPECT_EQ(policy->Decide(Burst(0.4)).target, 0);
  EXPECT_GT(policy->Decide(Burst(0.6)).target, 0);
}

}  // namespace
}  // namespace dsla
