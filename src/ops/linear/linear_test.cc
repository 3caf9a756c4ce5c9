#include "ops/linear/linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "base/half.h"
#include "ops/linear/linear_input.h"
#include "ops/linear/panel_testing.h"
#include "ops/simd/each_target.h"
#include "ops/testing/expect_close.h"

namespace dsla {
namespace {

constexpr uint32_t kSeed = 20250101;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<float> Random(int64_t n, uint32_t seed) {
  std::mt19937 random(kSeed + seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = normal(random);
  return values;
}

// fp32 sums, but for many rows of bf16.
Tolerance ToleranceOf(int64_t T, int64_t in, WeightFormat format) {
  const bool panels = format == WeightFormat::kBF16 && T > LinearLoopRows(format);
  return panels ? kPanelTolerance : SumTolerance(in);
}

struct Case {
  int64_t T, out, in;
  WeightFormat format;
  bool bias, accumulate;
};

// A strided problem; what lies between the rows is NaN and must neither be read nor written.
struct Problem {
  explicit Problem(const Case& c)
      : weight(Random(c.out * c.in, 1)),
        bias(c.bias ? Random(c.out, 2) : std::vector<float>()),
        x_stride(c.in + 5),
        y_stride(c.out + 3),
        x(static_cast<size_t>(c.T * x_stride), kNaN),
        y(static_cast<size_t>(c.T * y_stride), kNaN),
        want(static_cast<size_t>(c.T * c.out)) {
    const std::vector<float> values = Random(c.T * c.in, 3), old = Random(c.T * c.out, 4);
    for (int64_t t = 0; t < c.T; ++t)
      std::copy_n(values.data() + t * c.in, c.in, x.data() + t * x_stride);
    LinearRef(weight, c.out, c.in, c.format, bias, x.data(), x_stride, c.T, want.data(), c.out);
    if (!c.accumulate) return;
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t o = 0; o < c.out; ++o) {
        y[static_cast<size_t>(t * y_stride + o)] = old[static_cast<size_t>(t * c.out + o)];
        want[static_cast<size_t>(t * c.out + o)] += old[static_cast<size_t>(t * c.out + o)];
      }
    }
  }

  // The rows of y without the gaps, which must still be NaN.
  std::vector<float> Dense(const Case& c) const {
    std::vector<float> dense;
    for (int64_t t = 0; t < c.T; ++t) {
      const float* row = y.data() + t * y_stride;
      dense.insert(dense.end(), row, row + c.out);
      for (int64_t o = c.out; o < y_stride; ++o) EXPECT_TRUE(std::isnan(row[o])) << "row " << t;
    }
    return dense;
  }

  std::vector<float> weight, bias;
  int64_t x_stride, y_stride;
  std::vector<float> x, y, want;
};

void CheckCase(const Case& c, int threads) {
  SCOPED_TRACE(testing::Message() << "T " << c.T << " out " << c.out << " in " << c.in << " "
                                  << Name(c.format) << (c.bias ? " bias" : "")
                                  << (c.accumulate ? " accumulate" : "") << " threads " << threads);
  Problem p(c);
  const Linear linear(p.weight, c.out, c.in, c.format, p.bias);
  Workspace workspace;
  linear.Forward({threads, &workspace}, p.x.data(), p.x_stride, c.T, p.y.data(), p.y_stride,
                 c.accumulate ? Accumulate::kYes : Accumulate::kNo);
  ExpectClose(p.Dense(c), p.want, ToleranceOf(c.T, c.in, c.format));
}

TEST(LinearTest, EqualsReferenceOnEveryPath) {
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF32})
    for (const bool bias : {false, true})
      for (const bool accumulate : {false, true})
        for (const int64_t T : {1, 2, 3, 4, 7, 32, 33, 64, 65, 90})
          CheckCase({T, 129, 96, format, bias, accumulate}, 2);
}

TEST(LinearTest, OddShapes) {
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF32})
    for (const int64_t in : {1, 2, 3, 15, 16, 17, 31, 32, 33, 577})
      for (const int64_t out : {1, 2, 3, 4, 5, 67})
        for (const int64_t T : {1, 5, 70}) CheckCase({T, out, in, format, true, false}, 2);
}

