// Linear against the machine's limits. Few rows: bytes of weights per second as a share of the DRAM
// read bandwidth measured here, over weights that rotate through more than 200 MB. Many rows:
// GFLOP/s. Arguments: rows T, out, in, dtype (0 fp32, 1 bf16); the environment variable
// DSLA_BENCH_THREADS sets the threads (default 2).
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <random>
#include <vector>

#include "base/buffer.h"
#include "base/half.h"
#include "ops/linear/linear.h"
#include "ops/linear/linear_kernels.h"

namespace dsla {
namespace {

int Threads() {
  const char* text = std::getenv("DSLA_BENCH_THREADS");
  return text != nullptr ? std::atoi(text) : 2;
}

// Best of several sequential reads of 256 MB by all threads, bytes per second: a plain sum, split
// into as many streams as there are threads.
double DramBandwidth() {
  static const double best = [] {
    Buffer<uint64_t> data(int64_t{32} << 20);
    data.Fill(1);
    Workspace workspace;
    const ExecContext ctx{Threads(), &workspace};
    double fastest = 0;
    for (int repeat = 0; repeat < 12; ++repeat) {
      const auto start = std::chrono::steady_clock::now();
      ParallelRanges(ctx, data.size(), 1 << 16, [&](int64_t begin, int64_t end, int) {
        uint64_t sum[8] = {};
        for (int64_t i = begin; i < end; i += 8)
          for (int j = 0; j < 8; ++j) sum[j] += data[i + j];
        for (uint64_t s : sum) benchmark::DoNotOptimize(s);
      });
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      fastest = std::max(fastest, static_cast<double>(data.size()) * 8 / seconds.count());
    }
    return fastest;
  }();
  return best;
}

std::vector<float> Random(int64_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = uniform(random);
  return values;
}

void BM_DramRead(benchmark::State& state) {
  for (auto _ : state) benchmark::DoNotOptimize(DramBandwidth());
  state.counters["GB/s"] = DramBandwidth() * 1e-9;
}
BENCHMARK(BM_DramRead)->Iterations(1);

void BM_Linear(benchmark::State& state) {
  const int64_t T = state.range(0), out = state.range(1), in = state.range(2);
  const DType dtype = state.range(3) == 1 ? DType::kBF16 : DType::kF32;
  const std::vector<float> weight = Random(out * in, 1);
  const int64_t copies = std::max<int64_t>(1, (int64_t{220} << 20) / (out * in * SizeOf(dtype)));
  std::vector<Linear> layers;
  for (int64_t i = 0; i < copies; ++i) layers.emplace_back(weight, out, in, dtype);
  const std::vector<float> x = Random(T * in, 2);
  std::vector<float> y(static_cast<size_t>(T * out));
  Workspace workspace;
  const ExecContext ctx{Threads(), &workspace};
  size_t layer = 0;
  for (auto _ : state) {
    layers[layer].Forward(ctx, x.data(), in, T, y.data(), out);
    benchmark::DoNotOptimize(y.data());
    layer = (layer + 1) % layers.size();
  }
  const double calls = static_cast<double>(state.iterations());
  const double bytes = static_cast<double>(layers[0].bytes());
  state.counters["GB/s"] = benchmark::Counter(calls * bytes * 1e-9, benchmark::Counter::kIsRate);
  state.counters["of_dram"] =
      benchmark::Counter(calls * bytes / DramBandwidth(), benchmark::Counter::kIsRate);
  state.counters["GFLOP/s"] = benchmark::Counter(calls * 2e-9 * static_cast<double>(T * out * in),
                                                 benchmark::Counter::kIsRate);
}
// The matrices of SmolLM2-135M (C = 576, ffn 1536, V = 49152) and one of a 7B model.
BENCHMARK(BM_Linear)
    ->ArgNames({"T", "out", "in", "bf16"})
    ->ArgsProduct({{1}, {576, 3072, 49152}, {576}, {1}})
    ->ArgsProduct({{1}, {576}, {1536}, {1}})
    ->ArgsProduct({{1}, {4096}, {4096}, {0, 1}})
    ->ArgsProduct({{2, 4, 8, 9, 16, 32, 64, 512}, {3072}, {576}, {1}})
    ->ArgsProduct({{2, 4, 8, 9, 16, 32, 64, 512}, {4096}, {4096}, {1}})
    ->UseRealTime()
    ->MeasureProcessCPUTime();

}  // namespace
}  // namespace dsla

BENCHMARK_MAIN();
