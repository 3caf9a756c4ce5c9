// The products of few rows against fp64 sums. Outputs, and what lies between their rows, are NaN
// before a call.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "ops/linear/cuda/linear_cuda.h"
#include "ops/norm_rope/cuda/norm_rope_cuda.h"
#include "ops/norm_rope/cuda/norm_rope_cuda_testing.cuh"

namespace dsla {
namespace {

using cuda::kMostSkinnyRows;
using SkinnyTest = GpuTest;
using AdapterInTest = GpuTest;
using SkinnyGraphTest = GpuTest;

constexpr int kRows[] = {1, 2, 7, 8, 9, 16, 31, 32};
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  int out, in;
};
// Of models, of adapters, and what is no multiple of a tile: of 16 features, of 32 or 256 inputs.
constexpr Shape kShapes[] = {{960, 576},   {576, 576},    {3072, 576},  {576, 1536}, {49152, 576},
                             {4096, 4096}, {4096, 11008}, {12288, 256}, {25, 576},   {96, 4096},
                             {4096, 16},   {576, 32},     {4096, 128},  {8, 8},      {24, 200},
                             {3848, 1032}, {17, 136},     {20000, 8}};

// A short period makes large weights quick; it is prime, so that rows differ.
std::vector<uint16_t> Values(int64_t n, uint32_t seed, float scale = 1) {
  const std::vector<uint16_t> pool = Bits(RandomExact(65521, seed, scale));
  std::vector<uint16_t> values(static_cast<size_t>(n));
  for (size_t i = 0; i < values.size(); ++i) values[i] = pool[i % pool.size()];
  return values;
}

// Rows with `gap` NaNs after each.
std::vector<uint16_t> Spread(const std::vector<uint16_t>& rows, int64_t width, int64_t gap) {
  std::vector<uint16_t> spread;
  for (size_t i = 0; i < rows.size(); i += static_cast<size_t>(width)) {
    const auto row = rows.begin() + static_cast<std::ptrdiff_t>(i);
    spread.insert(spread.end(), row, row + width);
    spread.insert(spread.end(), static_cast<size_t>(gap), 0xFFFF);
  }
  return spread;
}

// A weight, 32 rows of x, and, if asked for, the fp64 products of some features (all where they are
// few).
struct Product {
  explicit Product(Shape s, bool reference = false)
      : shape(s),
        weight(Values(int64_t{s.out} * s.in, 1)),
        x(Values(int64_t{kMostSkinnyRows} * s.in, 2)),
        device_weight(weight),
        step(int64_t{s.out} * s.in > (1 << 22) ? 37 : 1) {
    if (!reference) return;
    for (int t = 0; t < kMostSkinnyRows; ++t)
      for (int j = 0; j < s.out; j += step) {
        double sum = 0;
        for (int i = 0; i < s.in; ++i)
          sum += double{ToFloat(bf16{weight[size_t(int64_t{j} * s.in + i)]})} *
                 double{ToFloat(bf16{x[size_t(t * s.in + i)]})};
        sums.push_back(sum);
      }
  }
  // Of the features that `sums` has.
  std::vector<float> Pick(const std::vector<float>& y) const {
    std::vector<float> picked;
    for (size_t row = 0; row < y.size(); row += static_cast<size_t>(shape.out))
      for (int j = 0; j < shape.out; j += step) picked.push_back(y[row + static_cast<size_t>(j)]);
    return picked;
  }
  cuda::SkinnyArgs args() const {
    cuda::SkinnyArgs a;
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

// T rows of fp32 results for dense rows `x`.
std::vector<float> Dense(const Product& p, const std::vector<uint16_t>& x, int T) {
  const DeviceBytes device_x(x), y(int64_t{T} * p.shape.out * 4);
  cuda::SkinnyArgs a = p.args();
  a.x = device_x.as<void>();
  a.T = T;
  a.y = y.as<void>();
  a.y_f32 = true;
  CheckCuda(cuda::Skinny(a, nullptr));
  return ReadAll<float>(y);
}

void CheckProduct(const Product& p, int T, bool f32, bool add) {
  SCOPED_TRACE(testing::Message() << "T " << T << (f32 ? ", fp32" : "") << (add ? ", add" : ""));
  constexpr int kGap = 24;
  const int out = p.shape.out, in = p.shape.in;
  const int64_t stride = out + 5, n = T * stride;
  const DeviceBytes x(Spread(p.x, in, kGap));
  // y before: values in rows, NaN between them, and in rows only with `add`.
  std::vector<float> before = Random(n, 3, 10);
  if (!f32) RoundToBf16(before);
  for (int64_t i = 0; i < n; ++i)
    if (!add || i % stride >= out) before[static_cast<size_t>(i)] = kNaN;
  DeviceBytes y(n * (f32 ? 4 : 2));
  if (f32)
    y.Write(before.data());
  else
    y.Write(Bits(before).data());
  cuda::SkinnyArgs a = p.args();
  a.x = x.as<void>();
  a.x_stride = in + kGap;
  a.T = T;
  a.y = y.as<void>();
  a.y_stride = stride;
  a.y_f32 = f32;
  a.add = add;
  CheckCuda(cuda::Skinny(a, nullptr));
  const std::vector<float> got = f32 ? ReadAll<float>(y) : Floats(ReadBits(y));

  std::vector<float> rows, old;
  for (int64_t i = 0; i < n; ++i) {
    const auto at = static_cast<size_t>(i);
    if (i % stride >= out) {
      ASSERT_TRUE(std::isnan(got[at])) << "written between rows, at " << i;
      continue;
    }
    ASSERT_FALSE(std::isnan(got[at])) << "at " << i;
    rows.push_back(got[at]);
    old.push_back(before[at]);
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

TEST_F(SkinnyTest, EqualsReference) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(testing::Message() << "[" << shape.out << ", " << shape.in << "]");
    const Product p(shape, true);
    for (const int T : kRows)
      for (const bool f32 : {false, true})
        for (const bool add : {false, true}) CheckProduct(p, T, f32, add);
  }
}

// To the bit: from run to run, for any number of rows, and wherever a row stands.
TEST_F(SkinnyTest, RowsAreIndependent) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(testing::Message() << "[" << shape.out << ", " << shape.in << "]");
    const Product p(shape);
    const std::vector<float> all = Dense(p, p.x, kMostSkinnyRows);
    EXPECT_EQ(all, Dense(p, p.x, kMostSkinnyRows)) << "two runs differ";
    for (int T = 1; T < kMostSkinnyRows; ++T) {
      // The last T rows, then as many of the first.
      const std::vector<uint16_t> last(p.x.end() - std::ptrdiff_t{T} * shape.in, p.x.end());
      const std::vector<float> some = Dense(p, last, T), first = Dense(p, p.x, T);
      EXPECT_TRUE(std::equal(some.begin(), some.end(), all.end() - std::ptrdiff_t{T} * shape.out))
          << T << " last rows";
      EXPECT_TRUE(std::equal(first.begin(), first.end(), all.begin())) << T << " first rows";
    }
  }
}

// An adapter's second product: rows below first_row keep what they have.
TEST_F(SkinnyTest, FirstRow) {
  for (const Shape& shape : {Shape{4096, 64}, Shape{576, 16}, Shape{960, 576}}) {
    const Product p(shape);
    for (const int T : kRows)
      for (const int first : {0, 1, T / 2, T, T + 3}) {
        SCOPED_TRACE(testing::Message() << "[" << shape.out << ", " << shape.in << "], T " << T
                                        << ", from row " << first);
        const std::vector<uint16_t> before = Values(int64_t{T} * shape.out, 3);
        const DeviceBytes x(p.x), all(before), some(before), from(std::vector<int32_t>{first});
        cuda::SkinnyArgs a = p.args();
        a.x = x.as<void>();
        a.T = T;
        a.add = true;
        a.y = all.as<void>();
        CheckCuda(cuda::Skinny(a, nullptr));
        a.y = some.as<void>();
        a.first_row = from.as<int32_t>();
        if (first >= T) a.weight = reinterpret_cast<void*>(0x1000);  // which nobody can read
        CheckCuda(cuda::Skinny(a, nullptr));
        std::vector<uint16_t> want = ReadBits(all);
        const auto kept = std::ptrdiff_t{std::min(first, T)} * shape.out;
        std::copy(before.begin(), before.begin() + kept, want.begin());
        EXPECT_EQ(ReadBits(some), want);
      }
  }
}

TEST_F(AdapterInTest, IsTheProductSplit) {
  struct {
    int in, r, H;
  } const shapes[] = {{576, 16, 9}, {4096, 64, 32}, {576, 8, 0}, {1024, 0, 7}, {104, 128, 32}};
  for (const auto& s : shapes) {
    const Product p({s.r + s.H, s.in});
    const std::vector<float> bias = Random(s.H, 4);
    const DeviceBytes x(Spread(p.x, s.in, 8)), device_bias(bias);
    for (const int T : kRows) {
      const std::vector<float> product = Dense(p, p.x, T);
      for (const int first : {0, 1, T / 2, T - 1, T, T + 1}) {
        SCOPED_TRACE(testing::Message() << "in " << s.in << ", r " << s.r << ", H " << s.H << ", T "
                                        << T << ", from row " << first);
        std::vector<uint16_t> low;
        std::vector<float> claim;
        for (int t = 0; t < T; ++t)
          for (int j = 0; j < s.r + s.H; ++j) {
            const float value = product[static_cast<size_t>(t * (s.r + s.H) + j)];
            const bool none = first >= T;
            if (j < s.r)
              low.push_back(none ? 0xFFFF : t < first ? 0 : ToBf16(value).bits);
            else
              claim.push_back(t < first ? kNaN : value + bias[static_cast<size_t>(j - s.r)]);
          }
        const DeviceBytes from(std::vector<int32_t>{first}), d_low(int64_t{T} * s.r * 2),
            d_claim(int64_t{T} * s.H * 4);
        cuda::AdapterInArgs a;
        a.weight = first >= T ? reinterpret_cast<void*>(0x1000) : p.device_weight.as<void>();
        a.in = s.in;
        a.r = s.r;
        a.H = s.H;
        a.x = x.as<void>();
        a.x_stride = s.in + 8;
        a.T = T;
        a.first_row = from.as<int32_t>();
        if (s.r > 0) a.low_rank = d_low.as<void>();
        if (s.H > 0) a.claim = d_claim.as<float>(), a.claim_bias = device_bias.as<float>();
        CheckCuda(cuda::AdapterIn(a, nullptr));
        EXPECT_EQ(ReadBits(d_low), low);
        const std::vector<float> got = ReadAll<float>(d_claim);
        ASSERT_EQ(got.size(), claim.size());
        for (size_t i = 0; i < got.size(); ++i)
          ASSERT_TRUE(std::isnan(claim[i]) ? std::isnan(got[i]) : got[i] == claim[i]) << i;
      }
    }
  }
}

// Layers as a decode step runs them, in which each kernel reads what the one before it wrote.
class Layers {
 public:
  Layers(int C, int ffn, int r, int T, int first)
      : C_(C),
        ffn_(ffn),
        r_(r),
        T_(T),
        norm_(Random(C, 1)),
        up_(Values(int64_t{kLayers} * 2 * ffn * C, 2, Scale(C))),
        down_(Values(int64_t{kLayers} * C * ffn, 3, Scale(ffn))),
        in_(Values(int64_t{r + kHeads} * C, 4, Scale(C))),
        out_(Values(int64_t{2} * ffn * r, 5, Scale(r))),
        bias_(Random(kHeads, 6)),
        start_(Random(int64_t{T} * C, 7)),
        first_(std::vector<int32_t>{first}),
        hidden(int64_t{T} * C * 4),
        claim(int64_t{T} * kHeads * 4),
        normed_(int64_t{T} * C * 2),
        gate_up_(int64_t{T} * ffn * 4),
        activation_(int64_t{T} * ffn * 2),
        delta_(int64_t{T} * C * 2),
        low_(int64_t{T} * r * 2) {}

