#include <algorithm>
#include <cmath>
#include <cstring>

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
// 4 inputs of one row, for each of the 8 features.
HWY_INLINE __m256i Inputs(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof(four));
  return _mm256_set1_epi32(four);
}

// 8 features of T rows, all inputs. With 2 rows at a time the sums take 6 of 16 registers.
constexpr int kRowTile = 2;

// One row's integers and scales.
struct Row {
  const int8_t* high;
  const int8_t* low;
  const float* scale;
  const float* sum;
};

// 128 high + low.
HWY_INLINE __m256 Total(__m256i high, __m256i low) {
  return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(high, 7), low));
}

HWY_INLINE __m256 AddGroup(__m256 sum, __m256 d, __m256 m, __m256 total, const Row& row,
                           int64_t g) {
  sum = _mm256_fmadd_ps(total, _mm256_mul_ps(d, _mm256_set1_ps(row.scale[g])), sum);
  return _mm256_fmadd_ps(m, _mm256_set1_ps(row.sum[g]), sum);
}

// sum += the four products of each feature, bytes unsigned by signed.
HWY_INLINE __m256i Add4(__m256i sum, __m256i size, __m256i x) {
#if HWY_TARGET <= HWY_AVX3_DL
  return _mm256_dpbusd_epi32(sum, size, x);
#else
  // Pairs fit 16 bits: 2 * 127 * 127.
  const __m256i pairs = _mm256_maddubs_epi16(size, x);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

template <int kT>
HWY_INLINE void Int8Groups(const GroupQuantShape& shape, const BlockView& block, bool ahead,
                           const Row (&row)[kT], __m256 (&sum)[kT]) {
  for (int64_t g = 0; g < shape.groups(); ++g) {
    const uint8_t* w = block.q + g * 256;
    if (ahead) {  // the next block, in address order
      for (int i = 0; i < 256; i += 64) hwy::Prefetch(w + shape.block_bytes() + i);
    }
    __m256i high[kT], low[kT];
    for (int t = 0; t < kT; ++t) high[t] = low[t] = _mm256_setzero_si256();
    for (int c = 0; c < 8; ++c) {
      // |w| is the unsigned factor, and x takes w's sign.
      const __m256i signed_w = Load(w + c * 32), size = _mm256_abs_epi8(signed_w);
      for (int t = 0; t < kT; ++t) {
        const int64_t at = g * kQuantGroup + c * 4;
        high[t] = Add4(high[t], size, _mm256_sign_epi8(Inputs(row[t].high + at), signed_w));
        low[t] = Add4(low[t], size, _mm256_sign_epi8(Inputs(row[t].low + at), signed_w));
      }
    }
    const __m256 d = Scales(block.d + g * kQuantBlock), m = Scales(block.m + g * kQuantBlock);
    for (int t = 0; t < kT; ++t) sum[t] = AddGroup(sum[t], d, m, Total(high[t], low[t]), row[t], g);
  }
}

// sum += the products of half a byte each. Without 32-bit dot products the sums are of 16 bits,
// which hold a whole group: 8 pairs of 2 * 15 * 127.
HWY_INLINE __m256i AddHalf(__m256i sum, __m256i half, const int8_t* x) {
#if HWY_TARGET <= HWY_AVX3_DL
  return _mm256_dpbusd_epi32(sum, half, Inputs(x));
#else
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(half, Inputs(x)));
#endif
}
HWY_INLINE __m256i HalfSum(__m256i sum) {
#if HWY_TARGET <= HWY_AVX3_DL
  return sum;
#else
  return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
#endif
}

