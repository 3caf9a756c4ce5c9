#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/half.h"
#include "ops/linear/group_quant.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/linear/group_quant_kernels.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

// Integer dot products are written in intrinsics: the library's vectors have none for bytes.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {

// Where input i of a group lies among QuantRows::q.
constexpr int Place(int i) { return i / 4 * 4 + i % 2 * 2 + i % 4 / 2; }

// A block's parts.
struct BlockView {
  const uint16_t* d;
  const uint16_t* m;
  const uint8_t* q;
};
inline BlockView ViewBlock(const GroupQuantShape& shape, const uint8_t* weight, int64_t block) {
  const uint8_t* at = weight + block * shape.block_bytes();
  const auto* d = reinterpret_cast<const uint16_t*>(at);
  return {d, d + shape.groups() * kQuantBlock, at + shape.header_bytes()};
}

#if defined(__x86_64__) && HWY_TARGET <= HWY_AVX2

HWY_INLINE __m256 Scales(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}
HWY_INLINE __m256i Load(const uint8_t* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
// 2 inputs of one row, for each of the 8 features.
HWY_INLINE __m256i Inputs(const int16_t* p) {
  int32_t two;
  std::memcpy(&two, p, sizeof(two));
  return _mm256_set1_epi32(two);
}

// 8 features of T rows, all inputs: per row a sum of integers and one of floats, beside them the
// weights, a mask and a product.
constexpr int kRowTile = 4;

// One row's integers and scales.
struct Row {
  const int16_t* q;
  const float* scale;
  const float* sum;
};

HWY_INLINE __m256 AddGroup(__m256 sum, __m256 d, __m256 m, __m256 total, const Row& row,
                           int64_t g) {
  sum = _mm256_fmadd_ps(total, _mm256_mul_ps(d, _mm256_set1_ps(row.scale[g])), sum);
  return _mm256_fmadd_ps(m, _mm256_set1_ps(row.sum[g]), sum);
}

// GCC would add up a group's products as a tree, all of them spilled to memory first: a sum that it
// cannot look into stays a running one in its register.
HWY_INLINE __m256i Running(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}

// sum += the two products of each feature. A group's 32 of 127 * 16256 fit 32 bits.
HWY_INLINE __m256i AddPairs(__m256i sum, __m256i w, __m256i x) {
#if HWY_TARGET <= HWY_AVX3_DL
  return _mm256_dpwssd_epi32(sum, w, x);
#else
  return Running(_mm256_add_epi32(sum, _mm256_madd_epi16(w, x)));
#endif
}

// Group g: total += w x, 8 inputs in every step for int4, 4 for int8.
template <int kT>
HWY_INLINE void Int8Group(const uint8_t* w, int64_t g, const Row (&row)[kT], __m256i (&total)[kT]) {
  for (int c = 0; c < 8; ++c) {
    const __m256i four = Load(w + c * 32), odd = _mm256_srai_epi16(four, 8),
                  even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
    for (int t = 0; t < kT; ++t) {
      const int16_t* x = row[t].q + g * kQuantGroup + c * 4;
      total[t] = AddPairs(total[t], even, Inputs(x));
      total[t] = AddPairs(total[t], odd, Inputs(x + 2));
    }
  }
}
template <int kT>
HWY_INLINE void Int4Group(const uint8_t* w, int64_t g, const Row (&row)[kT], __m256i (&total)[kT]) {
  const __m256i low = _mm256_set1_epi16(0x0f);
  for (int c = 0; c < 4; ++c) {
    // Chunk c in the low halves of the bytes, c + 4 in the high ones.
    const __m256i eight = Load(w + c * 32), even = _mm256_and_si256(eight, low),
                  odd = _mm256_and_si256(_mm256_srli_epi16(eight, 8), low),
                  later_even = _mm256_and_si256(_mm256_srli_epi16(eight, 4), low),
                  later_odd = _mm256_srli_epi16(eight, 12);
    for (int t = 0; t < kT; ++t) {
      const int16_t* x = row[t].q + g * kQuantGroup + c * 4;
      total[t] = AddPairs(total[t], even, Inputs(x));
      total[t] = AddPairs(total[t], odd, Inputs(x + 2));
      total[t] = AddPairs(total[t], later_even, Inputs(x + 16));
      total[t] = AddPairs(total[t], later_odd, Inputs(x + 18));
    }
  }
}

template <int kBits, int kT>
HWY_INLINE void Groups(const GroupQuantShape& shape, const BlockView& block, bool ahead,
                       const Row (&row)[kT], __m256 (&sum)[kT]) {
  constexpr int kGroupBytes = 32 * kBits;
  for (int64_t g = 0; g < shape.groups(); ++g) {
    const uint8_t* w = block.q + g * kGroupBytes;
    if (ahead) {  // the next block, in address order, with int4 a line more, for the scales
      for (int i = 0; i < (kBits == 8 ? 256 : 192); i += 64)
        hwy::Prefetch(w + shape.block_bytes() + i);
    }
    __m256i total[kT];
    for (int t = 0; t < kT; ++t) total[t] = _mm256_setzero_si256();
    if constexpr (kBits == 8)
      Int8Group(w, g, row, total);
    else
      Int4Group(w, g, row, total);
    const __m256 d = Scales(block.d + g * kQuantBlock), m = Scales(block.m + g * kQuantBlock);
    for (int t = 0; t < kT; ++t)
      sum[t] = AddGroup(sum[t], d, m, _mm256_cvtepi32_ps(total[t]), row[t], g);
  }
}

template <int kBits, int kT>
HWY_NOINLINE void Rows(const GroupQuantArgs& a, int64_t block, int64_t t0, bool ahead) {
  const GroupQuantShape& shape = a.shape;
  const BlockView view = ViewBlock(shape, a.weight, block);
  Row row[kT];
  __m256 sum[kT];
  for (int t = 0; t < kT; ++t) {
    const int64_t at = (t0 + t) * shape.stride(), group = (t0 + t) * shape.groups();
    row[t] = {a.x.q + at, a.x.scale + group, a.x.sum + group};
    sum[t] = _mm256_setzero_ps();
  }
  Groups<kBits, kT>(shape, view, ahead, row, sum);
  const int64_t first = block * kQuantBlock;
  const int count = static_cast<int>(std::min<int64_t>(kQuantBlock, shape.out - first));
  for (int t = 0; t < kT; ++t) {
    alignas(32) float lanes[kQuantBlock];
    _mm256_store_ps(lanes, sum[t]);
    float* y = a.y + (t0 + t) * a.y_stride + first;
    for (int i = 0; i < count; ++i) {
      const float value = lanes[i] + (a.bias != nullptr ? a.bias[first + i] : 0.f);
      y[i] = a.accumulate ? y[i] + value : value;
    }
  }
}

template <int kBits, int kT>
HWY_INLINE void LastRows(int64_t rows, const GroupQuantArgs& a, int64_t block, int64_t t0,
                         bool ahead) {
  if constexpr (kT > 0) {
    if (rows == kT)
      Rows<kBits, kT>(a, block, t0, ahead);
    else
      LastRows<kBits, kT - 1>(rows, a, block, t0, ahead);
  }
}

template <int kBits>
void Blocks(const GroupQuantArgs& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    int64_t t = 0;
    for (; t + kRowTile <= a.T; t += kRowTile)
      Rows<kBits, kRowTile>(a, block, t, t == 0 && block + 1 < end);
    LastRows<kBits, kRowTile - 1>(a.T - t, a, block, t, t == 0 && block + 1 < end);
  }
}

