// Thousands of random traces through the scheduler, with everything checked after every step.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <set>

#include "engine/scheduler.h"
#include "engine/scheduler_testing.h"

namespace dsla {
namespace {

constexpr int kPage = 4;
constexpr int kVocabulary = 64;

// What the client knows of its request.
struct Client {
  ScheduledRequest request;
  std::vector<int32_t> tokens;  // prompt and reply
  uint64_t seed = 0;
  int first_position = -1;  // of its first row: the tokens it had from the prefix cache
  int logits = 0;           // prompt rows whose logits came
  int preemptions = 0;
  int overtaken = 0;
  int level = 0;
  bool cancelled = false;
  bool stopped = false;    // its last token was made, whether the scheduler knows or not
  int auto_max_level = 0;  // when it was added

  int generated() const {
    return static_cast<int>(tokens.size()) - static_cast<int>(request.prompt.size());
  }
};

struct Totals {
  int64_t steps = 0, requests = 0, preemptions = 0, hits = 0, folds = 0, copies = 0, raises = 0;
  int64_t awaited = 0;  // steps in which somebody waited for a prefix
  int64_t ahead = 0;    // steps that began before the results of those before them were known
  int64_t ahead_prompts = 0, ahead_starts = 0;  // of those: with prompts, with new ones
  int64_t surplus = 0;                          // rows of those for who had ended
  int64_t expired = 0, cancelled = 0, finished = 0;
};

class Trace {
 public:
  explicit Trace(uint32_t seed) : random_(seed) {
    const int layers = Pick(1, 5);
    std::vector<int> ladder(layers);
    std::iota(ladder.begin(), ladder.end(), 0);
    std::shuffle(ladder.begin(), ladder.end(), random_);
    options_.layers = layers;
    options_.max_level = Pick(0, 3) == 0 ? 0 : layers;
    options_.top_level = Pick(0, options_.max_level);
    options_.page_size = kPage;
    options_.max_batch_tokens = Pick(2, 16) * kPage;
    options_.max_running = Pick(1, 12);
    options_.max_preemptions = Pick(0, 4);
    options_.max_overtaken_tokens = Pick(0, 6) * 2 * kPage;
    options_.prefix_cache = Pick(0, 4) != 0;
    options_.snapshot_stride = kPage * Pick(1, 4);
    options_.deterministic = Pick(0, 3) == 0;
    options_.deterministic_chunk = options_.deterministic ? Pick(0, 1) * kPage : 0;
    options_.adapter_id = "adapter";
    chunk_ = options_.deterministic_chunk;
    if (chunk_ == 0) chunk_ = options_.max_batch_tokens / 2 / kPage * kPage;
    // From room for little more than one request to room for all.
    const int64_t page_bytes = 64, slot_bytes = options_.max_level == 0 ? 0 : 16 * Pick(1, 30);
    const int64_t largest = layers * std::max<int64_t>(slot_bytes, 24 * page_bytes);
    ledger_ =
        std::make_unique<Ledger>(LedgerConfig{largest * Pick(2, 16) / 8, page_bytes, slot_bytes});
    model_ = std::make_unique<FakeModel>(ledger_.get(), ladder, kPage, options_.deterministic);
    scheduler_ = std::make_unique<Scheduler>(ledger_.get(), model_.get(), options_);
    for (int i = 0; i < 3; ++i) {
      documents_.emplace_back();
      for (int t = 0; t < 80; ++t) documents_.back().push_back(Pick(0, kVocabulary - 1));
    }
    scheduler_->set_auto_max_level(Pick(0, options_.max_level));
    ahead_odds_ = Pick(0, 2);
  }