template <int kT>
HWY_INLINE void Int4Groups(const GroupQuantShape& shape, const BlockView& block, bool ahead,
                           const Row (&row)[kT], __m256 (&sum)[kT]) {
  const __m256i low_half = _mm256_set1_epi8(0x0f);
  for (int64_t g = 0; g < shape.groups(); ++g) {
    const uint8_t* w = block.q + g * 128;
    if (ahead) {
      for (int i = 0; i < 192; i += 64) hwy::Prefetch(w + shape.block_bytes() + i);
    }
    __m256i high[kT], low[kT];
    for (int t = 0; t < kT; ++t) high[t] = low[t] = _mm256_setzero_si256();
    for (int c = 0; c < 4; ++c) {
      const __m256i both = Load(w + c * 32), first = _mm256_and_si256(both, low_half),
                    second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_half);
      for (int t = 0; t < kT; ++t) {
        const int64_t at = g * kQuantGroup + c * 4;
        high[t] = AddHalf(high[t], first, row[t].high + at);
        high[t] = AddHalf(high[t], second, row[t].high + at + 16);
        low[t] = AddHalf(low[t], first, row[t].low + at);
        low[t] = AddHalf(low[t], second, row[t].low + at + 16);
      }
    }
    const __m256 d = Scales(block.d + g * kQuantBlock), m = Scales(block.m + g * kQuantBlock);
    for (int t = 0; t < kT; ++t) {
      sum[t] = AddGroup(sum[t], d, m, Total(HalfSum(high[t]), HalfSum(low[t])), row[t], g);
    }
  }
}

template <int kT>
HWY_NOINLINE void Rows(const GroupQuantArgs& a, int64_t block, int64_t t0, bool ahead) {
  const GroupQuantShape& shape = a.shape;
  const BlockView view = ViewBlock(shape, a.weight, block);
  Row row[kT];
  __m256 sum[kT];
  for (int t = 0; t < kT; ++t) {
    row[t] = {a.x.high + (t0 + t) * shape.stride(), a.x.low + (t0 + t) * shape.stride(),
              a.x.scale + (t0 + t) * shape.groups(), a.x.sum + (t0 + t) * shape.groups()};
    sum[t] = _mm256_setzero_ps();
  }
  if (shape.bits == 8)
    Int8Groups<kT>(shape, view, ahead, row, sum);
  else
    Int4Groups<kT>(shape, view, ahead, row, sum);
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

template <int kT>
HWY_INLINE void LastRows(int64_t rows, const GroupQuantArgs& a, int64_t block, int64_t t0,
                         bool ahead) {
  if constexpr (kT > 0) {
    if (rows == kT)
      Rows<kT>(a, block, t0, ahead);
    else
      LastRows<kT - 1>(rows, a, block, t0, ahead);
  }
}

void ProductTarget(const GroupQuantArgs& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    int64_t t = 0;
    for (; t + kRowTile <= a.T; t += kRowTile)
      Rows<kRowTile>(a, block, t, t == 0 && block + 1 < end);
    LastRows<kRowTile - 1>(a.T - t, a, block, t, t == 0 && block + 1 < end);
  }
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
        for (int i = 0; i < kQuantGroup; ++i) {
          const int x = 128 * a.x.high[first + i] + a.x.low[first + i];
          dot += Weight(shape, block, g, lane, i) * x;
        }
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

// Rounds to nearest even as std::nearbyint does, so that every target gives the same bytes.
void QuantizeRowsTarget(const GroupQuantShape& shape, const float* x, int64_t x_stride, int64_t T,
                        const QuantRows& to) {
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t g = 0; g < shape.groups(); ++g) {
      const float* from = x + t * x_stride + g * kQuantGroup;
      const auto count =
          static_cast<int>(std::min<int64_t>(kQuantGroup, shape.in - g * kQuantGroup));
      float largest = 0, not_finite = 0;
      for (int i = 0; i < count; ++i) {
        largest = std::max(largest, std::abs(from[i]));
        not_finite += from[i] * 0.f;
      }
      // A NaN or an infinity has no integer: the scale carries it to the result as NaN.
      const float scale = largest / kLargest + not_finite;
      const float inverse = largest > 0 && std::isfinite(scale) ? kLargest / largest : 0.f;
      int8_t* const high = to.high + t * shape.stride() + g * kQuantGroup;
      int8_t* const low = to.low + t * shape.stride() + g * kQuantGroup;
      int sum = 0;
      for (int i = 0; i < count; ++i) {
        const int value = inverse > 0 ? static_cast<int>(std::nearbyint(from[i] * inverse)) : 0;
        high[i] = static_cast<int8_t>((value + 64) >> 7);  // rounds: low is in [-64, 63]
        low[i] = static_cast<int8_t>(value - 128 * high[i]);
        sum += value;
      }
      std::fill(high + count, high + kQuantGroup, int8_t{0});
      std::fill(low + count, low + kQuantGroup, int8_t{0});
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
