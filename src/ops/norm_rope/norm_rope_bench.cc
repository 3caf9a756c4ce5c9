// Bytes read and written per second by the elementwise steps, at the sizes of SmolLM2-135M: one row
// (all in the L1 cache) and, of what takes many, a prefill chunk of 512.
#include <benchmark/benchmark.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "base/half.h"
#include "ops/norm_rope/norm_rope.h"
#include "ops/norm_rope/rope_kv.h"

namespace dsla {
namespace {

constexpr int64_t kC = 576, kFfn = 1536;
constexpr int kHeads = 9, kKvHeads = 3, kD = 64;

void Report(benchmark::State& state, int64_t floats_per_call) {
  state.SetBytesProcessed(state.iterations() * floats_per_call * 4);
}

void BM_RmsNorm(benchmark::State& state) {
  const int64_t T = state.range(0);
  std::vector<float> x(static_cast<size_t>(T * kC), 0.5f), out(x.size()), weight(kC, 1.f);
  Workspace workspace;
  for (auto _ : state) {
    RmsNorm({2, &workspace}, x.data(), weight.data(), 1e-5f, T, kC, out.data());
    benchmark::DoNotOptimize(out.data());
  }
  Report(state, 2 * T * kC);
}
BENCHMARK(BM_RmsNorm)->Arg(1)->Arg(512)->UseRealTime();

void BM_AddRmsNorm(benchmark::State& state) {
  std::vector<float> x(static_cast<size_t>(kC), 0.f), delta(x.size(), 1e-3f), out(x.size()),
      weight(x.size(), 1.f);
  for (auto _ : state) {
    AddRmsNormRow(x.data(), delta.data(), weight.data(), 1e-5f, kC, out.data());
    benchmark::DoNotOptimize(out.data());
  }
  Report(state, 4 * kC);
}
BENCHMARK(BM_AddRmsNorm);

void BM_SiluMul(benchmark::State& state) {
  std::vector<float> gate_up(static_cast<size_t>(2 * kFfn), 0.5f), out(static_cast<size_t>(kFfn));
  for (auto _ : state) {
    SiluMulRow(gate_up.data(), kFfn, 0, kFfn, out.data());
    benchmark::DoNotOptimize(out.data());
  }
  Report(state, 3 * kFfn);
}
BENCHMARK(BM_SiluMul);

RopeTable Table() {
  std::vector<double> frequencies(kD / 2);
  for (int i = 0; i < kD / 2; ++i)
    frequencies[static_cast<size_t>(i)] = std::pow(1e5, -2. * i / kD);
  return RopeTable(frequencies, 8192);
}

std::vector<int32_t> Positions(int64_t T) {
  std::vector<int32_t> positions(static_cast<size_t>(T));
  std::iota(positions.begin(), positions.end(), 4000);
  return positions;
}

void BM_NormRope(benchmark::State& state) {
  const int64_t T = state.range(0);
  const RopeTable table = Table();
  std::vector<float> x(static_cast<size_t>(T * kHeads * kD), 0.5f), weight(kD, 1.f);
  const std::vector<int32_t> positions = Positions(T);
  RopeArgs args{.x = x.data(),
                .stride = kHeads * kD,
                .T = T,
                .heads = kHeads,
                .positions = positions.data(),
                .table = &table};
  if (state.range(1) == 1) args.norm_weight = weight.data(), args.norm_eps = 1e-6f;
  Workspace workspace;
  for (auto _ : state) {
    NormRope({2, &workspace}, args);
    benchmark::DoNotOptimize(x.data());
  }
  Report(state, 2 * T * kHeads * kD + T * kD);
}
BENCHMARK(BM_NormRope)->ArgNames({"T", "norm"})->ArgsProduct({{1, 512}, {0, 1}})->UseRealTime();

// Into dense bf16 rows.
void BM_RopeKv(benchmark::State& state) {
  const int64_t T = state.range(0), width = (kHeads + 2 * kKvHeads) * kD, kv = T * kKvHeads * kD;
  const RopeTable table = Table();
  std::vector<float> qkv(static_cast<size_t>(T * width), 0.5f);
  std::vector<bf16> k(static_cast<size_t>(kv)), v(k.size());
  const std::vector<int32_t> positions = Positions(T);
  Workspace workspace;
  for (auto _ : state) {
    RopeKvCpu({2, &workspace}, {.qkv = qkv.data(),
                                .stride = width,
                                .T = T,
                                .H = kHeads,
                                .Hkv = kKvHeads,
                                .positions = positions.data(),
                                .table = &table,
                                .paged = {},
                                .tables = {},
                                .kv = {},
                                .k = k.data(),
                                .v = v.data()});
    benchmark::DoNotOptimize(qkv.data());
  }
  Report(state, T * (2 * kHeads * kD + kD) + 3 * kv);
}
BENCHMARK(BM_RopeKv)->ArgName("T")->Arg(1)->Arg(512)->UseRealTime();

}  // namespace
}  // namespace dsla

BENCHMARK_MAIN();
