#include "adapt/load_estimate.h"

#include <algorithm>
#include <utility>

#include "base/quantile.h"

namespace dsla {
namespace {

// Sums over the sequences in the order in which they are served.
class Estimator {
 public:
  Estimator(const LoadSnapshot& load, const CostModel& cost, const EstimateOptions& options)
      : load_(load), cost_(cost), options_(options) {}

  void Add(const SequenceLoad& s, int level, bool running) {
    rows_ += cost_.RowSeconds(level, s.cached_tokens + s.pending_tokens);
    remaining_ += s.remaining_tokens;
    ++sequences_;
    const int growth = std::min(s.remaining_tokens, options_.growth_tokens);
    bytes_ += SequenceBytes(load_.sizes, level, s.cached_tokens + s.pending_tokens + growth);
    if (s.pending_tokens == 0) {
      decoding_ += cost_.RowSeconds(level, s.cached_tokens);
      ++decoding_sequences_;
      return;
    }
    const int chunk = options_.prefill_chunk;
    prefill_ += cost_.PromptSeconds(level, s.pending_tokens, s.cached_tokens, chunk);
    const bool first = steps_ == 0;
    steps_ += (s.pending_tokens + chunk - 1) / chunk;
    if (first) first_steps_ = steps_;
    if (s.has_first_token) return;
    // Of one under way, the part that is done belongs to its own time too.
    const double alone = running
                             ? cost_.PromptSeconds(0, s.cached_tokens + s.pending_tokens, 0, chunk)
                             : cost_.PromptSeconds(0, s.pending_tokens, s.cached_tokens, chunk);
    first_token_.push_back({load_.now - s.arrival + prefill_ - alone, steps_});
  }

  LoadEstimate Finish() {
    LoadEstimate estimate;
    estimate.memory_bytes = bytes_;
    if (sequences_ == 0) return estimate;
    // Prefill steps carry the decode rows along.
    std::vector<double> ttft;
    ttft.reserve(first_token_.size());
    for (const auto& [seconds, steps] : first_token_) ttft.push_back(seconds + steps * decoding_);
    estimate.ttft = Quantile(std::move(ttft), 0.95);
    estimate.tpot = cost_.step_seconds() + rows_;
    // Prefill chunks that some reply shares its steps with: with nobody decoding yet, those behind
    // the first prompt.
    const double shared = decoding_sequences_ > 0 ? steps_ : steps_ - first_steps_;
    if (shared > 0) {
      const double length = std::max(1.0, remaining_ / sequences_);
      const double per_step = std::max(0.0, prefill_ / steps_ - cost_.step_seconds());
      estimate.tpot += std::min(1.0, shared / length) * per_step;
    }
    return estimate;
  }

 private:
  struct FirstToken {
    double seconds;  // without the decode rows beside the chunks
    double steps;
  };

  const LoadSnapshot& load_;
  const CostModel& cost_;
  const EstimateOptions& options_;
  double rows_ = 0, decoding_ = 0, prefill_ = 0, steps_ = 0, remaining_ = 0;
  double first_steps_ = 0;  // of steps_, the first prompt's
  int64_t bytes_ = 0;
  int sequences_ = 0, decoding_sequences_ = 0;
  std::vector<FirstToken> first_token_;
};

}  // namespace

int LevelAt(const SequenceLoad& sequence, int target) {
  return std::max(sequence.level, std::min(target, sequence.max_level));
}

int BreakEvenTokens(const BlockSizes& sizes) {
  if (sizes.page_bytes == 0) return 0;
  return static_cast<int>(sizes.slot_bytes * sizes.page_size / sizes.page_bytes);
}

LoadEstimate EstimateLoad(const LoadSnapshot& load, const CostModel& cost,
                          const EstimateOptions& options, int target, bool raise_running) {
  Estimator estimator(load, cost, options);
  const int break_even = BreakEvenTokens(load.sizes);
  const auto level = [&](const SequenceLoad& s) {
    return s.cached_tokens + s.pending_tokens < break_even ? s.level : LevelAt(s, target);
  };
  for (const SequenceLoad& s : load.running)
    estimator.Add(s, raise_running ? level(s) : s.level, true);
  for (const SequenceLoad& s : load.waiting) estimator.Add(s, level(s), false);
  return estimator.Finish();
}

}  // namespace dsla
