#include "engine/engine_stats.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

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

TEST(SlidingQuantileTest, EqualsASortOfTheWindow) {
  constexpr uint32_t kSeed = 20250302;
  std::mt19937 random(kSeed);
  SlidingQuantile sliding(10);
  EXPECT_EQ(sliding.Quantile(0, 0.95), 0);
  std::vector<std::pair<double, double>> all;
  for (int i = 0; i < 20000; ++i) {
    const double now = i * 0.004, value = static_cast<double>(random() % 10000);
    sliding.Add(now, value);
    all.emplace_back(now, value);
    if (i % 997 != 0) continue;
    std::vector<double> window;
    for (const auto& [time, v] : all) {
      if (time > now - 10) window.push_back(v);
    }
    ASSERT_LE(window.size(), 4096u);
    std::sort(window.begin(), window.end());
    const size_t rank = (window.size() * 95 + 99) / 100;  // ceil
    ASSERT_EQ(sliding.Quantile(now, 0.95), window[rank - 1]) << "seed " << kSeed << ", " << i;
  }
  EXPECT_EQ(sliding.Quantile(1e6, 0.95), 0);
}

TEST(SlidingQuantileTest, OfTheNewestOnly) {
  SlidingQuantile sliding(1000);
  for (int i = 0; i < 10000; ++i) sliding.Add(i * 1e-3, i);
  EXPECT_EQ(sliding.Quantile(10, 0), 10000 - 4096);
  EXPECT_EQ(sliding.Quantile(10, 1), 9999);
}

}  // namespace
}  // namespace dsla
