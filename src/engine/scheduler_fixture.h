// What the tests of the scheduler's rules share: a small scheduler over a model that checks what it
// reads, and steps in which every token is 7.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "engine/scheduler.h"
#include "engine/scheduler_testing.h"

namespace dsla {

inline constexpr int kPage = 4;
inline constexpr int kLayers = 4;
inline constexpr int64_t kPageBytes = 100;
inline constexpr int64_t kSlotBytes = 150;
inline constexpr int64_t kTokenPages = kLayers * kPageBytes;  // of one page of tokens at level 0

class SchedulerTest : public testing::Test {
 protected:
  void Make(int64_t budget, SchedulerOptions options = {}, int64_t slot_bytes = kSlotBytes) {
    options.layers = options.max_level = kLayers;
    options.page_size = kPage;
    if (options.top_level == 0) options.top_level = 3;
    if (options.max_batch_tokens == 512) options.max_batch_tokens = 32;
    if (options.snapshot_stride == 512) options.snapshot_stride = 2 * kPage;
    ledger_ = std::make_unique<Ledger>(LedgerConfig{budget, kPageBytes, slot_bytes});
    model_ = std::make_unique<FakeModel>(ledger_.get(), std::vector<int>{2, 0, 3, 1}, kPage,
                                         options.deterministic);
    scheduler_ = std::make_unique<Scheduler>(ledger_.get(), model_.get(), options);
  }

  static SchedulerOptions NoPrefixCache() {
    SchedulerOptions options;
    options.prefix_cache = false;
    return options;
  }

  // Prompts of different `text` share no prefix.
  int64_t Add(int prompt, int max_tokens, Tier tier = Tier::kAuto, int text = 0,
              ScheduledRequest request = {}) {
    request.prompt.resize(prompt);
    std::iota(request.prompt.begin(), request.prompt.end(), 1000 * text);
    request.max_tokens = max_tokens;
    request.tier = tier;
    const auto tokens = request.prompt;
    const int64_t id = scheduler_->Add(std::move(request));
    tokens_[id] = tokens;
    left_[id] = max_tokens;
    return id;
  }

  // One whole step; the ends are in ended_.
  StepPlan Step(double now = 1) {
    StepPlan plan = scheduler_->Plan(now);
    shapes_.clear();
    for (auto& ended : plan.ended) ended_[ended.id] = ended;
    std::vector<RowResult> results;
    for (const PlannedRows& rows : plan.rows) {
      shapes_[rows.id] = {rows.cache->length(), static_cast<int>(rows.tokens.size())};
      model_->Forward(rows, tokens_[rows.id]);
      RowResult result;
      if (rows.samples) {
        result.token = 7;
        result.finish = --left_[rows.id] <= 0;
        tokens_[rows.id].push_back(7);
      }
      results.push_back(result);
    }
    if (!plan.rows.empty()) {
      for (auto& ended : scheduler_->Commit(results)) ended_[ended.id] = ended;
    }
    ExpectExactAccounts(*ledger_, *scheduler_);
    return plan;
  }

  void RunUntilIdle() {
    for (int i = 0; i < 1000 && !scheduler_->idle(); ++i) Step();
    ASSERT_TRUE(scheduler_->idle());
  }

  using Shape = std::pair<int, int>;  // position, rows
  std::unique_ptr<Ledger> ledger_;
  std::unique_ptr<FakeModel> model_;
  std::unique_ptr<Scheduler> scheduler_;
  std::map<int64_t, std::vector<int32_t>> tokens_;
  std::map<int64_t, int> left_;
  std::map<int64_t, Shape> shapes_;  // of the last step, by request
  std::map<int64_t, EndedSequence> ended_;
};

}  // namespace dsla
