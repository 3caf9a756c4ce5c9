// Time of one layer of SmolLM2-135M's shape (H 9, Hkv 3, D 64, F 128, two states, W 64, S 4) and of
// the default shape (F = D, W 256): prompts, decode steps and folds. Counters: tokens and
// operations per second.
#include <benchmark/benchmark.h>

#include <memory>
#include <numeric>

#include "ops/dsla/dsla_testing.h"

namespace dsla {
namespace {

DslaShape Shape(bool starting_adapter) {
  DslaShape s;
  s.H = 9;
  s.Hkv = 3;
  s.D = 64;
  s.F = starting_adapter ? 128 : 64;
  s.states = 2;
  s.window = starting_adapter ? 64 : 256;
  s.sinks = 4;
  s.kv_dtype = DType::kBF16;
  s.gate_floor = -2.5f;
  return s;
}

// Multiplications and additions of the chunked form per token, without what masks cut off.
double PrefillFlops(const DslaShape& s, int chunk) {
  const double D = s.D, SF = s.SF();
  const double per_kv_head = 2 * D * SF + 2 * D * D + 2 * SF * D;
  const double per_head = 2 * D * D + 2 * SF * D + (SF + D) * chunk + 4 * D * (s.window + s.sinks);
  return s.Hkv * per_kv_head + s.H * per_head;
}
double FoldFlops(const DslaShape& s) { return s.Hkv * (4.0 * s.D * s.SF() + 2.0 * s.D * s.D); }

void BM_Prefill(benchmark::State& state) {
  const DslaShape shape = Shape(state.range(2) == 0);
  const int count = static_cast<int>(state.range(0)), threads = static_cast<int>(state.range(1));
  const int begin = 1000;
  const TestLayer layer(shape, TestGates::kTrained, begin + count, 1);
  const TestTokens tokens(shape, begin + count, 2);
  TestPool pool(shape, 1);
  pool.Reset(0);
  Workspace workspace;
  const ExecContext ctx{threads, &workspace};
  const std::vector<TestPart> first = {{&tokens, 0, begin, 0}}, part = {{&tokens, begin, count, 0}};
  TestBatch start(layer, pool, first), batch(layer, pool, part);
  DslaForwardCpu(ctx, start.args());
  for (auto _ : state) DslaForwardCpu(ctx, batch.args());
  state.counters["tokens"] = benchmark::Counter(static_cast<double>(state.iterations()) * count,
                                                benchmark::Counter::kIsRate);
  state.counters["flops"] =
      benchmark::Counter(static_cast<double>(state.iterations()) * count * PrefillFlops(shape, 32),
                         benchmark::Counter::kIsRate);
}
BENCHMARK(BM_Prefill)
    ->ArgNames({"tokens", "threads", "shape"})
    ->ArgsProduct({{512}, {1, 2}, {0, 1}})
    ->ArgsProduct({{16, 64, 2048}, {2}, {0}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

// Rotates through as many layers as fill more than the L3 cache, as a model does; `layers` = 1 is
// the operator alone.
void BM_Decode(benchmark::State& state) {
  const DslaShape shape = Shape(state.range(3) == 0);
  const int rows = static_cast<int>(state.range(0)), threads = static_cast<int>(state.range(1));
  const size_t layers = static_cast<size_t>(state.range(2));
  std::vector<TestLayer> models;
  std::vector<TestPool> pools;
  for (size_t i = 0; i < layers; ++i) {
    models.emplace_back(shape, TestGates::kTrained, 1000, static_cast<uint32_t>(i));
    pools.emplace_back(shape, rows);
    for (int n = 0; n < rows; ++n) pools.back().Reset(n);
  }
  const TestTokens tokens(shape, 1000, 2);
  std::vector<TestPart> parts;
  for (int n = 0; n < rows; ++n) parts.push_back({&tokens, 900 + n, 1, n});
  std::vector<std::unique_ptr<TestBatch>> batches;
  for (size_t i = 0; i < layers; ++i)
    batches.push_back(std::make_unique<TestBatch>(models[i], pools[i], parts));
  Workspace workspace;
  size_t layer = 0;
  for (auto _ : state) {
    DslaForwardCpu({threads, &workspace}, batches[layer]->args());
    layer = (layer + 1) % layers;
  }
  const double slot = static_cast<double>(rows * shape.Hkv * shape.SF() * (shape.D + 1)) * 8;
  state.counters["state_bytes"] = benchmark::Counter(static_cast<double>(state.iterations()) * slot,
                                                     benchmark::Counter::kIsRate);
}
BENCHMARK(BM_Decode)
    ->ArgNames({"rows", "threads", "layers", "shape"})
    ->ArgsProduct({{1}, {1, 2}, {1, 60}, {0, 1}})
    ->ArgsProduct({{8, 32}, {2}, {1}, {0}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

void BM_Fold(benchmark::State& state) {
  const DslaShape shape = Shape(true);
  const int count = static_cast<int>(state.range(0)), threads = static_cast<int>(state.range(1));
  constexpr int kPage = 16;
  const int pages = (count + kPage - 1) / kPage;
  const TestLayer layer(shape, TestGates::kTrained, count, 1);
  const TestTokens tokens(shape, pages * kPage, 2);  // [token, head, D]: any order will do
  std::vector<int32_t> table(static_cast<size_t>(pages));
  std::iota(table.begin(), table.end(), 0);
  const int32_t pos = count, page_start[] = {0, pages}, slot = 0;
  TestPool pool(shape, 1);
  DslaFoldArgs args;
  args.shape = shape;
  args.params = layer.Params();
  args.rows = {1, nullptr, &pos};
  args.tables = {page_start, table.data()};
  args.kv = {const_cast<std::byte*>(tokens.k.data()),
             const_cast<std::byte*>(tokens.v.data()),
             int64_t{kPage} * shape.Hkv * shape.D,
             kPage,
             shape.Hkv,
             shape.D,
             shape.kv_dtype};
  args.slots = &slot;
  args.states = pool.View();
  Workspace workspace;
  for (auto _ : state) DslaFoldCpu({threads, &workspace}, args);
  state.counters["tokens"] = benchmark::Counter(static_cast<double>(state.iterations()) * count,
                                                benchmark::Counter::kIsRate);
  state.counters["flops"] =
      benchmark::Counter(static_cast<double>(state.iterations()) * count * FoldFlops(shape),
                         benchmark::Counter::kIsRate);
}
BENCHMARK(BM_Fold)
    ->ArgNames({"tokens", "threads"})
    ->ArgsProduct({{512, 7000}, {1, 2}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace dsla

BENCHMARK_MAIN();
