#include "ops/linear/group_quant.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/buffer.h"
#include "base/half.h"
#include "ops/linear/linear.h"
#include "ops/linear/panel_testing.h"
#include "ops/simd/each_target.h"
#include "ops/testing/expect_close.h"

namespace dsla {
namespace {

constexpr uint32_t kSeed = 20250102;

std::vector<float> Random(int64_t n, uint32_t seed) {
  std::mt19937 random(kSeed + seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = normal(random);
  return values;
}

TEST(HalfTest, EveryF16ComesBack) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = ToFloat(f16{static_cast<uint16_t>(bits)});
    const f16 back = ToF16(value);
    if (std::isnan(value))
      EXPECT_TRUE(std::isnan(ToFloat(back)));
    else
      ASSERT_EQ(back.bits, bits) << value;
  }
}

// The nearest of the two neighbours, and of equals the even one.
TEST(HalfTest, ToF16RoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const float low = ToFloat(f16{static_cast<uint16_t>(bits)});
    const float high = bits + 1 == 0x7c00 ? 65536.f : ToFloat(f16{static_cast<uint16_t>(bits + 1)});
    const float middle = low + (high - low) / 2;
    const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
    ASSERT_EQ(ToF16(middle).bits, even) << middle;
    ASSERT_EQ(ToF16(std::nextafter(middle, low)).bits, bits) << middle;
    ASSERT_EQ(ToF16(std::nextafter(middle, high)).bits, bits + 1) << middle;
    ASSERT_EQ(ToF16(-middle).bits, even | 0x8000u) << middle;
  }
}

// Groups as a GGUF file holds them, dequantised: both ends of the range in use, fp16 scales.
std::vector<float> FileWeights(int64_t out, int64_t in, int bits) {
  std::mt19937 random(kSeed);
  std::normal_distribution<float> normal(0.f, 0.02f);
  const int low = bits == 8 ? -127 : 0, high = bits == 8 ? 127 : 15;
  std::uniform_int_distribution<int> any(low, high);
  std::vector<float> weights(static_cast<size_t>(out * in));
  for (int64_t i = 0; i < out * in; i += kQuantGroup) {
    const float d = ToFloat(ToF16(std::abs(normal(random)) / 7));
    const float m = bits == 8 ? 0.f : ToFloat(ToF16(-std::abs(normal(random))));
    for (int64_t j = 0; j < kQuantGroup; ++j) {
      const int q = j == 3 ? low : j == 17 ? high : any(random);
      weights[static_cast<size_t>(i + j)] = static_cast<float>(q) * d + m;
    }
  }
  return weights;
}

// A tensor that comes from such a file keeps its scales, minima and integers: what comes back is
// the file's value up to the rounding of one fp32 multiply-add.
TEST(GroupQuantTest, QuantizedTensorsLoseNothing) {
  for (const auto& [bits, file_bits] : {std::pair(8, 8), std::pair(4, 4), std::pair(8, 4)}) {
    const GroupQuantShape shape{.out = 100, .in = 576, .bits = bits};
    const std::vector<float> weights = FileWeights(shape.out, shape.in, file_bits);
    Buffer<uint8_t> stored(shape.bytes());
    ForEachTarget([&] {
      GroupQuantize(shape, 0, shape.out, weights.data(), stored.data());
      std::vector<float> back(weights.size());
      GroupDequantize(shape, stored.data(), 0, shape.out, back.data(), shape.stride());
      for (size_t i = 0; i < weights.size(); ++i) {
        // The middle of a Q4_1 group, int8's m, is not always an fp16 number.
        const float middle = bits == file_bits ? 0.f : 0x1p-11f * 0.3f;
        const float ulp = 1e-7f * std::max(std::abs(weights[i]), 0.1f);
        ASSERT_NEAR(back[i], weights[i], ulp + middle) << bits << " bits, weight " << i;
      }
    });
  }
}

