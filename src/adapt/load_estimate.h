// What a snapshot's sequences would see if the target were a given level, by the cost model.
#pragma once

#include <cstdint>
#include <vector>

#include "adapt/cost_model.h"
#include "adapt/policy.h"

namespace dsla {

struct LoadEstimate {
  // What the load adds to the time to first token: 95th percentile over the sequences that have
  // none yet, seconds, beyond what each one's prompt takes alone at level 0. (No level makes up for
  // a long prompt on an idle server, and nothing has to.) Negative where a level gains more.
  double ttft = 0;
  double tpot = 0;           // seconds per token of a reply, the share of prefill steps included
  int64_t memory_bytes = 0;  // that all sequences, with some growth, would hold
};

struct EstimateOptions {
  int prefill_chunk = 512;
  int growth_tokens = 256;
};

// The level a sequence would have at `target`: never below its own, never above its tier's.
int LevelAt(const SequenceLoad& sequence, int target);

// Tokens below which a converted layer takes more than its cache would.
int BreakEvenTokens(const BlockSizes& sizes);

// With every running sequence raised to `target` (raise_running) or left at its level, and every
// waiting one started at it; but for sequences short of the break-even length.
LoadEstimate EstimateLoad(const LoadSnapshot& load, const CostModel& cost,
                          const EstimateOptions& options, int target, bool raise_running);

}  // namespace dsla