  void Run(Totals* totals) {
    const int requests = Pick(1, 30);
    const int raise_odds = Pick(1, 20), cancel_odds = Pick(10, 200), burst = Pick(1, 12);
    int64_t added = 0, steps = 0;
    while (added < requests || !scheduler_->idle()) {
      now_ += 0.25 * Pick(0, 4);
      if (added < requests && (scheduler_->idle() || Pick(0, 3) == 0)) {
        for (int i = Pick(1, burst); i > 0 && added < requests; --i) added += Add();
      }
      if (Pick(1, raise_odds) == 1) raise_due_ = true;
      if (!flight_.has_value() && std::exchange(raise_due_, false)) RaiseSomebody(totals);
      if (Pick(1, cancel_odds) == 1) CancelSomebody();
      if (Pick(0, 15) == 0) {
        prefill_limit_ = Pick(0, Pick(0, 1) == 0 ? 2 * kPage : options_.max_batch_tokens);
        scheduler_->set_prefill_limit(prefill_limit_);
      }
      if (Pick(0, 7) == 0) scheduler_->set_target_level(Pick(0, options_.layers));
      if (Pick(0, 31) == 0) model_->FailCopies(1);
      Step();
      if (testing::Test::HasFailure()) return;
      ASSERT_LT(++steps, 20000) << "it does not end";
    }
    ASSERT_TRUE(clients_.empty()) << clients_.size() << " requests never ended";
    ASSERT_EQ(ledger_->used_bytes(), ledger_->idle_bytes());
    scheduler_->Clear();
    ASSERT_EQ(ledger_->used_bytes(), 0);
    totals->steps += steps;
    totals->requests += requests;
    totals->preemptions += scheduler_->preemptions();
    totals->folds += model_->folds();
    totals->copies += model_->copies();
    totals->hits += hits_;
    totals->awaited += awaited_;
    totals->ahead += ahead_;
    totals->ahead_prompts += ahead_prompts_;
    totals->ahead_starts += ahead_starts_;
    totals->surplus += surplus_;
    totals->expired += ends_[StatusCode::kDeadlineExceeded];
    totals->cancelled += ends_[StatusCode::kCancelled];
    totals->finished += ends_[StatusCode::kOk];
  }

 private:
  int Pick(int low, int high) { return std::uniform_int_distribution(low, high)(random_); }

  bool Add() {
    ScheduledRequest request;
    if (!conversation_.empty() && Pick(0, 2) == 0) {
      request.prompt = conversation_;  // and then the next turn
    } else {
      const auto& document = documents_[Pick(0, 2)];
      request.prompt.assign(document.begin(), document.begin() + Pick(1, 60));
    }
    for (int i = Pick(0, 20); i > 0; --i) request.prompt.push_back(Pick(0, kVocabulary - 1));
    request.max_tokens = Pick(0, 3) == 0 ? Pick(0, 2) : Pick(0, 48);
    request.tier = static_cast<Tier>(Pick(0, 3));
    request.level = Pick(0, options_.max_level);
    request.prompt_logprobs = request.max_tokens == 0 || Pick(0, 9) == 0;
    if (Pick(0, 9) == 0) request.host_tokens = Pick(0, 1) == 0 ? Pick(1, 5) : 1000;
    request.cache_salt = Pick(0, 3) == 0 ? "salt" : "";
    request.arrival = now_;
    if (Pick(0, 9) == 0) request.deadline = now_ + Pick(0, 40);
    const auto size = static_cast<int64_t>(request.prompt.size());
    if (!scheduler_->CanEverFit(size, request.max_tokens, request.tier, request.level).ok())
      return true;
    Client client{.request = request, .tokens = request.prompt, .seed = random_()};
    client.auto_max_level = scheduler_->auto_max_level();
    const int64_t id = scheduler_->Add(std::move(request));
    EXPECT_TRUE(clients_.emplace(id, std::move(client)).second);
    return true;
  }

  void RaiseSomebody(Totals* totals) {
    const LoadSnapshot load = scheduler_->Snapshot();
    if (load.running.empty()) return;
    const SequenceLoad& entry = load.running[Pick(0, static_cast<int>(load.running.size()) - 1)];
    const int level = Pick(0, options_.layers);
    const Status status = scheduler_->Raise(entry.id, level);
    if (level <= entry.level || level > entry.max_level) {
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    }
    EXPECT_EQ(scheduler_->level(entry.id), status.ok() ? level : RealLevel(entry));
    if (status.ok()) ++totals->raises;
    ExpectExactAccounts(*ledger_, *scheduler_);
  }

  // The load says of a sequence that is recomputed which level it will have again.
  int RealLevel(const SequenceLoad& entry) const { return scheduler_->level(entry.id); }

  void CancelSomebody() {
    if (clients_.empty()) return;
    auto it = clients_.begin();
    std::advance(it, Pick(0, static_cast<int>(clients_.size()) - 1));
    const int64_t id = it->first;
    it->second.cancelled = true;
    if (const auto ended = scheduler_->Cancel(id)) End(*ended);
    EXPECT_FALSE(scheduler_->Cancel(-1).has_value());
  }

  // A step from its plan to its commit: the model has run it, and nobody knows its results.
  struct Flight {
    StepPlan plan;
    std::vector<RowResult> results;
    std::vector<std::pair<BlockKind, int32_t>> blocks;  // that its rows read and write
    bool host_has_a_part = false;                       // its results are not for a device alone
  };

