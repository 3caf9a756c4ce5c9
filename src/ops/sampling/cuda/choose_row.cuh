// One row of logits as a thread block sees it: the histograms that selection.h asks for, sums by
// slice, and the draw. Everything is read from global memory, which for a row is the L2 cache; the
// largest logit of each group says which groups need not be read.
#pragma once

#include "ops/sampling/cuda/row_layout.cuh"
#include "ops/sampling/cuda/selection.h"

namespace dsla::cuda {

inline constexpr int kLog2RowThreads = 9, kRowThreads = 1 << kLog2RowThreads;
inline constexpr int kRowWarps = kRowThreads / 32;

struct RowShared {
  static constexpr int kMostKeys = 2048;

  uint32_t high[kBuckets], low[kBuckets];  // a bucket's weights: high * 2^kLowBits + low
  uint32_t keys[kMostKeys];
  int key_count;
  float mass[kMaxSlices];  // of what is kept of a slice
  int ties[kMaxSlices];    // how many of its logits that equal the cut's are kept
  uint64_t warp_total[kRowWarps];
  Found found;
};
inline constexpr int kLowBits = kWeightBits / 2;
static_assert((uint64_t{kMaxVocabulary} << (kWeightBits - kLowBits)) <= uint64_t{1} << 32);

// Row blockIdx.x, which is not broken. All threads of the block call its functions together.
template <bool kVector>
class BlockRow {
 public:
  __device__ BlockRow(RowShared& shared, const Rows& rows, float max, float inverse_temperature)
      : s_(shared),
        rows_(rows),
        slices_(rows.parts_per_row * kSlicesPerPart),
        max_(max),
        inverse_(inverse_temperature) {}

  __device__ int V() const { return rows_.V; }
  __device__ float largest() const { return max_; }
  __device__ float inverse_temperature() const { return inverse_; }

  __device__ uint32_t Weight(float logit, int exponent) const {
    const float power = __fmaf_rn(logit - max_, inverse_ * kLog2e, static_cast<float>(exponent));
    return __float2uint_rn(Exp2(power) * (1 << kWeightBits));
  }

  __device__ Found InMaxima(Measure measure, uint64_t wanted, Cut cut) {
    return Find(wanted, measure == Measure::kMass, [&] {
      for (int g = threadIdx.x; g < 32 * slices_; g += kRowThreads)
        AddByDistance(measure, group_max()[g], cut, kLastCountedBucket);
    });
  }

  __device__ Found InLogits(Measure measure, uint64_t wanted, Cut cut, int most) {
    return Find(wanted, measure == Measure::kMass, [&] {
      ForEachLogit(
          [&](float max) { return max > cut.above && BucketOf(max, max_, inverse_) <= most; },
          [&](float logit) { AddByDistance(measure, logit, cut, most); });
    });
  }

  __device__ uint32_t LowestKey(int bucket) const {
    uint32_t low = 0;
    for (int shift = 32 - kLog2RowThreads;; shift = max(shift - kLog2RowThreads, 0)) {
      const uint32_t key = low + (threadIdx.x << shift);
      const bool below = key < KeyOf(max_) && BucketOf(FromKey(key), max_, inverse_) > bucket;
      const int count = __syncthreads_count(below);  // these are the first ones
      if (shift == 0) return low + count;
      low += static_cast<uint32_t>(count - 1) << shift;
    }
  }

  // They are kept in shared memory if there is room.
  __device__ void Collect(uint32_t low, uint32_t high) {
    if (threadIdx.x == 0) s_.key_count = 0;
    __syncthreads();
    ForEachLogit([&](float max) { return KeyOf(max) >= low; },
                 [&](float logit) {
                   const uint32_t key = KeyOf(logit);
                   if (key < low || key >= high) return;
                   const int at = atomicAdd(&s_.key_count, 1);
                   if (at < RowShared::kMostKeys) s_.keys[at] = key;
                 });
    __syncthreads();
  }

  __device__ Found InKeys(Measure measure, uint64_t wanted, uint32_t low, uint32_t high, int shift,
                          int exponent) {
    const auto add = [&](uint32_t key) {
      if (key >= low && key < high)
        Add(measure, static_cast<int>((high - 1 - key) >> shift), FromKey(key), exponent);
    };
    return Find(wanted, false, [&] {
      if (s_.key_count <= RowShared::kMostKeys) {
        for (int i = threadIdx.x; i < s_.key_count; i += kRowThreads) add(s_.keys[i]);
      } else {
        ForEachLogit([&](float max) { return KeyOf(max) >= low; },
                     [&](float logit) { add(KeyOf(logit)); });
      }
    });
  }

