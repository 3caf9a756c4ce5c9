#include "engine/engine_stats.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace dsla {

RateMeter::RateMeter(double window_seconds) : width_(window_seconds / kBuckets) {
  DSLA_CHECK(window_seconds > 0);
}

void RateMeter::Add(double now, double amount) {
  if (first_ < 0) first_ = now;
  const auto index = static_cast<int64_t>(std::floor(now / width_));
  Bucket& bucket = buckets_[static_cast<size_t>(index) % kBuckets];
  if (bucket.index != index) bucket = {index, 0};
  bucket.amount += amount;
}

double RateMeter::PerSecond(double now) const {
  if (first_ < 0) return 0;
  const auto index = static_cast<int64_t>(std::floor(now / width_));
  double sum = 0;
  for (const Bucket& bucket : buckets_) {
    if (bucket.index > index - kBuckets) sum += bucket.amount;
  }
  // The oldest bucket is whole, the newest has only begun.
  const double covered = now - static_cast<double>(index - kBuckets + 1) * width_;
  return sum / std::clamp(now - first_, width_, std::max(covered, width_));
}

}  // namespace dsla
