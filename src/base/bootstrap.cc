#include "base/bootstrap.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/random.h"

namespace dsla {

Estimate Bootstrap(std::span<const double> values, std::span<const double> weights, uint64_t seed) {
  constexpr int kSamples = 2000;
  DSLA_CHECK(values.size() == weights.size());
  std::vector<std::pair<double, double>> documents;
  double value = 0, weight = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    if (weights[i] == 0) continue;
    documents.emplace_back(values[i], weights[i]);
    value += values[i], weight += weights[i];
  }
  if (documents.empty()) return {};
  Random random(seed, {0xb007});
  std::vector<double> means(kSamples);
  for (double& mean : means) {
    double sum = 0, sum_weights = 0;
    for (size_t i = 0; i < documents.size(); ++i) {
      const auto& [v, w] = documents[random.Below(documents.size())];
      sum += v, sum_weights += w;
    }
    mean = sum / sum_weights;
  }
  std::sort(means.begin(), means.end());
  return {.mean = value / weight,
          .low = means[kSamples / 40],
          .high = means[kSamples - 1 - kSamples / 40]};
}

}  // namespace dsla
