// How far a hybrid model at a level is from the same model at level 0: KL divergence and top-1
// agreement of the next-token distributions, on given documents, from the start and after a switch
// in the middle.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/exec.h"
#include "base/status.h"
#include "cache/cache_pool.h"
#include "model/hybrid_model.h"

namespace dsla {

// log(sum(exp(x))) of a row of logits, the sum in fp64.
double LogSumExp(std::span<const float> logits);

// Forward KL(p || q) in nats of two rows of logits, sums in fp64, and whether both have the same
// likeliest token.
struct RowDivergence {
  double kl = 0;
  bool agree = false;
  double q_log_sum = 0;  // LogSumExp(q_logits)
};
RowDivergence Divergence(std::span<const float> p_logits, std::span<const float> q_logits);

struct DivergenceOptions {
  std::vector<int> levels;
  double switch_at = 0.5;  // share of each document after which the switched run folds, rounded
                           // down to whole tokens
  bool measure_switched = true;  // else kl_suffix and kl_switched stay 0
  int chunk = 128;               // rows per step; logits of two runs are held for so many rows
};

// Means over tokens; `_suffix` over the tokens after the switch only.
struct LevelDivergence {
  int level = 0;
  int64_t tokens = 0;
  int64_t suffix_tokens = 0;
  double kl = 0;           // the level from the first token on
  double agreement = 0;    // top-1
  double kl_suffix = 0;    // the same run, tokens after the switch
  double kl_switched = 0;  // level 0 up to the switch, then folded
};

struct DivergenceReport {
  double teacher_loss = 0;  // mean next-token cross-entropy of level 0, nats
  int64_t documents = 0;
  std::vector<LevelDivergence> levels;
};

// Each document is a token sequence of at least 2 tokens that fits the context. `progress` is
// called after each document.
Expected<DivergenceReport> MeasureDivergence(
    const ExecContext& ctx, const HybridModel& model, CachePool& pool,
    std::span<const std::vector<int32_t>> documents, const DivergenceOptions& options,
    const std::function<void(int64_t done)>& progress = {});

}  // namespace dsla
