// Products of a LinearInput against those of its rows by themselves, which other tests hold against
// the reference: to the bit, whatever shares it and however it was filled.
#include "ops/linear/linear_input.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <vector>

#include "ops/simd/each_target.h"

namespace dsla {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr WeightFormat kFormats[] = {WeightFormat::kF32, WeightFormat::kBF16, WeightFormat::kInt8,
                                     WeightFormat::kInt4};

std::vector<float> Random(int64_t n, uint32_t seed) {
  std::mt19937 random(20250104 + seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = normal(random);
  return values;
}

// Rows with a gap of NaN between them.
struct Rows {
  int64_t T, in, stride;
  std::vector<float> x;

  Rows(int64_t T, int64_t in) : T(T), in(in), stride(in + 3) {
    x.assign(static_cast<size_t>(T * stride), kNaN);
    const std::vector<float> values = Random(T * in, 1);
    for (int64_t t = 0; t < T; ++t) std::copy_n(values.data() + t * in, in, x.data() + t * stride);
  }
};

class Weight {
 public:
  Weight(int64_t out, int64_t in, WeightFormat format, uint32_t seed)
      : linear_(Random(out * in, seed), out, in, format, Random(out, seed + 1)) {}
  const Linear& linear() const { return linear_; }

  // Of the rows [first, T).
  std::vector<float> Alone(const Rows& rows, int64_t first, Products products) const {
    Workspace workspace;
    std::vector<float> y(static_cast<size_t>((rows.T - first) * linear_.out()), kNaN);
    linear_.Forward({2, &workspace}, rows.x.data() + first * rows.stride, rows.stride,
                    rows.T - first, y.data(), linear_.out(), Accumulate::kNo, products);
    return y;
  }
  std::vector<float> Of(const ExecContext& ctx, LinearInput& input, int64_t first) const {
    std::vector<float> y(static_cast<size_t>((input.T() - first) * linear_.out()), kNaN);
    linear_.Forward(ctx, input, first, y.data(), linear_.out());
    return y;
  }

 private:
  Linear linear_;
};

// All formats take turns on one input, with all rows and with the last ones, few and many.
TEST(LinearInputTest, SharedByAllFormatsAndRanges) {
  const int64_t in = 200;
  std::vector<Weight> weights;
  for (const WeightFormat format : kFormats) weights.emplace_back(67, in, format, 5);
  ForEachTarget([&] {
    for (const Products products : {Products::kFastest, Products::kInvariant}) {
      for (const int64_t T : {1, 3, 32, 33, 65, 150}) {
        const Rows rows(T, in);
        Workspace workspace;
        LinearInput input(workspace, T + 2, in, products);
        input.Set(rows.x.data(), rows.stride, T);
        for (const int64_t first : {T / 2, int64_t{0}, T - 1, T / 3, T}) {
          for (const Weight& weight : weights) {
            EXPECT_EQ(weight.Of({2, &workspace}, input, first), weight.Alone(rows, first, products))
                << "T " << T << " first " << first << " " << Name(weight.linear().format());
          }
        }
      }
    }
  });
}

TEST(LinearInputTest, FillEqualsSet) {
  for (const WeightFormat format : kFormats) {
    for (const int64_t in :
         {int64_t{1}, int64_t{33}, LinearInput::kPiece, LinearInput::kPiece + 1, int64_t{1700}}) {
      const Weight weight(9, in, format, 5), other(5, in, WeightFormat::kBF16, 7);
      for (const int64_t T : {1, 2, 7, 40}) {
        const Rows rows(T, in);
        for (const auto cut : {LinearInput::Cut::kRows, LinearInput::Cut::kPieces}) {
          for (const int threads : {1, 3}) {
            Workspace workspace;
            const ExecContext ctx{threads, &workspace};
            LinearInput input(workspace, T, in, Products::kFastest);
            std::vector<float> x(rows.x.size(), kNaN);
            input.Fill(ctx, x.data(), rows.stride, T, weight.linear(), cut,
                       [&](int64_t t, int64_t begin, int64_t end) {
                         for (int64_t i = t * rows.stride + begin; i < t * rows.stride + end; ++i)
                           x[static_cast<size_t>(i)] = rows.x[static_cast<size_t>(i)];
                       });
            EXPECT_EQ(weight.Of(ctx, input, 0), weight.Alone(rows, 0, Products::kFastest))
                << Name(format) << " in " << in << " T " << T;
            EXPECT_EQ(other.Of(ctx, input, T / 2), other.Alone(rows, T / 2, Products::kFastest));
          }
        }
      }
    }
  }
}

// A form is made once: rows that change behind its back are not seen, but after Set.
TEST(LinearInputTest, MadeOnce) {
  const int64_t in = 70;
  for (const auto& [T, format] :
       {std::pair(3, WeightFormat::kInt4), std::pair(3, WeightFormat::kBF16),
        std::pair(3, WeightFormat::kF32), std::pair(40, WeightFormat::kInt8)}) {
    const Weight weight(9, in, format, 5);
    Rows rows(T, in);
    Workspace workspace;
    const ExecContext ctx{2, &workspace};
    LinearInput input(workspace, T, in, Products::kFastest);
    input.Set(rows.x.data(), rows.stride, T);
    const std::vector<float> before = weight.Of(ctx, input, 0);
    for (float& x : rows.x) x += 1;
    EXPECT_EQ(weight.Of(ctx, input, 0), before);
    input.Set(rows.x.data(), rows.stride, T);
    EXPECT_EQ(weight.Of(ctx, input, 0), weight.Alone(rows, 0, Products::kFastest));
  }
}

TEST(LinearInputDeathTest, MoreRowsThanItHasRoomFor) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const Rows rows(3, 8);
  Workspace workspace;
  LinearInput input(workspace, 2, 8, Products::kFastest);
  EXPECT_DEATH(input.Set(rows.x.data(), rows.stride, 3), "check failed");
}

}  // namespace
}  // namespace dsla