TEST(LinearTest, MoreFeaturesThanOnePanelOrTask) {
  for (const int64_t T : {1, 6, 33, 70, 150})
    for (const int threads : {1, 2, 3, 5})
      CheckCase({T, 1300, 160, WeightFormat::kBF16, true, true}, threads);
}

TEST(LinearTest, EveryTargetEqualsReference) {
  ForEachTarget([] {
    for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF32})
      for (const int64_t T : {1, 2, 3, 5, 8, 33, 36})
        CheckCase({T, 39, 300, format, true, true}, 1);
  });
}

// Decoding a token alone or with others gives the same bits.
TEST(LinearTest, RowsDoNotDependOnTheBatch) {
  const int64_t out = 515, in = 200, T = kLinearInvariantRows;
  const std::vector<float> weight = Random(out * in, 1), x = Random(T * in, 3);
  Workspace workspace;
  ForEachTarget([&] {
    for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF32}) {
      const Linear linear(weight, out, in, format);
      std::vector<float> alone(static_cast<size_t>(T * out));
      for (int64_t t = 0; t < T; ++t)
        linear.Forward({1, &workspace}, x.data() + t * in, in, 1, alone.data() + t * out, out);
      for (const int64_t rows : {int64_t{2}, int64_t{3}, int64_t{4}, int64_t{5}, int64_t{11}, T}) {
        std::vector<float> batched(static_cast<size_t>(rows * out));
        linear.Forward({2, &workspace}, x.data(), in, rows, batched.data(), out);
        EXPECT_EQ(std::memcmp(alone.data(), batched.data(), batched.size() * sizeof(float)), 0)
            << Name(format) << ", " << rows << " rows";
      }
    }
  });
}

// So does a prompt, with invariant products: more rows than any path choice or tile.
TEST(LinearTest, InvariantProductsDoNotDependOnTheBatch) {
  const int64_t out = 130, in = 200, T = 200, rank = 5;
  const std::vector<float> weight = Random(out * in, 1), x = Random(T * in, 3),
                           a = Random(rank * in, 5), b = Random(out * rank, 6);
  Workspace workspace;
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF32}) {
    const Linear linear(weight, out, in, format);
    const LowRankDelta delta(a, b, rank, in, out, format);
    const auto run = [&](int threads, int64_t rows, std::vector<float>& y) {
      for (int64_t t = 0; t < T; t += rows) {
        const int64_t count = std::min(rows, T - t);
        linear.Forward({threads, &workspace}, x.data() + t * in, in, count, y.data() + t * out, out,
                       Accumulate::kNo, Products::kInvariant);
        const Workspace::Scope scope(workspace);
        LinearInput input(workspace, count, in, Products::kInvariant);
        input.Set(x.data() + t * in, in, count);
        delta.AddTo({threads, &workspace}, input, 0, y.data() + t * out, out);
      }
    };
    std::vector<float> alone(static_cast<size_t>(T * out));
    run(1, 1, alone);
    for (const int64_t rows : {int64_t{33}, int64_t{65}, int64_t{127}, T}) {
      std::vector<float> batched(static_cast<size_t>(T * out));
      run(2, rows, batched);
      EXPECT_EQ(std::memcmp(alone.data(), batched.data(), batched.size() * sizeof(float)), 0)
          << Name(format) << ", " << rows << " rows";
    }
  }
}

TEST(LinearTest, ReadRowIsTheRoundedWeight) {
  const int64_t out = 7, in = 45;
  const std::vector<float> weight = Random(out * in, 1);
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF32}) {
    const Linear linear(weight, out, in, format);
    for (int64_t o = 0; o < out; ++o) {
      std::vector<float> row(static_cast<size_t>(in));
      linear.ReadRow(o, row.data());
      for (int64_t k = 0; k < in; ++k) {
        const float w = weight[static_cast<size_t>(o * in + k)];
        EXPECT_EQ(row[static_cast<size_t>(k)],
                  format == WeightFormat::kBF16 ? ToFloat(ToBf16(w)) : w);
      }
    }
  }
}

