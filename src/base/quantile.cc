#include "base/quantile.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

namespace dsla {

double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  const auto count = static_cast<double>(values.size());
  const auto rank = static_cast<int64_t>(std::clamp(std::ceil(q * count), 1.0, count)) - 1;
  std::nth_element(values.begin(), values.begin() + rank, values.end());
  return values[static_cast<size_t>(rank)];
}

void SlidingQuantile::Add(double now, double value) {
  if (samples_.size() < kCapacity) {
    samples_.push_back({now, value});
    return;
  }
  samples_[next_] = {now, value};
  next_ = (next_ + 1) % kCapacity;
}

double SlidingQuantile::Quantile(double now, double q) const {
  std::vector<double> values;
  for (const Sample& sample : samples_) {
    if (sample.time > now - window_) values.push_back(sample.value);
  }
  return dsla::Quantile(std::move(values), q);
}

}  // namespace dsla
