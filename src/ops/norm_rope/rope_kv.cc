#include "ops/norm_rope/rope_kv.h"

#include <algorithm>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/norm_rope/rope_kv.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Must come after foreach_target.h.
#include "hwy/highway.h"
#include "ops/attention/paging.h"
#include "ops/norm_rope/norm_rope_kernels.h"
#include "ops/norm_rope/rotate-inl.h"
#include "ops/simd/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {

// One row to integers with its scale: the largest becomes 127. A NaN or an infinity makes the
// scale, and with it the row, NaN.
void QuantizeRow(const float* from, int8_t* to, float* scale, int D) {
  const Tag d;
  const hn::Rebind<int8_t, Tag> d8;
  const auto lanes = static_cast<int>(kLanes);
  auto largest = hn::Zero(d), not_finite = hn::Zero(d);
  int i = 0;
  for (; i + lanes <= D; i += lanes) {
    const auto x = hn::LoadU(d, from + i);
    largest = hn::Max(largest, hn::Abs(x));
    not_finite = hn::MulAdd(x, hn::Zero(d), not_finite);
  }
  float most = hn::GetLane(hn::MaxOfLanes(d, largest));
  float nan = hn::GetLane(hn::SumOfLanes(d, not_finite));
  for (int j = i; j < D; ++j) {
    most = std::max(most, std::abs(from[j]));
    nan += from[j] * 0.f;
  }
  *scale = most / 127.f + nan;
  const float inverse = most > 1e-30f && nan == 0.f ? 127.f / most : 0.f;
  const auto by = hn::Set(d, inverse);
  for (i = 0; i + lanes <= D && inverse > 0; i += lanes) {
    const auto q = hn::NearestInt(hn::Mul(by, hn::LoadU(d, from + i)));
    hn::StoreU(hn::DemoteTo(d8, q), d8, to + i);
  }
  for (; i < D; ++i)
    to[i] = inverse > 0 ? static_cast<int8_t>(std::nearbyint(from[i] * inverse)) : int8_t{0};
}

// `count` floats to element `at` of `base`, fp32 or bf16.
HWY_INLINE void PutRow(DType type, const float* from, int64_t count, void* base, int64_t at) {
  const auto n = static_cast<size_t>(count);
  if (type == DType::kF32)
    ConvertRow(from, static_cast<float*>(base) + at, n);
  else
    ConvertRow(from, static_cast<bf16*>(base) + at, n);
}

// k, v: [Hkv, D] of token s of sequence n.
HWY_INLINE void PutInPages(const RopeKvArgs& a, int n, int s, const float* k, const float* v) {
  const int D = a.kv.D;
  for (int h = 0; h < a.Hkv; ++h) {
    const int64_t from = int64_t{h} * D;
    if (a.kv.dtype == DType::kI8) {
      QuantizeRow(k + from, KeyRow<int8_t>(a.kv, a.tables, n, h, s),
                  RowScale(a.kv, a.kv.k, a.tables, n, h, s), D);
      QuantizeRow(v + from, ValueRow<int8_t>(a.kv, a.tables, n, h, s),
                  RowScale(a.kv, a.kv.v, a.tables, n, h, s), D);
      continue;
    }
    const int64_t at = RowOffset(a.kv, a.tables, n, h, s);
    PutRow(a.kv.dtype, k + from, D, a.kv.k, at);
    PutRow(a.kv.dtype, v + from, D, a.kv.v, at);
  }
}

// k: memory for Hkv D floats.
void RopeKvTarget(const RopeKvArgs& a, int64_t begin, int64_t end, float* k) {
  const int64_t half = a.table->D() / 2, D = 2 * half;
  const int64_t paged = a.paged.N > 0 ? a.paged.row_start[a.paged.N] : 0;
  int n = 0;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t position = a.positions[t];
    const float* cos = a.table->cos() + position * half;
    const float* sin = a.table->sin() + position * half;
    float* const q = a.qkv + t * a.stride;
    const float* const keys = q + a.H * D;
    const float* const v = keys + a.Hkv * D;
    for (int64_t h = 0; h < a.H; ++h)
      NormRotateHead(q + h * D, half, cos, sin, a.q_norm, a.norm_eps, q + h * D);
    for (int64_t h = 0; h < a.Hkv; ++h)
      NormRotateHead(keys + h * D, half, cos, sin, a.k_norm, a.norm_eps, k + h * D);
    if (t < paged) {
      while (t >= a.paged.row_start[n + 1]) ++n;
      PutInPages(a, n, static_cast<int>(position), k, v);
    } else {
      PutRow(a.row_type, k, a.Hkv * D, a.k, t * a.Hkv * D);
      PutRow(a.row_type, v, a.Hkv * D, a.v, t * a.Hkv * D);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "base/check.h"

namespace dsla {

HWY_EXPORT(RopeKvTarget);

void RopeKvCpu(const ExecContext& ctx, const RopeKvArgs& args) {
  DSLA_CHECK(args.table != nullptr && ctx.workspace != nullptr);
  const int64_t D = args.table->D(), width = (args.H + int64_t{2} * args.Hkv) * D;
  DSLA_CHECK(args.T <= 1 || args.stride >= width);
  for (int64_t t = 0; t < args.T; ++t)
    DSLA_CHECK(args.positions[t] >= 0 && args.positions[t] < args.table->positions());
  const int64_t paged = args.paged.N > 0 ? args.paged.row_start[args.paged.N] : 0;
  DSLA_CHECK(paged == 0 || (args.kv.D == D && args.kv.Hkv == args.Hkv && args.tables.pages));
  DSLA_CHECK(paged == args.T || (args.k != nullptr && args.v != nullptr));
  const Workspace::Scope scope(*ctx.workspace);
  const int64_t floats = (args.Hkv * D + 15) / 16 * 16;  // a thread's, whole cache lines
  float* const k = ctx.workspace->Take<float>(ctx.threads * floats);
  ForRows(ctx, args.T, width, [&](int64_t begin, int64_t end, int thread) {
    HWY_DYNAMIC_DISPATCH(RopeKvTarget)(args, begin, end, k + thread * floats);
  });
}

}  // namespace dsla
#endif  // HWY_ONCE
