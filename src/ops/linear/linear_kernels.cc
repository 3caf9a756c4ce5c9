#include "ops/linear/linear_kernels.h"

#include <algorithm>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/linear/linear_kernels.cc"
#include "hwy/cache_control.h"
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

// 4 output features x 3 rows of the batch: 12 accumulators of 16 registers, the rest for one
// decoded pair of weight vectors; with 32 registers (AVX-512) 4 x 6. Four features at a time also
// means that a pair of loaded activations serves four weights. One accumulator per element is
// enough: 4 independent chains at T = 1 take 8 bytes of weights a cycle and core, above what DRAM
// gives.
constexpr int kFeatures = 4;
constexpr int kMaxBatch = HWY_TARGET <= HWY_AVX3 ? 6 : 3;

// Two vectors of weights. bf16 pairs lie in one 32-bit lane, the even element in its low half: a
// shift and a mask widen them, cheaper than a widening load per vector; hence the packed order.
HWY_INLINE void DecodePair(const bf16* w, Vec& first, Vec& second) {
  const Tag d;
  const hn::RebindToUnsigned<Tag> du;
  const auto raw = hn::Load(du, reinterpret_cast<const uint32_t*>(w));
  first = hn::BitCast(d, hn::ShiftLeft<16>(raw));
  second = hn::BitCast(d, hn::And(raw, hn::Set(du, 0xffff0000u)));
}
HWY_INLINE void DecodePair(const float* w, Vec& first, Vec& second) {
  const Tag d;
  first = hn::Load(d, w);
  second = hn::Load(d, w + kLanes);
}

// y (+)= sum + bias, of one feature.
HWY_INLINE void Finish(float sum, const float* bias, bool accumulate, float* y) {
  if (bias != nullptr) sum += *bias;
  *y = accumulate ? *y + sum : sum;
}

// FinishAll: the same of kFeatures features, each of whose sums is in the lanes of a vector.
#if HWY_TARGET == HWY_SCALAR
HWY_INLINE float SumOfLanes(Vec v) { return hn::GetLane(v); }
HWY_INLINE void FinishAll(Vec v0, Vec v1, Vec v2, Vec v3, const float* bias, bool accumulate,
                          float* y) {
  int r = 0;
  for (const Vec v : {v0, v1, v2, v3}) {
    Finish(SumOfLanes(v), bias != nullptr ? bias + r : nullptr, accumulate, y + r);
    ++r;
  }
}
#else
using Tag4 = hn::FixedTag<float, kFeatures>;

template <class D>
HWY_INLINE hn::Vec<Tag4> SumOfBlocks(D /*d*/, hn::Vec<D> v) {
  if constexpr (hn::MaxLanes(D()) == kFeatures) {
    return v;
  } else {
    const hn::Half<D> half;
    return SumOfBlocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}
// Transposed and added together, which takes half the time of four sums by themselves. It counts
// where rows are short: an adapter's B has 32 inputs, two products a sum.
HWY_INLINE hn::Vec<Tag4> SumsOfLanes(Vec v0, Vec v1, Vec v2, Vec v3) {
  const Tag d;
  const hn::Repartition<double, Tag> d64;
  const auto v01 =
      hn::BitCast(d64, hn::Add(hn::InterleaveLower(d, v0, v1), hn::InterleaveUpper(d, v0, v1)));
  const auto v23 =
      hn::BitCast(d64, hn::Add(hn::InterleaveLower(d, v2, v3), hn::InterleaveUpper(d, v2, v3)));
  return SumOfBlocks(d, hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, v01, v23)),
                                hn::BitCast(d, hn::InterleaveUpper(d64, v01, v23))));
}
// In the same order, so that a feature's bits do not depend on those beside it.
HWY_INLINE float SumOfLanes(Vec v) { return hn::GetLane(SumsOfLanes(v, v, v, v)); }
HWY_INLINE void FinishAll(Vec v0, Vec v1, Vec v2, Vec v3, const float* bias, bool accumulate,
                          float* y) {
  const Tag4 d;
  auto sums = SumsOfLanes(v0, v1, v2, v3);
  if (bias != nullptr) sums = hn::Add(sums, hn::LoadU(d, bias));
  hn::StoreU(accumulate ? hn::Add(hn::LoadU(d, y), sums) : sums, d, y);
}
#endif

template <typename W, int kR, int kT>
HWY_INLINE void Tile(const W* HWY_RESTRICT w, int64_t stride, int64_t ahead,
                     const float* HWY_RESTRICT x, const float* bias, float* HWY_RESTRICT y,
                     int64_t y_stride, bool accumulate) {
  const Tag d;
  Vec sum[kR][kT];
  for (int r = 0; r < kR; ++r)
    for (int t = 0; t < kT; ++t) sum[r][t] = hn::Zero(d);
  for (int64_t k = 0; k < stride; k += kLinearPad) {
    if (ahead != 0) {
      for (int r = 0; r < kR; ++r) {
        const W* line = w + ahead + k * kR + r * kLinearPad;
        hwy::Prefetch(line);
        if (sizeof(W) == 4) hwy::Prefetch(line + kLinearPad / 2);
      }
    }
    for (int64_t j = k; j < k + kLinearPad; j += 2 * kLanes) {
      for (int r = 0; r < kR; ++r) {
        Vec first, second;
        DecodePair(w + r * stride + j, first, second);
        for (int t = 0; t < kT; ++t) {
          sum[r][t] = hn::MulAdd(first, hn::Load(d, x + t * stride + j), sum[r][t]);
          sum[r][t] = hn::MulAdd(second, hn::Load(d, x + t * stride + j + kLanes), sum[r][t]);
        }
      }
    }
  }
  for (int t = 0; t < kT; ++t) {
    float* const to = y + t * y_stride;
    if constexpr (kR == kFeatures)
      FinishAll(sum[0][t], sum[1][t], sum[2][t], sum[3][t], bias, accumulate, to);
    else
      Finish(SumOfLanes(sum[0][t]), bias, accumulate, to);
  }
}

