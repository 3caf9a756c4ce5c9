// Sums of squares and the rotation of one head, for the kernels of this folder. Included once per
// Highway target.

#if defined(DSLA_OPS_NORM_ROPE_ROTATE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_NORM_ROPE_ROTATE_INL_H_
#undef DSLA_OPS_NORM_ROPE_ROTATE_INL_H_
#else
#define DSLA_OPS_NORM_ROPE_ROTATE_INL_H_
#endif

#include <cmath>
#include <cstdint>

#include "hwy/highway.h"
#include "ops/simd/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using Tag = hn::ScalableTag<float>;
using Vec = hn::Vec<Tag>;
constexpr int64_t kLanes = HWY_LANES(float);

// Calls body(i, n) for [0, size): n = kLanes for whole vectors, less for the last.
template <typename Body>
HWY_INLINE void Vectors(int64_t size, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, size - i);
}
HWY_INLINE Vec Load(const float* p, int64_t n) {
  const Tag d;
  return n == kLanes ? hn::LoadU(d, p) : LoadPart(d, p, static_cast<size_t>(n));
}
HWY_INLINE void Store(Vec v, float* p, int64_t n) {
  const Tag d;
  if (n == kLanes)
    hn::StoreU(v, d, p);
  else
    StorePart(d, v, p, static_cast<size_t>(n));
}

// sum(x^2), or of x + delta, which then replaces x. Four accumulators cover the latency of the
// multiply-add.
template <bool kAdd>
HWY_INLINE float SumOfSquares(float* sum_to, const float* x, const float* delta, int64_t n) {
  const Tag d;
  Vec sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  const auto step = [&](int64_t i, int64_t lanes, Vec& acc) {
    Vec v = Load(x + i, lanes);
    if constexpr (kAdd) {
      v = hn::Add(v, Load(delta + i, lanes));
      Store(v, sum_to + i, lanes);
    }
    acc = hn::MulAdd(v, v, acc);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) step(i + j * kLanes, kLanes, sum[j]);
  Vectors(n - i, [&](int64_t k, int64_t lanes) { step(i + k, lanes, sum[0]); });
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3]))));
}

HWY_INLINE float InverseRms(float squares, int64_t n, float eps) {
  return 1.f / std::sqrt(squares / static_cast<float>(n) + eps);
}

// One head, to `to`, which may be x: x[d], x[d + half] turned by the angle of d, after RMSNorm
// where kNorm.
template <bool kNorm>
HWY_INLINE void RotateHead(const float* x, int64_t half, const float* cos, const float* sin,
                           const float* weight, float eps, float* to) {
  const Tag d;
  Vec scale = hn::Zero(d);
  if constexpr (kNorm)
    scale =
        hn::Set(d, InverseRms(SumOfSquares<false>(nullptr, x, nullptr, 2 * half), 2 * half, eps));
  Vectors(half, [&](int64_t i, int64_t n) {
    Vec a = Load(x + i, n), b = Load(x + half + i, n);
    if constexpr (kNorm) {
      a = hn::Mul(hn::Mul(a, scale), Load(weight + i, n));
      b = hn::Mul(hn::Mul(b, scale), Load(weight + half + i, n));
    }
    const Vec c = Load(cos + i, n), s = Load(sin + i, n);
    Store(hn::NegMulAdd(b, s, hn::Mul(a, c)), to + i, n);
    Store(hn::MulAdd(a, s, hn::Mul(b, c)), to + half + i, n);
  });
}
// The same, with a norm where there is a weight.
HWY_INLINE void NormRotateHead(const float* x, int64_t half, const float* cos, const float* sin,
                               const float* weight, float eps, float* to) {
  if (weight != nullptr)
    RotateHead<true>(x, half, cos, sin, weight, eps, to);
  else
    RotateHead<false>(x, half, cos, sin, nullptr, 0, to);
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_NORM_ROPE_ROTATE_INL_H_
