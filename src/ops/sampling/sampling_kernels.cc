#include "ops/sampling/sampling_kernels.h"

#include <algorithm>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/sampling/sampling_kernels.cc"
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
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Calls body(vector) over n floats; a last part is filled up with -inf, which neither is a maximum
// nor adds to a sum of exponentials.
template <typename Body>
HWY_INLINE void Vectors(const float* p, int64_t n, Body&& body) {
  const Tag d;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(hn::LoadU(d, p + i));
  if (i == n) return;
  HWY_ALIGN float last[kLanes];
  std::fill(std::copy(p + i, p + n, last), last + kLanes, -kInfinity);
  body(hn::Load(d, last));
}

// Returns whether there is a NaN.
bool BlockMaxTarget(const float* logits, int64_t n, int64_t block, float* block_max) {
  const Tag d;
  auto nan = hn::IsNaN(hn::Zero(d));  // none yet
  for (int64_t b = 0; b * block < n; ++b) {
    Vec max = hn::Set(d, -kInfinity);
    Vectors(logits + b * block, std::min(block, n - b * block), [&](Vec l) {
      max = hn::Max(max, l);
      nan = hn::Or(nan, hn::IsNaN(l));
    });
    block_max[b] = hn::GetLane(hn::MaxOfLanes(d, max));
  }
  return !hn::AllFalse(d, nan);
}

void BlockSumTarget(const float* logits, int64_t n, int64_t block, float max, float inverse,
                    float threshold, double* sums) {
  const Tag d;
  const Vec vmax = hn::Set(d, max), vinverse = hn::Set(d, inverse),
            vthreshold = hn::Set(d, threshold);
  for (int64_t b = 0; b * block < n; ++b) {
    Vec sum = hn::Zero(d);
    Vectors(logits + b * block, std::min(block, n - b * block), [&](Vec l) {
      const Vec e = Exp(d, hn::Mul(hn::Sub(l, vmax), vinverse));
      sum = hn::Add(sum, hn::IfThenElseZero(hn::Gt(l, vthreshold), e));
    });
    // The few lanes are added in fp64, so that what rounds in fp32 is a sum of block / lanes terms.
    HWY_ALIGN float lanes[kLanes];
    hn::Store(sum, d, lanes);
    double total = 0;
    for (const float lane : lanes) total += lane;
    sums[b] = total;
  }
}

void BucketSumTarget(const float* logits, int64_t n, float max, float inverse, double* mass) {
  const Tag d;
  const hn::RebindToSigned<Tag> di;
  const Vec vmax = hn::Set(d, max), vinverse = hn::Set(d, inverse),
            per_bucket = hn::Set(d, inverse * kBucketsPerUnit), last = hn::Set(d, kBuckets - 1);
  Vectors(logits, n, [&](Vec l) {
    HWY_ALIGN float terms[kLanes];
    HWY_ALIGN int32_t buckets[kLanes];
    hn::Store(Exp(d, hn::Mul(hn::Sub(l, vmax), vinverse)), d, terms);
    const Vec distance = hn::Mul(hn::Sub(vmax, l), per_bucket);
    hn::Store(hn::ConvertTo(di, hn::Min(distance, last)), di, buckets);
    for (int64_t i = 0; i < kLanes; ++i) mass[buckets[i]] += terms[i];
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dsla {

HWY_EXPORT(BlockMaxTarget);
HWY_EXPORT(BlockSumTarget);
HWY_EXPORT(BucketSumTarget);

void FindBlocks(std::span<const float> logits, LogitBlocks& blocks) {
  const int64_t n = static_cast<int64_t>(logits.size());
  const int64_t least = (n + LogitBlocks::kMaxBlocks - 1) / LogitBlocks::kMaxBlocks;
  blocks.size = std::max<int64_t>(1, (least + 63) / 64) * 64;
  blocks.count = static_cast<int>((n + blocks.size - 1) / blocks.size);
  blocks.has_nan =
      HWY_DYNAMIC_DISPATCH(BlockMaxTarget)(logits.data(), n, blocks.size, blocks.block_max);
  blocks.max = *std::max_element(blocks.block_max, blocks.block_max + blocks.count);
}

double SumExp(std::span<const float> logits, const LogitBlocks& blocks, float inverse_temperature,
              float threshold, double* sums) {
  HWY_DYNAMIC_DISPATCH(BlockSumTarget)
  (logits.data(), static_cast<int64_t>(logits.size()), blocks.size, blocks.max, inverse_temperature,
   threshold, sums);
  double total = 0;
  for (int b = 0; b < blocks.count; ++b) total += sums[b];
  return total;
}

void SumExpByBucket(std::span<const float> logits, const LogitBlocks& blocks,
                    float inverse_temperature, double* mass) {
  std::fill(mass, mass + kBuckets, 0.);
  HWY_DYNAMIC_DISPATCH(BucketSumTarget)
  (logits.data(), static_cast<int64_t>(logits.size()), blocks.max, inverse_temperature, mass);
}

}  // namespace dsla
#endif  // HWY_ONCE
