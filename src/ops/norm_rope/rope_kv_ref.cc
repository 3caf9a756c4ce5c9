#include <algorithm>
#include <cmath>
#include <vector>

#include "base/half.h"
#include "ops/attention/paging.h"
#include "ops/norm_rope/rope_kv.h"

namespace dsla {
namespace {

// One head's row of K or V as its cache holds it: to element `at` of `base`.
void PutRow(DType type, const float* x, int D, void* base, int64_t at, float* scale) {
  float most = 0;
  for (int d = 0; d < D; ++d) most = std::max(most, std::abs(x[d]));
  for (int d = 0; d < D; ++d) {
    switch (type) {
      case DType::kF32:
        static_cast<float*>(base)[at + d] = x[d];
        break;
      case DType::kBF16:
        static_cast<bf16*>(base)[at + d] = ToBf16(x[d]);
        break;
      case DType::kI8:
        static_cast<int8_t*>(base)[at + d] =
            most > 0 ? static_cast<int8_t>(std::nearbyint(x[d] * (127.f / most))) : int8_t{0};
        break;
    }
  }
  if (type == DType::kI8) *scale = most / 127.f;
}

}  // namespace

void RopeKvRef(const RopeKvArgs& a) {
  const int D = a.table->D();
  RopeArgs rope{.x = a.qkv,
                .stride = a.stride,
                .T = a.T,
                .heads = a.H,
                .positions = a.positions,
                .table = a.table,
                .norm_weight = a.q_norm,
                .norm_eps = a.norm_eps};
  NormRopeRef(rope);
  const int64_t width = int64_t{a.Hkv} * D;
  std::vector<float> keys(static_cast<size_t>(a.T * width));
  for (int64_t t = 0; t < a.T; ++t)
    std::copy_n(a.qkv + t * a.stride + int64_t{a.H} * D, width, keys.data() + t * width);
  rope.x = keys.data();
  rope.stride = width;
  rope.heads = a.Hkv;
  rope.norm_weight = a.k_norm;
  NormRopeRef(rope);
  for (int n = 0; n < a.paged.N; ++n) {
    for (int64_t t = a.paged.row_start[n]; t < a.paged.row_start[n + 1]; ++t) {
      const int s = a.paged.pos[n] + static_cast<int>(t - a.paged.row_start[n]);
      for (int h = 0; h < a.Hkv; ++h) {
        const bool scaled = a.kv.dtype == DType::kI8;
        const auto put = [&](const float* x, void* base) {
          PutRow(a.kv.dtype, x, D, base, RowOffset(a.kv, a.tables, n, h, s),
                 scaled ? RowScale(a.kv, base, a.tables, n, h, s) : nullptr);
        };
        put(keys.data() + t * width + int64_t{h} * D, a.kv.k);
        put(a.qkv + t * a.stride + (int64_t{a.H} + a.Hkv + h) * D, a.kv.v);
      }
    }
  }
  for (int64_t t = a.paged.N > 0 ? a.paged.row_start[a.paged.N] : 0; t < a.T; ++t) {
    for (int h = 0; h < a.Hkv; ++h) {
      const int64_t at = t * width + int64_t{h} * D;
      PutRow(a.row_type, keys.data() + at, D, a.k, at, nullptr);
      PutRow(a.row_type, a.qkv + t * a.stride + (int64_t{a.H} + a.Hkv + h) * D, D, a.v, at,
             nullptr);
    }
  }
}

}  // namespace dsla
