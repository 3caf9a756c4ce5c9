// Paged attention at the shape of a small model (H 9, Hkv 3, D 64, bf16 cache, pages of 64 in
// shuffled order, each with K and then V, in huge pages of memory where the system has them: as the
// cache's pool). The layers take turns over more than 64 MB of cache, so that K and V come from
// DRAM as in a real step; with `resident` 1 there is one layer, which stays in the cache. Prefill
// reports GFLOP/s (4 H D per row and visible key), decode GB/s of K and V; the first two benches
// measure this machine's DRAM bandwidth and its fp32 product rate.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "base/arena.h"
#include "base/half.h"
#include "ops/attention/attention.h"

namespace dsla {
namespace {

constexpr int kH = 9, kHkv = 3, kD = 64, kPage = 64;

// `layers` caches of one sequence of `tokens` tokens.
struct Bench {
  int layers;
  std::vector<int32_t> page_start, pages;
  Arena arena;
  bf16* cache;
  std::vector<float> q, out;
  int32_t row_start[2], pos[1];
  Workspace workspace;
  PagedAttentionArgs args;
  int64_t layer_size;

  Bench(int cached, int rows, bool resident = false) {
    const int tokens = cached + rows, count = (tokens + kPage - 1) / kPage;
    const int64_t page_stride = 2 * kHkv * kPage * kD;
    layer_size = count * page_stride;
    layers = resident ? 1
                      : static_cast<int>(std::max<int64_t>(
                            30, (int64_t{64} << 20) / (int64_t{sizeof(bf16)} * layer_size) + 1));
    page_start = {0, count};
    pages.resize(static_cast<size_t>(count));
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), std::mt19937(1));
    std::mt19937 rng(2);
    std::vector<bf16> noise(4099);
    for (bf16& x : noise) x = ToBf16(std::normal_distribution<float>()(rng));
    const int64_t size = layer_size * layers;
    cache = static_cast<bf16*>(arena.Take(size * int64_t{sizeof(bf16)}));
    for (int64_t i = 0; i < size; ++i) cache[i] = noise[static_cast<size_t>(i) % noise.size()];
    q.resize(static_cast<size_t>(rows * kH * kD));
    for (float& x : q) x = std::normal_distribution<float>()(rng);
    out.resize(q.size());
    row_start[0] = 0;
    row_start[1] = rows;
    pos[0] = cached;
    args.rows = {1, row_start, pos};
    args.tables = {page_start.data(), pages.data()};
    args.kv = {nullptr, nullptr, page_stride, kPage, kHkv, kD, DType::kBF16};
    args.H = kH;
    args.scale = 0.125f;
    args.q = q.data();
    args.q_stride = kH * kD;
    args.out = out.data();
  }
  void Run(int layer, int threads) {
    args.kv.k = cache + layer * layer_size;
    args.kv.v = cache + layer * layer_size + kHkv * kPage * kD;
    PagedAttentionCpu(ExecContext{threads, &workspace}, args);
  }
};

void BM_ReadBandwidth(benchmark::State& state) {
  const int threads = static_cast<int>(state.range(0));
  std::vector<uint64_t> data(size_t{24} << 20, 1);
  const ExecContext ctx{threads, nullptr};
  std::vector<uint64_t> sums(static_cast<size_t>(threads) * 8);
  for (auto _ : state) {
    ParallelRanges(ctx, static_cast<int64_t>(data.size()), 4096,
                   [&](int64_t begin, int64_t end, int thread) {
                     uint64_t sum[4] = {};
                     for (int64_t i = begin; i < end; i += 4)
                       for (int64_t j = 0; j < 4; ++j) sum[j] ^= data[static_cast<size_t>(i + j)];
                     sums[static_cast<size_t>(thread) * 8] = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
                   });
    benchmark::DoNotOptimize(sums.data());
  }
  state.counters["GB/s"] = benchmark::Counter(
      static_cast<double>(data.size() * 8) * static_cast<double>(state.iterations()) * 1e-9,
      benchmark::Counter::kIsRate);
}
BENCHMARK(BM_ReadBandwidth)->Arg(1)->Arg(2)->UseRealTime()->ArgName("threads");

void BM_Prefill(benchmark::State& state) {
  const int cached = static_cast<int>(state.range(0)), rows = static_cast<int>(state.range(1));
  Bench bench(cached, rows);
  int layer = 0;
  for (auto _ : state) bench.Run(layer++ % bench.layers, static_cast<int>(state.range(2)));
  const double keys = static_cast<double>(rows) * (cached + (rows + 1) / 2.0);
  state.counters["GFLOP/s"] =
      benchmark::Counter(4 * kH * kD * keys * static_cast<double>(state.iterations()) * 1e-9,
                         benchmark::Counter::kIsRate);
}
BENCHMARK(BM_Prefill)
    ->ArgNames({"cached", "rows", "threads"})
    ->ArgsProduct({{0, 2048, 7168}, {512}, {1, 2}})
    ->Args({7168, 16, 2})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

void BM_Decode(benchmark::State& state) {
  const int tokens = static_cast<int>(state.range(0));
  Bench bench(tokens - 1, 1, state.range(2) != 0);
  int layer = 0;
  for (auto _ : state) bench.Run(layer++ % bench.layers, static_cast<int>(state.range(1)));
  const double bytes = 4.0 * tokens * kHkv * kD;
  state.counters["GB/s"] = benchmark::Counter(
      bytes * static_cast<double>(state.iterations()) * 1e-9, benchmark::Counter::kIsRate);
}
BENCHMARK(BM_Decode)
    ->ArgNames({"tokens", "threads", "resident"})
    ->ArgsProduct({{512, 2048, 7168, 32768}, {1, 2}, {0}})
    ->ArgsProduct({{512}, {1, 2}, {1}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace dsla

BENCHMARK_MAIN();
