// Prefill, decode and fold speed of one sequence at several levels on one text, alternating between
// the levels so that a noisy machine treats them alike.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/exec.h"
#include "base/status.h"
#include "cache/cache_pool.h"
#include "model/hybrid_model.h"

namespace dsla {

struct SpeedOptions {
  std::vector<int> levels;
  int decode_tokens = 64;
  int repetitions = 3;
  int prefill_chunk = 512;
};

// Medians over repetitions (prefill, fold) or over all decode steps.
struct LevelSpeed {
  int level = 0;
  double prefill_seconds = 0;  // the whole text
  double decode_seconds = 0;   // one step
  double fold_seconds = 0;     // level 0 -> level with the whole text cached; 0 for level 0
  int64_t cache_bytes = 0;     // after the text
  std::vector<double> prefill_runs, decode_steps;  // what those are the medians of
};

Expected<std::vector<LevelSpeed>> MeasureSpeed(
    const ExecContext& ctx, const HybridModel& model, CachePool& pool,
    std::span<const int32_t> text, const SpeedOptions& options,
    const std::function<void(const std::string&)>& progress = {});

}  // namespace dsla
