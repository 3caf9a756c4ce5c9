// Products of few rows with weights in e4m3 against fp64 sums over what the weights stand for.
#include <algorithm>
#include <cmath>
#include <span>

#include "ops/linear/cuda/product_testing.cuh"

namespace dsla {
namespace {

using ScaledTest = GpuTest;

constexpr int kRows[] = {1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 40, 64};
constexpr Shape kShapes[] = {{960, 576}, {576, 1536}, {3072, 576},  {57, 576},   {8, 64},
                             {24, 192},  {17, 128},   {1000, 1088}, {4232, 256}, {12304, 192}};

// A weight, 64 rows of x and, of the features that are compared, their products.
struct Scaled {
  explicit Scaled(Shape s)
      : shape(s),
        x(Values(int64_t{64} * s.in, 2)),
        weight(Values(int64_t{s.out} * s.in, 1, 3), s.out, s.in) {}
  // [64, out]
  std::vector<float> Sums() const {
    const auto bytes = ReadAll<uint8_t>(weight.data);
    const auto scales = ReadAll<float>(weight.scale);
    const std::vector<float> rows = Floats(x);
    const auto in = static_cast<size_t>(shape.in), out = static_cast<size_t>(shape.out);
    std::vector<float> sums(64 * out);
    ParallelFor({.threads = ThreadCount(0)}, shape.out, [&](int64_t f, int) {
      const auto feature = static_cast<size_t>(f);
      std::vector<double> w(in);
      for (size_t i = 0; i < in; ++i) {
        const auto place = static_cast<size_t>(cuda::RoundedPlace(static_cast<int>(i)));
        w[i] = double{FromE4m3(bytes[feature * in + place])} * double{scales[feature]};
      }
      for (size_t t = 0; t < 64; ++t) {
        double sum = 0;
        for (size_t i = 0; i < in; ++i) sum += w[i] * double{rows[t * in + i]};
        sums[t * out + feature] = static_cast<float>(sum);
      }
    });
    return sums;
  }
  cuda::ProductArgs args() const {
    return {.weight = weight.data.as<void>(),
            .bits = 8,
            .scale = weight.scale.as<float>(),
            .out = shape.out,
            .in = shape.in,
            .x_stride = shape.in,
            .y_stride = shape.out};
  }

  Shape shape;
  std::vector<uint16_t> x;
  RoundedRows weight;
};

TEST_F(ScaledTest, EqualsReference) {
  for (const Shape& shape : kShapes) {
    const Scaled p(shape);
    const std::vector<float> sums = p.Sums();
    for (const int T : kRows) {
      SCOPED_TRACE(testing::Message() << shape << ", T " << T);
      const std::vector<float> want(sums.begin(), sums.begin() + std::ptrdiff_t{T} * shape.out);
      ExpectClose(Dense(p, p.x, T), want, SumTolerance(shape.in));
    }
  }
}

TEST_F(ScaledTest, RowsAreIndependent) {
  constexpr size_t kFew = 6;
  static_assert(kRows[kFew - 1] == cuda::kFewPackedRows);
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(testing::Message() << shape);
    const Scaled p(shape);
    CheckIndependence(p, std::span(kRows).first(kFew));
    CheckIndependence(p, std::span(kRows).subspan(kFew));
  }
}

TEST_F(ScaledTest, Gated) {
  for (const Shape& shape :
       {Shape{3072, 576}, Shape{96, 192}, Shape{18, 64}, Shape{160, 1088}, Shape{12320, 128}}) {
    const Scaled p(shape);
    for (const int T : kRows) {
      SCOPED_TRACE(testing::Message() << shape << ", T " << T);
      CheckGated(p, T);
    }
  }
}

// Subnormal and largest numbers, every sign and place: an identity matrix times each of them.
TEST_F(ScaledTest, HoldsEveryNumber) {
  constexpr int kIn = 256;
  std::vector<float> numbers;
  for (int bits = 0; bits < 256; ++bits)
    numbers.push_back((bits & 0x7F) == 0x7F ? 0.f : FromE4m3(static_cast<uint8_t>(bits)));
  // Feature f has number (f + i) % 256 at input i; 448 is among them, so its scale is 1.
  std::vector<float> weight(size_t{kIn} * kIn), identity(size_t{64} * kIn, 0.f);
  for (size_t f = 0; f < kIn; ++f)
    for (size_t i = 0; i < kIn; ++i) weight[f * kIn + i] = numbers[(f + i) % 256];
  const RoundedRows rounded(Bits(weight), kIn, kIn);
  for (size_t first = 0; first < kIn; first += 64) {
    std::fill(identity.begin(), identity.end(), 0.f);
    for (size_t t = 0; t < 64; ++t) identity[t * kIn + first + t] = 1;
    const DeviceBytes x(Bits(identity)), y(int64_t{64} * kIn * 4);
    CheckCuda(cuda::SmallProduct({.weight = rounded.data.as<void>(),
                                  .bits = 8,
                                  .scale = rounded.scale.as<float>(),
                                  .out = kIn,
                                  .in = kIn,
                                  .x = x.as<void>(),
                                  .x_stride = kIn,
                                  .T = 64,
                                  .y = y.as<void>(),
                                  .y_stride = kIn,
                                  .y_f32 = true},
                                 nullptr));
    const auto got = ReadAll<float>(y);
    for (size_t t = 0; t < 64; ++t)
      for (size_t f = 0; f < kIn; ++f)
        ASSERT_EQ(got[t * kIn + f], weight[f * kIn + first + t])
            << "feature " << f << ", input " << first + t;
  }
}

}  // namespace
}  // namespace dsla
