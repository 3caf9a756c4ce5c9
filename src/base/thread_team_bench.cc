// What a loop costs that does nothing, or hardly anything: two tasks for two threads.
#include <benchmark/benchmark.h>

#include "base/exec.h"

namespace dsla {
namespace {

// work: turns of an empty loop in each task.
void BM_Loop(benchmark::State& state) {
  const ExecContext ctx{.threads = 2, .workspace = nullptr};
  const int64_t work = state.range(0);
  for (auto _ : state) {
    ParallelFor(ctx, 2, [&](int64_t, int) {
      for (int64_t i = 0; i < work; ++i) asm volatile("");
    });
  }
}
BENCHMARK(BM_Loop)->ArgName("work")->Arg(0)->Arg(500)->Arg(4000)->UseRealTime();

}  // namespace
}  // namespace dsla

BENCHMARK_MAIN();