TEST(GroupQuantTest, ErrorIsHalfAStep) {
  for (const int bits : {8, 4}) {
    const GroupQuantShape shape{.out = 21, .in = 77, .bits = bits};
    const std::vector<float> weights = Random(shape.out * shape.in, 1);
    Buffer<uint8_t> stored(shape.bytes());
    std::vector<float> back(static_cast<size_t>(shape.out * shape.stride()));
    ForEachTarget([&] {
      GroupQuantize(shape, 0, 8, weights.data(), stored.data());  // in two pieces
      GroupQuantize(shape, 8, shape.out, weights.data() + 8 * shape.in, stored.data());
      GroupDequantize(shape, stored.data(), 0, shape.out, back.data(), shape.stride());
      for (int64_t o = 0; o < shape.out; ++o) {
        for (int64_t g = 0; g < shape.groups(); ++g) {
          float low = 1e9f, high = -1e9f;
          const int64_t end = std::min(shape.in, (g + 1) * kQuantGroup);
          for (int64_t k = g * kQuantGroup; k < end; ++k) {
            low = std::min(low, weights[static_cast<size_t>(o * shape.in + k)]);
            high = std::max(high, weights[static_cast<size_t>(o * shape.in + k)]);
          }
          const float step = bits == 8 ? std::max(-low, high) / 127 : (high - low) / 15;
          // Half a step, and what fp16 rounds off the scale (15 or 127 steps of 2^-11) and minimum.
          const float bound = step * (bits == 8 ? 0.5f + 127 * 0x1p-11f : 0.5f + 15 * 0x1p-11f) +
                              std::abs(low) * 0x1p-10f;
          for (int64_t k = g * kQuantGroup; k < end; ++k) {
            ASSERT_NEAR(back[static_cast<size_t>(o * shape.stride() + k)],
                        weights[static_cast<size_t>(o * shape.in + k)], bound);
          }
        }
      }
    });
  }
}

struct Case {
  int64_t T, out, in;
  WeightFormat format;
  Products products = Products::kFastest;
};

void CheckCase(const Case& c, int threads) {
  SCOPED_TRACE(testing::Message() << "T " << c.T << " out " << c.out << " in " << c.in << " "
                                  << Name(c.format) << " threads " << threads);
  const std::vector<float> weight = Random(c.out * c.in, 1), bias = Random(c.out, 2);
  const std::vector<float> x = Random(c.T * c.in, 3);
  std::vector<float> y = Random(c.T * c.out, 4), want = y;
  const Linear linear(weight, c.out, c.in, c.format, bias);
  Workspace workspace;
  linear.Forward({threads, &workspace}, x.data(), c.in, c.T, y.data(), c.out, Accumulate::kYes,
                 c.products);
  const bool rounded = c.T <= LinearLoopRows(c.format) || c.products == Products::kInvariant;
  std::vector<float> product(want.size());
  LinearRef(weight, c.out, c.in, c.format, bias, x.data(), c.in, c.T, product.data(), c.out,
            rounded);
  for (size_t i = 0; i < want.size(); ++i) want[i] += product[i];
  ExpectClose(y, want, rounded ? SumTolerance(c.in) : kPanelTolerance);
}

TEST(GroupQuantTest, ProductsEqualTheReference) {
  for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
    for (const int64_t T : {1, 2, 3, 4, 5, 9, 32, 33, 64, 65, 90, 128, 129, 200}) {
      CheckCase({T, 129, 96, format}, 2);
      CheckCase({T, 129, 96, format, Products::kInvariant}, 2);
    }
    for (const int64_t in : {1, 31, 32, 33, 577})
      for (const int64_t out : {1, 7, 8, 9, 67}) CheckCase({3, out, in, format}, 1);
    for (const int threads : {1, 2, 3}) CheckCase({2, 3000, 160, format}, threads);
    for (const int threads : {1, 2, 3})  // pieces of rows and features, segments of inputs
      CheckCase({1100, 601, 420, format}, threads);
  }
}

TEST(GroupQuantTest, EveryTargetEqualsTheReference) {
  ForEachTarget([] {
    for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4})
      for (const int64_t T : {1, 2, 3, 4, 7, 8, 9, 21, 33, 34, 35, 36, 37, 38})
        CheckCase({T, 39, 300, format}, 1);
  });
}