  // Anew: all that kernels write is NaN but the start.
  void Reset() {
    for (DeviceBytes* p : {&claim, &normed_, &gate_up_, &activation_, &delta_, &low_}) p->Poison();
    hidden.Write(start_.data());
  }

  template <typename AfterEach>
  void Run(cudaStream_t stream, const AfterEach& after_each) {
    const auto done = [&](int error) {
      CheckCuda(error);
      after_each();
    };
    for (int l = 0; l < kLayers; ++l) {
      done(cuda::AddRmsNorm({.hidden = hidden.as<float>(),
                             .delta = l == 0 ? nullptr : delta_.as<void>(),
                             .weight = norm_.as<float>(),
                             .eps = 1e-5f,
                             .T = T_,
                             .C = C_,
                             .normed = normed_.as<void>()},
                            stream));
      done(cuda::Skinny(Weight(up_, l, 2 * ffn_, C_, normed_, gate_up_), stream));
      done(cuda::AdapterIn({.weight = in_.as<void>(),
                            .in = C_,
                            .r = r_,
                            .H = kHeads,
                            .x = normed_.as<void>(),
                            .x_stride = C_,
                            .T = T_,
                            .first_row = first_.as<int32_t>(),
                            .low_rank = low_.as<void>(),
                            .claim = claim.as<float>(),
                            .claim_bias = bias_.as<float>()},
                           stream));
      cuda::SkinnyArgs add = Weight(out_, 0, 2 * ffn_, r_, low_, gate_up_);
      add.add = true;
      add.first_row = first_.as<int32_t>();
      done(cuda::Skinny(add, stream));
      done(cuda::SiluMul(gate_up_.as<void>(), T_, ffn_, activation_.as<void>(), stream));
      done(cuda::Skinny(Weight(down_, l, C_, ffn_, activation_, delta_), stream));
    }
  }

