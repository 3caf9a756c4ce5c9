// A counter-based generator: the numbers are a function of the seed and the stream alone, so that
// the batch of any training step can be drawn without those before it, and a resumed run draws what
// an uninterrupted one would have. SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom
// Number Generators", OOPSLA 2014).
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <numbers>

namespace dsla {

class Random {
 public:
  // `stream`: what tells this sequence from others of the same seed (stage, step, row).
  Random(uint64_t seed, std::initializer_list<uint64_t> stream) : state_(Mix(seed + kStep)) {
    for (const uint64_t part : stream) state_ = Mix(state_ ^ Mix(part + kStep));
  }

  uint64_t Next() {
    state_ += kStep;
    return Mix(state_);
  }
  // In [0, n), n > 0. The bias of the product is under n / 2^64.
  uint64_t Below(uint64_t n) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(Next()) * n) >> 64);
  }
  // In [first, last].
  int64_t Between(int64_t first, int64_t last) {
    return first + static_cast<int64_t>(Below(static_cast<uint64_t>(last - first) + 1));
  }
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }  // [0, 1)
  double Normal() {                                                         // Box, Muller
    const double radius = std::sqrt(-2 * std::log(1 - Uniform()));
    return radius * std::cos(2 * std::numbers::pi * Uniform());
  }

 private:
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15;
  static uint64_t Mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }

  uint64_t state_;
};

}  // namespace dsla
