// Weights of a panel (panel_kernels.cc) to 12-bit integers, in pairs of inputs. Included once per
// Highway target.

#if defined(DSLA_OPS_LINEAR_PANEL_UNPACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_LINEAR_PANEL_UNPACK_INL_H_
#undef DSLA_OPS_LINEAR_PANEL_UNPACK_INL_H_
#else
#define DSLA_OPS_LINEAR_PANEL_UNPACK_INL_H_
#endif

#include <algorithm>
#include <iterator>

#include "base/half.h"
#include "hwy/highway.h"
#include "ops/linear/group_quant.h"
#include "ops/linear/panel.h"
#include "ops/simd/transpose-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using DI = hn::CappedTag<int32_t, 16>;
using DF = hn::Rebind<float, DI>;
using Ints = hn::Vec<DI>;
using Floats = hn::Vec<DF>;
constexpr int kLanes = HWY_MIN(16, HWY_LANES(int32_t));

// A strip, the features of one tile: one broadcast of activations serves kVectors products.
constexpr int kVectors = HWY_TARGET <= HWY_AVX3 ? 4 : 2;
constexpr int kStrip = kVectors * kLanes;

// Where kLanes features of integers lie: in one block, or in two where vectors are that wide.
struct FeatureLanes {
  BlockView blocks[kLanes > kQuantBlock ? 2 : 1];
  int lane;  // of the block, the first feature's
};

// Those from `feature` on. Beyond the last block it is repeated: nobody reads those sums.
HWY_INLINE FeatureLanes LanesAt(const GroupQuantShape& shape, const uint8_t* weight,
                                int64_t feature) {
  FeatureLanes at{};
  at.lane = static_cast<int>(feature % kQuantBlock);
  int64_t block = feature / kQuantBlock;
  for (BlockView& view : at.blocks)
    view = ViewBlock(shape, weight, std::min(block++, shape.blocks() - 1));
  return at;
}

// kLanes elements, those of the second block after those of the first.
template <class D, typename T>
HWY_INLINE hn::Vec<D> LoadLanes(D d, const T* first, const T* second) {
#if HWY_TARGET <= HWY_AVX3
  const hn::Half<D> half;
  return hn::Combine(d, hn::LoadU(half, second), hn::LoadU(half, first));
#else
  (void)second;
  return hn::LoadU(d, first);
#endif
}
HWY_INLINE Floats LoadScales(const FeatureLanes& at, const uint16_t* BlockView::*which, int64_t g) {
  const hn::Rebind<uint16_t, DI> d16;
  const hn::Rebind<hwy::float16_t, DI> d_half;
  const int64_t offset = g * kQuantBlock + at.lane;
  const auto bits = LoadLanes(d16, at.blocks[0].*which + offset,
                              at.blocks[std::size(at.blocks) - 1].*which + offset);
  return hn::PromoteTo(DF(), hn::BitCast(d_half, bits));
}
// Chunk c of a group: 4 bytes of each feature.
template <int kBits>
HWY_INLINE Ints LoadChunk(const FeatureLanes& at, int64_t g, int c) {
  const int64_t offset = g * 32 * kBits + c * 32 + 4 * at.lane;
  const auto load = [&](const BlockView& block) {
    return reinterpret_cast<const int32_t*>(block.q + offset);
  };
  return LoadLanes(DI(), load(at.blocks[0]), load(at.blocks[std::size(at.blocks) - 1]));
}

// The step of kLanes features, from what weights there are.
struct Steps {
  // Without their sign, floats are in the order of their bits, infinities and then NaNs at the end.
  Ints bits;

  HWY_INLINE Steps() : bits(hn::Zero(DI())) {}
  HWY_INLINE void See(Floats w) { bits = hn::Max(hn::BitCast(DI(), hn::Abs(w)), bits); }
  // The step, NaN if a weight is no number; returns its reciprocal.
  HWY_INLINE Floats Store(float* step) const {
    const Floats most = hn::Set(DF(), kLargestWeight), largest = hn::BitCast(DF(), bits);
    const Floats not_finite = hn::Mul(largest, hn::Zero(DF()));
    hn::Store(hn::Add(hn::Div(largest, most), not_finite), DF(), step);
    return hn::IfThenElseZero(hn::Gt(largest, hn::Set(DF(), kTiny)), hn::Div(most, largest));
  }
};

