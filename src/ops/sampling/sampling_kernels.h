// Vectorised passes over the V logits. Internal to this folder.
#pragma once

#include <cstdint>
#include <span>

namespace dsla {

// The logits cut into at most kMaxBlocks blocks, with the largest logit of each. The k-th largest
// of the block maxima is at most the k-th largest logit, as k blocks hold one such logit each:
// whoever looks for the k largest need only look at logits from there on, in the blocks that
// reach it.
struct LogitBlocks {
  static constexpr int kMaxBlocks = 1024;  // small enough for the stack

  int64_t size = 0;  // logits per block, the last may be shorter
  int count = 0;
  float max = 0;         // of all
  bool has_nan = false;  // then the maxima mean nothing
  float block_max[kMaxBlocks];
};

void FindBlocks(std::span<const float> logits, LogitBlocks& blocks);

// sums[b] = sum over block b of exp((l - max) * inverse_temperature) where l > threshold. Returns
// their sum. The terms are fp32, the sums fp64.
double SumExp(std::span<const float> logits, const LogitBlocks& blocks, float inverse_temperature,
              float threshold, double* sums);

// The same terms by distance from the largest logit: bucket i holds those with (max - l) /
// temperature in [i, i + 1) / kBucketsPerUnit, the last one all beyond. 32 units below the largest
// a token has 1e-14 of its probability.
inline constexpr int kBuckets = 1024, kBucketsPerUnit = 32;
void SumExpByBucket(std::span<const float> logits, const LogitBlocks& blocks,
                    float inverse_temperature, double* mass);

// The bucket of a logit, by the same fp32 operations as SumExpByBucket; never grows with the logit.
// constexpr, so that nvcc compiles it for GPUs too.
constexpr int BucketOf(float logit, float max, float inverse_temperature) {
  const float distance = (max - logit) * (inverse_temperature * kBucketsPerUnit);
  return distance < kBuckets - 1 ? static_cast<int>(distance) : kBuckets - 1;
}

}  // namespace dsla