void ProductTarget(const GroupQuantArgs& a, int64_t begin, int64_t end) {
  if (a.shape.bits == 8)
    Blocks<8>(a, begin, end);
  else
    Blocks<4>(a, begin, end);
}

// 8 floats from 8 bytes: d q + m.
template <bool kSigned>
HWY_INLINE void StoreEight(const uint8_t* q, __m256 d, __m256 m, float* to) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q));
  const __m256i wide = kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
  _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide), d, m));
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

template <bool kSigned>
inline void StoreEight(const uint8_t* q, float d, float m, float* to) {
  for (int i = 0; i < 8; ++i) {
    const int value = kSigned ? static_cast<int8_t>(q[i]) : q[i];
    to[i] = std::fma(static_cast<float>(value), d, m);
  }
}

#endif

void DequantizeTarget(const GroupQuantShape& shape, const uint8_t* from, int64_t begin, int64_t end,
                      float* to, int64_t stride) {
#if defined(__x86_64__) && HWY_TARGET <= HWY_AVX2
  const auto all = [](float x) { return _mm256_set1_ps(x); };
#else
  const auto all = [](float x) { return x; };
#endif
  for (int64_t o = begin; o < end; ++o) {
    const BlockView block = ViewBlock(shape, from, o / kQuantBlock);
    const int64_t lane = o % kQuantBlock;
    float* row = to + (o - begin) * stride;
    for (int64_t g = 0; g < shape.groups(); ++g, row += kQuantGroup) {
      const auto d = all(ToFloat(f16{block.d[g * kQuantBlock + lane]}));
      const uint8_t* q = block.q + g * shape.group_bytes() + 4 * lane;
      uint32_t four[8];  // inputs of this feature
      const int loads = shape.bits == 8 ? 8 : 4;
      for (int c = 0; c < loads; ++c) std::memcpy(&four[c], q + c * 32, sizeof(four[c]));
      // Two chunks at a time through a register: a load of bytes just stored would wait for them.
      const auto pair = [&](uint32_t x, uint32_t y) {
        return static_cast<uint64_t>(x) | static_cast<uint64_t>(y) << 32;
      };
      const auto store = [&](uint64_t eight, auto m, auto is_signed, float* at) {
        uint8_t bytes[8];
        std::memcpy(bytes, &eight, sizeof(bytes));
        StoreEight<decltype(is_signed)::value>(bytes, d, m, at);
      };
      const auto m = all(ToFloat(f16{block.m[g * kQuantBlock + lane]}));
      if (shape.bits == 8) {
        for (int c = 0; c < 8; c += 2)
          store(pair(four[c], four[c + 1]), m, std::true_type(), row + 4 * c);
        continue;
      }
      constexpr uint64_t kLow = 0x0f0f0f0f0f0f0f0full;
      for (int c = 0; c < 4; c += 2) {
        const uint64_t both = pair(four[c], four[c + 1]);
        store(both & kLow, m, std::false_type(), row + 4 * c);
        store(both >> 4 & kLow, m, std::false_type(), row + 4 * (c + 4));
      }
    }
  }
}

