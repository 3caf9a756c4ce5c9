#include "base/quantile.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

namespace dsla {
namespace {

TEST(QuantileTest, IsTheSmallestValueThatTheShareDoesNotExceed) {
  EXPECT_EQ(Quantile({}, 0.95), 0);
  EXPECT_EQ(Quantile({7}, 0.5), 7);
  EXPECT_EQ(Quantile({7, 3}, 0.95), 7);
  EXPECT_EQ(Quantile({7, 3}, 0.5), 3);
  std::vector<double> values;
  for (int i = 20; i > 0; --i) values.push_back(i);
  EXPECT_EQ(Quantile(values, 0.95), 19);
  values.push_back(21);
  EXPECT_EQ(Quantile(values, 0.95), 20);
  EXPECT_EQ(Quantile(values, 0), 1);
  EXPECT_EQ(Quantile(values, 1), 21);
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
  sliding.Clear();
  EXPECT_EQ(sliding.Quantile(10, 1), 0);
  sliding.Add(10, 3);
  EXPECT_EQ(sliding.Quantile(10, 0), 3);
}

}  // namespace
}  // namespace dsla
