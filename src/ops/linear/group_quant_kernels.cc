#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/check.h"
#include "base/half.h"
#include "ops/linear/group_quant.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/linear/group_quant_kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "ops/linear/group_quant_product-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {

#if defined(__x86_64__) && HWY_TARGET <= HWY_AVX2

// 8 floats from 8 bytes: d q + m.
template <bool kSigned>
HWY_INLINE void StoreEight(const uint8_t* q, __m256 d, __m256 m, float* to) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q));
  const __m256i wide = kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
  _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide), d, m));
}

#else

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
    float* const row = to + (o - begin) * stride;
    for (int64_t g = 0; g < shape.groups(); ++g) {
      const int64_t count = std::min<int64_t>(kQuantGroup, shape.in - g * kQuantGroup);
      float last[kQuantGroup];
      float* const group = count < kQuantGroup ? last : row + g * kQuantGroup;
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
          store(pair(four[c], four[c + 1]), m, std::true_type(), group + 4 * c);
      }
      constexpr uint64_t kLow = 0x0f0f0f0f0f0f0f0full;
      for (int c = 0; c < 4 && shape.bits == 4; c += 2) {
        const uint64_t both = pair(four[c], four[c + 1]);
        store(both & kLow, m, std::false_type(), group + 4 * c);
        store(both >> 4 & kLow, m, std::false_type(), group + 4 * (c + 4));
      }
      if (count < kQuantGroup) std::copy_n(last, count, row + g * kQuantGroup);
    }
  }
}

// One group of one feature.
struct Group {
  f16 d, m;
  HWY_ALIGN int32_t q[kQuantGroup];
};

// Rounds to d q + m with q in [low, high]; the sum of the first `count` squared errors.
HWY_INLINE float RoundGroup(const float* w, int64_t count, float low, float high, Group& group) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::CappedTag<float, 8> d;
  const hn::RebindToSigned<decltype(d)> di;
  const float scale = ToFloat(group.d);
  const auto by = hn::Set(d, scale), m = hn::Set(d, ToFloat(group.m)),
             inverse = hn::Set(d, scale > 0 ? 1.f / scale : 0.f);
  auto error = hn::Zero(d);
  for (size_t i = 0; i < kQuantGroup; i += hn::Lanes(d)) {
    const auto x = hn::LoadU(d, w + i);
    const auto q = hn::NearestInt(
        hn::Clamp(hn::Mul(hn::Sub(x, m), inverse), hn::Set(d, low), hn::Set(d, high)));
    hn::Store(q, di, group.q + i);
    const auto off = hn::Sub(hn::MulAdd(by, hn::ConvertTo(d, q), m), x);
    const auto counts =
        hn::Lt(hn::Iota(d, static_cast<float>(i)), hn::Set(d, static_cast<float>(count)));
    error = hn::MulAdd(hn::IfThenElseZero(counts, off), off, error);
  }
  return hn::GetLane(hn::SumOfLanes(d, error));
}

// w: [kQuantGroup], of which `count` are weights and the rest repeats one.
inline Group QuantizeGroup(const float* w, int64_t count, int bits) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::CappedTag<float, 8> d;
  auto lows = hn::LoadU(d, w), highs = lows;
  for (size_t i = hn::Lanes(d); i < kQuantGroup; i += hn::Lanes(d)) {
    lows = hn::Min(lows, hn::LoadU(d, w + i));
    highs = hn::Max(highs, hn::LoadU(d, w + i));
  }
  const float low = hn::GetLane(hn::MinOfLanes(d, lows)),
              high = hn::GetLane(hn::MaxOfLanes(d, highs));
  if (bits == 4) {
    Group group{};
    group.m = ToF16(low);
    group.d = ToF16((high - ToFloat(group.m)) / 15.f);
    RoundGroup(w, count, 0, 15, group);
    return group;
  }
  constexpr float kSymmetric = 127, kCentred = 120;
  Group symmetric{};
  symmetric.d = ToF16(std::max(-low, high) / kSymmetric);
  const float error = RoundGroup(w, count, -kSymmetric, kSymmetric, symmetric);
  if (error == 0) return symmetric;  // the group of a Q8_0 file
  Group centred{};
  centred.d = ToF16((high - low) / (2 * kCentred));
  centred.m = ToF16(low + (high - low) / 2);
  return RoundGroup(w, count, -kCentred, kCentred, centred) < error ? centred : symmetric;
}

