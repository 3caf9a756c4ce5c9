#include "ops/norm_rope/norm_rope_kernels.h"

#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/norm_rope/norm_rope_kernels.cc"
#include "hwy/foreach_target.h"
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

void RmsNormTarget(float* sum_to, const float* x, const float* delta, const float* weight,
                   float eps, int64_t C, float* out, int64_t begin, int64_t end) {
  const Tag d;
  for (int64_t t = begin; t < end; ++t) {
    const float* row = x + t * C;
    const float squares = delta != nullptr
                              ? SumOfSquares<true>(sum_to + t * C, row, delta + t * C, C)
                              : SumOfSquares<false>(nullptr, row, nullptr, C);
    const Vec scale = hn::Set(d, InverseRms(squares, C, eps));
    Vectors(C, [&](int64_t i, int64_t n) {
      Store(hn::Mul(hn::Mul(Load(row + i, n), scale), Load(weight + i, n)), out + t * C + i, n);
    });
  }
}

void SiluMulTarget(const float* gate_up, int64_t ffn, float* out, int64_t begin, int64_t end) {
  const Tag d;
  for (int64_t t = begin; t < end; ++t) {
    const float* gate = gate_up + t * 2 * ffn;
    const float* up = gate + ffn;
    Vectors(ffn, [&](int64_t i, int64_t n) {
      const Vec g = Load(gate + i, n);
      Store(hn::Mul(hn::Mul(g, Sigmoid(d, g)), Load(up + i, n)), out + t * ffn + i, n);
    });
  }
}

// One head: x[d], x[d + half] turned by the angle of d, after RMSNorm where kNorm.
template <bool kNorm>
HWY_INLINE void RotateHead(float* x, int64_t half, const float* cos, const float* sin,
                           const float* weight, float eps) {
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
    Store(hn::NegMulAdd(b, s, hn::Mul(a, c)), x + i, n);
    Store(hn::MulAdd(a, s, hn::Mul(b, c)), x + half + i, n);
  });
}

void NormRopeTarget(const RopeArgs& a, int64_t begin, int64_t end) {
  const int64_t half = a.table->D() / 2;
  for (int64_t t = begin; t < end; ++t) {
    const float* cos = a.table->cos() + a.positions[t] * half;
    const float* sin = a.table->sin() + a.positions[t] * half;
    for (int h = 0; h < a.heads; ++h) {
      float* x = a.x + t * a.stride + h * 2 * half;
      if (a.norm_weight != nullptr)
        RotateHead<true>(x, half, cos, sin, a.norm_weight, a.norm_eps);
      else
        RotateHead<false>(x, half, cos, sin, nullptr, 0);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dsla {

HWY_EXPORT(RmsNormTarget);
HWY_EXPORT(SiluMulTarget);
HWY_EXPORT(NormRopeTarget);

void RmsNormRows(float* sum_to, const float* x, const float* delta, const float* weight, float eps,
                 int64_t C, float* out, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(RmsNormTarget)(sum_to, x, delta, weight, eps, C, out, begin, end);
}
void SiluMulRows(const float* gate_up, int64_t ffn, float* out, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(SiluMulTarget)(gate_up, ffn, out, begin, end);
}
void NormRopeRows(const RopeArgs& args, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(NormRopeTarget)(args, begin, end);
}

}  // namespace dsla
#endif  // HWY_ONCE