// The nearest integers of small numbers: what a large one leaves of them in its last bits. Fewer
// instructions than a conversion that minds its range.
HWY_INLINE Ints RoundSteps(Floats in_steps) {
  const Floats large = hn::Set(DF(), 0x1.8p23f);
  return hn::Sub(hn::BitCast(DI(), hn::Add(in_steps, large)), hn::BitCast(DI(), large));
}
HWY_INLINE void StorePair(Ints first, Ints second, int32_t* to) {
  const Ints low = hn::Set(DI(), 0xffff);
  hn::Store(hn::Or(hn::And(first, low), hn::ShiftLeft<16>(second)), DI(), to);
}

// Scale and minimum of kLanes features in steps, as 16-bit numbers of fixed point, twice in each
// lane: for both inputs of a pair. kFraction bits of a step are kept until the last rounding.
template <int kBits>
struct FixedGroup {
  static constexpr int kFraction = kBits == 4 ? 2 : 3;
  // The integers of a group fill 15 bits, so that a product's upper 16 are the weight.
  static constexpr int kIntegerShift = 15 - kBits + (kBits == 8 ? 1 : 0);
  static constexpr int kScaleShift = 15 + kFraction - kIntegerShift;

  Ints d, m;

  HWY_INLINE FixedGroup(Floats scale, Floats minimum) {
    const auto twice = [](Floats x) {
      const Ints rounded = hn::NearestInt(x);
      return hn::Or(hn::And(rounded, hn::Set(DI(), 0xffff)), hn::ShiftLeft<16>(rounded));
    };
    d = twice(hn::Mul(scale, hn::Set(DF(), float{1 << kScaleShift})));
    constexpr float kOne = 1 << kFraction;
    m = twice(hn::MulAdd(minimum, hn::Set(DF(), kOne), hn::Set(DF(), kOne / 2)));
  }
};

// The weights, in steps, of two inputs: kBits from bit kShift of bytes kByte and kByte + 1 of each
// lane on.
template <int kBits, int kShift, int kByte>
HWY_INLINE Ints Pair(Ints raw, const FixedGroup<kBits>& group) {
  using Fixed = FixedGroup<kBits>;
#if HWY_TARGET == HWY_SCALAR  // which has no lanes of 16 bits
  const auto half = [&](int i) {
    const auto byte = static_cast<uint8_t>(raw.raw >> 8 * (kByte + i));
    const int q = kBits == 8 ? static_cast<int8_t>(byte) : byte >> kShift & 15;
    const int product = q * (1 << Fixed::kIntegerShift) * static_cast<int16_t>(group.d.raw);
    const int sum = ((product + (1 << 14)) >> 15) + static_cast<int16_t>(group.m.raw);
    return sum >> Fixed::kFraction;
  };
  return Ints(static_cast<int32_t>((half(0) & 0xffff) | static_cast<uint32_t>(half(1)) << 16));
#else
  const hn::Repartition<int16_t, DI> d16;
  const hn::Repartition<uint8_t, DI> d8;
  // Each byte twice, in one half of the lane.
  alignas(16) static constexpr uint8_t kBytes[16] = {
      kByte,     kByte,     kByte + 1, kByte + 1, kByte + 4,  kByte + 4,  kByte + 5,  kByte + 5,
      kByte + 8, kByte + 8, kByte + 9, kByte + 9, kByte + 12, kByte + 12, kByte + 13, kByte + 13};
  const auto bytes =
      hn::BitCast(d16, hn::TableLookupBytes(hn::BitCast(d8, raw), hn::LoadDup128(d8, kBytes)));
  constexpr int16_t kMask = kBits == 8 ? -0x100 : 15 << kShift;
  const auto q = hn::ShiftLeft < kBits == 8
                     ? 0
                     : Fixed::kIntegerShift - kShift > (hn::And(bytes, hn::Set(d16, kMask)));
  const auto product = hn::MulFixedPoint15(q, hn::BitCast(d16, group.d));
  return hn::BitCast(DI(),
                     hn::ShiftRight<Fixed::kFraction>(hn::Add(product, hn::BitCast(d16, group.m))));
#endif
}
// Four inputs, one in every byte from bit kShift on.
template <int kBits, int kShift>
HWY_INLINE void StoreFour(Ints raw, const FixedGroup<kBits>& group, int32_t* to) {
  hn::Store(Pair<kBits, kShift, 0>(raw, group), DI(), to);
  hn::Store(Pair<kBits, kShift, 2>(raw, group), DI(), to + kStrip);
}

