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

// GCC would add up a group's products as a tree, all of them spilled to memory first: a sum that it
// cannot look into stays a running one in its register.
template <class V>
HWY_INLINE V Running(V sum) {
#if HWY_TARGET <= HWY_AVX3
  asm("" : "+v"(sum));
#else
  asm("" : "+x"(sum));
#endif
  return sum;
}

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
  static Ints AddPairs(Ints sum, Ints w, Ints x) {
#if HWY_TARGET <= HWY_AVX3_DL
    return _mm256_dpwssd_epi32(sum, w, x);
#else
    return Running(_mm256_add_epi32(sum, _mm256_madd_epi16(w, x)));
#endif
  }
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
  static Ints AddPairs(Ints sum, Ints w, Ints x) {
#if HWY_TARGET <= HWY_AVX3_DL
    return _mm512_dpwssd_epi32(sum, w, x);
#else
    return Running(_mm512_add_epi32(sum, _mm512_madd_epi16(w, x)));
#endif
  }
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
// A group's products of few rows are summed up in two chains, to hide their latency.
constexpr int Chains(int rows) { return rows <= 2 ? 2 : 1; }

// One row's integers and scales.
struct Row {
  const int16_t* q;
  const float* scale;
  const float* sum;
};

// 2 inputs of one row, for every feature.
template <class B>
HWY_INLINE typename B::Ints Inputs(const int16_t* p) {
  int32_t two;
  std::memcpy(&two, p, sizeof(two));
  return B::All(two);
}

template <class B, int kT>
struct Totals {
  typename B::Ints of[Chains(kT)][kT];

  HWY_INLINE Totals() {
    for (auto& chain : of)
      for (auto& total : chain) total = B::Zero();
  }
  // Two inputs of each row, the first of them `input`. A group's 32 products of 127 * 16256 fit 32
  // bits, in whatever order.
  HWY_INLINE void Add(int chain, typename B::Ints w, const Row (&row)[kT], int64_t input) {
    auto& total = of[chain % Chains(kT)];
    for (int t = 0; t < kT; ++t) total[t] = B::AddPairs(total[t], w, Inputs<B>(row[t].q + input));
  }
  HWY_INLINE typename B::Floats Of(int t) const {
    if constexpr (Chains(kT) == 2) return B::ToFloats(B::Add(of[0][t], of[1][t]));
    return B::ToFloats(of[0][t]);
  }
};

// Group g at w: 8 inputs in every step for int4, 4 for int8.
template <class B, int kT>
HWY_INLINE void Int8Group(const uint8_t* w, int64_t block_bytes, int64_t g, const Row (&row)[kT],
                          Totals<B, kT>& totals) {
  for (int c = 0; c < 8; ++c) {
    const auto four = B::Load(w + c * 32, block_bytes);
    const int64_t input = g * kQuantGroup + c * 4;
    totals.Add(0, B::template SignedRight16<8>(B::template Left16<8>(four)), row, input);
    totals.Add(1, B::template SignedRight16<8>(four), row, input + 2);
  }
}
template <class B, int kT>
HWY_INLINE void Int4Group(const uint8_t* w, int64_t block_bytes, int64_t g, const Row (&row)[kT],
                          Totals<B, kT>& totals) {
  const auto low = B::All(0x000f000f);
  for (int c = 0; c < 4; ++c) {
    // Chunk c in the low halves of the bytes, c + 4 in the high ones.
    const auto eight = B::Load(w + c * 32, block_bytes);
    const int64_t input = g * kQuantGroup + c * 4;
    totals.Add(0, B::And(eight, low), row, input);
    totals.Add(1, B::And(B::template Right16<8>(eight), low), row, input + 2);
    totals.Add(0, B::And(B::template Right16<4>(eight), low), row, input + 16);
    totals.Add(1, B::template Right16<12>(eight), row, input + 18);
  }
}

