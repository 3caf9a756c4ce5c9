// Quantiles of measured values, by nearest rank: one of the values, never one between two.
#pragma once

#include <cstddef>
#include <vector>

namespace dsla {

// The smallest value that at least the share q of the values do not exceed; 0 if there are none.
double Quantile(std::vector<double> values, double q);

// Of the values of the last `window` seconds, of the newest kCapacity at most. The caller brings
// the clock, so that it can be tested.
class SlidingQuantile {
 public:
  explicit SlidingQuantile(double window_seconds) : window_(window_seconds) {}
  void Add(double now, double value);
  void Clear() { samples_.clear(), next_ = 0; }
  double Quantile(double now, double q) const;

 private:
  static constexpr size_t kCapacity = 4096;
  struct Sample {
    double time = 0;
    double value = 0;
  };
  double window_;
  size_t next_ = 0;  // where the oldest is overwritten
  std::vector<Sample> samples_;
};

}  // namespace dsla