  // Also leaves what Draw needs.
  __device__ double Mass(Cut cut) {
    if (cut.above == -kInfinity)
      TakeSlices();
    else
      SumSlices(cut);
    __syncthreads();
    double mass = 0;
    for (int slice = threadIdx.x % 32; slice < slices_; slice += 32) mass += s_.mass[slice];
    return LastLane(WarpScan(mass));
  }

  // The token at u of what Mass(cut) found. For one warp.
  __device__ int Draw(Cut cut, double u) const {
    const int lane = threadIdx.x % 32;
    const int chunk = (slices_ + 31) / 32, first = lane * chunk;
    double mass = 0;
    for (int i = first; i < min(first + chunk, slices_); ++i) mass += s_.mass[i];
    const double scan = WarpScan(mass), before = BeforeLane(scan);
    double left = u * LastLane(scan);
    // At each level the last with any mass that begins at or before the place drawn.
    const int holder = HighestLane(mass > 0 && before <= left);
    left -= __shfl_sync(~0u, before, holder);
    int slice = 0;
    double passed = 0, slice_begin = 0;
    for (int i = holder * chunk; i < min((holder + 1) * chunk, slices_); ++i) {
      if (s_.mass[i] > 0 && passed <= left) slice = i, slice_begin = passed;
      passed += s_.mass[i];
    }
    return DrawFromSlice(cut, slice, left - slice_begin);
  }

 private:
  __device__ float ExpOf(float logit) const { return Exp((logit - max_) * inverse_); }

  // visit(logit) for all of the groups of whose largest logit `reads` is true, and maybe -inf.
  template <typename Reads, typename Visit>
  __device__ void ForEachLogit(Reads reads, Visit visit) const {
    for (int g = threadIdx.x; g < 32 * slices_; g += kRowThreads) {
      if (!reads(group_max()[g])) continue;
#pragma unroll 1
      for (int i = 0; i < kHeld; i += kHeld / 2) {  // not all at once, as registers are few
        float x[kHeld / 2];
        LoadPieces<kVector>(logits(), rows_.V, g / 32, g % 32, i, x);
#pragma unroll
        for (int k = 0; k < kHeld / 2; ++k) visit(x[k]);
      }
    }
  }

  __device__ void Add(Measure measure, int bucket, float logit, int exponent) {
    if (measure == Measure::kCount) {
      atomicAdd(&s_.low[bucket], 1u);
      return;
    }
    const uint32_t weight = Weight(logit, exponent);
    atomicAdd(&s_.high[bucket], weight >> kLowBits);
    atomicAdd(&s_.low[bucket], weight & ((1u << kLowBits) - 1));
  }
  __device__ void AddByDistance(Measure measure, float logit, Cut cut, int most) {
    if (!(logit > cut.above)) return;
    const int bucket = BucketOf(logit, max_, inverse_);
    if (bucket <= most) Add(measure, bucket, logit, ExponentOf(bucket));
  }

