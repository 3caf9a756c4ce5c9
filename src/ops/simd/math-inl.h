// Vector functions the CPU kernels share: exp and its relatives in fp32, and the conversions
// between storage types and fp32.
//
// Compiled once per target: include it from a file that uses hwy/foreach_target.h, and call it
// inside that file's HWY_NAMESPACE. Errors are against the exact value, measured by math_test.cc on
// every target. Multiplications and additions that belong together are written as MulAdd, so that
// the compiler has nothing to contract differently from one place to the next.

#if defined(DSLA_OPS_SIMD_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_SIMD_MATH_INL_H_
#undef DSLA_OPS_SIMD_MATH_INL_H_
#else
#define DSLA_OPS_SIMD_MATH_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/half.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {

namespace math_internal {
namespace hn = hwy::HWY_NAMESPACE;

// Clamps that let a NaN in x through: x86 and Arm return the second operand or NaN then, the scalar
// fallback the first.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V AtLeast(D d, float low, V x) {
  const V bound = hn::Set(d, low);
  if constexpr (HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128)
    return hn::IfThenElse(hn::Lt(x, bound), bound, x);
  return hn::Max(bound, x);
}
template <class D, class V = hn::Vec<D>>
HWY_INLINE V AtMost(D d, float high, V x) {
  const V bound = hn::Set(d, high);
  if constexpr (HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128)
    return hn::IfThenElse(hn::Gt(x, bound), bound, x);
  return hn::Min(bound, x);
}

// x = n ln 2 + r with |r| <= ln(2) / 2; returns expm1(r) = r + r^2 q(r). q is the degree-4 minimax
// polynomial for the relative error of exp(r), which is 3.3e-9.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V ReduceAndExpm1(D d, V x, V& n) {
  n = hn::Round(hn::Mul(x, hn::Set(d, 1.44269504f)));
  // ln 2 in two parts; n times the first is exact.
  V r = hn::NegMulAdd(n, hn::Set(d, 0.693359375f), x);
  r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), r);
  V q = hn::MulAdd(hn::Set(d, 1.3813144760e-3f), r, hn::Set(d, 8.3694187924e-3f));
  q = hn::MulAdd(q, r, hn::Set(d, 4.1668456047e-2f));
  q = hn::MulAdd(q, r, hn::Set(d, 1.6666515171e-1f));
  q = hn::MulAdd(q, r, hn::Set(d, 0.49999994039f));
  return hn::MulAdd(hn::Mul(r, r), q, r);
}

// 2^n for an integer -127 < n < 128.
template <class D, class VI>
HWY_INLINE hn::Vec<D> PowerOfTwo(D d, VI n) {
  const hn::RebindToSigned<D> di;
  return hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(n, hn::Set(di, 127))));
}

// p 2^n for |p| in [1/2, 2] and the n of the clamps below.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Scale(D d, V p, V n) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  if constexpr (sizeof(V) == 64) return V{_mm512_scalef_ps(p.raw, n.raw)};
#endif
  // 2^n is the product of two normal powers.
  const hn::RebindToSigned<D> di;
  const auto ni = hn::ConvertTo(di, n);
  const auto half = hn::ShiftRight<1>(ni);
  return hn::Mul(hn::Mul(p, PowerOfTwo(d, half)), PowerOfTwo(d, hn::Sub(ni, half)));
}

}  // namespace math_internal

// e^x. Relative error < 1.2e-7 (1.5 ulp) where the result is normal; below that it runs through the
// subnormals to 0; exp(-inf) = 0, above 88.72 +inf, NaN stays NaN.
template <class D, class V = hwy::HWY_NAMESPACE::Vec<D>>
HWY_INLINE V Exp(D d, V x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const V clamped = math_internal::AtLeast(d, -104.f, math_internal::AtMost(d, 89.f, x));
  V n;
  const V p = math_internal::ReduceAndExpm1(d, clamped, n);
  return math_internal::Scale(d, hn::Add(p, hn::Set(d, 1.f)), n);
}

// e^x - 1 for x <= 0, relative error < 3e-7, also next to 0; expm1(-inf) = -1, NaN stays NaN.
template <class D, class V = hwy::HWY_NAMESPACE::Vec<D>>
HWY_INLINE V Expm1(D d, V x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::RebindToSigned<D> di;
  // The result is -1 in fp32 long before the clamp.
  const V clamped = math_internal::AtLeast(d, -80.f, x);
  V n;
  const V p = math_internal::ReduceAndExpm1(d, clamped, n);
  const V scale = math_internal::PowerOfTwo(d, hn::ConvertTo(di, n));
  return hn::MulAdd(scale, p, hn::Sub(scale, hn::Set(d, 1.f)));
}

// log(1 + x) for x in [0, 1], relative error < 3e-7, also next to 0: 2 atanh(s) with s = x / (2 +
// x) <= 1/3 by its odd minimax polynomial (error 4.6e-9).
template <class D, class V = hwy::HWY_NAMESPACE::Vec<D>>
HWY_INLINE V Log1p01(D d, V x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const V s = hn::Div(x, hn::Add(x, hn::Set(d, 2.f)));
  const V z = hn::Mul(s, s);
  V p = hn::MulAdd(hn::Set(d, 0.14015637338f), z, hn::Set(d, 0.13998931647f));
  p = hn::MulAdd(p, z, hn::Set(d, 0.20010885596f));
  p = hn::MulAdd(p, z, hn::Set(d, 0.33333206177f));
  const V twice = hn::Add(s, s);
  return hn::MulAdd(hn::Mul(twice, z), p, twice);
}

