#include "ops/norm_rope/norm_rope_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/norm_rope/norm_rope_kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "ops/norm_rope/rotate-inl.h"
#include "ops/simd/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {

void RmsNormTarget(float* sum_to, const float* x, const float* delta, const float* weight,
                   float eps, int64_t C, float* out) {
  const float squares = delta != nullptr ? SumOfSquares<true>(sum_to, x, delta, C)
                                         : SumOfSquares<false>(nullptr, x, nullptr, C);
  const Vec scale = hn::Set(Tag(), InverseRms(squares, C, eps));
  Vectors(C, [&](int64_t i, int64_t n) {
    Store(hn::Mul(hn::Mul(Load(x + i, n), scale), Load(weight + i, n)), out + i, n);
  });
}

void SiluMulTarget(const float* gate_up, int64_t ffn, int64_t begin, int64_t end, float* out) {
  const Tag d;
  Vectors(end - begin, [&](int64_t i, int64_t n) {
    const Vec g = Load(gate_up + begin + i, n), up = Load(gate_up + ffn + begin + i, n);
    Store(hn::Mul(hn::Mul(g, Sigmoid(d, g)), up), out + begin + i, n);
  });
}

void NormRopeTarget(const RopeArgs& a, int64_t begin, int64_t end) {
  const int64_t half = a.table->D() / 2;
  for (int64_t t = begin; t < end; ++t) {
    const float* cos = a.table->cos() + a.positions[t] * half;
    const float* sin = a.table->sin() + a.positions[t] * half;
    for (int h = 0; h < a.heads; ++h) {
      float* x = a.x + t * a.stride + h * 2 * half;
      NormRotateHead(x, half, cos, sin, a.norm_weight, a.norm_eps, x);
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

void RmsNormRow(float* sum_to, const float* x, const float* delta, const float* weight, float eps,
                int64_t C, float* out) {
  HWY_DYNAMIC_DISPATCH(RmsNormTarget)(sum_to, x, delta, weight, eps, C, out);
}
void SiluMulRow(const float* gate_up, int64_t ffn, int64_t begin, int64_t end, float* out) {
  HWY_DYNAMIC_DISPATCH(SiluMulTarget)(gate_up, ffn, begin, end, out);
}
void NormRopeRows(const RopeArgs& args, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(NormRopeTarget)(args, begin, end);
}

}  // namespace dsla
#endif  // HWY_ONCE
