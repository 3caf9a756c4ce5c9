// Measures the cost model that the level policy decides by: a few prefill chunks, decode steps and
// folds at levels 0 and the top, with short and long contexts, on this machine and with
// these threads. Runs before the server takes requests; the longest contexts are not computed but
// made up (their keys and values are zeros), so that it takes seconds.
#pragma once

#include <cstdint>

#include "adapt/cost_model.h"
#include "base/exec.h"
#include "base/status.h"
#include "model/hybrid_model.h"

namespace dsla {

struct CalibrateOptions {
  int64_t memory_bytes = 0;  // of the cache: contexts are cut to what fits
  int top_level = 0;         // the highest that a policy may choose
  // After it, every point having been measured once, none is measured again. A quiet machine takes
  // half of it; one that is busy with other things is measured until it gives the same time twice.
  double most_seconds = 8;
};

// In tokens, of what is measured on a machine of any speed: less than usual where memory is short.
int64_t LongestContext(const HybridModel& model, const CalibrateOptions& options);

// kResourceExhausted when not even the shortest context fits the memory.
Expected<CostModel> Calibrate(const ExecContext& ctx, const HybridModel& model,
                              const CalibrateOptions& options);

}  // namespace dsla
