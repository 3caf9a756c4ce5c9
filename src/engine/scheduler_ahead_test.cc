// Steps that are planned before the results of those before them are known.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "engine/scheduler_fixture.h"

namespace dsla {
namespace {

class SchedulerAheadTest : public SchedulerTest {
 protected:
  // The step behind the one in flight, of which the model knows all tokens already: each is 7.
  StepPlan StepAhead(double now = 1) {
    StepPlan plan = scheduler_->PlanAhead(now);
    for (const PlannedRows& rows : plan.rows) {
      if (rows.feed >= 0) tokens_[rows.id].push_back(7);
      model_->Forward(rows, tokens_[rows.id]);
    }
    ExpectExactAccounts(*ledger_, *scheduler_);
    return plan;
  }
  StepPlan Begin() {
    StepPlan plan = scheduler_->Plan(1);
    for (const PlannedRows& rows : plan.rows) model_->Forward(rows, tokens_[rows.id]);
    return plan;
  }
  // Of the step in flight; every token is 7.
  std::vector<EndedSequence> CommitRows(size_t rows) {
    auto ended = scheduler_->Commit(std::vector<RowResult>(rows, RowResult{.token = 7}));
    ExpectExactAccounts(*ledger_, *scheduler_);
    return ended;
  }
};

TEST_F(SchedulerAheadTest, ADecodeStepIsPlannedBehindAnother) {
  Make(1000 * kTokenPages);
  const int64_t first = Add(5, 3, Tier::kAuto, 1), second = Add(6, 9, Tier::kAuto, 2);
  Step();
  Begin();
  StepPlan ahead = StepAhead();
  ASSERT_EQ(ahead.rows.size(), 2u);
  EXPECT_EQ(ahead.rows[1].feed, 1);
  EXPECT_EQ(ahead.rows[1].cache->length(), 7) << "the row in flight counts";
  EXPECT_TRUE(scheduler_->PlanAhead(1).rows.empty()) << "two are in flight";
  EXPECT_TRUE(CommitRows(2).empty());
  EXPECT_TRUE(scheduler_->in_step());

  ahead = StepAhead();  // the first one's third token is on its way
  ASSERT_EQ(ahead.rows.size(), 1u);
  EXPECT_EQ(ahead.rows[0].id, second);
  EXPECT_EQ(ahead.rows[0].feed, 1);
  const std::vector<RowResult> two = {{.token = 7, .finish = true}, {.token = 7}};
  const auto ended = scheduler_->Commit(two);
  ASSERT_EQ(ended.size(), 1u);
  EXPECT_EQ(ended[0].id, first);
  EXPECT_TRUE(CommitRows(1).empty());
  EXPECT_FALSE(scheduler_->in_step());
  ExpectExactAccounts(*ledger_, *scheduler_);
}

// A prompt's end gives a row that is fed, another prompt has its next chunk, and who has come
// meanwhile its first.
TEST_F(SchedulerAheadTest, AStepIsPlannedBehindPrompts) {
  Make(1000 * kTokenPages);
  const int64_t longer = Add(40, 2, Tier::kAuto, 2), ends = Add(5, 3, Tier::kAuto, 1);
  StepPlan step = Begin();
  ASSERT_EQ(step.rows.size(), 2u);
  EXPECT_EQ(step.rows[0].tokens.size(), 24u);
  const int64_t newcomer = Add(6, 2, Tier::kAuto, 3);
  StepPlan ahead = StepAhead();
  ASSERT_EQ(ahead.rows.size(), 3u);
  EXPECT_EQ(ahead.rows[0].id, ends);
  EXPECT_EQ(ahead.rows[0].phase, Phase::kDecode);
  EXPECT_EQ(ahead.rows[0].feed, 1);
  EXPECT_EQ(ahead.rows[0].cache->length(), 5);
  EXPECT_EQ(ahead.rows[1].id, longer);
  EXPECT_EQ(ahead.rows[1].phase, Phase::kPrefill);
  EXPECT_EQ(ahead.rows[1].feed, -1);
  EXPECT_EQ(ahead.rows[1].cache->length(), 24);
  EXPECT_EQ(ahead.rows[1].tokens.size(), 16u);
  EXPECT_EQ(ahead.rows[1].tokens[0], 2024);
  EXPECT_TRUE(ahead.rows[1].samples);
  EXPECT_EQ(ahead.rows[2].id, newcomer);
  EXPECT_EQ(ahead.started, std::vector<int64_t>{newcomer});
  EXPECT_EQ(ahead.prefill_rows, 22);
  EXPECT_EQ(ahead.decode_rows, 1);

  // Both prompts end in flight, and the third token of the first reply is its last.
  EXPECT_TRUE(CommitRows(2).empty());
  ahead = StepAhead();
  ASSERT_EQ(ahead.rows.size(), 3u);
  EXPECT_EQ(ahead.rows[2].feed, 2);
  EXPECT_TRUE(CommitRows(3).empty());
  EXPECT_TRUE(StepAhead().rows.empty()) << "all end";
  const std::vector<RowResult> last(3, RowResult{.token = 7, .finish = true});
  EXPECT_EQ(scheduler_->Commit(last).size(), 3u);
  EXPECT_EQ(ledger_->used_bytes(), ledger_->idle_bytes());
}

// The chunk behind the one with which a request is cancelled is ignored, and so is all that it
// wrote.
TEST_F(SchedulerAheadTest, ASurplusChunkIsNotSeen) {
  Make(1000 * kTokenPages);
  const int64_t id = Add(60, 3, Tier::kAuto, 1);
  Begin();
  ASSERT_EQ(StepAhead().rows.size(), 1u);
  EXPECT_FALSE(scheduler_->Cancel(id).has_value());
  const auto ended = CommitRows(1);
  ASSERT_EQ(ended.size(), 1u);
  EXPECT_EQ(ended[0].status.code(), StatusCode::kCancelled);
  EXPECT_EQ(scheduler_->running(), 0);
  EXPECT_FALSE(scheduler_->idle());
  const int64_t entries = scheduler_->prefix_cache()->entries();
  EXPECT_GT(ledger_->used_bytes(), ledger_->idle_bytes());
  EXPECT_TRUE(CommitRows(1).empty());
  EXPECT_TRUE(scheduler_->idle());
  EXPECT_EQ(scheduler_->prefix_cache()->entries(), entries);
  EXPECT_EQ(ledger_->idle_bytes(), 8 * kTokenPages) << "of 32 tokens";
  EXPECT_EQ(ledger_->used_bytes(), ledger_->idle_bytes());
}

// States at a prompt's end are copied before the reply's first row goes on with them, and are
// dropped if that end turns out to have failed.
TEST_F(SchedulerAheadTest, StatesOfAPromptAreKeptBeforeTheRowsBehindIt) {
  for (const bool failed : {false, true}) {
    scheduler_.reset();
    Make(1000 * kTokenPages);
    ScheduledRequest request;
    request.level = 2;
    Add(12, 20, Tier::kExact, 1, request);
    Begin();
    ASSERT_EQ(StepAhead().rows.size(), 1u);
    ASSERT_TRUE(CommitRows(1).empty());
    EXPECT_EQ(scheduler_->prefix_cache()->snapshots(), 1) << "at the stride";
    ASSERT_EQ(StepAhead().rows.size(), 1u);
    EXPECT_EQ(scheduler_->prefix_cache()->snapshots(), 2) << "at the prompt's end";
    const RowResult result{.token = 7, .finish = failed, .failed = failed};
    EXPECT_EQ(scheduler_->Commit({&result, 1}).size(), failed ? 1u : 0u);
    EXPECT_EQ(scheduler_->prefix_cache()->snapshots(), failed ? 0 : 2);
    ExpectExactAccounts(*ledger_, *scheduler_);
  }
}

TEST_F(SchedulerAheadTest, NothingIsPlannedAheadOfWhatNeedsResults) {
  Make(5 * kTokenPages + kTokenPages / 2, NoPrefixCache());
  ScheduledRequest hurried;
  hurried.deadline = 9;
  const int64_t first = Add(5, 20, Tier::kFull, 1, hurried);
  Step();
  Begin();
  EXPECT_TRUE(scheduler_->PlanAhead(9).rows.empty()) << "the deadline";
  EXPECT_FALSE(scheduler_->Cancel(first).has_value());
  EXPECT_TRUE(scheduler_->PlanAhead(1).rows.empty()) << "nobody goes on";
  EXPECT_EQ(CommitRows(1).size(), 1u);

  // A prompt that has no room stops nothing.
  Add(5, 9, Tier::kFull, 3);
  Add(5, 9, Tier::kFull, 4);
  Step();
  Add(14, 2, Tier::kFull, 5);
  Begin();
  EXPECT_EQ(scheduler_->waiting(), 1);
  EXPECT_EQ(StepAhead().rows.size(), 2u);
  CommitRows(2);
  EXPECT_EQ(StepAhead().rows.size(), 2u);
  CommitRows(2);
  EXPECT_TRUE(scheduler_->PlanAhead(1).rows.empty()) << "two more pages that there are not";
  scheduler_->Clear();
  EXPECT_EQ(ledger_->used_bytes(), 0);
}

// Replies have outgrown what prompts were promised, the older of two prompts takes what is left,
// and the younger would have somebody pre-empted: not while rows of those are in flight.
TEST_F(SchedulerAheadTest, NobodyIsPreemptedAhead) {
  Make(39 * kTokenPages, NoPrefixCache());
  scheduler_->set_prefill_limit(kPage);
  for (int text = 1; text <= 4; ++text) Add(4, 60, Tier::kFull, text);
  Step();
  Add(64, 60, Tier::kFull, 5);
  const int64_t younger = Add(24, 60, Tier::kFull, 6);
  Add(4, 60, Tier::kFull, 7);
  for (int i = 0; i < 11; ++i) Step();
  const size_t in_flight = Begin().rows.size();
  scheduler_->set_prefill_limit(0);
  const StepPlan ahead = StepAhead();
  EXPECT_EQ(ahead.rows.size(), 6u);
  EXPECT_TRUE(std::ranges::none_of(ahead.rows,
                                   [&](const PlannedRows& rows) { return rows.id == younger; }));
  EXPECT_TRUE(ahead.preempted.empty());
  EXPECT_EQ(scheduler_->running(), 7);
  CommitRows(in_flight);
  EXPECT_TRUE(StepAhead().rows.empty());
  CommitRows(6);
  EXPECT_FALSE(scheduler_->Plan(1).preempted.empty());
  scheduler_->Clear();
}

TEST_F(SchedulerAheadTest, NothingIsPlannedAheadOfTheHostsTokens) {
  Make(1000 * kTokenPages);
  ScheduledRequest request;
  request.host_tokens = 2;
  Add(5, 20, Tier::kAuto, 1, request);
  Begin();
  EXPECT_TRUE(StepAhead().rows.empty()) << "its second token";
  CommitRows(1);
  tokens_[1].push_back(7);
  Begin();
  EXPECT_EQ(StepAhead().rows.size(), 1u) << "its third";
}

// Who cannot start ahead has the step after the next.
TEST_F(SchedulerAheadTest, WhoNeedsAPauseGetsIt) {
  for (const std::string why : {"tokens", "logits", "fold"}) {
    SCOPED_TRACE(why);
    scheduler_.reset();
    Make(1000 * kTokenPages);
    scheduler_->set_auto_max_level(2);
    if (why == "fold") {
      Add(12, 1, Tier::kFull, 2);
      Step();
      scheduler_->set_target_level(2);
    }
    const int64_t first = Add(5, 20, Tier::kAuto, 1);
    Begin();
    ScheduledRequest request;
    request.host_tokens = why == "tokens" ? 1 : 0;
    request.prompt_logprobs = why == "logits";
    const int64_t paused = Add(14, 9, Tier::kAuto, 2, request);
    EXPECT_EQ(StepAhead().rows.size(), 1u);
    CommitRows(1);
    EXPECT_TRUE(StepAhead().rows.empty());
    CommitRows(1);
    tokens_[first].push_back(7);
    EXPECT_EQ(Begin().started, std::vector<int64_t>{paused});
    EXPECT_EQ(scheduler_->cached_tokens(paused), why == "fold" ? 12 : 0);
    CommitRows(2);
  }
}

// What somebody waits for is only there with the results.
TEST_F(SchedulerAheadTest, APrefixInFlightIsAwaited) {
  Make(1000 * kTokenPages);
  const int64_t leader = Add(60, 9, Tier::kAuto, 1);
  Begin();
  const int64_t follower = Add(60, 9, Tier::kAuto, 1);
  ASSERT_EQ(StepAhead().rows.size(), 1u) << "the rest of the leader's prompt";
  EXPECT_EQ(scheduler_->waiting(), 1);
  CommitRows(1);
  EXPECT_TRUE(StepAhead().rows.empty());
  CommitRows(1);
  tokens_[leader].push_back(7);
  EXPECT_EQ(Begin().started, std::vector<int64_t>{follower});
  EXPECT_EQ(scheduler_->cached_tokens(follower), 56);
  EXPECT_EQ(StepAhead().rows.size(), 2u) << "nobody waits any more";
}

// A reply that ends while a row of it is in flight holds its memory until that row has run, and
// nothing of what the row did is kept.
TEST_F(SchedulerAheadTest, ASurplusRowIsNotSeen) {
  for (const bool failed : {false, true}) {
    scheduler_.reset();
    Make(1000 * kTokenPages);
    scheduler_->set_auto_max_level(2);
    scheduler_->set_target_level(2);
    const int64_t id = Add(5, 20, Tier::kAuto, 1);
    Step();
    while (scheduler_->Snapshot().running[0].cached_tokens < 7) Step();
    Begin();  // the eighth row: states are due behind it
    const int64_t before = scheduler_->prefix_cache()->snapshots();
    ASSERT_EQ(StepAhead().rows.size(), 1u);
    EXPECT_EQ(scheduler_->prefix_cache()->snapshots(), before + 1);
    const RowResult end{.token = 7, .finish = true, .failed = failed};
    EXPECT_EQ(scheduler_->Commit({&end, 1}).size(), 1u);
    EXPECT_EQ(scheduler_->running(), 0);
    EXPECT_FALSE(scheduler_->idle());
    EXPECT_GT(ledger_->used_bytes(), ledger_->idle_bytes());
    ExpectExactAccounts(*ledger_, *scheduler_);
    EXPECT_EQ(scheduler_->prefix_cache()->snapshots(), failed ? 0 : before + 1);
    EXPECT_TRUE(scheduler_->Commit(std::vector<RowResult>(1)).empty());
    EXPECT_TRUE(scheduler_->idle());
    EXPECT_EQ(ledger_->used_bytes(), ledger_->idle_bytes());
    if (failed) continue;
    // The next turn starts from the states as they were before it; the model checks what it reads.
    ScheduledRequest turn;
    turn.max_tokens = 3;
    turn.prompt.assign(tokens_[id].begin(), tokens_[id].begin() + 8);
    turn.prompt.push_back(9);
    const std::vector<int32_t> prompt = turn.prompt;
    const int64_t next = scheduler_->Add(std::move(turn));
    tokens_[next] = prompt;
    left_[next] = 3;
    RunUntilIdle();
    EXPECT_EQ(ended_[next].cached_tokens, 8);
  }
}

}  // namespace
}  // namespace dsla