  void Step() {
    if (!flight_.has_value()) Begin();
    if (!flight_.has_value()) return;
    std::optional<Flight> next;
    if (!raise_due_ && !flight_->host_has_a_part && Pick(0, ahead_odds_) > 0) BeginAhead(&next);
    if (Pick(0, 63) == 0) CancelSomebody();  // in mid-step
    for (const EndedSequence& ended : scheduler_->Commit(flight_->results)) End(ended);
    ASSERT_EQ(scheduler_->in_step(), next.has_value());
    ExpectExactAccounts(*ledger_, *scheduler_);  // what surplus rows are in is held
    if (next.has_value()) {
      for (const PlannedRows& rows : next->plan.rows) surplus_ += clients_.count(rows.id) == 0;
      for (const auto& [kind, id] : next->blocks) ASSERT_FALSE(ledger_->is_free(kind, id));
    }
    flight_ = std::move(next);
  }

  void Begin() {
    const auto was_running = RunningIds();
    StepPlan plan = scheduler_->Plan(now_);
    for (int64_t id : plan.preempted) {
      ASSERT_LE(++clients_.at(id).preemptions, options_.max_preemptions);
      ASSERT_GT(id, clients_.begin()->first) << "the oldest was pre-empted";
    }
    for (const EndedSequence& ended : plan.ended) {
      ASSERT_NE(ended.status.code(), StatusCode::kResourceExhausted) << ended.status.message();
      End(ended);
    }
    ASSERT_EQ(plan.rows.empty(), scheduler_->idle()) << "a silent stall";
    ExpectExactAccounts(*ledger_, *scheduler_);
    CheckFairness(was_running, plan);
    if (!plan.rows.empty()) RunStep(std::move(plan), &flight_);
  }

  void RunStep(StepPlan plan, std::optional<Flight>* flight) {
    Flight step;
    step.host_has_a_part = HostHasAPart(plan);
    int rows = 0;
    std::set<int64_t> seen;
    for (const PlannedRows& planned : plan.rows) {
      ASSERT_TRUE(seen.insert(planned.id).second);
      rows += static_cast<int>(planned.tokens.size());
      step.results.push_back(RunRows(planned));
      for (int layer = 0; layer < options_.layers; ++layer) {
        for (int32_t page : planned.cache->pages(layer))
          step.blocks.emplace_back(BlockKind::kPage, page);
        if (planned.cache->is_dsla(layer))
          step.blocks.emplace_back(BlockKind::kSlot, planned.cache->slot(layer));
      }
    }
    ASSERT_LE(rows, options_.max_batch_tokens);
    ASSERT_EQ(rows, plan.decode_rows + plan.prefill_rows);
    step.plan = std::move(plan);
    *flight = std::move(step);
  }

  // The step behind the one in flight. Whoever writes a reply has a row, but for those of whom it
  // is known that there will be nothing to run.
  void BeginAhead(std::optional<Flight>* next) {
    const auto was_running = RunningIds();
    const int64_t folds = model_->folds();
    StepPlan plan = scheduler_->PlanAhead(now_);
    ASSERT_TRUE(plan.ended.empty() && plan.preempted.empty());
    ASSERT_EQ(model_->folds(), folds);
    ExpectExactAccounts(*ledger_, *scheduler_);
    CheckFairness(was_running, plan);
    if (plan.rows.empty()) return;
    ++ahead_;
    ahead_prompts_ += plan.prefill_rows > 0;
    ahead_starts_ += !plan.started.empty();
    ASSERT_FALSE(HostHasAPart(plan));
    std::set<int64_t> with_rows;
    for (const PlannedRows& rows : plan.rows) {
      int feed = -1;
      for (int i = 0; i < static_cast<int>(flight_->plan.rows.size()); ++i) {
        const PlannedRows& before = flight_->plan.rows[i];
        if (before.id == rows.id && before.samples) feed = i;
      }
      ASSERT_EQ(rows.feed, feed);
      with_rows.insert(rows.id);
    }
    for (const int64_t id : RunningIds()) {
      const Client& client = clients_.at(id);
      if (!GoesOn(client)) {
        ASSERT_EQ(with_rows.count(id), 0u);
      } else if (client.generated() > 0) {
        ASSERT_EQ(with_rows.count(id), 1u);
      }
    }
    RunStep(std::move(plan), next);
  }

  static bool GoesOn(const Client& client) {
    return !client.cancelled && client.generated() < client.request.max_tokens;
  }

