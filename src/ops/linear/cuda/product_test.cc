// The products of few rows against fp64 sums. Outputs, and what lies between their rows, are NaN
// before a call.
#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "ops/linear/cuda/product_testing.cuh"

namespace dsla {
namespace {

using cuda::kMostSkinnyRows;
using ProductTest = GpuTest;
using AdapterInTest = GpuTest;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Of the kernel for few rows and of the one for more; around multiples of their tiles.
constexpr int kFewRows[] = {1, 2, 7, 8, 9, 16, 31, 32};
constexpr int kManyRows[] = {33, 63, 64, 65, 200, 256, kMostRows};
std::vector<int> AllRows() {
  std::vector<int> rows(std::begin(kFewRows), std::end(kFewRows));
  rows.insert(rows.end(), std::begin(kManyRows), std::end(kManyRows));
  return rows;
}

// Of models, of adapters, and what is no multiple of a tile: of 16, 32 or 64 features, of 32, 64 or
// 256 inputs.
constexpr Shape kShapes[] = {{960, 576}, {576, 576}, {3072, 576}, {576, 1536}, {57, 576},
                             {576, 48},  {25, 576},  {96, 4096},  {4096, 64},  {576, 32},
                             {8, 8},     {24, 200},  {17, 136},   {3848, 1032}};
// That only few rows are asked of.
constexpr Shape kLargeShapes[] = {{49152, 576}, {4096, 4096}, {4096, 11008},
                                  {12288, 256}, {4096, 16},   {20000, 8}};

// With `gap` elements between rows of y.
void CheckProduct(const Product& p, int T, int gap, bool f32, bool add) {
  SCOPED_TRACE(testing::Message() << "T " << T << ", gap " << gap << (f32 ? ", fp32" : "")
                                  << (add ? ", add" : ""));
  constexpr int kGap = 24;
  const int out = p.shape.out, in = p.shape.in;
  const int64_t stride = out + gap, n = T * stride;
  const DeviceBytes x(Spread(p.x, in, kGap));
  // y before: values in rows, NaN between them, and in rows only with `add`.
  static const std::vector<float> period = Random(kPeriod, 3, 10);
  std::vector<float> old = Repeated(period, int64_t{T} * out), before(static_cast<size_t>(n), kNaN);
  if (!f32) RoundToBf16(old);
  for (int64_t t = 0; add && t < T; ++t)
    std::copy_n(old.begin() + t * out, out, before.begin() + t * stride);
  DeviceBytes y(n * (f32 ? 4 : 2));
  if (f32)
    y.Write(before.data());
  else
    y.Write(Bits(before).data());
  cuda::ProductArgs a = p.args();
  a.x = x.as<void>();
  a.x_stride = in + kGap;
  a.T = T;
  a.y = y.as<void>();
  a.y_stride = stride;
  a.y_f32 = f32;
  a.add = add;
  CheckCuda(cuda::SmallProduct(a, nullptr));
  const std::vector<float> got = f32 ? ReadAll<float>(y) : Floats(ReadBits(y));

  std::vector<float> rows;
  for (int64_t t = 0; t < T; ++t) {
    const auto row = got.begin() + t * stride, end = row + out;
    const auto is_nan = [](float value) { return std::isnan(value); };
    ASSERT_TRUE(std::none_of(row, end, is_nan)) << "in row " << t;
    ASSERT_TRUE(std::all_of(end, row + stride, is_nan)) << "written behind row " << t;
    rows.insert(rows.end(), row, end);
  }
  old = p.Pick(old);
  std::vector<double> want(p.sums.begin(),
                           p.sums.begin() + static_cast<std::ptrdiff_t>(old.size()));
  if (add)
    for (size_t i = 0; i < want.size(); ++i) want[i] += old[i];
  const Tolerance sum = SumTolerance(in);
  const double u = UnitRoundoff(DType::kBF16);
  ExpectClose(p.Pick(rows), want, f32 ? sum : Tolerance{u * (1 + sum.relative) + sum.relative});
}

TEST_F(ProductTest, EqualsReference) {
  const auto check = [](const Shape& shape, std::span<const int> rows) {
    SCOPED_TRACE(testing::Message() << shape);
    const Product p(shape, rows.back());
    for (const int T : rows)
      for (const int gap : {5, 8})
        for (const bool f32 : {false, true})
          for (const bool add : {false, true}) CheckProduct(p, T, gap, f32, add);
  };
  for (const Shape& shape : kShapes) check(shape, AllRows());
  for (const Shape& shape : kLargeShapes) check(shape, kFewRows);
}

TEST_F(ProductTest, RowsAreIndependent) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(testing::Message() << shape);
    const Product p(shape);
    CheckIndependence(p, kFewRows);
    CheckIndependence(p, kManyRows);
  }
  for (const Shape& shape : kLargeShapes) {
    SCOPED_TRACE(testing::Message() << shape);
    CheckIndependence(Product(shape), kFewRows);
  }
}

TEST_F(ProductTest, Gated) {
  for (const Shape& shape :
       {Shape{3072, 576}, Shape{22, 200}, Shape{40, 8}, Shape{208, 1032}, Shape{1000, 104}}) {
    const Product p(shape);
    for (const int T : AllRows()) {
      SCOPED_TRACE(testing::Message() << shape << ", T " << T);
      CheckGated(p, T);
    }
  }
}

