#include "engine/engine_stats.h"

#include <gtest/gtest.h>

namespace dsla {
namespace {

TEST(RateMeterTest, NothingIsZero) {
  RateMeter meter(5);
  EXPECT_EQ(meter.PerSecond(100), 0);
}

TEST(RateMeterTest, ASteadyRateIsThatRate) {
  RateMeter meter(4);
  for (int i = 0; i < 2000; ++i) {
    const double now = 50 + i * 0.01;
    meter.Add(now, 3);  // 300 a second
    // The bucket in progress and the first instants hold a part of a step more or less.
    if (i > 100) {
      EXPECT_NEAR(meter.PerSecond(now), 300, 300 * 0.03) << i;
    }
  }
}

TEST(RateMeterTest, OldAmountsAreForgotten) {
  RateMeter meter(4);
  meter.Add(10, 100);
  EXPECT_GT(meter.PerSecond(13), 20);
  EXPECT_EQ(meter.PerSecond(14.2), 0);
  meter.Add(1000, 8);
  EXPECT_LE(meter.PerSecond(1003.5), 8 / 3.0);
  EXPECT_GT(meter.PerSecond(1003.5), 0);
}

}  // namespace
}  // namespace dsla
