// What the tests of this folder share: a weight, rows of x and their products in fp64, and checks
// for weights of any format. Not a .h, as what it includes.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "base/exec.h"
#include "ops/linear/cuda/linear_cuda.h"
#include "ops/norm_rope/cuda/norm_rope_cuda_testing.cuh"
#include "ops/norm_rope/norm_rope.h"

namespace dsla {

inline float FromE4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return bits & 0x80 ? -magnitude : magnitude;
}

struct Shape {
  int out, in;
};
inline std::ostream& operator<<(std::ostream& to, const Shape& shape) {
  return to << "[" << shape.out << ", " << shape.in << "]";
}

inline constexpr int kMostRows = 257;

// A short period makes many values quick; it is prime, so that rows differ.
inline constexpr int kPeriod = 65521;
template <typename T>
std::vector<T> Repeated(const std::vector<T>& period, int64_t n) {
  std::vector<T> values;
  values.reserve(static_cast<size_t>(n));
  for (int64_t left = n; left > 0; left = n - std::ssize(values))
    values.insert(values.end(), period.begin(),
                  period.begin() + std::min<int64_t>(left, std::ssize(period)));
  return values;
}
inline std::vector<uint16_t> Values(int64_t n, uint32_t seed, float scale = 1) {
  return Repeated(Bits(RandomExact(kPeriod, seed, scale)), n);
}

// Rows with `gap` NaNs after each.
inline std::vector<uint16_t> Spread(const std::vector<uint16_t>& rows, int64_t width, int64_t gap) {
  std::vector<uint16_t> spread;
  for (size_t i = 0; i < rows.size(); i += static_cast<size_t>(width)) {
    const auto row = rows.begin() + static_cast<std::ptrdiff_t>(i);
    spread.insert(spread.end(), row, row + width);
    spread.insert(spread.end(), static_cast<size_t>(gap), 0xFFFF);
  }
  return spread;
}

// T rows [T, in] of bf16 in e4m3, each with its scale, by RoundRows; `gap` elements apart before
// it.
struct RoundedRows {
  RoundedRows(const std::vector<uint16_t>& x, int T, int in, int gap = 0)
      : data(int64_t{T} * in), scale(int64_t{T} * 4) {
    const DeviceBytes exact(Spread(x, in, gap));
    CheckCuda(cuda::RoundRows({.x = exact.as<void>(),
                               .x_stride = in + gap,
                               .T = T,
                               .in = in,
                               .to = data.as<void>(),
                               .scale = scale.as<float>()},
                              nullptr));
  }

  DeviceBytes data, scale;
};

// A weight, kMostRows rows of x, and of the first `referenced` of them the fp64 products of some
// features (all where they are few).
struct Product {
  explicit Product(Shape s, int referenced = 0)
      : shape(s),
        weight(Values(int64_t{s.out} * s.in, 1)),
        x(Values(int64_t{kMostRows} * s.in, 2)),
        device_weight(weight),
        step(int64_t{s.out} * s.in > (1 << 22) ? 37 : 1) {
    const int features = (s.out + step - 1) / step;
    sums.resize(static_cast<size_t>(referenced) * static_cast<size_t>(features));
    const std::vector<float> rows = Floats(x);
    ParallelFor({.threads = ThreadCount(0)}, referenced > 0 ? features : 0, [&](int64_t f, int) {
      const auto first = weight.begin() + f * step * s.in;
      const std::vector<float> w = Floats({first, first + s.in});
      for (int t = 0; t < referenced; ++t) {
        const float* const row = rows.data() + int64_t{t} * s.in;
        double sum = 0;
        for (int i = 0; i < s.in; ++i) sum += double{w[static_cast<size_t>(i)]} * double{row[i]};
        sums[static_cast<size_t>(t * int64_t{features} + f)] = sum;
      }
    });
  }
  // Of the features that `sums` has.
  std::vector<float> Pick(const std::vector<float>& y) const {
    if (step == 1) return y;
    std::vector<float> picked;
    for (size_t row = 0; row < y.size(); row += static_cast<size_t>(shape.out))
      for (int j = 0; j < shape.out; j += step) picked.push_back(y[row + static_cast<size_t>(j)]);
    return picked;
  }
  cuda::ProductArgs args() const {
    cuda::ProductArgs a;
    a.weight = device_weight.as<void>();
    a.out = shape.out;
    a.in = shape.in;
    a.x_stride = shape.in;
    a.y_stride = shape.out;
    return a;
  }

  Shape shape;
  std::vector<uint16_t> weight, x;
  DeviceBytes device_weight;
  int step;
  std::vector<double> sums;
};

// T rows of fp32 results for dense rows `x`. A Weight has shape, x and args() as Product has.
template <typename Weight>
std::vector<float> Dense(const Weight& p, const std::vector<uint16_t>& x, int T) {
  const DeviceBytes device_x(x), y(int64_t{T} * p.shape.out * 4);
  cuda::ProductArgs a = p.args();
  a.x = device_x.as<void>();
  a.T = T;
  a.y = y.as<void>();
  a.y_f32 = true;
  CheckCuda(cuda::SmallProduct(a, nullptr));
  return ReadAll<float>(y);
}

// To the bit: from run to run, for any of these numbers of rows, and wherever a row stands.
template <typename Weight>
void CheckIndependence(const Weight& p, std::span<const int> rows) {
  const int most = rows.back(), in = p.shape.in, out = p.shape.out;
  const std::vector<uint16_t> x(p.x.begin(), p.x.begin() + std::ptrdiff_t{most} * in);
  const std::vector<float> all = Dense(p, x, most);
  EXPECT_EQ(all, Dense(p, x, most)) << "two runs differ";
  for (const int T : rows) {
    // The last T rows, then as many of the first.
    const std::vector<uint16_t> last(x.end() - std::ptrdiff_t{T} * in, x.end());
    const std::vector<float> some = Dense(p, last, T), first = Dense(p, x, T);
    EXPECT_TRUE(std::equal(some.begin(), some.end(), all.end() - std::ptrdiff_t{T} * out))
        << T << " last rows";
    EXPECT_TRUE(std::equal(first.begin(), first.end(), all.begin())) << T << " first rows";
  }
}

// The sums are those of a plain product, to the bit; the activation is of them.
template <typename Weight>
void CheckGated(const Weight& p, int T) {
  const int ffn = p.shape.out / 2;
  const std::vector<float> sums = Dense(p, p.x, T);
  std::vector<float> want(static_cast<size_t>(T) * static_cast<size_t>(ffn));
  SiluMulRef(sums.data(), T, ffn, want.data());
  const DeviceBytes x(p.x), y(int64_t{T} * ffn * 2);
  cuda::ProductArgs a = p.args();
  a.x = x.template as<void>();
  a.T = T;
  a.y = y.template as<void>();
  a.y_stride = ffn;
  a.gated = true;
  CheckCuda(cuda::SmallProduct(a, nullptr));
  const double u = UnitRoundoff(DType::kBF16), fp32 = RoundingTolerance(200).relative;
  ExpectClose(Floats(ReadBits(y)), want, Tolerance{u * (1 + fp32) + fp32});
}

}  // namespace dsla