template <class B, int kBits, int kT>
HWY_INLINE void Groups(const GroupQuantShape& shape, const BlockView& block, bool ahead,
                       const Row (&row)[kT], typename B::Floats (&sum)[kT]) {
  constexpr int kGroupBytes = 32 * kBits;
  const int64_t block_bytes = shape.block_bytes();
  for (int64_t g = 0; g < shape.groups(); ++g) {
    const uint8_t* w = block.q + g * kGroupBytes;
    if (ahead) {  // the next blocks, in address order, with int4 a line more, for the scales
      for (int b = 0; b < B::kBlocks; ++b)
        for (int i = 0; i < (kBits == 8 ? 256 : 192); i += 64)
          hwy::Prefetch(w + (B::kBlocks + b) * block_bytes + i);
    }
    Totals<B, kT> totals;
    if constexpr (kBits == 8)
      Int8Group(w, block_bytes, g, row, totals);
    else
      Int4Group(w, block_bytes, g, row, totals);
    const auto d = B::Scales(block.d + g * kQuantBlock, block_bytes),
               m = B::Scales(block.m + g * kQuantBlock, block_bytes);
    for (int t = 0; t < kT; ++t) {
      sum[t] = B::MulAdd(totals.Of(t), B::Mul(d, B::All(row[t].scale[g])), sum[t]);
      sum[t] = B::MulAdd(m, B::All(row[t].sum[g]), sum[t]);
    }
  }
}

template <class B, int kBits, int kT>
HWY_NOINLINE void Rows(const GroupQuantArgs& a, int64_t block, int64_t t0, bool ahead) {
  const GroupQuantShape& shape = a.shape;
  const BlockView view = ViewBlock(shape, a.weight, block);
  Row row[kT];
  typename B::Floats sum[kT];
  for (int t = 0; t < kT; ++t) {
    const int64_t at = (t0 + t) * shape.stride(), group = (t0 + t) * shape.groups();
    row[t] = {a.x.q + at, a.x.scale + group, a.x.sum + group};
    sum[t] = B::All(0.f);
  }
  Groups<B, kBits, kT>(shape, view, ahead, row, sum);
  constexpr int kFeatures = B::kBlocks * kQuantBlock;
  const int64_t first = block * kQuantBlock;
  const int count = static_cast<int>(std::min<int64_t>(kFeatures, shape.out - first));
  for (int t = 0; t < kT; ++t) {
    alignas(64) float lanes[kFeatures];
    B::Store(sum[t], lanes);
    float* y = a.y + (t0 + t) * a.y_stride + first;
    for (int i = 0; i < count; ++i) {
      const float value = lanes[i] + (a.bias != nullptr ? a.bias[first + i] : 0.f);
      y[i] = a.accumulate ? y[i] + value : value;
    }
  }
}

template <class B, int kBits, int kT>
HWY_INLINE void LastRows(int64_t rows, const GroupQuantArgs& a, int64_t block, int64_t t0,
                         bool ahead) {
  if constexpr (kT > 0) {
    if (rows == kT)
      Rows<B, kBits, kT>(a, block, t0, ahead);
    else
      LastRows<B, kBits, kT - 1>(rows, a, block, t0, ahead);
  }
}

template <class B, int kBits>
void BlockRows(const GroupQuantArgs& a, int64_t block, bool ahead) {
  int64_t t = 0;
  for (; t + kRowTile <= a.T; t += kRowTile) Rows<B, kBits, kRowTile>(a, block, t, ahead && t == 0);
  LastRows<B, kBits, kRowTile - 1>(a.T - t, a, block, t, ahead && t == 0);
}

template <int kBits>
void Blocks(const GroupQuantArgs& a, int64_t begin, int64_t end) {
  constexpr int kWide = WideBlocks::kBlocks;
  int64_t block = begin;
  for (; block + kWide <= end; block += kWide)
    BlockRows<WideBlocks, kBits>(a, block, block + 2 * kWide <= end);
  for (; block < end; ++block) BlockRows<OneBlock, kBits>(a, block, false);
}

void ProductTarget(const GroupQuantArgs& a, int64_t begin, int64_t end) {
  if (a.shape.bits == 8)
    Blocks<8>(a, begin, end);
  else
    Blocks<4>(a, begin, end);
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
