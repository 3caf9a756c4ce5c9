// Least squares with coefficients that cannot be negative, for a handful of features.
#pragma once

#include <array>
#include <vector>

namespace dsla {

inline constexpr int kMaxFeatures = 4;

struct Observation {
  std::array<double, kMaxFeatures> features{};  // unused ones 0
  double value = 0;                             // positive
};

// The x >= 0 that minimises the sum of ((features . x - value) / value)^2. Exact: tries every set
// of features that may be non-zero, 2^4 at most. A feature that is 0 everywhere gets 0.
std::array<double, kMaxFeatures> FitNonNegative(const std::vector<Observation>& observations);

}  // namespace dsla