void QuantizeTarget(const GroupQuantShape& shape, int64_t begin, int64_t end, const float* weight,
                    uint8_t* to) {
  for (int64_t o = begin; o < end; ++o) {
    uint8_t* const block = to + o / kQuantBlock * shape.block_bytes();
    const int64_t lane = o % kQuantBlock;
    auto* const d = reinterpret_cast<uint16_t*>(block);
    uint16_t* const m = d + shape.groups() * kQuantBlock;
    for (int64_t g = 0; g < shape.groups(); ++g) {
      const float* w = weight + (o - begin) * shape.in + g * kQuantGroup;
      const int64_t count = std::min<int64_t>(kQuantGroup, shape.in - g * kQuantGroup);
      float padded[kQuantGroup];
      if (count < kQuantGroup) {
        std::copy(w, w + count, padded);
        std::fill(padded + count, padded + kQuantGroup, w[0]);
        w = padded;
      }
      Group group = QuantizeGroup(w, count, shape.bits);
      std::fill(group.q + count, group.q + kQuantGroup, 0);
      d[g * kQuantBlock + lane] = group.d.bits;
      m[g * kQuantBlock + lane] = group.m.bits;
      uint8_t bytes[kQuantGroup];
      for (int i = 0; i < kQuantGroup; ++i) bytes[i] = static_cast<uint8_t>(group.q[i]);
      if (shape.bits == 4)  // chunk c in the low halves, c + 4 in the high ones
        for (int i = 0; i < kQuantGroup / 2; ++i)
          bytes[i] = static_cast<uint8_t>(bytes[i] | bytes[i + kQuantGroup / 2] << 4);
      uint8_t* const q = block + shape.header_bytes() + g * shape.group_bytes() + 4 * lane;
      for (int c = 0; c < shape.bits; ++c) std::memcpy(q + c * 32, bytes + 4 * c, 4);
    }
  }
}

constexpr float kLargest = 127 * 128;

// One group of activations, zeros at its end where there are fewer, to integers `to`. Returns the
// scale; *total is the integers' sum. Rounds to nearest even, so that every target gives the same.
#if defined(__x86_64__) && HWY_TARGET <= HWY_AVX2
inline float QuantizeActivations(const float* from, int16_t* to, int* total) {
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
inline float QuantizeActivations(const float* from, int16_t* to, int* total) {
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
void QuantizePieceTarget(const float* x, int64_t begin, int64_t end, const QuantRows& row) {
  for (int64_t i = begin; i < end; i += kQuantGroup) {
    const float* from = x + i;
    float last[kQuantGroup];
    if (end - i < kQuantGroup) {
      std::fill(std::copy(from, x + end, last), last + kQuantGroup, 0.f);
      from = last;
    }
    int sum = 0;
    const float scale = QuantizeActivations(from, row.q + i, &sum);
    row.scale[i / kQuantGroup] = scale;
    row.sum[i / kQuantGroup] = scale * static_cast<float>(sum);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dsla {

HWY_EXPORT(ProductTarget);
HWY_EXPORT(QuantizeTarget);
HWY_EXPORT(DequantizeTarget);
HWY_EXPORT(QuantizePieceTarget);

void GroupQuantProduct(const GroupQuantArgs& args, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(ProductTarget)(args, begin, end);
}
void GroupQuantize(const GroupQuantShape& shape, int64_t begin, int64_t end, const float* weight,
                   uint8_t* to) {
  DSLA_CHECK(shape.bits == 8 || shape.bits == 4);
  DSLA_CHECK(begin % kQuantBlock == 0 && (end % kQuantBlock == 0 || end == shape.out));
  const int64_t first = begin / kQuantBlock, last = (end + kQuantBlock - 1) / kQuantBlock;
  std::memset(to + first * shape.block_bytes(), 0,
              static_cast<size_t>((last - first) * shape.block_bytes()));
  HWY_DYNAMIC_DISPATCH(QuantizeTarget)(shape, begin, end, weight, to);
}
void GroupDequantize(const GroupQuantShape& shape, const uint8_t* from, int64_t begin, int64_t end,
                     float* to, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(DequantizeTarget)(shape, from, begin, end, to, stride);
}
void QuantizePiece(const float* x, int64_t begin, int64_t end, const QuantRows& row) {
  HWY_DYNAMIC_DISPATCH(QuantizePieceTarget)(x, begin, end, row);
}

}  // namespace dsla
#endif  // HWY_ONCE