constexpr float kLargest = 127 * 128;
// Groups below have no reciprocal in fp32 and count as zeros.
constexpr float kTiny = 1e-34f;

// One group of activations, zeros at its end where there are fewer, to integers `to`. Returns the
// scale; *total is the integers' sum. Rounds to nearest even, so that every target gives the same.
#if defined(__x86_64__) && HWY_TARGET <= HWY_AVX2
inline float QuantizeGroup(const float* from, int16_t* to, int* total) {
  constexpr int kVectors = kQuantGroup / 8;
  __m256 x[kVectors], largest = _mm256_setzero_ps(), not_finite = _mm256_setzero_ps();
  const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (int i = 0; i < kVectors; ++i) {
    x[i] = _mm256_loadu_ps(from + 8 * i);
    // Of a NaN the second operand is taken.
    largest = _mm256_max_ps(_mm256_and_ps(x[i], no_sign), largest);
    not_finite = _mm256_fmadd_ps(x[i], _mm256_setzero_ps(), not_finite);
  }
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  most = _mm_max_ss(most, _mm_movehdup_ps(most));
  const float size = _mm_cvtss_f32(most);
  const bool finite = _mm256_movemask_ps(_mm256_cmp_ps(not_finite, not_finite, _CMP_UNORD_Q)) == 0;
  const __m256 inverse = _mm256_set1_ps(finite && size > kTiny ? kLargest / size : 0.f);
  __m256i sum = _mm256_setzero_si256(), q[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    // 0 where there is no scale: a NaN times 0 has no integer.
    const __m256 scaled = _mm256_mul_ps(x[i], inverse);
    q[i] = _mm256_cvtps_epi32(_mm256_and_ps(scaled, _mm256_cmp_ps(scaled, scaled, _CMP_ORD_Q)));
    sum = _mm256_add_epi32(sum, q[i]);
  }
  for (int i = 0; i < kVectors; i += 2) {
    // The packing goes by halves of a vector.
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[i], q[i + 1]), 0xd8);
    packed = _mm256_shufflelo_epi16(_mm256_shufflehi_epi16(packed, 0xd8), 0xd8);  // Place
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * i), packed);
  }
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  *total = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  return finite ? size / kLargest : std::numeric_limits<float>::quiet_NaN();
}
#else
inline float QuantizeGroup(const float* from, int16_t* to, int* total) {
  float largest = 0, not_finite = 0;
  for (int i = 0; i < kQuantGroup; ++i) {
    largest = std::max(largest, std::abs(from[i]));
    not_finite += from[i] * 0.f;
  }
  const float scale = largest / kLargest + not_finite;
  const float inverse = largest > kTiny && std::isfinite(scale) ? kLargest / largest : 0.f;
  *total = 0;
  for (int i = 0; i < kQuantGroup; ++i) {
    const int q = inverse > 0 ? static_cast<int>(std::nearbyint(from[i] * inverse)) : 0;
    to[Place(i)] = static_cast<int16_t>(q);
    *total += q;
  }
  return scale;
}
#endif

// A NaN or an infinity has no integer: the scale carries it to the result as NaN.
void QuantizeRowsTarget(const GroupQuantShape& shape, const float* x, int64_t x_stride, int64_t T,
                        const QuantRows& to) {
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t g = 0; g < shape.groups(); ++g) {
      const float* from = x + t * x_stride + g * kQuantGroup;
      const int64_t count = std::min<int64_t>(kQuantGroup, shape.in - g * kQuantGroup);
      float last[kQuantGroup] = {};
      if (count < kQuantGroup) {
        std::copy(from, from + count, last);
        from = last;
      }
      int sum = 0;
      const float scale = QuantizeGroup(from, to.q + t * shape.stride() + g * kQuantGroup, &sum);
      to.scale[t * shape.groups() + g] = scale;
      to.sum[t * shape.groups() + g] = scale * static_cast<float>(sum);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dsla {

HWY_EXPORT(ProductTarget);
HWY_EXPORT(DequantizeTarget);
HWY_EXPORT(QuantizeRowsTarget);

void GroupQuantProduct(const GroupQuantArgs& args, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(ProductTarget)(args, begin, end);
}
void GroupDequantize(const GroupQuantShape& shape, const uint8_t* from, int64_t begin, int64_t end,
                     float* to, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(DequantizeTarget)(shape, from, begin, end, to, stride);
}
void QuantizeRows(const GroupQuantShape& shape, const float* x, int64_t x_stride, int64_t T,
                  const QuantRows& to) {
  HWY_DYNAMIC_DISPATCH(QuantizeRowsTarget)(shape, x, x_stride, T, to);
}

}  // namespace dsla
#endif  // HWY_ONCE
