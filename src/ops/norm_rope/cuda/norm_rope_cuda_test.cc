// The elementwise CUDA kernels against the fp64 references. Outputs are NaN before a call.
#include "ops/norm_rope/cuda/norm_rope_cuda.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "ops/norm_rope/cuda/norm_rope_cuda_testing.cuh"
#include "ops/norm_rope/norm_rope.h"

namespace dsla {
namespace {

using EmbedRowsTest = GpuTest;
using AddRmsNormCudaTest = GpuTest;
using SiluMulCudaTest = GpuTest;
using GraphTest = GpuTest;

constexpr int kRows[] = {1, 7, 64, 300};
constexpr int kWidths[] = {8, 104, 576, 2048, 4096, 8192, 16384};
constexpr float kEps = 1e-5f;

// One rounding to bf16 of what was computed in fp32 to within `tolerance`.
Tolerance Rounded(Tolerance tolerance) {
  return {UnitRoundoff(DType::kBF16) * (1 + tolerance.relative) + tolerance.relative};
}

TEST_F(EmbedRowsTest, CopiesRows) {
  constexpr int kV = 50;
  for (const int C : {8, 104, 576, 4096}) {
    const std::vector<float> embedding = RandomExact(int64_t{kV} * C, 1);
    const DeviceBytes table(Bits(embedding));
    for (const int T : kRows) {
      std::vector<int32_t> tokens;
      std::vector<float> want;
      for (int t = 0; t < T; ++t) {
        const int token = t % 5 == 3 ? -1 : t * 37 % kV;  // a negative one is padding
        tokens.push_back(token);
        for (int i = 0; i < C; ++i)
          want.push_back(token < 0 ? 0 : embedding[static_cast<size_t>(token * C + i)]);
      }
      // Some of them by way of an array of triples.
      std::vector<int32_t> feed, own = tokens, chosen(static_cast<size_t>(3 * T), -7);
      for (int t = 0; t < T; ++t) {
        const bool fed = t % 3 == 1;
        feed.push_back(fed ? T - 1 - t : -1);
        if (fed) chosen[static_cast<size_t>(3 * (T - 1 - t))] = std::exchange(own[t], kV - 1);
      }
      const DeviceBytes d_tokens(tokens), d_own(own), d_feed(feed), d_chosen(chosen);
      cuda::EmbedRowsArgs args{
          .tokens = d_tokens.as<int32_t>(), .embedding = table.as<void>(), .T = T, .C = C};
      for (const bool fed : {false, true}) {
        const DeviceBytes hidden(int64_t{T} * C * 4);
        args.hidden = hidden.as<float>();
        if (fed) {
          args.tokens = d_own.as<int32_t>();
          args.feed = d_feed.as<int32_t>();
          args.chosen = d_chosen.as<int32_t>();
          args.chosen_stride = 3;
        }
        CheckCuda(cuda::EmbedRows(args, nullptr));
        EXPECT_EQ(ReadAll<float>(hidden), want) << "C " << C << ", T " << T << ", fed " << fed;
      }
    }
  }
}

struct NormCase {
  bool delta, bias, gather;
};

// hidden after the call and normed of T rows of a fixed sequence of rows.
struct NormResult {
  std::vector<float> hidden;
  std::vector<uint16_t> normed;
};
NormResult RunAddRmsNorm(const NormCase& c, int T, int C, const std::vector<float>& hidden,
                         const std::vector<float>& delta, const std::vector<float>& bias,
                         const std::vector<float>& weight, const std::vector<int32_t>& rows) {
  const DeviceBytes d_hidden(hidden), d_delta(Bits(delta)), d_bias(bias), d_weight(weight),
      d_rows(rows), normed(int64_t{T} * C * 2);
  cuda::AddRmsNormArgs args;
  args.hidden = d_hidden.as<float>();
  if (c.delta) args.delta = d_delta.as<void>();
  if (c.bias) args.bias = d_bias.as<float>();
  args.weight = d_weight.as<float>();
  args.eps = kEps;
  args.T = T;
  args.C = C;
  if (c.gather) args.rows = d_rows.as<int32_t>();
  args.normed = normed.as<void>();
  CheckCuda(cuda::AddRmsNorm(args, nullptr));
  return {ReadAll<float>(d_hidden), ReadBits(normed)};
}

void CheckAddRmsNorm(const NormCase& c, int T, int C) {
  SCOPED_TRACE(testing::Message() << "T " << T << ", C " << C << (c.delta ? ", delta" : "")
                                  << (c.bias ? ", bias" : "") << (c.gather ? ", rows" : ""));
  // A gather takes from more rows than it makes.
  const int sources = c.gather ? T + 5 : T;
  const int64_t n = int64_t{sources} * C;
  const std::vector<float> hidden = Random(n, 1, 3), delta = RandomExact(n, 2), bias = Random(C, 3),
                           weight = Random(C, 4);
  std::vector<int32_t> rows;
  for (int t = 0; t < T; ++t) rows.push_back(c.gather ? (t * 7 + 2) % sources : t);
  const NormResult got = RunAddRmsNorm(c, T, C, hidden, delta, bias, weight, rows);

  // The order of fp32 additions is not promised, but no more than two are needed.
  std::vector<double> sum(hidden.begin(), hidden.end());
  for (size_t i = 0; i < sum.size(); ++i)
    sum[i] += (c.delta ? delta[i] : 0.) + (c.bias ? bias[i % static_cast<size_t>(C)] : 0.);
  if (c.gather || (!c.delta && !c.bias))
    EXPECT_EQ(got.hidden, hidden) << "hidden must not change";
  else
    ExpectClose(got.hidden, sum, RoundingTolerance(4));
  std::vector<float> gathered, want(static_cast<size_t>(T) * static_cast<size_t>(C));
  for (const int32_t row : rows)
    for (int i = 0; i < C; ++i)
      gathered.push_back(static_cast<float>(sum[static_cast<size_t>(int64_t{row} * C + i)]));
  RmsNormRef(gathered.data(), weight.data(), kEps, T, C, want.data());
  ExpectClose(Floats(got.normed), want, Rounded(SumTolerance(C)));

  const NormResult again = RunAddRmsNorm(c, T, C, hidden, delta, bias, weight, rows);
  EXPECT_EQ(got.normed, again.normed) << "two runs differ";
  EXPECT_EQ(got.hidden, again.hidden) << "two runs differ";
  // A row does not depend on how many others there are.
  const NormResult alone = RunAddRmsNorm(c, 1, C, hidden, delta, bias, weight, rows);
  EXPECT_TRUE(std::equal(alone.normed.begin(), alone.normed.end(), got.normed.begin()));
}

TEST_F(AddRmsNormCudaTest, EqualsReference) {
  for (const int C : kWidths)
    for (const int T : kRows)
      for (const NormCase& c : {NormCase{true, false, false}, NormCase{true, true, true}})
        if (int64_t{T} * C <= (1 << 20) || c.delta != c.bias) CheckAddRmsNorm(c, T, C);
  for (const bool delta : {false, true})
    for (const bool bias : {false, true})
      for (const bool gather : {false, true}) CheckAddRmsNorm({delta, bias, gather}, 7, 4096);
}

// Where eps outweighs the values it must not be lost: all zeros give zeros.
TEST_F(AddRmsNormCudaTest, EpsCounts) {
  constexpr int kC = 576;
  const std::vector<float> weight(kC, 1.f), bias(kC, 0.f);
  const std::vector<int32_t> rows{0};
  std::vector<float> x(kC, 0.f);
  EXPECT_EQ(RunAddRmsNorm({}, 1, kC, x, x, bias, weight, rows).normed,
            std::vector<uint16_t>(kC, 0));
  x.assign(kC, std::sqrt(kEps / 3));
  for (const uint16_t bits : RunAddRmsNorm({}, 1, kC, x, x, bias, weight, rows).normed)
    EXPECT_EQ(bits, ToBf16(0.5f).bits);
}

TEST_F(AddRmsNormCudaTest, NegativeRowIsLeftAlone) {
  constexpr int kC = 104;
  const std::vector<float> x = Random(2 * kC, 1), weight(kC, 1.f);
  const NormResult got =
      RunAddRmsNorm({false, false, true}, 3, kC, x, x, weight, weight, {1, -1, 0});
  for (size_t i = 0; i < kC; ++i) {
    ASSERT_FALSE(std::isnan(ToFloat(bf16{got.normed[i]})));
    ASSERT_EQ(got.normed[kC + i], 0xFFFF);
    ASSERT_FALSE(std::isnan(ToFloat(bf16{got.normed[2 * kC + i]})));
  }
}

std::vector<uint16_t> RunSiluMul(const std::vector<float>& gate_up, int T, int ffn) {
  const DeviceBytes from(Bits(gate_up)), out(int64_t{T} * ffn * 2);
  CheckCuda(cuda::SiluMul(from.as<void>(), T, ffn, out.as<void>(), nullptr));
  return ReadBits(out);
}

TEST_F(SiluMulCudaTest, EqualsReference) {
  for (const int ffn : {8, 104, 1536, 11008})
    for (const int T : kRows) {
      SCOPED_TRACE(testing::Message() << "T " << T << ", ffn " << ffn);
      // Gates up to 8 * 6: the exponent of e^-g is off by |g| / ln 2 roundings.
      const std::vector<float> gate_up = RandomExact(int64_t{T} * 2 * ffn, 1, 8);
      std::vector<float> want(static_cast<size_t>(T) * static_cast<size_t>(ffn));
      SiluMulRef(gate_up.data(), T, ffn, want.data());
      const std::vector<uint16_t> got = RunSiluMul(gate_up, T, ffn);
      ExpectClose(Floats(got), want, Rounded(RoundingTolerance(80)));
      EXPECT_EQ(got, RunSiluMul(gate_up, T, ffn)) << "two runs differ";
    }
}

TEST_F(SiluMulCudaTest, LargeGates) {
  const std::vector<float> gate_up = {200, -200, 0, -88, -87.5f, -3e38f, 3e38f, 1,
                                      2,   2,    2, 2,   2,      2,      0.5f,  -0.f};
  const std::vector<float> got = Floats(RunSiluMul(gate_up, 1, 8));
  EXPECT_EQ(got[0], 400);
  EXPECT_NEAR(got[1], 0, 1e-37);
  EXPECT_EQ(got[2], 0);
  EXPECT_NEAR(got[3], 0, 1e-35);
  EXPECT_NEAR(got[4], 0, 1e-35);
  EXPECT_EQ(got[5], 0);
  EXPECT_EQ(got[6], ToFloat(ToBf16(1.5e38f)));
  EXPECT_EQ(got[7], 0);
}

// A chain in which each kernel reads what the one before it wrote, replayed from a graph, where
// kernels may start early, equals the same chain with a wait after each.
TEST_F(GraphTest, ReplaysEqualSingleLaunches) {
  constexpr int kV = 64, kT = 200, kC = 4096, kLayers = 8;
  const DeviceBytes embedding(Bits(RandomExact(int64_t{kV} * kC, 1))),
      delta(Bits(RandomExact(int64_t{kT} * kC, 2))), weight(Random(kC, 3));
  std::vector<int32_t> tokens;
  for (int t = 0; t < kT; ++t) tokens.push_back(t * 11 % kV);
  const DeviceBytes d_tokens(tokens);
  DeviceBytes hidden(int64_t{kT} * kC * 4), normed(int64_t{kT} * kC * 2), out(int64_t{kT} * kC * 2);
  cudaStream_t stream;
  CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto chain = [&](const auto& after_each) {
    CheckCuda(cuda::EmbedRows({.tokens = d_tokens.as<int32_t>(),
                               .embedding = embedding.as<void>(),
                               .T = kT,
                               .C = kC,
                               .hidden = hidden.as<float>()},
                              stream));
    after_each();
    cuda::AddRmsNormArgs args;
    args.hidden = hidden.as<float>();
    args.delta = delta.as<void>();
    args.weight = weight.as<float>();
    args.eps = kEps;
    args.T = kT;
    args.C = kC;
    args.normed = normed.as<void>();
    for (int i = 0; i < kLayers; ++i) {
      CheckCuda(cuda::AddRmsNorm(args, stream));
      after_each();
      CheckCuda(cuda::SiluMul(normed.as<void>(), kT, kC / 2, out.as<void>(), stream));
      after_each();
      args.delta = out.as<void>();
      args.T = kT / 2;  // out has rows of kC / 2
    }
  };
  CheckCuda(cudaDeviceSynchronize());
  chain([&] { CheckCuda(cudaStreamSynchronize(stream)); });
  const std::vector<float> want = ReadAll<float>(hidden);
  const std::vector<uint16_t> want_out = ReadBits(out);
  ASSERT_FALSE(std::isnan(want[0]));

  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CheckCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  chain([] {});
  CheckCuda(cudaStreamEndCapture(stream, &graph));
  CheckCuda(cudaGraphInstantiate(&exec, graph, 0));
  for (int replay = 0; replay < 20; ++replay) {
    hidden.Poison();
    normed.Poison();
    out.Poison();
    CheckCuda(cudaDeviceSynchronize());
    CheckCuda(cudaGraphLaunch(exec, stream));
    CheckCuda(cudaStreamSynchronize(stream));
    ASSERT_EQ(ReadAll<float>(hidden), want) << "replay " << replay;
    ASSERT_EQ(ReadBits(out), want_out) << "replay " << replay;
  }
  CheckCuda(cudaGraphExecDestroy(exec));
  CheckCuda(cudaGraphDestroy(graph));
  CheckCuda(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace dsla
