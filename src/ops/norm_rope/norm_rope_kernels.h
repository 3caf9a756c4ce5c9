// The CPU kernels behind norm_rope.h, each on one thread, and how rows are shared out among
// threads. Internal to this folder.
#pragma once

#include <cstdint>

#include "ops/norm_rope/norm_rope.h"

namespace dsla {

// Calls body(begin, end, thread) for ranges of [0, T).
template <typename Body>
void ForRows(const ExecContext& ctx, int64_t T, int64_t floats_per_row, Body&& body) {
  // Floats below which starting threads costs more than the work: some microseconds of one core.
  constexpr int64_t kMinParallel = int64_t{8} << 10;
  if (T * floats_per_row < kMinParallel) {
    if (T > 0) body(0, T, 0);
    return;
  }
  ParallelRanges(ctx, T, 1, body);
}

// One row: out = RMSNorm(x) * weight; with a delta (not null) x + delta is written to `sum_to` (x
// itself) first.
void RmsNormRow(float* sum_to, const float* x, const float* delta, const float* weight, float eps,
                int64_t C, float* out);
// Rows [begin, end).
void NormRopeRows(const RopeArgs& args, int64_t begin, int64_t end);

}  // namespace dsla
