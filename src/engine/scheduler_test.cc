#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/scheduler_fixture.h"

namespace dsla {
namespace {

TEST_F(SchedulerTest, DecodesGoFirstAndPromptsTakeTheRestInWholePages) {
  Make(1000 * kTokenPages);
  const int64_t first = Add(5, 8, Tier::kAuto, 1);
  StepPlan plan = Step();
  EXPECT_EQ(plan.started, std::vector<int64_t>{first});
  ASSERT_EQ(plan.rows.size(), 1u);
  EXPECT_EQ(plan.rows[0].phase, Phase::kPrefill);
  EXPECT_EQ(plan.rows[0].logits, RowLogits::kLast);
  EXPECT_EQ(shapes_[first], Shape(0, 5));
  const int64_t second = Add(40, 8, Tier::kAuto, 2);
  plan = Step();
  ASSERT_EQ(plan.rows.size(), 2u);
  EXPECT_EQ(plan.rows[0].id, first);
  EXPECT_EQ(plan.rows[0].phase, Phase::kDecode);
  EXPECT_EQ(shapes_[first], Shape(5, 1));
  EXPECT_EQ(plan.rows[1].logits, RowLogits::kNone);
  EXPECT_FALSE(plan.rows[1].samples);
  EXPECT_EQ(shapes_[second], Shape(0, 28)) << "31 rows are left, 28 are whole pages";
  EXPECT_EQ(plan.decode_rows, 1);
  EXPECT_EQ(plan.prefill_rows, 28);
  plan = Step();
  EXPECT_EQ(shapes_[second], Shape(28, 12));
  EXPECT_TRUE(plan.rows[1].samples);
}

TEST_F(SchedulerTest, AShortPromptDoesNotWaitForALongOneNorTheOtherWayRound) {
  Make(1000 * kTokenPages);
  const int64_t longer = Add(100, 1, Tier::kAuto, 1);
  std::vector<int64_t> shorter;
  for (int i = 0; i < 6; ++i) shorter.push_back(Add(8, 1, Tier::kAuto, 2 + i));
  Step();
  EXPECT_EQ(shapes_[longer], Shape(0, 16)) << "half of the rows by age";
  EXPECT_EQ(shapes_[shorter[0]], Shape(0, 8));
  EXPECT_EQ(shapes_[shorter[1]], Shape(0, 8));
  EXPECT_EQ(scheduler_->running(), 1);
  Step();
  EXPECT_EQ(shapes_[longer], Shape(16, 16));
  Step();
  Step();
  EXPECT_EQ(shapes_[longer], Shape(48, 32)) << "and all of them where no other is there";
}

TEST_F(SchedulerTest, OvertakingHasABound) {
  SchedulerOptions options = NoPrefixCache();
  options.max_overtaken_tokens = 12;
  Make(12 * kTokenPages, options);
  Add(16, 30, Tier::kFull, 1);  // holds 4 pages of tokens and grows
  Step();
  const int64_t big = Add(32, 1, Tier::kFull, 2);  // needs 8 of the 8 that are left, and 1 promised
  for (int i = 0; i < 6; ++i) Add(4, 1, Tier::kFull, 3 + i);
  for (int i = 0; i < 4; ++i) Step();
  EXPECT_EQ(scheduler_->waiting(), 4) << "three small ones passed, then the queue waited";
  EXPECT_EQ(ended_.size(), 3u);
  RunUntilIdle();
  EXPECT_TRUE(ended_.at(big).status.ok());
}

TEST_F(SchedulerTest, LongPromptsAreReadOneAfterTheOther) {
  Make(1000 * kTokenPages);
  const int64_t oldest = Add(100, 1, Tier::kAuto, 1);
  const int64_t alike = Add(90, 1, Tier::kAuto, 2);
  const int64_t shorter = Add(40, 1, Tier::kAuto, 3);  // more than a step takes, too
  const int64_t chat = Add(4, 1, Tier::kAuto, 4);
  Step();
  EXPECT_EQ(shapes_[oldest], Shape(0, 16));
  EXPECT_EQ(shapes_[chat], Shape(0, 4));
  EXPECT_EQ(shapes_[shorter], Shape(0, 12)) << "less than half as long";
  while (!ended_.contains(oldest)) {
    EXPECT_EQ(shapes_.count(alike), 0u);
    Step();
  }
  Step();
  EXPECT_EQ(shapes_.count(alike), 1u);
}

TEST_F(SchedulerTest, RowsThatALongPromptHasNoUseForGoToTheNext) {
  SchedulerOptions options;
  options.max_batch_tokens = 128;
  Make(1000 * kTokenPages, options);
  const int64_t oldest = Add(300, 1, Tier::kAuto, 1);
  const int64_t alike = Add(280, 1, Tier::kAuto, 2);
  for (const int place : {0, 128}) {
    Step();
    EXPECT_EQ(shapes_[oldest], Shape(place, 128));
    EXPECT_EQ(shapes_.count(alike), 0u) << "not by turns";
  }
  Step();
  EXPECT_EQ(shapes_[oldest], Shape(256, 44));
  EXPECT_EQ(shapes_[alike], Shape(0, 84));
  RunUntilIdle();
  // Above level 0 snapshots cut both.
  scheduler_->set_auto_max_level(2);
  scheduler_->set_target_level(2);
  const int64_t cut = Add(300, 1, Tier::kAuto, 3);
  const int64_t cut_alike = Add(280, 1, Tier::kAuto, 4);
  for (const int place : {0, 8, 16, 32, 64}) {
    Step();
    EXPECT_EQ(shapes_[cut].first, place);
    EXPECT_EQ(shapes_[cut_alike], shapes_[cut]);
  }
}

TEST_F(SchedulerTest, InStepsOfAStrideLongPromptsAreReadOneAfterTheOther) {
  SchedulerOptions options;
  options.snapshot_stride = 32;
  Make(1000 * kTokenPages, options);
  const int64_t oldest = Add(100, 1, Tier::kAuto, 1);
  const int64_t alike = Add(90, 1, Tier::kAuto, 2);
  while (!ended_.contains(oldest)) {
    Step();
    EXPECT_EQ(shapes_.count(alike), 0u);
  }
}

TEST_F(SchedulerTest, StartLevelIsTheTargetWithinTheTiersBounds) {
  Make(1000 * kTokenPages);
  scheduler_->set_auto_max_level(2);
  scheduler_->set_target_level(4);
  ScheduledRequest exact;
  exact.level = 1;
  const int64_t ids[] = {Add(4, 9, Tier::kAuto, 1), Add(4, 9, Tier::kFull, 2),
                         Add(4, 9, Tier::kEconomy, 3), Add(4, 9, Tier::kExact, 4, exact)};
  Step();
  EXPECT_EQ(scheduler_->level(ids[0]), 2);
  EXPECT_EQ(scheduler_->level(ids[1]), 0);
  EXPECT_EQ(scheduler_->level(ids[2]), 3);
  EXPECT_EQ(scheduler_->level(ids[3]), 1);
  EXPECT_EQ(scheduler_->rows_per_level(), (std::vector<int>{1, 1, 1, 1, 0}));
  const LoadSnapshot load = scheduler_->Snapshot();
  EXPECT_EQ(load.running[0].max_level, 2);
  EXPECT_EQ(load.running[1].max_level, 0);
  EXPECT_EQ(load.running[2].max_level, 3);
  EXPECT_EQ(load.running[0].cached_tokens, 4);
  EXPECT_EQ(load.running[0].pending_tokens, 0);
  EXPECT_EQ(load.running[0].remaining_tokens, 8);
}

TEST_F(SchedulerTest, ARequestThatFitsOnlyAtAHigherLevelStartsThere) {
  // 16 tokens: 1600 bytes at level 0, 1350 at 1, 1100 at 2.
  Make(1200);
  scheduler_->set_auto_max_level(4);
  EXPECT_TRUE(scheduler_->CanEverFit(12, 5, Tier::kAuto, 0).ok());
  const Status full = scheduler_->CanEverFit(12, 5, Tier::kFull, 0);
  EXPECT_EQ(full.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(full.message(),
            "12 prompt tokens and 5 new ones need at least 1600 bytes of cache at levels 0 to 0; "
            "the whole cache has 1200");
  const int64_t id = Add(12, 5);
  Step();
  EXPECT_EQ(scheduler_->level(id), 2);
  RunUntilIdle();
  EXPECT_TRUE(ended_.at(id).status.ok());
}

TEST_F(SchedulerTest, TheLongestReplyIsTheLongestThatFits) {
  Make(1200);
  scheduler_->set_auto_max_level(4);
  constexpr int kMost = 40;
  int shorter = 0, none = 0;
  for (const Tier tier : {Tier::kFull, Tier::kAuto, Tier::kEconomy, Tier::kExact}) {
    for (int prompt = 1; prompt < 80; ++prompt) {
      const int64_t longest = scheduler_->LongestReply(prompt, kMost, tier, 1);
      for (int tokens = 1; tokens <= kMost; ++tokens) {
        EXPECT_EQ(scheduler_->CanEverFit(prompt, tokens, tier, 1).ok(), tokens <= longest)
            << Name(tier) << ", " << prompt << " and " << tokens << " tokens";
      }
      shorter += longest > 0 && longest < kMost;
      none += longest == 0;
    }
  }
  EXPECT_GT(shorter, 0);
  EXPECT_GT(none, 0);
  EXPECT_EQ(scheduler_->LongestReply(1, 0, Tier::kFull, 0), 0);
  EXPECT_EQ(scheduler_->LongestReply(50, -10, Tier::kFull, 0), 0);
}

TEST_F(SchedulerTest, IdlePrefixesGoBeforeAnybodyIsPreempted) {
  Make(10 * kTokenPages);
  Add(24, 1, Tier::kFull, 1);
  Step();
  EXPECT_EQ(ledger_->idle_bytes(), 6 * kTokenPages);
  Add(16, 9, Tier::kFull, 2);
  Add(16, 1, Tier::kFull, 3);
  const StepPlan plan = Step();
  EXPECT_EQ(plan.rows.size(), 2u);
  EXPECT_LT(ledger_->idle_bytes(), 7 * kTokenPages);
  RunUntilIdle();
  EXPECT_EQ(scheduler_->preemptions(), 0);
}

TEST_F(SchedulerTest, TheNewestOfTheLowestTierIsPreemptedAndRecomputed) {
  Make(10 * kTokenPages, NoPrefixCache());
  const int64_t oldest = Add(4, 9, Tier::kEconomy, 1);
  const int64_t full = Add(4, 13, Tier::kFull, 2);
  const int64_t older_auto = Add(4, 13, Tier::kAuto, 3);
  const int64_t newer_auto = Add(4, 13, Tier::kAuto, 4);
  const int64_t newest = Add(4, 13, Tier::kFull, 5);
  std::vector<int64_t> preempted;
  while (!scheduler_->idle()) {
    const StepPlan plan = Step();
    preempted.insert(preempted.end(), plan.preempted.begin(), plan.preempted.end());
  }
  ASSERT_FALSE(preempted.empty());
  EXPECT_EQ(preempted[0], newer_auto) << "a lower tier than the newest";
  EXPECT_EQ(ended_.at(oldest).preemptions, 0);
  EXPECT_EQ(ended_.at(full).preemptions, 0);
  for (int64_t id : {oldest, full, older_auto, newer_auto, newest})
    EXPECT_TRUE(ended_.at(id).status.ok());
  EXPECT_GT(ended_.at(newer_auto).preemptions, 0);
}

TEST_F(SchedulerTest, ARecomputationRepeatsTheLevels) {
  Make(8 * kTokenPages, NoPrefixCache());
  scheduler_->set_auto_max_level(4);
  const int64_t older = Add(4, 24, Tier::kFull, 1);
  const int64_t newer = Add(4, 24, Tier::kAuto, 2);
  for (int i = 0; i < 3; ++i) Step();
  ASSERT_TRUE(scheduler_->Raise(newer, 1).ok());  // at 6 cached tokens
  bool replaying = false;
  while (!scheduler_->idle()) {
    const StepPlan plan = Step();
    if (std::ranges::find(plan.preempted, newer) != plan.preempted.end()) {
      EXPECT_EQ(scheduler_->level(newer), 0) << "it waits";
      const LoadSnapshot load = scheduler_->Snapshot();
      ASSERT_EQ(load.waiting.size(), 1u);
      EXPECT_EQ(load.waiting[0].level, 1);
      EXPECT_EQ(load.waiting[0].max_level, 1);
      EXPECT_TRUE(load.waiting[0].has_first_token);
      replaying = true;
    }
  }
  EXPECT_TRUE(replaying);
  EXPECT_EQ(ended_.at(newer).levels, (LevelHistory{{0, 0}, {6, 1}}));
  EXPECT_EQ(ended_.at(older).preemptions, 0);
}

TEST_F(SchedulerTest, WhoCannotBePreemptedIsAdmittedWithRoomToItsEnd) {
  SchedulerOptions options = NoPrefixCache();
  options.max_preemptions = 0;
  Make(4 * kTokenPages, options);
  const int64_t older = Add(4, 12, Tier::kFull, 1);
  const int64_t newer = Add(4, 12, Tier::kFull, 2);
  Step();
  EXPECT_EQ(scheduler_->running(), 1) << "its prompt alone would have room";
  RunUntilIdle();
  EXPECT_TRUE(ended_.at(older).status.ok());
  EXPECT_TRUE(ended_.at(newer).status.ok());
}

// The older one, which was never pre-empted, waits for the end of the one that was.
TEST_F(SchedulerTest, NobodyTakesTheRoomOfWhoCannotBePreemptedAnyMore) {
  SchedulerOptions options = NoPrefixCache();
  options.max_preemptions = 1;
  Make(6 * kTokenPages, options);
  const int64_t oldest = Add(4, 20, Tier::kFull, 1);
  const int64_t newest = Add(4, 12, Tier::kFull, 2);
  RunUntilIdle();
  EXPECT_EQ(ended_.at(oldest).preemptions, 0);
  EXPECT_EQ(ended_.at(newest).preemptions, 1);
  EXPECT_TRUE(ended_.at(oldest).status.ok());
  EXPECT_TRUE(ended_.at(newest).status.ok());
}

TEST_F(SchedulerTest, WithoutProgressTheOldestFailsWithFigures) {
  Make(4 * kTokenPages, NoPrefixCache());
  const int64_t id = Add(4, 12);
  Step();
  auto hold = ledger_->Reserve(ledger_->free_bytes() / kPageBytes, 0);
  ASSERT_TRUE(hold.ok());
  const StepPlan plan = scheduler_->Plan(1);
  ASSERT_EQ(plan.ended.size(), 1u);
  EXPECT_EQ(plan.ended[0].id, id);
  EXPECT_EQ(plan.ended[0].status.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(plan.ended[0].status.message(),
            "cache memory: no room to go on from token 4 of 5: 0 of 1600 bytes can be had, 1 "
            "requests hold the rest and none of them can be pre-empted");
  EXPECT_TRUE(scheduler_->idle());
}

TEST_F(SchedulerTest, RaisesAreRefusedWhereTheyCannotBe) {
  Make(4 * kTokenPages, NoPrefixCache());
  scheduler_->set_auto_max_level(2);
  const int64_t id = Add(8, 5);
  EXPECT_EQ(scheduler_->Raise(id, 1).code(), StatusCode::kInvalidArgument) << "it waits";
  Step();
  EXPECT_EQ(scheduler_->Raise(id, 3).message(),
            "request 1 cannot be raised from level 0 to 3: its highest is 2");
  EXPECT_EQ(scheduler_->Raise(id, 0).code(), StatusCode::kInvalidArgument);
  auto hold = ledger_->Reserve(ledger_->free_bytes() / kPageBytes, 0);
  ASSERT_TRUE(hold.ok());
  EXPECT_EQ(scheduler_->Raise(id, 1).message(),
            "no room to raise request 1 from level 0 to 1: 0 bytes are free");
  hold->Abort();
  EXPECT_TRUE(scheduler_->Raise(id, 2).ok());
  RunUntilIdle();
  EXPECT_EQ(ended_.at(id).levels, (LevelHistory{{0, 0}, {8, 2}}));
}

// Pages that the prefix cache holds too would not come free layer by layer.
TEST_F(SchedulerTest, ARaiseEmptiesThePrefixCacheWhereThatMakesTheRoom) {
  Make(2 * kTokenPages + kSlotBytes);
  scheduler_->set_auto_max_level(4);
  const int64_t id = Add(7, 2);
  Step();
  EXPECT_EQ(scheduler_->prefix_cache()->entries(), 2);
  EXPECT_EQ(ledger_->idle_bytes(), 0);
  EXPECT_EQ(ledger_->free_bytes(), kSlotBytes);
  EXPECT_TRUE(scheduler_->Raise(id, 2).ok());
  EXPECT_EQ(scheduler_->level(id), 2);
  EXPECT_EQ(scheduler_->prefix_cache()->entries(), 0);
  RunUntilIdle();
  EXPECT_EQ(ended_.at(id).levels, (LevelHistory{{0, 0}, {7, 2}}));
}

TEST_F(SchedulerTest, ACachedPrefixIsCountedHonestlyAndFoldedToTheLevel) {
  Make(100 * kTokenPages);
  scheduler_->set_auto_max_level(4);
  const int64_t first = Add(14, 1);
  RunUntilIdle();
  EXPECT_EQ(ended_.at(first).cached_tokens, 0);
  const int64_t same = Add(14, 1);
  Step();
  EXPECT_EQ(shapes_[same], Shape(12, 2));
  EXPECT_EQ(ended_.at(same).cached_tokens, 12);
  scheduler_->set_target_level(2);
  const int64_t folded = Add(20, 1);
  Step();
  EXPECT_EQ(shapes_[folded], Shape(12, 4)) << "up to the snapshot at 16";
  RunUntilIdle();
  EXPECT_EQ(ended_.at(folded).cached_tokens, 12);
  EXPECT_EQ(ended_.at(folded).levels, (LevelHistory{{0, 0}, {12, 2}}));
  ScheduledRequest exact;
  exact.level = 2;
  const int64_t alone = Add(20, 1, Tier::kExact, 0, exact);
  RunUntilIdle();
  EXPECT_EQ(ended_.at(alone).cached_tokens, 0) << "another history";
  EXPECT_EQ(ended_.at(alone).levels, (LevelHistory{{0, 2}}));
  const int64_t again = Add(21, 1);
  RunUntilIdle();
  EXPECT_EQ(ended_.at(again).cached_tokens, 20) << "the snapshot at the prompt's end";
}

TEST_F(SchedulerTest, APromptAboveLevel0IsCutAtSnapshotsThatGrowApartToAQuarterOfAStep) {
  SchedulerOptions options;
  options.max_batch_tokens = 128;
  Make(100 * kTokenPages, options);
  scheduler_->set_auto_max_level(2);
  scheduler_->set_target_level(2);
  const int64_t alone = Add(150, 1);
  for (const Shape& shape : {Shape(0, 8), Shape(8, 8), Shape(16, 16), Shape(32, 32), Shape(64, 32),
                             Shape(96, 32), Shape(128, 20), Shape(148, 2)}) {
    Step();
    EXPECT_EQ(shapes_[alone], shape);
  }
  // One that begins alike waits for the last snapshot of what both have.
  const int64_t leader = Add(100, 1, Tier::kAuto, 1);
  const int64_t same = Add(70, 1, Tier::kAuto, 1);
  RunUntilIdle();
  EXPECT_EQ(ended_.at(leader).cached_tokens, 0);
  EXPECT_EQ(ended_.at(same).cached_tokens, 64);
}

TEST_F(SchedulerTest, APromptThatIsBeingComputedIsNotComputedTwice) {
  Make(100 * kTokenPages);
  const int64_t leader = Add(81, 3);
  const int64_t same = Add(81, 1);    // the whole of it
  const int64_t longer = Add(90, 1);  // and more
  ScheduledRequest salted;
  salted.cache_salt = "salt";
  const int64_t foreign = Add(40, 1, Tier::kAuto, 0, salted);
  Step();
  Step();
  EXPECT_EQ(scheduler_->running(), 2) << "the leader and the foreign one";
  const LoadSnapshot load = scheduler_->Snapshot();
  ASSERT_EQ(load.waiting.size(), 2u);
  EXPECT_EQ(load.waiting[0].cached_tokens, 80) << "which it will find";
  EXPECT_EQ(load.waiting[0].pending_tokens, 1);
  RunUntilIdle();
  EXPECT_EQ(ended_.at(leader).cached_tokens, 0);
  EXPECT_EQ(ended_.at(foreign).cached_tokens, 0);
  EXPECT_GE(ended_.at(same).cached_tokens, 76);  // it does not wait for the last page
  EXPECT_GE(ended_.at(longer).cached_tokens, 76);
}

TEST_F(SchedulerTest, WhoeverAwaitsAPrefixGoesOnWithoutItsLeader) {
  Make(100 * kTokenPages);
  const int64_t leader = Add(81, 3);
  const int64_t same = Add(81, 1);
  Step();
  EXPECT_EQ(shapes_.count(same), 0u);
  scheduler_->Cancel(leader);
  Step();
  EXPECT_EQ(shapes_[same], Shape(32, 32)) << "from what the leader left";
  RunUntilIdle();
  EXPECT_EQ(ended_.at(same).cached_tokens, 32);
}

TEST_F(SchedulerTest, UnderLoadALongerPrefixOfAHigherLevelServes) {
  Make(100 * kTokenPages);
  scheduler_->set_auto_max_level(3);
  scheduler_->set_target_level(3);
  Add(41, 1);
  RunUntilIdle();
  scheduler_->set_target_level(1);
  const int64_t under_load = Add(41, 1);
  const int64_t full = Add(41, 1, Tier::kFull);
  RunUntilIdle();
  EXPECT_EQ(ended_.at(under_load).cached_tokens, 40);
  EXPECT_EQ(ended_.at(under_load).levels, (LevelHistory{{0, 3}}));
  EXPECT_EQ(ended_.at(full).levels, (LevelHistory{{0, 0}}));
  scheduler_->set_target_level(0);
  const int64_t calm = Add(45, 1);
  RunUntilIdle();
  EXPECT_EQ(ended_.at(calm).levels, (LevelHistory{{0, 0}})) << "quality first";
}

TEST_F(SchedulerTest, PromptsTakeFewerRowsWhereRepliesAreWritten) {
  Make(100 * kTokenPages);
  scheduler_->set_prefill_limit(12);
  const int64_t first = Add(30, 9, Tier::kAuto, 1);
  Step();
  EXPECT_EQ(shapes_[first], Shape(0, 30)) << "nobody waits for a token";
  const int64_t second = Add(40, 1, Tier::kAuto, 2);
  Step();
  EXPECT_EQ(shapes_[second], Shape(0, 12));
  scheduler_->set_prefill_limit(1);
  Step();
  EXPECT_EQ(shapes_[second], Shape(12, 4)) << "a page at least";
  scheduler_->set_prefill_limit(0);
  Step();
  EXPECT_EQ(shapes_[second], Shape(16, 24));
}

TEST_F(SchedulerTest, TheOldestAndTheShortestTakeTurnsAtASinglePage) {
  Make(100 * kTokenPages);
  Add(5, 99, Tier::kAuto, 1);
  Step();
  scheduler_->set_prefill_limit(kPage);
  const int64_t longer = Add(40, 1, Tier::kAuto, 2);
  const int64_t shorter = Add(16, 1, Tier::kAuto, 3);
  for (int turn = 0; turn < 3; ++turn) {
    int longer_rows = 0, shorter_rows = 0;
    for (int step = 0; step < 2; ++step) {
      Step();
      if (shapes_.contains(longer)) longer_rows += shapes_[longer].second;
      if (shapes_.contains(shorter)) shorter_rows += shapes_[shorter].second;
    }
    EXPECT_EQ(longer_rows, kPage);
    EXPECT_EQ(shorter_rows, kPage);
  }
}

TEST_F(SchedulerTest, APromptThatIsCachedCountsAsShort) {
  Make(100 * kTokenPages);
  Add(40, 1, Tier::kAuto, 1);
  RunUntilIdle();
  const int64_t oldest = Add(64, 1, Tier::kAuto, 2);
  const int64_t shorter = Add(20, 1, Tier::kAuto, 3);
  const int64_t cached = Add(41, 1, Tier::kAuto, 1);
  Step();
  EXPECT_EQ(shapes_[oldest], Shape(0, 16));
  EXPECT_EQ(shapes_[cached], Shape(40, 1)) << "before the shorter one that is not cached";
  EXPECT_EQ(shapes_[shorter], Shape(0, 12));
}

TEST_F(SchedulerTest, WhatSomebodyWaitsForIsGivenUpLast) {
  SchedulerOptions options;
  options.max_running = 1;
  Make(12 * kTokenPages, options);
  Add(16, 1, Tier::kAuto, 1);
  RunUntilIdle();
  Add(16, 1, Tier::kAuto, 2);  // used later, but nobody waits for it
  RunUntilIdle();
  Add(12, 20, Tier::kAuto, 3);  // takes 8 pages of tokens in the end
  const int64_t waits = Add(17, 1, Tier::kAuto, 1);
  RunUntilIdle();
  EXPECT_EQ(ended_.at(waits).cached_tokens, 16);
}

// Else the oldest would take the memory of the prefix.
TEST_F(SchedulerTest, APromptThatIsCachedComesBeforeWhoWouldTakeItsPrefix) {
  Make(20 * kTokenPages);
  Add(40, 1, Tier::kFull, 1);
  RunUntilIdle();
  const int64_t oldest = Add(64, 1, Tier::kFull, 2);
  const int64_t cached = Add(41, 1, Tier::kFull, 1);
  Step();
  EXPECT_EQ(shapes_[cached], Shape(40, 1));
  EXPECT_EQ(scheduler_->running() + scheduler_->waiting(), 1);
  RunUntilIdle();
  EXPECT_EQ(ended_.at(cached).cached_tokens, 40);
  EXPECT_TRUE(ended_.at(oldest).status.ok());
}

TEST_F(SchedulerTest, ThereIsRoomForTheStatesThatAPromptWillLeave) {
  // At level 3 a prompt of 40 takes 10 pages and 3 slots, and leaves 3 slots.
  Make(2 * (1000 + 450) + 450 + 50);
  scheduler_->set_auto_max_level(3);
  scheduler_->set_target_level(3);
  Add(40, 1, Tier::kAuto, 1);
  const int64_t follower = Add(41, 1, Tier::kAuto, 1);
  Add(40, 1, Tier::kAuto, 2);
  Step();
  EXPECT_EQ(scheduler_->running(), 1) << "with the states of the first there is no room for two";
  RunUntilIdle();
  EXPECT_GE(ended_.at(follower).cached_tokens, 32);
}

TEST_F(SchedulerTest, PromptLogprobsReadNothingFromThePrefixCache) {
  Make(100 * kTokenPages);
  Add(14, 1);
  RunUntilIdle();
  ScheduledRequest request;
  request.prompt_logprobs = true;
  const int64_t id = Add(14, 0, Tier::kAuto, 0, request);
  const StepPlan plan = Step();
  EXPECT_EQ(shapes_[id], Shape(0, 14));
  EXPECT_EQ(plan.rows[0].logits, RowLogits::kAll);
  EXPECT_EQ(ended_.at(id).cached_tokens, 0);
}

TEST_F(SchedulerTest, DeterministicChunksLieAtFixedPlaces) {
  SchedulerOptions options;
  options.deterministic = true;
  options.deterministic_chunk = 8;
  Make(100 * kTokenPages, options);
  const int64_t id = Add(19, 3, Tier::kAuto, 1);
  for (const Shape& shape : {Shape(0, 8), Shape(8, 8), Shape(16, 3), Shape(19, 1), Shape(20, 1)}) {
    Step();
    EXPECT_EQ(shapes_[id], shape);
  }
  EXPECT_TRUE(scheduler_->idle());
  const int64_t again = Add(19, 1, Tier::kAuto, 1);
  Step();
  EXPECT_EQ(shapes_[again], Shape(16, 3));
}

TEST_F(SchedulerTest, DeadlinesAndCancelsEndWaitingAndRunningRequests) {
  SchedulerOptions options;
  options.max_running = 1;
  Make(100 * kTokenPages, options);
  ScheduledRequest request;
  request.arrival = 1;
  request.deadline = 3;
  const int64_t running = Add(4, 20, Tier::kAuto, 1, request);
  request.deadline = 2;
  const int64_t waiting = Add(4, 20, Tier::kAuto, 2, request);
  Step(1.5);
  EXPECT_TRUE(ended_.empty());
  Step(2);
  EXPECT_EQ(ended_.at(waiting).status.code(), StatusCode::kDeadlineExceeded);
  Step(3.5);
  EXPECT_EQ(ended_.at(running).status.message(),
            "the deadline passed 2.500 s after arrival, with 2 of at most 20 tokens made");
  EXPECT_TRUE(scheduler_->idle());

  const int64_t third = Add(4, 20, Tier::kAuto, 3), fourth = Add(4, 20, Tier::kAuto, 4);
  const StepPlan plan = scheduler_->Plan(4);
  EXPECT_FALSE(scheduler_->Cancel(third).has_value()) << "its rows are in flight";
  EXPECT_TRUE(scheduler_->Cancel(fourth).has_value());
  model_->Forward(plan.rows[0], tokens_[third]);
  const RowResult result{.token = 5};
  const auto ended = scheduler_->Commit({&result, 1});
  ASSERT_EQ(ended.size(), 1u);
  EXPECT_EQ(ended[0].id, third);
  EXPECT_EQ(ended[0].status.code(), StatusCode::kCancelled);
  EXPECT_TRUE(scheduler_->idle());
  EXPECT_TRUE(Step().rows.empty());
}

TEST_F(SchedulerTest, AFoldThatFailsHarmsNobody) {
  Make(100 * kTokenPages);
  scheduler_->set_auto_max_level(4);
  const int64_t other = Add(4, 9, Tier::kAuto, 1);
  Add(14, 1);
  Step();
  model_->FailRaises(1);
  EXPECT_EQ(scheduler_->Raise(other, 2).message(), "no memory to fold");
  EXPECT_EQ(scheduler_->level(other), 0);
  scheduler_->set_target_level(3);
  const int64_t folded = Add(20, 1);  // its prefix is to be folded
  model_->FailRaises(1);
  Step();
  EXPECT_EQ(scheduler_->waiting(), 1);
  RunUntilIdle();
  EXPECT_TRUE(ended_.at(folded).status.ok());
  EXPECT_EQ(ended_.at(folded).levels, (LevelHistory{{0, 0}, {12, 3}}));
}

// Who runs alone starts without the prefix; beside others it waits for the memory of one of them.
TEST_F(SchedulerTest, ACopyThatFailsHarmsNobody) {
  Make(100 * kTokenPages);
  scheduler_->set_auto_max_level(4);
  scheduler_->set_target_level(3);
  model_->FailCopies(1);
  Add(14, 1);
  RunUntilIdle();
  EXPECT_EQ(scheduler_->prefix_cache()->snapshots(), 1) << "of two";
  model_->FailCopies(1);
  const int64_t alone = Add(14, 1);
  RunUntilIdle();
  EXPECT_TRUE(ended_.at(alone).status.ok());
  EXPECT_EQ(ended_.at(alone).cached_tokens, 0);

  const int64_t other = Add(4, 3, Tier::kFull, 1);
  Step();
  model_->FailCopies(1);
  const int64_t beside = Add(14, 1);
  Step();
  EXPECT_EQ(scheduler_->waiting(), 1);
  RunUntilIdle();
  EXPECT_TRUE(ended_.at(other).status.ok());
  EXPECT_EQ(ended_.at(beside).cached_tokens, 12);
}

TEST_F(SchedulerTest, ClearLeavesNothingBehind) {
  Make(100 * kTokenPages);
  Add(30, 9, Tier::kEconomy, 1);
  Add(30, 9, Tier::kFull, 2);
  for (int i = 0; i < 5; ++i) Step();
  Add(30, 9, Tier::kAuto, 3);
  EXPECT_GT(ledger_->used_bytes(), 0);
  EXPECT_EQ(scheduler_->Clear().size(), 3u);
  EXPECT_EQ(ledger_->used_bytes(), 0);
}

// Pages that another sequence holds, too, do not come free.
TEST_F(SchedulerTest, ARaiseBesideASharedPrefixKeepsWhatWasPromised) {
  SchedulerOptions options;
  options.max_preemptions = 0;  // so both are promised their longest reply
  // 9 and 1 pages of tokens are held after two steps, 1 more is promised to each.
  Make(12 * kTokenPages + 50, options, /*slot_bytes=*/350);
  scheduler_->set_auto_max_level(kLayers);
  const int64_t first = Add(8 * kPage, 9), second = Add(8 * kPage + 2, 7);
  Step();
  Step();
  ASSERT_EQ(scheduler_->cached_tokens(second), 8 * kPage);
  EXPECT_EQ(scheduler_->Raise(first, 1).code(), StatusCode::kResourceExhausted);
  RunUntilIdle();
  EXPECT_TRUE(ended_[first].status.ok()) << ended_[first].status.message();
  EXPECT_TRUE(ended_[second].status.ok()) << ended_[second].status.message();
}

}  // namespace
}  // namespace dsla