// Inputs [begin, end) of the kLanes features from `feature` on, kStrip pairs apart.
template <int kBits>
void UnpackGroups(const PanelArgs& a, int64_t feature, int64_t begin, int64_t end, int32_t* to,
                  float* step) {
  const FeatureLanes at = LanesAt(a.quant(), static_cast<const uint8_t*>(a.weight), feature);
  Steps steps;
  for (int64_t g = begin / kQuantGroup; g < end / kQuantGroup; ++g) {
    const Floats d = LoadScales(at, &BlockView::d, g), m = LoadScales(at, &BlockView::m, g);
    if constexpr (kBits == 8) {
      steps.See(hn::MulAdd(hn::Abs(d), hn::Set(DF(), 127.f), hn::Abs(m)));
    } else {
      steps.See(m);
      steps.See(hn::MulAdd(d, hn::Set(DF(), 15.f), m));
    }
  }
  const Floats inverse = steps.Store(step);
  for (int64_t g = begin / kQuantGroup; g < end / kQuantGroup; ++g) {
    const FixedGroup<kBits> group(hn::Mul(LoadScales(at, &BlockView::d, g), inverse),
                                  hn::Mul(LoadScales(at, &BlockView::m, g), inverse));
    for (int c = 0; c < kBits; ++c) {
      const Ints raw = LoadChunk<kBits>(at, g, c);
      StoreFour<kBits, 0>(raw, group, to + 2 * c * kStrip);
      if constexpr (kBits == 4) StoreFour<kBits, 4>(raw, group, to + 2 * (c + 4) * kStrip);
    }
    to += kQuantGroup / 2 * kStrip;
  }
}

// The same of bf16. Pairs are first copied to their places, then rounded there.
inline void UnpackRows(const PanelArgs& a, int64_t feature, int64_t begin, int64_t end, int32_t* to,
                       float* step) {
  const int64_t stride = a.padded() / 2;
  const int32_t* const rows = static_cast<const int32_t*>(a.weight) + feature * stride + begin / 2;
  Transpose(rows, stride, static_cast<int>(std::min<int64_t>(kLanes, a.out - feature)),
            static_cast<int>((end - begin) / 2), to, kStrip);
  const auto first = [](Ints pair) { return hn::BitCast(DF(), hn::ShiftLeft<16>(pair)); };
  const auto second = [](Ints pair) {
    return hn::BitCast(DF(), hn::And(pair, hn::Set(DI(), -0x10000)));
  };
  const int32_t* const last = to + (end - begin) / 2 * kStrip;
  Steps steps;
  for (const int32_t* at = to; at < last; at += kStrip) {
    const Ints pair = hn::Load(DI(), at);
    steps.See(first(pair));
    steps.See(second(pair));
  }
  const Floats inverse = steps.Store(step);
  for (int32_t* at = to; at < last; at += kStrip) {
    const Ints pair = hn::Load(DI(), at);
    StorePair(RoundSteps(hn::Mul(first(pair), inverse)), RoundSteps(hn::Mul(second(pair), inverse)),
              at);
  }
}

HWY_INLINE void UnpackLanes(const PanelArgs& a, int64_t feature, int64_t begin, int64_t end,
                            int32_t* to, float* step) {
  switch (a.format) {
    case WeightFormat::kInt8:
      return UnpackGroups<8>(a, feature, begin, end, to, step);
    case WeightFormat::kInt4:
      return UnpackGroups<4>(a, feature, begin, end, to, step);
    case WeightFormat::kBF16:
      return UnpackRows(a, feature, begin, end, to, step);
    case WeightFormat::kF32:
    case WeightFormat::kFp8:
      break;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_LINEAR_PANEL_UNPACK_INL_H_