// The integers at the ends of their ranges, where sums of 16 bits, or of a segment, would overflow.
TEST(GroupQuantTest, ExtremesDoNotOverflow) {
  const int64_t out = 16, in = 256;
  ForEachTarget([&] {
    for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
      for (const float sign : {1.f, -1.f}) {
        std::vector<float> weight(static_cast<size_t>(out * in), sign);
        weight[5] = -sign;  // so that int4 has a range
        for (int64_t o = 1; o < out; ++o) weight[static_cast<size_t>(o * in)] = 0.f;
        for (const int64_t T : {int64_t{1}, kLinearInvariantRows + 1}) {
          std::vector<float> x(static_cast<size_t>(T * in), 1.f), y(static_cast<size_t>(T * out)),
              want = y;
          x[7] = -1.f;
          Workspace workspace;
          Linear(weight, out, in, format).Forward({1, &workspace}, x.data(), in, T, y.data(), out);
          LinearRef(weight, out, in, format, {}, x.data(), in, T, want.data(), out, true);
          ExpectClose(y, want, T == 1 ? SumTolerance(in) : kPanelTolerance);
        }
      }
    }
  });
}

TEST(GroupQuantTest, ARowDoesNotDependOnTheBatch) {
  const int64_t out = 515, in = 200, T = 90;
  const std::vector<float> weight = Random(out * in, 1), x = Random(T * in, 3);
  Workspace workspace;
  ForEachTarget([&] {
    for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
      const Linear linear(weight, out, in, format);
      std::vector<float> alone(static_cast<size_t>(T * out)), batched = alone;
      for (int64_t t = 0; t < T; ++t)
        linear.Forward({1, &workspace}, x.data() + t * in, in, 1, alone.data() + t * out, out);
      linear.Forward({2, &workspace}, x.data(), in, T, batched.data(), out, Accumulate::kNo,
                     Products::kInvariant);
      EXPECT_EQ(std::memcmp(alone.data(), batched.data(), batched.size() * sizeof(float)), 0)
          << Name(format);
    }
  });
}

// Nor among many rows: not on how many they are, nor on how they are cut for the threads.
TEST(GroupQuantTest, ARowOfManyDoesNotDependOnTheOthers) {
  const int64_t out = 201, in = 200, T = 600;
  const std::vector<float> weight = Random(out * in, 1), x = Random(T * in, 3);
  Workspace workspace;
  ForEachTarget([&] {
    for (const WeightFormat format :
         {WeightFormat::kInt8, WeightFormat::kInt4, WeightFormat::kBF16}) {
      const Linear linear(weight, out, in, format);
      const auto run = [&](int threads, int64_t rows) {
        std::vector<float> y(static_cast<size_t>(T * out));
        for (int64_t t = 0; t < T; t += rows)
          linear.Forward({threads, &workspace}, x.data() + t * in, in, rows, y.data() + t * out,
                         out);
        return y;
      };
      EXPECT_EQ(run(1, 40), run(3, T)) << Name(format);
    }
  });
}

// An activation that is no number must show in its row and nowhere else.
TEST(GroupQuantTest, NonFiniteActivationsShow) {
  const int64_t out = 9, in = 50;
  const std::vector<float> weight = Random(out * in, 1);
  ForEachTarget([&] {
    for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
      for (const float bad :
           {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        for (const int64_t T : {int64_t{3}, kLinearInvariantRows + 1}) {
          std::vector<float> x = Random(T * in, 3), y(static_cast<size_t>(T * out));
          x[static_cast<size_t>(in + 7)] = bad;
          Workspace workspace;
          Linear(weight, out, in, format).Forward({1, &workspace}, x.data(), in, T, y.data(), out);
          for (int64_t i = 0; i < T * out; ++i)
            EXPECT_EQ(std::isfinite(y[static_cast<size_t>(i)]), i / out != 1) << Name(format);
        }
      }
    }
  });
}

TEST(GroupQuantTest, ReadRowIsTheRoundedWeight) {
  const int64_t out = 11, in = 70;
  const std::vector<float> weight = Random(out * in, 1);
  for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
    const Linear linear(weight, out, in, format);
    // The reference's row o is its product with unit vectors.
    std::vector<float> unit(static_cast<size_t>(in * in)), want(static_cast<size_t>(in * out));
    for (int64_t k = 0; k < in; ++k) unit[static_cast<size_t>(k * in + k)] = 1;
    LinearRef(weight, out, in, format, {}, unit.data(), in, in, want.data(), out);
    std::vector<float> row(static_cast<size_t>(in));
    for (int64_t o = 0; o < out; ++o) {
      linear.ReadRow(o, row.data());
      for (int64_t k = 0; k < in; ++k)
        EXPECT_NEAR(row[static_cast<size_t>(k)], want[static_cast<size_t>(k * out + o)], 1e-6);
    }
  }
}

}  // namespace
}  // namespace dsla