// An adapter's second product: rows below first_row keep what they have.
TEST_F(ProductTest, FirstRow) {
  for (const Shape& shape : {Shape{4096, 64}, Shape{576, 48}, Shape{960, 576}}) {
    const Product p(shape);
    for (const int T : AllRows())
      for (const int first : {0, 1, T / 2, T, T + 3}) {
        SCOPED_TRACE(testing::Message() << shape << ", T " << T << ", from row " << first);
        const std::vector<uint16_t> before = Values(int64_t{T} * shape.out, 3);
        const DeviceBytes x(p.x), all(before), some(before), from(std::vector<int32_t>{first});
        cuda::ProductArgs a = p.args();
        a.x = x.as<void>();
        a.T = T;
        a.add = true;
        a.y = all.as<void>();
        CheckCuda(cuda::SmallProduct(a, nullptr));
        a.y = some.as<void>();
        a.first_row = from.as<int32_t>();
        if (first >= T) a.weight = reinterpret_cast<void*>(0x1000);  // which nobody can read
        CheckCuda(cuda::SmallProduct(a, nullptr));
        std::vector<uint16_t> want = ReadBits(all);
        const auto kept = std::ptrdiff_t{std::min(first, T)} * shape.out;
        std::copy(before.begin(), before.begin() + kept, want.begin());
        EXPECT_EQ(ReadBits(some), want);
      }
  }
}

// An adapter's first product with what it writes, which is NaN before.
struct FirstProduct {
  FirstProduct(const Product& product, int r, int T, int first)
      : product(product),
        r(r),
        H(product.shape.out - r),
        T(T),
        first(first),
        bias(Random(H, 4)),
        device_bias(bias),
        from(std::vector<int32_t>{first}),
        low_rank(int64_t{T} * r * 2),
        claim(int64_t{T} * H * 4) {}

  // For rows of x with `gap` elements between them.
  cuda::AdapterInArgs Args(const DeviceBytes& x, int gap) const {
    cuda::AdapterInArgs a;
    // Nobody can read there.
    a.weight = first >= T ? reinterpret_cast<void*>(0x1000) : product.device_weight.as<void>();
    a.in = product.shape.in;
    a.r = r;
    a.H = H;
    a.x = x.as<void>();
    a.x_stride = a.in + gap;
    a.T = T;
    a.first_row = from.as<int32_t>();
    if (r > 0) a.low_rank = low_rank.as<void>();
    if (H > 0) a.claim = claim.as<float>(), a.claim_bias = device_bias.as<float>();
    return a;
  }
  // To the bit; `sums` are the product of all rows.
  void Check(const std::vector<float>& sums) const {
    std::vector<uint16_t> low;
    std::vector<float> claims;
    for (int t = 0; t < T; ++t)
      for (int j = 0; j < r + H; ++j) {
        const float value = sums[static_cast<size_t>(t * (r + H) + j)];
        if (j < r)
          low.push_back(t < first ? 0xFFFF : ToBf16(value).bits);
        else
          claims.push_back(t < first ? kNaN : value + bias[static_cast<size_t>(j - r)]);
      }
    EXPECT_EQ(ReadBits(low_rank), low);
    const std::vector<float> got = ReadAll<float>(claim);
    ASSERT_EQ(got.size(), claims.size());
    for (size_t i = 0; i < got.size(); ++i)
      ASSERT_TRUE(std::isnan(claims[i]) ? std::isnan(got[i]) : got[i] == claims[i]) << i;
  }

  const Product& product;
  int r, H, T, first;
  std::vector<float> bias;
  DeviceBytes device_bias, from, low_rank, claim;
};

TEST_F(AdapterInTest, IsTheProductSplit) {
  struct {
    int in, r, H;
  } const shapes[] = {{576, 48, 9}, {4096, 64, 32}, {576, 48, 0},
                      {576, 8, 0},  {1024, 0, 7},   {104, 128, 32}};
  for (const auto& s : shapes) {
    const Product p({s.r + s.H, s.in});
    const DeviceBytes x(Spread(p.x, s.in, 8));
    for (const int T : AllRows()) {
      const std::vector<float> sums = Dense(p, p.x, T);
      for (const int first : {0, 1, T / 2, T - 1, T, T + 1}) {
        SCOPED_TRACE(testing::Message() << "in " << s.in << ", r " << s.r << ", H " << s.H << ", T "
                                        << T << ", from row " << first);
        const FirstProduct adapter(p, s.r, T, first);
        CheckCuda(cuda::AdapterIn(adapter.Args(x, 8), nullptr));
        adapter.Check(sums);
      }
    }
  }
}

// Both have the bits that each has by itself.
TEST_F(AdapterInTest, JointProduct) {
  struct {
    int out, in, r, H;
  } const shapes[] = {{960, 576, 48, 9},
                      {576, 576, 48, 0},
                      {576, 576, 0, 9},
                      {40, 104, 8, 7},
                      {1000, 4096, 64, 32}};
  for (const auto& s : shapes) {
    const Product main({s.out, s.in}), p({s.r + s.H, s.in});
    const DeviceBytes x(p.x);
    for (const int T : AllRows()) {
      const std::vector<float> want = Dense(main, main.x, T), sums = Dense(p, p.x, T);
      for (const int first : {0, T / 2, T}) {
        SCOPED_TRACE(testing::Message() << "[" << s.out << ", " << s.in << "], r " << s.r << ", H "
                                        << s.H << ", T " << T << ", from row " << first);
        const FirstProduct adapter(p, s.r, T, first);
        const DeviceBytes y(int64_t{T} * s.out * 4);
        cuda::ProductArgs a = main.args();
        a.x = x.as<void>();
        a.T = T;
        a.y = y.as<void>();
        a.y_f32 = true;
        CheckCuda(cuda::JointProduct(a, adapter.Args(x, 0), nullptr));
        EXPECT_EQ(ReadAll<float>(y), want);
        adapter.Check(sums);
      }
    }
  }
}

}  // namespace
}  // namespace dsla
