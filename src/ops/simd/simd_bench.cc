// GemmTile and Exp on one thread. GFLOP/s of the tile against the FMA peak, which the first bench
// measures on the spot: independent FMAs on registers.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/simd/simd_bench.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Must come after foreach_target.h.
#include "hwy/highway.h"
#include "ops/simd/math-inl.h"
#include "ops/simd/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {

void CallGemmTile(const float* a, ptrdiff_t a_row, ptrdiff_t a_col, const float* b, ptrdiff_t b_row,
                  float* c, ptrdiff_t c_row, int M, int N, int K, bool accumulate) {
  GemmTile(a, a_row, a_col, b, b_row, c, c_row, M, N, K, accumulate);
}

void CallExp(const float* from, float* to, size_t n) {
  const hwy::HWY_NAMESPACE::ScalableTag<float> d;
  const size_t lanes = hwy::HWY_NAMESPACE::Lanes(d);
  for (size_t i = 0; i + lanes <= n; i += lanes) StoreF32(d, Exp(d, LoadF32(d, from + i)), to + i);
}

// `steps` FMAs on each of ten vectors that stay in registers; returns the flops.
int64_t FmaLoop(int64_t steps, float* out) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::ScalableTag<float> d;
  const auto m = hn::Set(d, out[0]), b = hn::Set(d, out[1]);
  auto x0 = b, x1 = b, x2 = b, x3 = b, x4 = b, x5 = b, x6 = b, x7 = b, x8 = b, x9 = b;
  for (int64_t i = 0; i < steps; ++i) {
    x0 = hn::MulAdd(x0, m, b);
    x1 = hn::MulAdd(x1, m, b);
    x2 = hn::MulAdd(x2, m, b);
    x3 = hn::MulAdd(x3, m, b);
    x4 = hn::MulAdd(x4, m, b);
    x5 = hn::MulAdd(x5, m, b);
    x6 = hn::MulAdd(x6, m, b);
    x7 = hn::MulAdd(x7, m, b);
    x8 = hn::MulAdd(x8, m, b);
    x9 = hn::MulAdd(x9, m, b);
#if HWY_COMPILER_GCC
    // Keeps ten chains: equal ones would be merged.
    __asm__ volatile("" : "+x"(x0.raw), "+x"(x1.raw), "+x"(x2.raw), "+x"(x3.raw), "+x"(x4.raw));
    __asm__ volatile("" : "+x"(x5.raw), "+x"(x6.raw), "+x"(x7.raw), "+x"(x8.raw), "+x"(x9.raw));
#endif
  }
  const auto sum = hn::Add(hn::Add(hn::Add(x0, x1), hn::Add(x2, x3)),
                           hn::Add(hn::Add(hn::Add(x4, x5), hn::Add(x6, x7)), hn::Add(x8, x9)));
  hn::StoreU(sum, d, out);
  return steps * 10 * 2 * static_cast<int64_t>(hn::Lanes(d));
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <benchmark/benchmark.h>

#include <vector>

namespace dsla {
namespace {

HWY_EXPORT(CallGemmTile);
HWY_EXPORT(CallExp);
HWY_EXPORT(FmaLoop);

void SetFlops(benchmark::State& state, double flops) {
  state.counters["GFLOP/s"] = benchmark::Counter(flops * 1e-9, benchmark::Counter::kIsRate);
}

void BM_FmaPeak(benchmark::State& state) {
  std::vector<float> out(64, 0.5f);
  double flops = 0;
  for (auto _ : state) {
    flops += static_cast<double>(HWY_DYNAMIC_DISPATCH(FmaLoop)(10000, out.data()));
    out.assign(64, 0.5f);
  }
  SetFlops(state, flops);
}
BENCHMARK(BM_FmaPeak);

// M, N, K, stride of B in floats (0: dense), A transposed.
void BM_GemmTile(benchmark::State& state) {
  const int M = static_cast<int>(state.range(0)), N = static_cast<int>(state.range(1)),
            K = static_cast<int>(state.range(2));
  const int b_row = state.range(3) ? static_cast<int>(state.range(3)) : N;
  const bool transposed = state.range(4) != 0;
  std::vector<float> a(static_cast<size_t>(M * K), 0.5f), b(static_cast<size_t>(K * b_row), 0.25f),
      c(static_cast<size_t>(M * N));
  for (auto _ : state) {
    HWY_DYNAMIC_DISPATCH(CallGemmTile)
    (a.data(), transposed ? 1 : K, transposed ? M : 1, b.data(), b_row, c.data(), N, M, N, K,
     false);
    benchmark::ClobberMemory();
  }
  SetFlops(state, 2.0 * M * N * K * static_cast<double>(state.iterations()));
}
BENCHMARK(BM_GemmTile)
    ->ArgNames({"M", "N", "K", "b_row", "aT"})
    ->Args({192, 64, 64, 0, 0})
    ->Args({192, 64, 128, 0, 0})
    ->Args({192, 64, 256, 0, 0})
    ->Args({192, 256, 64, 0, 0})
    ->Args({192, 128, 256, 0, 0})
    ->Args({192, 256, 256, 0, 0})
    ->Args({128, 64, 64, 0, 1})
    ->Args({64, 64, 256, 0, 0})
    ->Args({6, 64, 256, 0, 0})
    ->Args({3, 64, 256, 0, 0});

void BM_Exp(benchmark::State& state) {
  std::vector<float> x(4096, -1.5f), y(4096);
  for (auto _ : state) {
    HWY_DYNAMIC_DISPATCH(CallExp)(x.data(), y.data(), x.size());
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(static_cast<int64_t>(x.size()) * state.iterations());
}
BENCHMARK(BM_Exp);

}  // namespace
}  // namespace dsla

BENCHMARK_MAIN();
#endif  // HWY_ONCE