  bool HostHasAPart(const StepPlan& plan) const {
    return std::ranges::any_of(plan.rows, [&](const PlannedRows& rows) {
      const Client& client = clients_.at(rows.id);
      return rows.logits == RowLogits::kAll ||
             (rows.samples && client.generated() < client.request.host_tokens);
    });
  }

  std::set<int64_t> RunningIds() const {
    std::set<int64_t> ids;
    for (const SequenceLoad& entry : scheduler_->Snapshot().running) ids.insert(entry.id);
    return ids;
  }

  void CheckFairness(const std::set<int64_t>& was_running, const StepPlan& plan) {
    const LoadSnapshot load = scheduler_->Snapshot();
    awaited_ += std::ranges::any_of(
        load.waiting, [](const SequenceLoad& entry) { return entry.cached_tokens > 0; });
    // Nobody is overtaken for ever.
    for (const SequenceLoad& entry : load.running) {
      if (was_running.count(entry.id) > 0) continue;
      for (const SequenceLoad& waiting : load.waiting) {
        if (waiting.id > entry.id || was_running.count(waiting.id) > 0) continue;
        if (waiting.cached_tokens > 0) continue;  // it waits for a prefix that is being computed
        int& overtaken = clients_.at(waiting.id).overtaken;
        overtaken += entry.pending_tokens;
        ASSERT_LE(overtaken, options_.max_overtaken_tokens);
      }
    }
    // The oldest gets rows in every step, of single pages in every other, but for others that
    // cannot be pre-empted any more.
    if (clients_.empty() || plan.rows.empty()) return;
    const int64_t oldest = clients_.begin()->first;
    const bool runs = std::any_of(load.running.begin(), load.running.end(),
                                  [&](const SequenceLoad& entry) { return entry.id == oldest; });
    const bool rows = std::any_of(plan.rows.begin(), plan.rows.end(),
                                  [&](const PlannedRows& r) { return r.id == oldest; });
    const bool missed_before = std::exchange(oldest_missed_, runs && !rows ? oldest : 0) == oldest;
    if (!runs || rows || (flight_.has_value() && !GoesOn(clients_.begin()->second))) return;
    const bool takes_turns =
        prefill_limit_ > 0 && prefill_limit_ < 2 * kPage && !options_.deterministic;
    if (takes_turns && !missed_before) return;
    for (const SequenceLoad& entry : load.running) {
      if (entry.id == oldest) continue;
      ASSERT_GE(clients_.at(entry.id).preemptions, options_.max_preemptions)
          << "the oldest stalls while " << entry.id << " could make room";
    }
  }

  RowResult RunRows(const PlannedRows& planned) {
    Client& client = clients_.at(planned.id);
    const int prompt = static_cast<int>(client.request.prompt.size());
    const int begin = planned.cache->length();
    const int end = begin + static_cast<int>(planned.tokens.size());
    if (client.first_position < 0) client.first_position = begin;
    if (planned.phase == Phase::kDecode) {
      EXPECT_EQ(planned.tokens.size(), 1u);
      EXPECT_GE(begin, prompt);
    } else if (options_.deterministic) {
      EXPECT_EQ(begin % chunk_, 0);
      EXPECT_TRUE(end == std::min(begin + chunk_, prompt)) << begin << " " << end;
    }
    const uint64_t link = model_->Forward(planned, client.tokens, Owner(client));
    if (planned.logits == RowLogits::kAll && begin <= client.logits)
      client.logits = std::max(client.logits, end);
    EXPECT_EQ(planned.samples, end == static_cast<int>(client.tokens.size()));
    if (!planned.samples || client.stopped) return {};
    EXPECT_NE(planned.logits, RowLogits::kNone);
    const int32_t token = Sample(link, client.seed);
    const bool stop = (link ^ client.seed) % 47 == 0;
    if (client.generated() < client.request.max_tokens) client.tokens.push_back(token);
    client.stopped = stop || client.generated() == client.request.max_tokens;
    return {.token = token, .finish = client.stopped};
  }

  static int Owner(const Client& client) { return client.request.cache_salt.empty() ? 0 : 1; }
  static int32_t Sample(uint64_t link, uint64_t seed) {
    return static_cast<int32_t>((link ^ seed) % kVocabulary);
  }

