// Causal softmax attention over a paged KV cache, for prefill chunks and decode rows alike (a
// ragged batch, GQA-aware). K and V of the new rows are already in the pages (RopeKvCpu). fp32
// arithmetic; K and V are read in the cache's dtype.
#pragma once

#include <cstdint>

#include "base/exec.h"
#include "ops/views.h"

namespace dsla {

// How the rows of a call are cut into tasks. It follows from the rows, the heads and the window
// alone, so the layers of a step share one.
struct AttentionTask;
struct AttentionMerge;
struct PagedAttentionPlan {
  const AttentionTask* tasks = nullptr;
  const AttentionMerge* merges = nullptr;
  int64_t num_tasks = 0, num_merges = 0;
  int64_t partials = 0;                  // floats of partial results
  bool prefill = false, decode = false;  // which forms occur
};

struct PagedAttentionArgs {
  RaggedRows rows;
  PageTables tables;
  PagedKvView kv;
  int H = 0;
  float scale = 0;           // usually 1 / sqrt(D)
  int sliding_window = 0;    // keys a query sees, itself included; 0 = all
  const float* q = nullptr;  // [T, H, D], rotated
  int64_t q_stride = 0;      // floats between rows of q
  float* out = nullptr;      // [T, H, D], dense
  float* lse = nullptr;      // [T, H] natural log of the sum of exp(scale * q.k), or null
  const PagedAttentionPlan* plan = nullptr;  // PlanPagedAttention's; null: the call makes its own
};

// Reads rows, H, sliding_window, and the heads of kv. The plan lies in `workspace`.
PagedAttentionPlan PlanPagedAttention(const PagedAttentionArgs& args, Workspace& workspace);

// Row (n, i) attends to the tokens [max(0, t - sliding_window + 1), t], t = pos[n] + i.
// Deterministic; the result of a row does not depend on the number of threads, nor on which other
// rows are in the batch.
void PagedAttentionCpu(const ExecContext& ctx, const PagedAttentionArgs& args);

// The oracle: fp64 sums, scalar, one thread.
void PagedAttentionRef(const PagedAttentionArgs& args);

}  // namespace dsla
