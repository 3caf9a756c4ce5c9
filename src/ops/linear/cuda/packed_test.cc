// Products with packed weights against fp64 sums over the values that the CPU multiplies by, and
// those values as they are unpacked, to the bit.
#include <algorithm>
#include <span>

#include "base/buffer.h"
#include "ops/linear/cuda/product_testing.cuh"
#include "ops/linear/group_quant.h"
#include "ops/linear/linear.h"
#include "ops/norm_rope/cuda/norm_rope_cuda.h"

namespace dsla {
namespace {

using PackedTest = GpuTest;

// Around multiples of 8 rows, and of what is read once for all; the first six are few.
constexpr int kRows[] = {1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 40, 64, 65, 100};
constexpr int kAll = 100;
// Of models, and what is no multiple of 16 or 32 features, of 32, 64 or 512 inputs.
constexpr Shape kShapes[] = {{960, 576},  {576, 1536}, {3072, 576}, {57, 576},
                             {8, 8},      {24, 200},   {17, 136},   {1000, 104},
                             {136, 1032}, {4232, 264}, {12304, 200}};

std::vector<std::byte> PackedBytes(const Shape& s, int bits, const std::vector<float>& weight) {
  const PackedShape shape{.out = s.out, .in = s.in, .bits = bits};
  std::vector<std::byte> bytes(static_cast<size_t>(shape.bytes()));
  PackWeight(shape, weight.data(), bytes.data());
  return bytes;
}

// A weight, kAll rows of x and, if `referenced`, their products.
struct Packed {
  Packed(Shape s, int bits, bool referenced = false)
      : shape(s),
        bits(bits),
        weight(Random(int64_t{s.out} * s.in, 1)),
        x(Values(int64_t{kAll} * s.in, 2)),
        device_weight(PackedBytes(s, bits, weight)) {
    if (!referenced) return;
    sums.resize(static_cast<size_t>(kAll) * static_cast<size_t>(s.out));
    const std::vector<float> rows = Floats(x);
    LinearRef(weight, s.out, s.in, bits == 4 ? WeightFormat::kInt4 : WeightFormat::kInt8, {},
              rows.data(), s.in, kAll, sums.data(), s.out);
  }
  // What the weight is rounded to.
  std::vector<float> Rounded() const {
    const GroupQuantShape groups{.out = shape.out, .in = shape.in, .bits = bits};
    Buffer<uint8_t> stored(groups.bytes());
    GroupQuantize(groups, 0, shape.out, weight.data(), stored.data());
    std::vector<float> rounded(weight.size());
    GroupDequantize(groups, stored.data(), 0, shape.out, rounded.data(), shape.in);
    return rounded;
  }
  cuda::ProductArgs args() const {
    return {.weight = device_weight.as<void>(),
            .bits = bits,
            .out = shape.out,
            .in = shape.in,
            .x_stride = shape.in,
            .y_stride = shape.out};
  }
  // Sums are of integers with an offset, some 40 times as large as what they are without it.
  Tolerance tolerance() const { return {40 * SumTolerance(shape.in).relative}; }

