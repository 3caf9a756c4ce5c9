// Learning rates, levels and switch points: functions of the step alone, so that a resumed run goes
// on as an uninterrupted one.
#pragma once

#include <cstdint>
#include <vector>

namespace dsla {

// The share of the base learning rate at `step` of `steps`: rises over `warmup` steps, then falls
// as a cosine to `floor`.
double LearningRateShare(int64_t step, int64_t steps, int warmup, double floor);

struct LevelSampling {
  int layers = 0;           // L
  std::vector<int> levels;  // drawn more often
  double level_share = 0;   // share of the steps at those, the rest at 1 .. L
  double switch_share = 0;  // share of the steps that switch
};

struct LevelDraw {
  int level = 0;
  int switch_at = 0;  // tokens; 0: none
};

// Nested sampling: one level for a step, and whether and where in a sequence of `length` tokens the
// teacher hands over: between a quarter and three quarters.
LevelDraw DrawLevel(const LevelSampling& sampling, uint64_t seed, int64_t step, int length);

}  // namespace dsla