  // Where the sums of the buckets that `fill` adds to reach `wanted`.
  template <typename Fill>
  __device__ Found Find(uint64_t wanted, bool mass_by_distance, Fill fill) {
    for (int i = threadIdx.x; i < kBuckets; i += kRowThreads) s_.high[i] = s_.low[i] = 0;
    __syncthreads();
    if (threadIdx.x == 0) s_.found = {};
    fill();
    __syncthreads();

    constexpr int kEach = kBuckets / kRowThreads;
    const int first = threadIdx.x * kEach, warp = threadIdx.x / 32;
    uint64_t sums[kEach], mine = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int bucket = first + i;
      sums[i] = (uint64_t{s_.high[bucket]} << kLowBits) + s_.low[bucket];
      if (mass_by_distance) sums[i] = MassOf(sums[i], ExponentOf(bucket));
      mine += sums[i];
    }
    const uint64_t scan = WarpScan(mine);
    if (threadIdx.x % 32 == 31) s_.warp_total[warp] = scan;
    __syncthreads();
    uint64_t before = scan - mine, total = 0;
#pragma unroll 4
    for (int i = 0; i < kRowWarps; ++i) {
      if (i < warp) before += s_.warp_total[i];
      total += s_.warp_total[i];
    }
    if (threadIdx.x == 0) s_.found.total = total;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (before < wanted && wanted <= before + sums[i]) {
        s_.found.bucket = first + i;
        s_.found.before = before;
      }
      before += sums[i];
    }
    __syncthreads();
    return s_.found;
  }

  // Without a cut the first kernel has the sums.
  __device__ void TakeSlices() {
    for (int slice = threadIdx.x; slice < slices_; slice += kRowThreads) {
      const float largest = rows_.parts[first_part() + slice / kSlicesPerPart].max;
      const float mass = rows_.slice_sum[first_part() * kSlicesPerPart + slice] *
                         ExpBelow(largest, max_, inverse_);
      s_.mass[slice] = mass > 0x1p-100f ? mass : 0;  // a logit's own weight must not be 0 then
      s_.ties[slice] = 0;
    }
  }

  __device__ void SumSlices(Cut cut) {
    const int lane = threadIdx.x % 32;
    for (int slice = threadIdx.x / 32; slice < slices_; slice += kRowWarps) {
      float mass = 0;
      int ties = 0;
      if (group_max()[slice * 32 + lane] >= cut.above) {
        float x[kHeld];
        LoadPieces<kVector>(logits(), rows_.V, slice, lane, 0, x);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          if (x[i] > cut.above) mass += ExpOf(x[i]);
          ties += x[i] == cut.above;
        }
      }
      mass = WarpSum(mass);
      ties = __reduce_add_sync(~0u, ties);
      if (lane == 0) s_.mass[slice] = mass, s_.ties[slice] = ties;
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    const float weight = ExpOf(cut.above);
    int before = 0;
    for (int base = 0; base < slices_; base += 32) {
      const int slice = base + lane;
      const int ties = slice < slices_ ? s_.ties[slice] : 0;
      const int scan = WarpScan(ties);
      const int kept = min(max(cut.ties - before - (scan - ties), 0), ties);
      if (slice < slices_) {
        s_.mass[slice] += static_cast<float>(kept) * weight;
        s_.ties[slice] = kept;
      }
      before += LastLane(scan);
    }
  }

  __device__ int DrawFromSlice(Cut cut, int slice, double left) const {
    constexpr int kPiece = kWidth<kVector>;
    const int lane = threadIdx.x % 32;
    int token = 0, ties_left = s_.ties[slice];
    double passed = 0;
#pragma unroll 1
    for (int i = 0; i < kHeld; i += kPiece) {
      float x[kPiece];
      LoadPieces<kVector>(logits(), rows_.V, slice, lane, i, x);
      int ties = 0;
#pragma unroll
      for (int k = 0; k < kPiece; ++k) ties += x[k] == cut.above;
      const int ties_scan = WarpScan(ties);
      int tie = ties_scan - ties;
      double mass = 0;
#pragma unroll
      for (int k = 0; k < kPiece; ++k) {
        const bool kept = x[k] > cut.above || (x[k] == cut.above && tie++ < ties_left);
        x[k] = kept ? ExpOf(x[k]) : 0;  // its weight from here on
        mass += x[k];
      }
      const double scan = WarpScan(mass);
      double begin = passed + BeforeLane(scan);
      int candidate = -1;
#pragma unroll
      for (int k = 0; k < kPiece; ++k) {
        if (x[k] > 0 && begin <= left) candidate = IdOf<kVector>(slice, lane, i + k);
        begin += x[k];
      }
      const int holder = HighestLane(candidate >= 0);
      if (holder >= 0) token = __shfl_sync(~0u, candidate, holder);
      passed += LastLane(scan);
      ties_left -= LastLane(ties_scan);
    }
    return token;
  }

  // Addresses are made when they are needed, as registers are few.
  __device__ int64_t first_part() const { return int64_t{blockIdx.x} * rows_.parts_per_row; }
  __device__ const float* logits() const { return rows_.logits + int64_t{blockIdx.x} * rows_.V; }
  __device__ const float* group_max() const {
    return rows_.group_max + first_part() * kPartThreads;
  }

  RowShared& s_;
  const Rows& rows_;
  const int slices_;
  const float max_, inverse_;
};

}  // namespace dsla::cuda
