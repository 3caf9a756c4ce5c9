#include "distill/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/random.h"

namespace dsla {

double LearningRateShare(int64_t step, int64_t steps, int warmup, double floor) {
  const double rise = warmup > 0 ? std::min(1.0, static_cast<double>(step + 1) / warmup) : 1.0;
  const double done = steps > 0 ? std::min(1.0, static_cast<double>(step) / steps) : 1.0;
  const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * done));
  return rise * (cosine * (1 - floor) + floor);
}

LevelDraw DrawLevel(const LevelSampling& sampling, uint64_t seed, int64_t step, int length) {
  Random random(seed, {0x1e7e1, static_cast<uint64_t>(step)});
  LevelDraw draw;
  if (!sampling.levels.empty() && random.Uniform() < sampling.level_share)
    draw.level = sampling.levels[random.Below(sampling.levels.size())];
  else
    draw.level = static_cast<int>(random.Between(1, sampling.layers));
  if (random.Uniform() < sampling.switch_share)
    draw.switch_at = static_cast<int>(random.Between(length / 4, length * 3 / 4));
  return draw;
}

}  // namespace dsla