template <typename W, int kR, int kT>
HWY_NOINLINE void Tiles(const W* w, int64_t stride, int64_t ahead, const float* x,
                        const float* bias, float* y, int64_t y_stride, bool accumulate) {
  Tile<W, kR, kT>(w, stride, ahead, x, bias, y, y_stride, accumulate);
}

// The last kT = batch < kMaxBatch rows.
template <typename W, int kR, int kT>
HWY_INLINE void LastTiles(int64_t batch, const W* w, int64_t stride, int64_t ahead, const float* x,
                          const float* bias, float* y, int64_t y_stride, bool accumulate) {
  if constexpr (kT > 0) {
    if (batch == kT)
      Tiles<W, kR, kT>(w, stride, ahead, x, bias, y, y_stride, accumulate);
    else
      LastTiles<W, kR, kT - 1>(batch, w, stride, ahead, x, bias, y, y_stride, accumulate);
  }
}

// kR features for all rows; the weights come from memory once, with the first tile.
template <typename W, int kR>
void Features(const LinearRowsArgs& a, int64_t o, int64_t ahead) {
  const W* w = static_cast<const W*>(a.weight) + o * a.stride;
  const float* bias = a.bias != nullptr ? a.bias + o : nullptr;
  int64_t t = 0;
  for (; t + kMaxBatch <= a.T; t += kMaxBatch) {
    Tiles<W, kR, kMaxBatch>(w, a.stride, t == 0 ? ahead : 0, a.x + t * a.stride, bias,
                            a.y + t * a.y_stride + o, a.y_stride, a.accumulate);
  }
  LastTiles<W, kR, kMaxBatch - 1>(a.T - t, w, a.stride, t == 0 ? ahead : 0, a.x + t * a.stride,
                                  bias, a.y + t * a.y_stride + o, a.y_stride, a.accumulate);
}

template <typename W>
void Range(const LinearRowsArgs& a, int64_t begin, int64_t end) {
  int64_t o = begin;
  for (; o + kFeatures <= end; o += kFeatures) {
    // The next four rows are fetched while these are used, in the order in which they lie, not in
    // that of their use: rows are too short (a few KB) for the hardware prefetcher, which stops at
    // page ends and would start anew on each of four streams (1,152-byte rows, one core: 10.1 GB/s
    // in order, 8.0 row beside row, 5.5 without, of 10.2 read).
    const int64_t ahead = o + 2 * kFeatures <= end ? kFeatures * a.stride : 0;
    Features<W, kFeatures>(a, o, ahead);
  }
  for (; o < end; ++o) Features<W, 1>(a, o, 0);
}

void LinearRowsTarget(const LinearRowsArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::kBF16)
    Range<bf16>(args, begin, end);
  else
    Range<float>(args, begin, end);
}

// For bf16 weights every 2 N floats become N of even and N of odd index, as DecodePair yields them.
void PackTarget(const float* x, int64_t begin, int64_t end, int64_t in, int64_t stride, DType dtype,
                float* packed) {
  const Tag d;
  int64_t k = begin;
  if (dtype == DType::kF32) {
    k = std::copy(x + begin, x + end, packed + begin) - packed;
  } else {
    Vec even, odd;
    const auto store = [&](const float* from) {
      hn::LoadInterleaved2(d, from, even, odd);
      hn::Store(even, d, packed + k);
      hn::Store(odd, d, packed + k + kLanes);
      k += 2 * kLanes;
    };
    while (k + 2 * kLanes <= end) store(x + k);
    if (k < end) {
      HWY_ALIGN float last[2 * kLanes] = {};
      std::copy(x + k, x + end, last);
      store(last);
    }
  }
  if (end == in) std::fill(packed + k, packed + stride, 0.f);
}

void WidenTarget(const bf16* from, float* to, int64_t n) {
  ConvertRow(from, to, static_cast<size_t>(n));
}
void NarrowTarget(const float* from, bf16* to, int64_t n) {
  ConvertRow(from, to, static_cast<size_t>(n));
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dsla {

HWY_EXPORT(LinearRowsTarget);
HWY_EXPORT(PackTarget);
HWY_EXPORT(WidenTarget);
HWY_EXPORT(NarrowTarget);

void LinearRows(const LinearRowsArgs& args, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(LinearRowsTarget)(args, begin, end);
}
void PackPiece(const float* x, int64_t begin, int64_t end, int64_t in, int64_t stride, DType dtype,
               float* packed) {
  HWY_DYNAMIC_DISPATCH(PackTarget)(x, begin, end, in, stride, dtype, packed);
}
void WidenBf16(const bf16* from, float* to, int64_t n) {
  HWY_DYNAMIC_DISPATCH(WidenTarget)(from, to, n);
}
void NarrowBf16(const float* from, bf16* to, int64_t n) {
  HWY_DYNAMIC_DISPATCH(NarrowTarget)(from, to, n);
}

}  // namespace dsla
#endif  // HWY_ONCE
