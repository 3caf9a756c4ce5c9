// Feature maps and gates shared by the chunked and the recurrent form.
// Included once per Highway target.

#if defined(DSLA_OPS_DSLA_FEATURES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_DSLA_FEATURES_INL_H_
#undef DSLA_OPS_DSLA_FEATURES_INL_H_
#else
#define DSLA_OPS_DSLA_FEATURES_INL_H_
#endif

#include <cstdint>

#include "hwy/highway.h"
#include "ops/dsla/dsla.h"
#include "ops/simd/math-inl.h"
#include "ops/simd/tile-inl.h"
#include "ops/simd/transpose-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {
namespace {  // of the one file that includes this

namespace hn = hwy::HWY_NAMESPACE;
using F32 = hn::ScalableTag<float>;
using V32 = hn::Vec<F32>;

HWY_INLINE float Sum(F32 d, V32 v) { return hn::GetLane(hn::SumOfLanes(d, v)); }

// c [V * lanes] = a [K] B [K, V * lanes]
template <int V>
HWY_INLINE void RowTimesMatrix(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, int b_row,
                               float* HWY_RESTRICT c, int K) {
  const F32 d;
  V32 sum[V];
  for (int v = 0; v < V; ++v) sum[v] = hn::Zero(d);
  for (int k = 0; k < K; ++k) {
    const V32 x = hn::Set(d, a[k]);
    for (int v = 0; v < V; ++v)
      sum[v] = hn::MulAdd(x, hn::LoadU(d, b + k * b_row + v * kTileLanes), sum[v]);
  }
  for (int v = 0; v < V; ++v) hn::StoreU(sum[v], d, c + v * kTileLanes);
}

// C [M, N] = A [M, K] B [K, N] for dense A and weights B. A single row reads the weights once, from
// memory as a rule, so it takes 8 vectors of a row of B at a time where GemmTile's narrow panels
// would defeat the prefetcher. The same sums in the same order, as K <= kTileDepth.
HWY_INLINE void Project(const float* a, const float* b, float* c, int c_row, int M, int N, int K) {
  if (M > 1) {
    GemmTile(a, K, 1, b, N, c, c_row, M, N, K, false);
    return;
  }
  int n = 0;
  for (; n + 8 * kTileLanes <= N; n += 8 * kTileLanes) RowTimesMatrix<8>(a, b + n, N, c + n, K);
  for (; n < N; n += kTileLanes) RowTimesMatrix<1>(a, b + n, N, c + n, K);
}

// y [D] -> e [F] = exp(y - max y), then exp(min y - y) if F = 2D, not normalized; inverse[0..1] are
// 1 / their sums.
HWY_INLINE void ExpFeatures(const float* HWY_RESTRICT y, int D, int F, float* HWY_RESTRICT e,
                            float* HWY_RESTRICT inverse) {
  const F32 d;
  const int lanes = kTileLanes;
  V32 high = hn::LoadU(d, y), low = high;
  for (int i = lanes; i < D; i += lanes) {
    const V32 x = hn::LoadU(d, y + i);
    high = hn::Max(high, x);
    low = hn::Min(low, x);
  }
  high = hn::MaxOfLanes(d, high);
  V32 sum = hn::Zero(d);
  for (int i = 0; i < D; i += lanes) {
    const V32 x = Exp(d, hn::Sub(hn::LoadU(d, y + i), high));
    hn::StoreU(x, d, e + i);
    sum = hn::Add(sum, x);
  }
  inverse[0] = 1.f / Sum(d, sum);
  if (F == D) return;
  low = hn::MinOfLanes(d, low);
  sum = hn::Zero(d);
  for (int i = 0; i < D; i += lanes) {
    const V32 x = Exp(d, hn::Sub(low, hn::LoadU(d, y + i)));
    hn::StoreU(x, d, e + D + i);
    sum = hn::Add(sum, x);
  }
  inverse[1] = 1.f / Sum(d, sum);
}

// k~: undoes the rotation of one key [D] at the position of the cos and sin rows [D/2].
HWY_INLINE void Unrotate(const float* HWY_RESTRICT k, const float* HWY_RESTRICT cos,
                         const float* HWY_RESTRICT sin, int D, float* HWY_RESTRICT out) {
  const hn::CappedTag<float, 8> d;  // D / 2 is a multiple of 8
  const int half = D / 2;
  for (int i = 0; i < half; i += static_cast<int>(hn::Lanes(d))) {
    const auto lo = hn::LoadU(d, k + i), hi = hn::LoadU(d, k + half + i);
    const auto c = hn::LoadU(d, cos + i), s = hn::LoadU(d, sin + i);
    hn::StoreU(hn::MulAdd(lo, c, hn::Mul(hi, s)), d, out + i);
    hn::StoreU(hn::NegMulAdd(lo, s, hn::Mul(hi, c)), d, out + half + i);
  }
}

// What the two parts of an output are multiplied with: w / (denominator + epsilon), (1 - w) / sum.
struct Shares {
  V32 linear, window;
};
HWY_INLINE Shares LinearShare(V32 denominator) {
  const F32 d;
  return {hn::Div(hn::Set(d, 1.f), hn::Add(denominator, hn::Set(d, kDslaEpsilon))), hn::Zero(d)};
}
// With a window of weights exp(score - top).
HWY_INLINE Shares MergeShares(V32 denominator, V32 top, V32 sum, V32 claim) {
  const F32 d;
  const V32 one = hn::Set(d, 1.f), epsilon = hn::Set(d, kDslaEpsilon);
  // sigmoid(claim - top - log(sum)) without the logarithm; an overflow to infinity gives 0.
  const V32 other = hn::Mul(sum, Exp(d, hn::Sub(top, claim)));
  const V32 w = hn::IfThenZeroElse(hn::Lt(denominator, epsilon), hn::Div(one, hn::Add(one, other)));
  return {hn::Div(w, hn::Add(denominator, epsilon)), hn::Div(hn::Sub(one, w), sum)};
}

// a from the gate's logit without its bias.
HWY_INLINE V32 LogGate(F32 d, V32 logit, V32 bias, V32 floor) {
  const V32 a = hn::Mul(LogSigmoid(d, hn::Add(logit, bias)), hn::Set(d, 1.f / kDslaGateDivisor));
  return hn::Max(floor, a);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_DSLA_FEATURES_INL_H_
