#include "eval/machine.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/arena.h"
#include "base/buffer.h"
#include "base/clock.h"
#include "ops/linear/linear.h"

namespace dsla {
namespace {

// The best of a few passes: what the memory can do, not what it did on average.
double ReadBandwidth(const ExecContext& ctx) {
  constexpr int64_t kWords = int64_t{40} << 20;  // 320 MB
  Arena arena;                                   // huge pages: the most that the memory gives
  auto* const words = static_cast<uint64_t*>(arena.Take(kWords * int64_t{sizeof(uint64_t)}));
  // First touched by the threads that read it.
  ParallelRanges(ctx, kWords, 4096, [&](int64_t begin, int64_t end, int) {
    std::fill(words + begin, words + end, 1);
  });
  std::vector<uint64_t> sums(ctx.threads);
  double best = 0;
  for (int pass = 0; pass < 7; ++pass) {
    const double start = NowSeconds();
    ParallelRanges(ctx, kWords, 4096, [&](int64_t begin, int64_t end, int thread) {
      uint64_t sum = 0;
      for (int64_t i = begin; i < end; ++i) sum += words[i];
      sums[thread] = sum;
    });
    best = std::max(best, static_cast<double>(kWords) * sizeof(uint64_t) / (NowSeconds() - start));
  }
  // Keeps the sums alive, and the passes with them.
  volatile uint64_t sink = sums[0];
  static_cast<void>(sink);
  return best;
}

Expected<double> GemmRate(const ExecContext& ctx) {
  DSLA_RETURN_IF_ERROR(PrepareLinear(WeightFormat::kF32));
  constexpr int64_t kRows = 512, kSize = 1536;
  Buffer<float> weight(kSize * kSize), x(kRows * kSize), y(kRows * kSize);
  weight.Fill(0.01f);
  x.Fill(0.5f);
  const Linear linear(weight.span(), kSize, kSize, WeightFormat::kF32);
  double best = 0;
  for (int pass = 0; pass < 7; ++pass) {
    const double start = NowSeconds();
    linear.Forward(ctx, x.data(), kSize, kRows, y.data(), kSize);
    best = std::max(best, 2.0 * kRows * kSize * kSize / (NowSeconds() - start));
  }
  return best;
}

}  // namespace

Expected<MachineLimits> MeasureMachine(const ExecContext& ctx, Device* device) {
  if (device != nullptr) {
    const DeviceLimits limits = device->Measure();
    return MachineLimits{.read_bytes_per_second = limits.copy_bytes_per_second,
                         .gemm_flops = limits.gemm_flops};
  }
  MachineLimits limits{.read_bytes_per_second = ReadBandwidth(ctx)};
  DSLA_ASSIGN_OR_RETURN(limits.gemm_flops, GemmRate(ctx));
  return limits;
}

}  // namespace dsla
