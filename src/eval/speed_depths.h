// Prefill and decode speed at given depths of context, for one or more sequences at a time and at
// several levels. The context is read once, at level 0; every measurement starts from a copy of its
// cache, folded to the level where that is not 0, so that all begin at exactly the same depth.
// Copies share no memory, as the sequences of a server's batch do not.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/exec.h"
#include "base/stage_times.h"
#include "base/status.h"
#include "cache/cache_pool.h"
#include "model/hybrid_model.h"

namespace dsla {

struct DepthOptions {
  std::vector<int> levels;
  std::vector<int> depths;         // tokens of context
  std::vector<int> batches = {1};  // sequences that decode together
  int prefill_tokens = 512;        // read in one step, by one sequence; 0: prefill is not measured
  int decode_tokens = 64;
  int repetitions = 3;
  int prefill_chunk = 512;  // how the context is read
  bool stages = false;      // note the time of every stage of a step (some 10 us of it); on the CPU
};

// Seconds of each repetition.
struct DepthSpeed {
  int level = 0;
  int depth = 0;
  int sequences = 1;
  std::vector<double> prefill;  // all prefill_tokens; empty for more than one sequence
  std::vector<double> decode;   // one step of all sequences, mean of decode_tokens steps
  StageTimes prefill_stages, decode_stages;  // sums over all repetitions, and over all decode steps
};

// In the order of depths, ascending, then levels, then batches. `text` is repeated where it is too
// short. The pool must hold the context and the largest batch of copies of it.
Expected<std::vector<DepthSpeed>> MeasureDepths(
    const ExecContext& ctx, const HybridModel& model, CachePool& pool,
    std::span<const int32_t> text, const DepthOptions& options,
    const std::function<void(const std::string&)>& progress = {});

}  // namespace dsla
