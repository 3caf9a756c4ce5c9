// The CPU kernels behind norm_rope.h, each over rows [begin, end) on one thread. Internal to this
// folder.
#pragma once

#include <cstdint>

#include "ops/norm_rope/norm_rope.h"

namespace dsla {

// out = RMSNorm(x) * weight; with a delta (not null) x + delta is written to `sum_to` (x itself)
// first.
void RmsNormRows(float* sum_to, const float* x, const float* delta, const float* weight, float eps,
                 int64_t C, float* out, int64_t begin, int64_t end);
void SiluMulRows(const float* gate_up, int64_t ffn, float* out, int64_t begin, int64_t end);
void NormRopeRows(const RopeArgs& args, int64_t begin, int64_t end);

}  // namespace dsla
