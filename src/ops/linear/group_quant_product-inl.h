// Products of rows with integer weights, per target: see group_quant.h for the layout.
#if defined(DSLA_OPS_LINEAR_GROUP_QUANT_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_LINEAR_GROUP_QUANT_PRODUCT_INL_H_
#undef DSLA_OPS_LINEAR_GROUP_QUANT_PRODUCT_INL_H_
#else
#define DSLA_OPS_LINEAR_GROUP_QUANT_PRODUCT_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/half.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "ops/linear/group_quant.h"

// Integer dot products are written in intrinsics: the library's vectors have none for bytes.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {

// Where input i of a group lies among QuantRows::q.
constexpr int Place(int i) { return i / 4 * 4 + i % 2 * 2 + i % 4 / 2; }

#if defined(__x86_64__) && HWY_TARGET <= HWY_AVX2

// A block's 8 features in the lanes of a vector.
struct OneBlock {
  static constexpr int kBlocks = 1;
  using Ints = __m256i;
  using Floats = __m256;
  static Ints Load(const uint8_t* p, int64_t /*block_bytes*/) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Floats Scales(const uint16_t* p, int64_t /*block_bytes*/) {
    return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Ints Zero() { return _mm256_setzero_si256(); }
  static Ints All(int32_t x) { return _mm256_set1_epi32(x); }
  static Floats All(float x) { return _mm256_set1_ps(x); }
  static Ints And(Ints a, Ints b) { return _mm256_and_si256(a, b); }
  static Ints Add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  template <int kBits>
  static Ints Left16(Ints x) {
    return _mm256_slli_epi16(x, kBits);
  }
  template <int kBits>
  static Ints Right16(Ints x) {
    return _mm256_srli_epi16(x, kBits);
  }
  template <int kBits>
  static Ints SignedRight16(Ints x) {
    return _mm256_srai_epi16(x, kBits);
  }
  static Ints MulPairs(Ints w, Ints x) { return _mm256_madd_epi16(w, x); }
  static Floats ToFloats(Ints x) { return _mm256_cvtepi32_ps(x); }
  static Floats Mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats MulAdd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static void Store(Floats x, float* to) { _mm256_store_ps(to, x); }
};

#if HWY_TARGET <= HWY_AVX3
// The same for this block and the next: the same operations lane by lane, so the same bits.
struct TwoBlocks {
  static constexpr int kBlocks = 2;
  using Ints = __m512i;
  using Floats = __m512;
  static Ints Load(const uint8_t* p, int64_t block_bytes) {
    const auto* first = reinterpret_cast<const __m256i*>(p);
    const auto* second = reinterpret_cast<const __m256i*>(p + block_bytes);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_load_si256(first)),
                              _mm256_load_si256(second), 1);
  }
  static Floats Scales(const uint16_t* p, int64_t block_bytes) {
    const auto* first = reinterpret_cast<const __m128i*>(p);
    const auto* second =
        reinterpret_cast<const __m128i*>(reinterpret_cast<const uint8_t*>(p) + block_bytes);
    return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_load_si128(first)),
                                                   _mm_load_si128(second), 1));
  }
  static Ints Zero() { return _mm512_setzero_si512(); }
  static Ints All(int32_t x) { return _mm512_set1_epi32(x); }
  static Floats All(float x) { return _mm512_set1_ps(x); }
  static Ints And(Ints a, Ints b) { return _mm512_and_si512(a, b); }
  static Ints Add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  template <int kBits>
  static Ints Left16(Ints x) {
    return _mm512_slli_epi16(x, kBits);
  }
  template <int kBits>
  static Ints Right16(Ints x) {
    return _mm512_srli_epi16(x, kBits);
  }
  template <int kBits>
  static Ints SignedRight16(Ints x) {
    return _mm512_srai_epi16(x, kBits);
  }
  static Ints MulPairs(Ints w, Ints x) { return _mm512_madd_epi16(w, x); }
  static Floats ToFloats(Ints x) { return _mm512_cvtepi32_ps(x); }
  static Floats Mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats MulAdd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static void Store(Floats x, float* to) { _mm512_store_ps(to, x); }
};
using WideBlocks = TwoBlocks;
#else
using WideBlocks = OneBlock;
#endif

// The features of one or two blocks, T rows, all inputs: per row sums of integers and one of
// floats, beside them the weights, a mask and a product in 16 or, with AVX-512, 32 registers.
constexpr int kRowTile = HWY_TARGET <= HWY_AVX3 ? 8 : 4;

// One row's integers and scales.
struct Row {
  const int16_t* q;
  const float* scale;
  const float* sum;
};

namespace plain {
#include "ops/linear/group_quant_rows-inl.h"
}  // namespace plain

#if HWY_TARGET == HWY_AVX3
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512vnni")
namespace dsla {
namespace HWY_NAMESPACE {
namespace vnni {
#define DSLA_WITH_VNNI
#include "ops/linear/group_quant_rows-inl.h"
#undef DSLA_WITH_VNNI
}  // namespace vnni
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_POP_ATTRIBUTES
namespace dsla {
namespace HWY_NAMESPACE {
#endif

void ProductTarget(const GroupQuantArgs& a, int64_t begin, int64_t end) {
#if HWY_TARGET == HWY_AVX3
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  if (has_vnni) return vnni::AllRows(a, begin, end);
#endif
  plain::AllRows(a, begin, end);
}

#else

// Without AVX2: the plain loops, the same integers and the same order of the groups.
inline int Weight(const GroupQuantShape& shape, const BlockView& block, int64_t g, int lane,
                  int i) {
  const int chunk = i / 4;
  if (shape.bits == 8) return static_cast<int8_t>(block.q[g * 256 + chunk * 32 + 4 * lane + i % 4]);
  const int both = block.q[g * 128 + chunk % 4 * 32 + 4 * lane + i % 4];
  return chunk < 4 ? both & 15 : both >> 4;
}

void ProductTarget(const GroupQuantArgs& a, int64_t begin, int64_t end) {
  const GroupQuantShape& shape = a.shape;
  for (int64_t o = begin * kQuantBlock; o < std::min(end * kQuantBlock, shape.out); ++o) {
    const BlockView block = ViewBlock(shape, a.weight, o / kQuantBlock);
    const int lane = static_cast<int>(o % kQuantBlock);
    for (int64_t t = 0; t < a.T; ++t) {
      float sum = 0;
      for (int64_t g = 0; g < shape.groups(); ++g) {
        const int64_t first = t * shape.stride() + g * kQuantGroup;
        int dot = 0;
        for (int i = 0; i < kQuantGroup; ++i)
          dot += Weight(shape, block, g, lane, i) * a.x.q[first + Place(i)];
        const int64_t at = t * shape.groups() + g;
        const float d = ToFloat(f16{block.d[g * kQuantBlock + lane]});
        sum = std::fma(static_cast<float>(dot), d * a.x.scale[at], sum);
        sum = std::fma(ToFloat(f16{block.m[g * kQuantBlock + lane]}), a.x.sum[at], sum);
      }
      if (a.bias != nullptr) sum += a.bias[o];
      float& y = a.y[t * a.y_stride + o];
      y = a.accumulate ? y + sum : sum;
    }
  }
}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_LINEAR_GROUP_QUANT_PRODUCT_INL_H_
