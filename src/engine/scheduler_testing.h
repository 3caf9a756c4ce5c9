// A model for tests of the scheduler that computes nothing but remembers, for every page and slot,
// exactly which run's tokens it holds. A run is a chain of (token, level, how the rows were cut);
// its last link stands for all of it, as a hidden state does. Whatever a sequence reads must be
// links of one chain, its own; anything freed, stale, foreign or half-written fails the test.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "cache/ledger.h"
#include "cache/level_history.h"
#include "cache/sequence_cache.h"
#include "engine/scheduler.h"

namespace dsla {

class FakeModel : public CacheOps {
 public:
  // exact_shape: how rows are cut changes results, as it does in the last bits.
  FakeModel(Ledger* ledger, std::vector<int> ladder, int page_size, bool exact_shape)
      : ledger_(ledger),
        ladder_(std::move(ladder)),
        page_size_(page_size),
        exact_shape_(exact_shape) {}

  SequenceCache NewSequence(int level) override {
    return SequenceCache(ledger_, ladder_, page_size_, level);
  }
  Status Raise(SequenceCache& cache, int level) override;
  Status CopySlots(std::span<const int32_t> from, std::span<const int32_t> to) override;

  // Runs the rows of a sequence whose tokens are `tokens`, those of a row that is fed included;
  // gives the last row's link. owner: who may share with whom, as a part of every link.
  uint64_t Forward(const PlannedRows& rows, std::span<const int32_t> tokens, int owner = 0);

  // The link after tokens[0, position] run alone at `history`, with the prompt in chunks of
  // `chunk` and the reply row by row: what Forward must give, however it was scheduled.
  std::vector<uint64_t> Alone(std::span<const int32_t> tokens, const LevelHistory& history,
                              int prompt_tokens, int chunk, int owner) const;

  // The next raises, or copies, that fail for want of the machine's memory.
  void FailRaises(int count) { failing_raises_ = count; }
  void FailCopies(int count) { failing_copies_ = count; }

  int64_t folds() const { return folds_; }
  int64_t copies() const { return copies_; }

 private:
  struct Link {
    uint64_t before;
    int32_t token;
  };
  struct Entry {
    int layer = -1;
    uint64_t link = 0;
  };

  uint64_t Next(uint64_t before, int32_t token, int level, int shape, int owner) const;
  uint64_t Read(const SequenceCache& cache) const;  // checks every block; its last link
  std::vector<Entry>& Page(int32_t id);

  Ledger* ledger_;
  std::vector<int> ladder_;
  int page_size_;
  bool exact_shape_;
  std::unordered_map<uint64_t, Link> links_;
  std::vector<std::vector<Entry>> pages_;
  std::vector<Entry> slots_;
  int failing_raises_ = 0, failing_copies_ = 0;
  int64_t folds_ = 0;
  int64_t copies_ = 0;
};

// Every block's references are those of the running sequences and the prefix cache, and nothing
// else is taken.
void ExpectExactAccounts(const Ledger& ledger, Scheduler& scheduler);

}  // namespace dsla