// log(1 / (1 + e^-x)) = min(x, 0) - log1p(e^-|x|), relative error < 6e-7.
template <class D, class V = hwy::HWY_NAMESPACE::Vec<D>>
HWY_INLINE V LogSigmoid(D d, V x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const V e = Exp(d, hn::Neg(hn::Abs(x)));
  return hn::Sub(hn::Min(hn::Zero(d), x), Log1p01(d, e));
}

// 1 / (1 + e^-x), relative error < 4e-7 for x > -87, gradually to 0 below.
template <class D, class V = hwy::HWY_NAMESPACE::Vec<D>>
HWY_INLINE V Sigmoid(D d, V x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const V one = hn::Set(d, 1.f);
  const V e = Exp(d, hn::Neg(hn::Abs(x)));  // <= 1: no overflow on either side
  return hn::Div(hn::IfThenElse(hn::Lt(x, hn::Zero(d)), e, one), hn::Add(one, e));
}

// One vector of fp32 from fp32 or bf16 in memory, unaligned.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> LoadF32(D d, const float* p) {
  return hwy::HWY_NAMESPACE::LoadU(d, p);
}
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> LoadF32(D d, const bf16* p) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<uint16_t, D> du16;
  const auto bits = hn::LoadU(du16, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, bits)));
}

// One vector to bf16 in memory, rounded to nearest even; the same bits as ToBf16 of base/half.h.
template <class D>
HWY_INLINE void StoreBf16(D d, hwy::HWY_NAMESPACE::Vec<D> v, bf16* p) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::RebindToUnsigned<D> du;
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint16_t, D> du16;
  const auto bits = hn::BitCast(du, v);
  const auto high = hn::ShiftRight<16>(bits);
  const auto odd = hn::And(high, hn::Set(du, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(du, 0x7fff)), odd));
  const auto nan = hn::MaskFromVec(hn::BitCast(du, hn::VecFromMask(d, hn::IsNaN(v))));
  const auto result = hn::IfThenElse(nan, hn::Or(high, hn::Set(du, 0x40)), rounded);
  // All values are below 2^16, so that the saturating signed narrowing keeps them.
  hn::StoreU(hn::DemoteTo(du16, hn::BitCast(di, result)), du16, reinterpret_cast<uint16_t*>(p));
}
template <class D>
HWY_INLINE void StoreF32(D d, hwy::HWY_NAMESPACE::Vec<D> v, float* p) {
  hwy::HWY_NAMESPACE::StoreU(v, d, p);
}
template <class D>
HWY_INLINE void StoreF32(D d, hwy::HWY_NAMESPACE::Vec<D> v, bf16* p) {
  StoreBf16(d, v, p);
}

// The first n < lanes elements, the rest 0; nothing past them is read.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> LoadPart(D d, const float* p, size_t n) {
  namespace hn = hwy::HWY_NAMESPACE;
  HWY_ALIGN float buffer[HWY_LANES(float)] = {};
  std::memcpy(buffer, p, n * sizeof(float));
  return hn::Load(d, buffer);
}
// Writes the first n < lanes elements.
template <class D>
HWY_INLINE void StorePart(D d, hwy::HWY_NAMESPACE::Vec<D> v, float* p, size_t n) {
  namespace hn = hwy::HWY_NAMESPACE;
  HWY_ALIGN float buffer[HWY_LANES(float)];
  hn::Store(v, d, buffer);
  std::memcpy(p, buffer, n * sizeof(float));
}

// n elements from one storage type to another.
inline void ConvertRow(const float* from, float* to, size_t n) {
  std::memcpy(to, from, n * sizeof(float));
}
inline void ConvertRow(const bf16* from, bf16* to, size_t n) {
  std::memcpy(to, from, n * sizeof(bf16));
}
inline void ConvertRow(const bf16* from, float* to, size_t n) {
  const hwy::HWY_NAMESPACE::ScalableTag<float> d;
  const size_t lanes = hwy::HWY_NAMESPACE::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) StoreF32(d, LoadF32(d, from + i), to + i);
  for (; i < n; ++i) to[i] = ToFloat(from[i]);
}
inline void ConvertRow(const float* from, bf16* to, size_t n) {
  const hwy::HWY_NAMESPACE::ScalableTag<float> d;
  const size_t lanes = hwy::HWY_NAMESPACE::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) StoreBf16(d, LoadF32(d, from + i), to + i);
  for (; i < n; ++i) to[i] = ToBf16(from[i]);
}

// scale times n integers, to fp32 or bf16.
template <typename T>
inline void DequantizeRow(const int8_t* from, float scale, T* to, int n) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::ScalableTag<float> d;
  const hn::RebindToSigned<decltype(d)> di;
  const hn::Rebind<int8_t, decltype(d)> d8;
  const auto by = hn::Set(d, scale);
  const auto lanes = static_cast<int>(hn::Lanes(d));
  int i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto x = hn::Mul(by, hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(d8, from + i))));
    if constexpr (sizeof(T) == 4)
      StoreF32(d, x, to + i);
    else
      StoreBf16(d, x, to + i);
  }
  for (; i < n; ++i) {
    const float x = scale * static_cast<float>(from[i]);
    if constexpr (sizeof(T) == 4)
      to[i] = x;
    else
      to[i] = ToBf16(x);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_SIMD_MATH_INL_H_