  Shape shape;
  int bits;
  std::vector<float> weight;
  std::vector<uint16_t> x;
  DeviceBytes device_weight;
  std::vector<float> sums;
};

template <typename F>
void ForEachWeight(bool referenced, const F& check) {
  for (const Shape& shape : kShapes)
    for (const int bits : {4, 8}) {
      SCOPED_TRACE(testing::Message() << shape << ", " << bits << " bits");
      check(Packed(shape, bits, referenced));
    }
}

TEST_F(PackedTest, EqualsReference) {
  ForEachWeight(true, [](const Packed& p) {
    const int out = p.shape.out, in = p.shape.in;
    for (const int T : kRows) {
      SCOPED_TRACE(testing::Message() << "T " << T);
      std::vector<float> want(p.sums.begin(), p.sums.begin() + std::ptrdiff_t{T} * out);
      ExpectClose(Dense(p, p.x, T), want, p.tolerance());

      // Added to rows of bf16 that lie apart.
      constexpr int kGap = 8;
      const std::vector<uint16_t> before = Values(int64_t{T} * out, 3);
      const DeviceBytes x(Spread(p.x, in, kGap)), y(Spread(before, out, kGap));
      cuda::ProductArgs a = p.args();
      a.x = x.as<void>();
      a.x_stride += kGap;
      a.T = T;
      a.y = y.as<void>();
      a.y_stride += kGap;
      a.add = true;
      CheckCuda(cuda::SmallProduct(a, nullptr));
      const std::vector<uint16_t> spread = ReadBits(y);
      std::vector<uint16_t> got;
      for (int t = 0; t < T; ++t) {
        const auto row = spread.begin() + std::ptrdiff_t{t} * (out + kGap);
        got.insert(got.end(), row, row + out);
        EXPECT_TRUE(std::all_of(row + out, row + out + kGap, [](auto v) { return v == 0xFFFF; }));
      }
      for (size_t i = 0; i < want.size(); ++i) want[i] += ToFloat(bf16{before[i]});
      ExpectClose(Floats(got), want, {p.tolerance().relative + UnitRoundoff(DType::kBF16)});
    }
  });
}

TEST_F(PackedTest, RowsAreIndependent) {
  ForEachWeight(false, [](const Packed& p) {
    constexpr size_t kFew = 6;
    static_assert(kRows[kFew - 1] == cuda::kFewPackedRows);
    CheckIndependence(p, std::span(kRows).first(kFew));
    CheckIndependence(p, std::span(kRows).subspan(kFew));
  });
}

TEST_F(PackedTest, Gated) {
  for (const Shape& shape :
       {Shape{3072, 576}, Shape{96, 200}, Shape{32, 8}, Shape{160, 1032}, Shape{12320, 72}})
    for (const int bits : {4, 8}) {
      const Packed p(shape, bits);
      for (const int T : kRows) {
        SCOPED_TRACE(testing::Message() << shape << ", " << bits << " bits, T " << T);
        CheckGated(p, T);
      }
    }
}

// The values themselves, rounded once; of some features, and nothing beside them.
TEST_F(PackedTest, Unpacks) {
  ForEachWeight(false, [](const Packed& p) {
    const int out = p.shape.out, in = p.shape.in;
    const std::vector<uint16_t> values = Bits(p.Rounded());
    for (const auto& [begin, end] :
         {std::pair{0, out}, {0, (out + 1) / 2}, {out / 2 / 16 * 16, out}}) {
      SCOPED_TRACE(testing::Message() << "features " << begin << " to " << end);
      const int64_t n = int64_t{end - begin} * in;
      const DeviceBytes to(2 * n + 64);
      CheckCuda(cuda::UnpackWeight({.weight = p.device_weight.as<void>(),
                                    .bits = p.bits,
                                    .out = out,
                                    .in = in,
                                    .begin = begin,
                                    .rows = end - begin,
                                    .to = to.as<void>()},
                                   nullptr));
      std::vector<uint16_t> want(values.begin() + std::ptrdiff_t{begin} * in,
                                 values.begin() + std::ptrdiff_t{end} * in);
      want.insert(want.end(), 32, 0xFFFF);
      EXPECT_EQ(ReadBits(to), want);
    }
  });
}

TEST_F(PackedTest, EmbedsRows) {
  for (const Shape& shape : {Shape{50, 8}, Shape{57, 104}, Shape{100, 576}}) {
    SCOPED_TRACE(testing::Message() << shape);
    const Packed p(shape, 8);
    const std::vector<float> values = p.Rounded();
    std::vector<int32_t> tokens;
    std::vector<float> want;
    for (int t = 0; t < 40; ++t) {
      const int token = t % 5 == 3 ? -1 : t * 37 % shape.out;
      tokens.push_back(token);
      for (int i = 0; i < shape.in; ++i)
        want.push_back(token < 0 ? 0 : values[static_cast<size_t>(token * shape.in + i)]);
    }
    const DeviceBytes d_tokens(tokens), hidden(int64_t{40} * shape.in * 4);
    CheckCuda(cuda::EmbedRows({.tokens = d_tokens.as<int32_t>(),
                               .embedding = p.device_weight.as<void>(),
                               .bits = 8,
                               .T = 40,
                               .C = shape.in,
                               .hidden = hidden.as<float>()},
                              nullptr));
    EXPECT_EQ(ReadAll<float>(hidden), want);
  }
}

}  // namespace
}  // namespace dsla