// A NaN or an infinity in one row of the batch or one weight touches only what it should.
TEST(LinearTest, NonFiniteValuesStayInTheirRowAndFeature) {
  const int64_t out = 9, in = 50;
  std::vector<float> weight = Random(out * in, 1);
  weight[static_cast<size_t>(4 * in + 49)] = std::numeric_limits<float>::infinity();
  for (const auto& [T, format] :
       {std::pair(3, WeightFormat::kBF16), std::pair(3, WeightFormat::kF32),
        std::pair(70, WeightFormat::kBF16), std::pair(70, WeightFormat::kF32)}) {
    std::vector<float> x = Random(T * in, 3), y(static_cast<size_t>(T * out));
    x[static_cast<size_t>(in + 7)] = kNaN;  // row 1
    Workspace workspace;
    Linear(weight, out, in, format).Forward({1, &workspace}, x.data(), in, T, y.data(), out);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t o = 0; o < out; ++o) {
        const float value = y[static_cast<size_t>(t * out + o)];
        if (t == 1)
          EXPECT_TRUE(std::isnan(value));
        else if (o == 4)
          EXPECT_FALSE(std::isfinite(value));
        else
          EXPECT_TRUE(std::isfinite(value)) << t << " " << o;
      }
    }
  }
}

TEST(LinearTest, MovesAndCountsBytes) {
  Linear empty;
  EXPECT_TRUE(empty.empty());
  EXPECT_EQ(empty.bytes(), 0);
  Linear a(Random(64 * 64, 1), 64, 64, WeightFormat::kBF16, Random(64, 2));
  EXPECT_EQ(a.bytes(), 64 * 64 * 2 + 64 * 4);
  Linear b = std::move(a);
  EXPECT_TRUE(a.empty());  // NOLINT: a moved-from Linear is empty
  EXPECT_EQ(b.out(), 64);
  a = std::move(b);
  EXPECT_EQ(a.bytes(), 64 * 64 * 2 + 64 * 4);
}

TEST(LowRankDeltaTest, EqualsReference) {
  const int64_t rank = 32, in = 130, out = 99;
  const std::vector<float> a = Random(rank * in, 1), b = Random(out * rank, 2);
  EXPECT_TRUE(LowRankDelta().empty());
  EXPECT_EQ(LowRankDelta().bytes(), 0);
  for (const int64_t T : {0, 1, 3, 70}) {
    const int64_t x_stride = in + 1, y_stride = out + 2;
    const std::vector<float> x = Random(T * x_stride, 3), old = Random(T * y_stride, 4);
    std::vector<float> hidden(static_cast<size_t>(T * rank)), want(static_cast<size_t>(T * out)),
        y = old, got;
    LinearRef(a, rank, in, WeightFormat::kBF16, {}, x.data(), x_stride, T, hidden.data(), rank);
    LinearRef(b, out, rank, WeightFormat::kBF16, {}, hidden.data(), rank, T, want.data(), out);
    Workspace workspace;
    const LowRankDelta delta(a, b, rank, in, out, WeightFormat::kBF16);
    EXPECT_GT(delta.bytes(), 2 * (rank * in + out * rank) - 1);
    LinearInput input(workspace, T, in, Products::kFastest);
    input.Set(x.data(), x_stride, T);
    delta.AddTo({2, &workspace}, input, 0, y.data(), y_stride);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t o = 0; o < out; ++o) {
        const size_t i = static_cast<size_t>(t * y_stride + o);
        want[static_cast<size_t>(t * out + o)] += old[i];
        got.push_back(y[i]);
      }
    }
    ExpectClose(got, want,
                T > LinearLoopRows(WeightFormat::kBF16) ? Tolerance{2 * kPanelTolerance.relative}
                                                        // two roundings in a row
                                                        : SumTolerance(in + rank));
  }
}

}  // namespace
}  // namespace dsla
