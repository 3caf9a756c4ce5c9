#include <algorithm>
#include <vector>

#include "ops/attention/cache_row_ref.h"
#include "ops/attention/paging.h"
#include "ops/norm_rope/rope_kv.h"

namespace dsla {

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
          PutCacheRowRef(a.kv.dtype, x, D, base, RowOffset(a.kv, a.tables, n, h, s),
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
      PutCacheRowRef(a.row_type, keys.data() + at, D, a.k, at, nullptr);
      PutCacheRowRef(a.row_type, a.qkv + t * a.stride + (int64_t{a.H} + a.Hkv + h) * D, D, a.v, at,
                     nullptr);
    }
  }
}

}  // namespace dsla
