// Time of one choice at V = 49152 (SmolLM2) and 151936 (Qwen). The bound is reading the logits
// once: V * 4 bytes, 197 KB, which lie in the L2 cache after the last matrix product.
#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "ops/sampling/sampling.h"

namespace dsla {
namespace {

// A few likely tokens over a wide base, as a language model's.
std::vector<float> Logits(int64_t V, bool flat) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, flat ? 0.1f : 2.5f);
  std::vector<float> logits(static_cast<size_t>(V));
  for (float& l : logits) l = normal(random);
  if (!flat)
    for (int i = 0; i < 20; ++i) logits[random() % logits.size()] += 10;
  return logits;
}

void Run(benchmark::State& state, SamplingParams params, bool flat = false) {
  const int64_t V = state.range(0);
  std::vector<float> logits = Logits(V, flat);
  Sampler sampler(params, V);
  for (int32_t i = 0; i < 2000; ++i) sampler.Accept(i);
  int64_t position = 0;
  for (auto _ : state) benchmark::DoNotOptimize(sampler.Sample(logits, position++)->token);
  state.SetBytesProcessed(state.iterations() * V * 4);
}

void Sizes(benchmark::internal::Benchmark* b) {
  b->Arg(49152)->Arg(151936)->Unit(benchmark::kMicrosecond);
}

BENCHMARK_CAPTURE(Run, greedy, SamplingParams{.temperature = 0})->Apply(Sizes);
BENCHMARK_CAPTURE(Run, temperature, SamplingParams{})->Apply(Sizes);
BENCHMARK_CAPTURE(Run, top_k_50, SamplingParams{.top_k = 50})->Apply(Sizes);
BENCHMARK_CAPTURE(Run, top_p_95, SamplingParams{.top_p = 0.95f})->Apply(Sizes);
BENCHMARK_CAPTURE(Run, top_p_95_flat, SamplingParams{.top_p = 0.95f}, true)->Apply(Sizes);
BENCHMARK_CAPTURE(Run, min_p_05, SamplingParams{.min_p = 0.05f})->Apply(Sizes);
BENCHMARK_CAPTURE(Run, top_k_50_top_p_95, SamplingParams{.top_k = 50, .top_p = 0.95f})
    ->Apply(Sizes);
BENCHMARK_CAPTURE(Run, penalties_greedy,
                  SamplingParams{.temperature = 0, .repetition_penalty = 1.1f})
    ->Apply(Sizes);

void BM_TopLogprobs(benchmark::State& state) {
  const std::vector<float> logits = Logits(state.range(0), false);
  for (auto _ : state) benchmark::DoNotOptimize(TopLogprobs(logits, 20)->size());
}
BENCHMARK(BM_TopLogprobs)->Apply(Sizes);

}  // namespace
}  // namespace dsla

BENCHMARK_MAIN();
