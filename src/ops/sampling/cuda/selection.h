// How the filters of one row become one cut, without a sort: histograms with exact integer sums
// find first the bucket (by distance from the largest logit) and then the logit at which a count or
// a mass is reached. Written over a Row, which on the GPU is a thread block (choose_row.cuh) and in
// selection_test.cc plain loops. A Row has V(), largest(), inverse_temperature() and
//   InMaxima: where `wanted` is reached among the largest logits of groups, by distance
//   InLogits: the same among all logits, up to a bucket
//   LowestKey: the least key in a bucket or those before it
//   Collect: from here on only keys in [low, high) are asked for
//   InKeys: where `wanted` is reached, in buckets (high - 1 - key) >> shift
//   Weight: of a logit, in units of 2^-(kWeightBits + exponent)
//   Mass: of what a cut keeps, the weight of the largest logit being 1
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>
#include <limits>

#include "ops/sampling/cuda/sampling_cuda.h"
#include "ops/sampling/logit_order.h"
#include "ops/sampling/sampling_kernels.h"

#ifdef __CUDACC__
#define DSLA_SELECTION __device__
#else
#define DSLA_SELECTION
#endif

namespace dsla::cuda {

// Kept are the logits above `above` and, in the order of ids, the first `ties` of those equal to
// it.
struct Cut {
  float above = -std::numeric_limits<float>::infinity();
  int32_t ties = 0;
};

// The first bucket with which `wanted` is reached, or -1; what is before it; all there is.
struct Found {
  int bucket = -1;
  uint64_t before = 0, total = 0;
};

enum class Measure { kCount, kMass };

// The last bucket holds all that is 32 temperatures and more below the largest logit: together less
// than 2^19 e^-31.9 of the probability, which is nothing next to a step of fp32. Filters do not
// look at it.
inline constexpr int kLastCountedBucket = kBuckets - 2;

// A weight in bucket b is 2^-ExponentOf(b) to within a factor of 2.1, so this many bits of it are
// about what fp32 gives.
inline constexpr int kWeightBits = 26;
constexpr int ExponentOf(int bucket) { return bucket * 2954 >> 16; }  // / kBucketsPerUnit * log2 e
// Sums over buckets are in units of 2^-kMassBits.
inline constexpr int kMassBits = 44, kUnitShift = kMassBits - kWeightBits;
constexpr uint64_t MassOf(uint64_t weights, int exponent) {
  return weights << kUnitShift >> exponent;
}

// How many equals of weight `each` reach `weights`: exact, as both are integers of few bits.
DSLA_SELECTION inline int32_t TiesWith(double weights, uint32_t each, int32_t most) {
  const double ties = ceil(weights / each);
  return ties < 1 ? 1 : ties < most ? static_cast<int32_t>(ties) : most;
}

// `last`: a bucket by which all logits together have reached `wanted`.
template <typename Row>
DSLA_SELECTION Cut Select(Row& row, Measure measure, uint64_t wanted, int last, Cut cut) {
  // The groups' maxima are logits: where they alone reach `wanted`, all logits have reached it.
  const Found most = row.InMaxima(measure, wanted, cut);
  const Found found = row.InLogits(measure, wanted, cut, most.bucket < 0 ? last : most.bucket);
  if (found.bucket < 0) {
    // Among the ties of the cut so far; without such all are needed, but for rounding.
    if (cut.ties == 0) return cut;
    const int exponent = ExponentOf(BucketOf(cut.above, row.largest(), row.inverse_temperature()));
    const double weights = ldexp(static_cast<double>(wanted - found.total), exponent - kUnitShift);
    return {cut.above, TiesWith(weights, row.Weight(cut.above, exponent), cut.ties)};
  }

  uint32_t low = row.LowestKey(found.bucket);
  uint32_t high = found.bucket == 0 ? KeyOf(row.largest()) + 1 : row.LowestKey(found.bucket - 1);
  if (low <= KeyOf(cut.above)) low = KeyOf(cut.above) + 1;
  const int exponent = measure == Measure::kCount ? 0 : ExponentOf(found.bucket);
  uint64_t left = wanted - found.before;
  if (measure == Measure::kMass)
    left = ((left << exponent) + (uint64_t{1} << kUnitShift) - 1) >> kUnitShift;
  row.Collect(low, high);
  int shift = 0;
  do {
    shift = 0;
    while ((high - low - 1) >> shift >= uint32_t{kBuckets}) ++shift;
    const Found at = row.InKeys(measure, left, low, high, shift, exponent);
    left -= at.before;
    high -= static_cast<uint32_t>(at.bucket) << shift;
    const uint32_t bottom = high - (uint32_t{1} << shift);
    if (bottom > low) low = bottom;
  } while (shift > 0);
  cut.above = FromKey(low);
  const uint32_t each = measure == Measure::kCount ? 1 : row.Weight(cut.above, exponent);
  return {cut.above, TiesWith(static_cast<double>(left), each, INT_MAX)};
}

// Top-k, top-p and min-p.
template <typename Row>
DSLA_SELECTION Cut Filter(Row& row, const RowSampling& sampling) {
  Cut cut;
  for (int step = 0; step < 2; ++step) {  // one copy of the code for both
    const Measure measure = step == 0 ? Measure::kCount : Measure::kMass;
    uint64_t wanted = 0;
    int last = kLastCountedBucket;
    if (measure == Measure::kCount) {
      if (sampling.top_k == 0) continue;
      wanted = static_cast<uint64_t>(sampling.top_k);
    } else {
      if (sampling.top_p == 1) continue;
      const double mass = row.Mass(cut), kept = static_cast<double>(sampling.top_p) * mass;
      wanted = static_cast<uint64_t>(ceil(ldexp(kept, kMassBits)));
      if (wanted == 0) wanted = 1;
      // From where on V logits together have no more than half of what may be left out.
      const float bucket = kBucketsPerUnit * logf(static_cast<float>(2 * row.V() / (mass - kept)));
      if (bucket < static_cast<float>(last)) last = static_cast<int>(bucket) + 1;
    }
    cut = Select(row, measure, wanted, last, cut);
  }
  const float least = LeastOfMinP(row.largest(), sampling.min_p);
  if (least > cut.above) cut = {least, INT_MAX};
  return cut;
}

}  // namespace dsla::cuda