 private:
  static constexpr int kLayers = 6, kHeads = 9;
  static float Scale(int n) { return 2 / std::sqrt(static_cast<float>(n)); }
  cuda::SkinnyArgs Weight(const DeviceBytes& weight, int l, int out, int in, const DeviceBytes& x,
                          const DeviceBytes& y) const {
    return {.weight = weight.as<uint16_t>() + int64_t{l} * out * in,
            .out = out,
            .in = in,
            .x = x.as<void>(),
            .x_stride = in,
            .T = T_,
            .y = y.as<void>(),
            .y_stride = out};
  }

  int C_, ffn_, r_, T_;
  DeviceBytes norm_, up_, down_, in_, out_, bias_;
  std::vector<float> start_;
  DeviceBytes first_;

 public:
  DeviceBytes hidden, claim;

 private:
  DeviceBytes normed_, gate_up_, activation_, delta_, low_;
};

// Replayed from a graph, where kernels start early, it equals a chain with a wait after each.
TEST_F(SkinnyGraphTest, ReplaysEqualSingleLaunches) {
  struct {
    int C, ffn, T, first;
  } const cases[] = {{576, 1536, 1, 1},  {576, 1536, 1, 0},  {576, 1536, 7, 3},  {576, 1536, 32, 0},
                     {4096, 2816, 1, 0}, {4096, 2816, 8, 8}, {4096, 2816, 16, 4}};
  cudaStream_t stream;
  CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (const auto& c : cases) {
    SCOPED_TRACE(testing::Message() << "C " << c.C << ", T " << c.T << ", from row " << c.first);
    Layers layers(c.C, c.ffn, 16, c.T, c.first);
    layers.Reset();
    CheckCuda(cudaDeviceSynchronize());
    layers.Run(stream, [&] { CheckCuda(cudaStreamSynchronize(stream)); });
    const std::vector<uint16_t> want = ReadBits(layers.hidden), claim = ReadBits(layers.claim);
    for (const float value : ReadAll<float>(layers.hidden)) ASSERT_FALSE(std::isnan(value));

    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CheckCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    layers.Run(stream, [] {});
    CheckCuda(cudaStreamEndCapture(stream, &graph));
    CheckCuda(cudaGraphInstantiate(&exec, graph, 0));
    for (int replay = 0; replay < 50; ++replay) {
      layers.Reset();
      CheckCuda(cudaDeviceSynchronize());
      CheckCuda(cudaGraphLaunch(exec, stream));
      CheckCuda(cudaStreamSynchronize(stream));
      ASSERT_EQ(ReadBits(layers.hidden), want) << "replay " << replay;
      ASSERT_EQ(ReadBits(layers.claim), claim) << "replay " << replay;
    }
    CheckCuda(cudaGraphExecDestroy(exec));
    CheckCuda(cudaGraphDestroy(graph));
  }
  CheckCuda(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace dsla
