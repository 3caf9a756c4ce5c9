#include "ops/norm_rope/norm_rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numbers>
#include <random>
#include <vector>

#include "ops/simd/each_target.h"
#include "ops/testing/expect_close.h"

namespace dsla {
namespace {

constexpr uint32_t kSeed = 20250102;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<float> Random(int64_t n, uint32_t seed, float scale = 1) {
  std::mt19937 random(kSeed + seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = normal(random);
  return values;
}

struct Shape {
  int64_t T, C;
};
const Shape kShapes[] = {{1, 1}, {2, 7}, {1, 8}, {3, 31}, {2, 33}, {5, 576}, {100, 577}, {0, 4}};

TEST(RmsNormTest, EqualsReference) {
  Workspace workspace;
  ForEachTarget([&] {
    for (const Shape s : kShapes) {
      const std::vector<float> x = Random(s.T * s.C, 1, 3), weight = Random(s.C, 2);
      std::vector<float> want(x.size()), got(x.size(), kNaN), in_place = x;
      RmsNormRef(x.data(), weight.data(), 1e-5f, s.T, s.C, want.data());
      RmsNorm({2, &workspace}, x.data(), weight.data(), 1e-5f, s.T, s.C, got.data());
      ExpectClose(got, want, SumTolerance(s.C));
      RmsNorm({2, &workspace}, in_place.data(), weight.data(), 1e-5f, s.T, s.C, in_place.data());
      EXPECT_EQ(in_place, got);
    }
  });
}

// Where eps outweighs the values it must not be lost: all zeros give zeros.
TEST(RmsNormTest, EpsCounts) {
  const std::vector<float> weight(16, 1.f), zeros(16, 0.f), small(16, 1e-3f);
  std::vector<float> out(16, kNaN);
  Workspace workspace;
  RmsNorm({1, &workspace}, zeros.data(), weight.data(), 1e-6f, 1, 16, out.data());
  EXPECT_EQ(out, zeros);
  RmsNorm({1, &workspace}, small.data(), weight.data(), 3e-6f, 1, 16, out.data());
  for (const float value : out) EXPECT_NEAR(value, 0.5f, 1e-6f);
}

TEST(AddRmsNormTest, AddsThenNormalises) {
  ForEachTarget([&] {
    for (const Shape s : kShapes) {
      std::vector<float> x = Random(s.T * s.C, 1), sum = x, out(x.size(), kNaN), want(x.size());
      const std::vector<float> delta = Random(s.T * s.C, 2), weight = Random(s.C, 3);
      for (size_t i = 0; i < x.size(); ++i) sum[i] += delta[i];
      RmsNormRef(sum.data(), weight.data(), 1e-5f, s.T, s.C, want.data());
      const auto run = [&](const float* added) {
        std::fill(out.begin(), out.end(), kNaN);
        for (int64_t at = 0; at < s.T * s.C; at += s.C)
          AddRmsNormRow(x.data() + at, added != nullptr ? added + at : nullptr, weight.data(),
                        1e-5f, s.C, out.data() + at);
        EXPECT_EQ(x, sum);
        ExpectClose(out, want, SumTolerance(s.C));
      };
      run(delta.data());
      run(nullptr);
    }
  });
}

TEST(SiluMulTest, EqualsReference) {
  ForEachTarget([&] {
    for (const Shape s : kShapes) {
      const std::vector<float> gate_up = Random(s.T * 2 * s.C, 1, 8);
      std::vector<float> got(static_cast<size_t>(s.T * s.C), kNaN), want(got.size());
      for (int64_t t = 0; t < s.T; ++t) {  // in two pieces
        const float* row = gate_up.data() + t * 2 * s.C;
        SiluMulRow(row, s.C, s.C / 3, s.C, got.data() + t * s.C);
        SiluMulRow(row, s.C, 0, s.C / 3, got.data() + t * s.C);
      }
      SiluMulRef(gate_up.data(), s.T, s.C, want.data());
      ExpectClose(got, want, RoundingTolerance(12));
    }
  });
}

TEST(SiluMulTest, LargeGates) {
  const std::vector<float> gate_up = {200, -200, 0, -88, 2, 2, 2, 2};
  std::vector<float> out(4, kNaN);
  SiluMulRow(gate_up.data(), 4, 0, 4, out.data());
  EXPECT_EQ(out[0], 400);
  EXPECT_NEAR(out[1], 0, 1e-37);
  EXPECT_EQ(out[2], 0);
  EXPECT_NEAR(out[3], 0, 1e-35);
}

std::vector<double> Frequencies(int half) {
  std::vector<double> f(static_cast<size_t>(half));
  for (int i = 0; i < half; ++i) f[static_cast<size_t>(i)] = std::pow(1e4, -double(i) / half);
  return f;
}

// cos and sin of position 131,071 to half an ulp: the angle was reduced in fp64.
TEST(RopeTableTest, LargePositionsAreExact) {
  const std::vector<double> f = Frequencies(8);
  const int64_t positions = 131072;
  const RopeTable table(f, positions);
  EXPECT_EQ(table.D(), 16);
  EXPECT_EQ(table.positions(), positions);
  for (const int64_t p : {int64_t{0}, int64_t{1}, int64_t{4095}, positions - 1}) {
    for (int i = 0; i < 8; ++i) {
      const long double angle = static_cast<long double>(p) * f[static_cast<size_t>(i)];
      EXPECT_NEAR(table.cos()[p * 8 + i], static_cast<double>(std::cos(angle)), 0x1p-24);
      EXPECT_NEAR(table.sin()[p * 8 + i], static_cast<double>(std::sin(angle)), 0x1p-24);
    }
  }
}

struct RopeCase {
  int64_t T;
  int heads, D;
  bool norm;
};

void CheckRope(const RopeCase& c) {
  SCOPED_TRACE(testing::Message() << c.T << " rows, " << c.heads << " heads of " << c.D
                                  << (c.norm ? ", norm" : ""));
  const RopeTable table(Frequencies(c.D / 2), 300);
  const int64_t width = c.heads * c.D, stride = width + 11;
  std::vector<float> got(static_cast<size_t>(c.T * stride), kNaN), want;
  const std::vector<float> values = Random(c.T * width, 1), weight = Random(c.D, 2);
  std::vector<int32_t> positions;
  for (int64_t t = 0; t < c.T; ++t) {
    std::copy_n(values.data() + t * width, width, got.data() + t * stride);
    positions.push_back(static_cast<int32_t>(t * 37 % 300));
  }
  want = got;
  RopeArgs args{.x = got.data(),
                .stride = stride,
                .T = c.T,
                .heads = c.heads,
                .positions = positions.data(),
                .table = &table};
  if (c.norm) args.norm_weight = weight.data(), args.norm_eps = 1e-6f;
  Workspace workspace;
  NormRope({2, &workspace}, args);
  args.x = want.data();
  NormRopeRef(args);
  for (int64_t t = 0; t < c.T; ++t) {
    const size_t at = static_cast<size_t>(t * stride), n = static_cast<size_t>(width);
    ExpectClose(std::span(got).subspan(at, n), std::span<const float>(want).subspan(at, n),
                c.norm ? SumTolerance(c.D) : RoundingTolerance(4));
    for (int64_t i = width; i < stride; ++i)
      EXPECT_TRUE(std::isnan(got[at + static_cast<size_t>(i)])) << "gap after row " << t;
  }
}

TEST(NormRopeTest, EqualsReference) {
  ForEachTarget([] {
    for (const bool norm : {false, true})
      for (const int D : {2, 6, 16, 64, 80, 128})
        for (const int64_t T : {0, 1, 3, 150}) CheckRope({T, 3, D, norm});
  });
}

// A quarter turn of pair 0: (1, 0) becomes (0, 1), so that the pairs are (d, d + D/2) and the
// direction is right.
TEST(NormRopeTest, TurnsPairsCounterClockwise) {
  const double frequencies[] = {std::numbers::pi / 2, 0};
  const RopeTable table(frequencies, 2);
  std::vector<float> x = {1, 5, 0, 7};
  const int32_t position = 1;
  Workspace workspace;
  NormRope(
      {1, &workspace},
      {.x = x.data(), .stride = 4, .T = 1, .heads = 1, .positions = &position, .table = &table});
  EXPECT_NEAR(x[0], 0, 1e-7);
  EXPECT_NEAR(x[2], 1, 1e-7);
  EXPECT_EQ(x[1], 5);
  EXPECT_EQ(x[3], 7);
}

TEST(NormRopeDeathTest, PositionBeyondTheTable) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const RopeTable table(Frequencies(2), 4);
  std::vector<float> x(4, 1.f);
  const int32_t position = 4;
  Workspace workspace;
  EXPECT_DEATH(NormRope({1, &workspace}, {.x = x.data(),
                                          .stride = 4,
                                          .T = 1,
                                          .heads = 1,
                                          .positions = &position,
                                          .table = &table}),
               "check failed");
}

}  // namespace
}  // namespace dsla
