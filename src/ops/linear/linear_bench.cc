// Linear against the machine's limits. Few rows: bytes of weights per second as a share of the DRAM
// read bandwidth measured here, over weights that rotate through more than 200 MB. Many rows:
// GFLOP/s. Each iteration is a sweep over all copies of the weight; the counters are of the best
// sweep, as others may use the machine. DSLA_BENCH_THREADS sets the threads (default 2).
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <random>
#include <span>
#include <vector>

#include "base/buffer.h"
#include "ops/linear/linear.h"

namespace dsla {
namespace {

int Threads() {
  const char* text = std::getenv("DSLA_BENCH_THREADS");
  return text != nullptr ? std::atoi(text) : 2;
}

// The best sequential read of 256 MB by all threads so far, bytes per second: a sum, one stream per
// thread, with and without software prefetch (which of them wins depends on the CPU). Each call
// measures again, next to the figure that is compared with it.
double DramBandwidth() {
  static Buffer<uint64_t> data;
  static double best = 0;
  if (data.size() == 0) {
    data.Resize(int64_t{32} << 20);
    data.Fill(1);
  }
  Workspace workspace;
  const ExecContext ctx{Threads(), &workspace};
  for (int repeat = 0; repeat < 8; ++repeat) {
    const int64_t ahead = repeat % 2 == 0 ? 512 : 0;  // 4 KB
    const auto start = std::chrono::steady_clock::now();
    ParallelRanges(ctx, data.size(), 1 << 16, [&](int64_t begin, int64_t end, int) {
      uint64_t sum[8] = {};
      for (int64_t i = begin; i < end; i += 8) {
        if (ahead != 0) __builtin_prefetch(data.data() + std::min(i + ahead, end - 1));
        for (int j = 0; j < 8; ++j) sum[j] += data[i + j];
      }
      for (uint64_t s : sum) benchmark::DoNotOptimize(s);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(data.size()) * 8 / seconds.count());
  }
  return best;
}

std::vector<float> Random(int64_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = uniform(random);
  return values;
}

void Measure(benchmark::State& state, Products products) {
  const int64_t T = state.range(0), out = state.range(1), in = state.range(2);
  const auto format = static_cast<WeightFormat>(state.range(3));
  const std::vector<float> weight = Random(out * in, 1);
  const int64_t rotation = T <= 8 ? int64_t{220} << 20 : int64_t{20} << 20;
  Arena arena;  // as a model's weights
  std::vector<Linear> layers;
  do {
    layers.emplace_back(weight, out, in, format, std::span<const float>(), &arena);
  } while (layers[0].bytes() * static_cast<int64_t>(layers.size() + 1) <= rotation);
  const auto copies = static_cast<double>(layers.size());
  const std::vector<float> x = Random(T * in, 2);
  std::vector<float> y(static_cast<size_t>(T * out));
  Workspace workspace;
  const ExecContext ctx{Threads(), &workspace};
  double best = 1e9;
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    for (const Linear& layer : layers)
      layer.Forward(ctx, x.data(), in, T, y.data(), out, Accumulate::kNo, products);
    benchmark::DoNotOptimize(y.data());
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::min(best, seconds.count() / copies);
  }
  const double bytes = static_cast<double>(layers[0].bytes());
  const double dram = DramBandwidth();
  state.SetLabel(Name(format));
  state.counters["us"] = best * 1e6;
  state.counters["GB/s"] = bytes / best * 1e-9;
  state.counters["of_dram"] = bytes / best / dram;
  state.counters["dram_GB/s"] = dram * 1e-9;
  state.counters["GFLOP/s"] = 2e-9 * static_cast<double>(T * out * in) / best;
}
void BM_Linear(benchmark::State& state) { Measure(state, Products::kFastest); }
// The loop for few rows at any number: where it ends being the faster one is in LinearLoopRows.
void BM_LinearLoop(benchmark::State& state) { Measure(state, Products::kInvariant); }
constexpr auto Arg(WeightFormat format) { return static_cast<int64_t>(format); }
constexpr int64_t kF32 = Arg(WeightFormat::kF32), kBF16 = Arg(WeightFormat::kBF16);
const std::vector<int64_t> kSixteenBitsAndLess = {kBF16, Arg(WeightFormat::kInt8),
                                                  Arg(WeightFormat::kInt4)};
// The matrices of SmolLM2-135M (C = 576, ffn 1536, V = 49152) and one of a 7B model.
BENCHMARK(BM_Linear)
    ->ArgNames({"T", "out", "in", "format"})
    ->ArgsProduct({{1}, {576, 3072, 49152}, {576}, kSixteenBitsAndLess})
    ->ArgsProduct({{1}, {576}, {1536}, kSixteenBitsAndLess})
    ->ArgsProduct({{1}, {4096}, {4096}, {kF32, kBF16}})
    ->ArgsProduct(
        {{2, 4, 8, 16, 32, 33, 64, 128, 256, 512, 2048}, {3072}, {576}, kSixteenBitsAndLess})
    ->ArgsProduct({{512}, {576, 960}, {576}, kSixteenBitsAndLess})
    ->ArgsProduct({{512}, {576}, {1536}, kSixteenBitsAndLess})
    ->ArgsProduct({{2, 4, 8, 16, 32, 64, 65, 128, 512}, {4096}, {4096}, {kBF16}})
    ->UseRealTime()
    ->MeasureProcessCPUTime();
BENCHMARK(BM_LinearLoop)
    ->ArgNames({"T", "out", "in", "format"})
    ->ArgsProduct({{33, 64, 128}, {3072}, {576}, kSixteenBitsAndLess})
    ->UseRealTime()
    ->MeasureProcessCPUTime();

}  // namespace
}  // namespace dsla

BENCHMARK_MAIN();
