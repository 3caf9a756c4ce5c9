// What the engine measures of itself over the last seconds. Plain values in memory of a fixed size;
// the caller brings the clock, so that they can be tested, and the locks.
#pragma once

#include <array>
#include <cstdint>

namespace dsla {

// Amounts per second over the last `window` seconds.
class RateMeter {
 public:
  explicit RateMeter(double window_seconds);

  void Add(double now, double amount);
  // 0 before the first Add. While less than a window has passed since then, over that time.
  double PerSecond(double now) const;

 private:
  static constexpr int kBuckets = 32;
  // The window's resolution. A bucket holds what was added in [index, index + 1) widths.
  struct Bucket {
    int64_t index = -1;
    double amount = 0;
  };
  double width_;
  double first_ = -1;  // time of the first Add
  std::array<Bucket, kBuckets> buckets_;
};

}  // namespace dsla
