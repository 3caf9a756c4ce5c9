// Rows in e4m3 against the same rounding on the host, to the bit.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/linear/cuda/product_testing.cuh"

namespace dsla {
namespace {

using RoundRowsTest = GpuTest;

constexpr uint8_t kNaN8 = 0x7F;

// The nearest of e4m3, to even where two are as near: 4 bits of exponent with a bias of 7, 3 of
// mantissa, subnormal below 2^-6, at most 448.
uint8_t ToE4m3(float x) {
  if (std::isnan(x)) return kNaN8;
  const auto sign = static_cast<uint8_t>(std::signbit(x) ? 0x80 : 0);
  const float magnitude = std::min(std::fabs(x), 448.f);
  const int exponent = std::max(std::ilogb(std::max(magnitude, 1e-30f)), -6);
  const auto eighths = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  // Eighths of 8 and more have the leading bit; 16 of them carry into the exponent.
  return static_cast<uint8_t>(sign | ((exponent + 6) * 8 + eighths));
}

struct Rows {
  std::vector<uint8_t> to;
  std::vector<float> scale;
};
Rows OnHost(const std::vector<uint16_t>& x, int T, int in) {
  Rows rows;
  const std::vector<float> values = Floats(x);
  for (int t = 0; t < T; ++t) {
    const auto first = values.begin() + std::ptrdiff_t{t} * in;
    float largest = 0;
    for (auto v = first; v != first + in; ++v) largest = std::fmax(largest, std::fabs(*v));
    const float inverse = largest > 1e-30f ? 448.f / largest : 0;
    const size_t begin = rows.to.size();
    rows.to.resize(begin + static_cast<size_t>(in));
    for (int i = 0; i < in; ++i)
      rows.to[begin + static_cast<size_t>(cuda::RoundedPlace(i))] = ToE4m3(first[i] * inverse);
    rows.scale.push_back(largest / 448.f);
  }
  return rows;
}
Rows OnGpu(const std::vector<uint16_t>& x, int T, int in, int gap) {
  const RoundedRows rounded(x, T, in, gap);
  return {ReadAll<uint8_t>(rounded.data), ReadAll<float>(rounded.scale)};
}

TEST(E4m3, Rounds) {
  EXPECT_EQ(ToE4m3(0), 0);
  EXPECT_EQ(ToE4m3(1), 0x38);
  EXPECT_EQ(ToE4m3(-448), 0xFE);
  EXPECT_EQ(ToE4m3(1000), 0x7E);
  EXPECT_EQ(ToE4m3(0x1p-9f), 1);     // the least
  EXPECT_EQ(ToE4m3(0x1p-10f), 0);    // a tie, to even
  EXPECT_EQ(ToE4m3(1.9375f), 0x40);  // a tie that carries: 2
  EXPECT_EQ(ToE4m3(1.0625f), 0x38);  // a tie, to even
  EXPECT_EQ(ToE4m3(0x1.Fp-7f), 8);   // the largest subnormal's neighbour: 2^-6
}

TEST_F(RoundRowsTest, EqualTheHosts) {
  for (const int in : {64, 128, 576, 1536, 4096, 11008})
    for (const int T : {1, 3, 70}) {
      SCOPED_TRACE(testing::Message() << "T " << T << ", in " << in);
      const std::vector<uint16_t> x = Values(int64_t{T} * in, 5, 3);
      for (const int gap : {0, 8}) {
        const Rows want = OnHost(x, T, in), got = OnGpu(x, T, in, gap);
        EXPECT_EQ(got.scale, want.scale);
        EXPECT_EQ(got.to, want.to);
      }
    }
}

TEST_F(RoundRowsTest, OfZerosHugeTinyAndNoNumbers) {
  constexpr int kIn = 64;
  std::vector<float> x(4 * kIn, 0.f);
  for (int i = 0; i < kIn; ++i) {
    x[static_cast<size_t>(kIn + i)] = i % 2 ? 3e38f : -1e37f;
    x[static_cast<size_t>(2 * kIn + i)] = 1e-35f;
    x[static_cast<size_t>(3 * kIn + i)] = static_cast<float>(i);
  }
  x[3 * kIn + 5] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<uint16_t> bits = Bits(x);
  const Rows got = OnGpu(bits, 4, kIn, 0), want = OnHost(bits, 4, kIn);
  EXPECT_EQ(got.scale, want.scale);
  for (size_t i = 0; i < got.to.size(); ++i) {
    const bool no_number = i == static_cast<size_t>(3 * kIn + cuda::RoundedPlace(5));
    EXPECT_EQ(no_number ? got.to[i] & kNaN8 : got.to[i], want.to[i]) << i;
  }
}

}  // namespace
}  // namespace dsla