  void End(const EndedSequence& ended) {
    const auto found = clients_.find(ended.id);
    ASSERT_NE(found, clients_.end()) << "ended twice";
    const Client client = std::move(found->second);
    clients_.erase(found);
    ++ends_[ended.status.code()];
    ASSERT_TRUE(ended.status.ok() || ended.status.code() != StatusCode::kCancelled ||
                client.cancelled);
    if (ended.status.code() == StatusCode::kDeadlineExceeded) {
      ASSERT_GE(now_, client.request.deadline);
    }
    EXPECT_EQ(ended.prompt_tokens, static_cast<int>(client.request.prompt.size()));
    EXPECT_EQ(ended.preemptions, client.preemptions);
    if (client.first_position < 0) return;  // never ran
    EXPECT_EQ(ended.cached_tokens, client.first_position);
    if (ended.cached_tokens > 0) ++hits_;
    CheckLevels(ended.levels, client);
    CheckReply(ended, client);
  }

  void CheckLevels(const LevelHistory& levels, const Client& client) {
    ASSERT_FALSE(levels.empty());
    EXPECT_EQ(levels.front().position, 0);
    for (size_t i = 1; i < levels.size(); ++i) {
      EXPECT_LT(levels[i - 1].position, levels[i].position);
      EXPECT_LT(levels[i - 1].level, levels[i].level);
    }
    switch (client.request.tier) {
      case Tier::kFull:
        EXPECT_EQ(levels, (LevelHistory{{0, 0}}));
        break;
      case Tier::kExact:
        EXPECT_EQ(levels, (LevelHistory{{0, client.request.level}}));
        break;
      case Tier::kEconomy:
        EXPECT_EQ(levels.back().level, options_.top_level);
        break;
      case Tier::kAuto:
        EXPECT_LE(levels.back().level, client.auto_max_level);
        break;
    }
  }

  // Every token is the one that the recorded levels give to a request that runs alone.
  void CheckReply(const EndedSequence& ended, const Client& client) {
    const int prompt = ended.prompt_tokens;
    const auto links = model_->Alone(client.tokens, ended.levels, prompt, chunk_, Owner(client));
    for (int i = prompt; i < static_cast<int>(client.tokens.size()); ++i)
      ASSERT_EQ(client.tokens[i], Sample(links[i - 1], client.seed)) << "token " << i - prompt;
    if (!ended.status.ok()) return;
    conversation_ = client.tokens;
    if (client.request.prompt_logprobs) {
      EXPECT_GE(client.logits, prompt);
    }
    const bool stopped =
        client.generated() > 0 && (links[client.tokens.size() - 2] ^ client.seed) % 47 == 0;
    EXPECT_TRUE(stopped || client.generated() == client.request.max_tokens);
  }

  std::mt19937 random_;
  SchedulerOptions options_;
  int chunk_ = 0;
  std::unique_ptr<Ledger> ledger_;
  std::unique_ptr<FakeModel> model_;
  std::unique_ptr<Scheduler> scheduler_;
  std::vector<std::vector<int32_t>> documents_;
  std::vector<int32_t> conversation_;  // the last prompt and reply that came to its end
  std::map<int64_t, Client> clients_;
  std::map<StatusCode, int64_t> ends_;
  int64_t hits_ = 0, awaited_ = 0, ahead_ = 0, ahead_prompts_ = 0, ahead_starts_ = 0, surplus_ = 0;
  std::optional<Flight> flight_;
  int ahead_odds_ = 0;      // 0: every step is committed before the next is planned
  bool raise_due_ = false;  // for when nothing is in flight
  int prefill_limit_ = 0;
  int64_t oldest_missed_ = 0;  // the oldest, where the last step had no rows of it
  double now_ = 1;
};

TEST(SchedulerSimulationTest, RandomTracesKeepTheInvariants) {
  Totals totals;
  for (uint32_t seed = 1; seed <= 2000; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Trace trace(seed);
    trace.Run(&totals);
    if (HasFailure()) return;
  }
  std::printf(
      "%ld steps, %ld requests: %ld finished, %ld expired, %ld cancelled; %ld pre-emptions, "
      "%ld prefix hits, %ld steps in which a prefix was awaited, %ld raises, %ld "
      "folds, %ld state copies, %ld steps ahead, %ld of them with prompts and %ld with new ones, "
      "and %ld surplus rows\n",
      totals.steps, totals.requests, totals.finished, totals.expired, totals.cancelled,
      totals.preemptions, totals.hits, totals.awaited, totals.raises, totals.folds, totals.copies,
      totals.ahead, totals.ahead_prompts, totals.ahead_starts, totals.surplus);
  // The traces reach what they are there for.
  for (int64_t count : {totals.finished, totals.expired, totals.cancelled, totals.preemptions,
                        totals.hits, totals.awaited, totals.raises, totals.copies, totals.ahead,
                        totals.ahead_prompts, totals.ahead_starts, totals.surplus})
    EXPECT_GT(count, 20);
}

}  // namespace
}  // namespace dsla
