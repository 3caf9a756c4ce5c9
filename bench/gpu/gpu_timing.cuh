// What the GPU benchmarks share: medians over CUDA events, the rate of a device copy, random
// values.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#include "ops/dsla/cuda/dsla_cuda_testing.cuh"

namespace dsla {

inline double MedianSeconds(cudaStream_t stream, int repeats, const std::function<void(int)>& run) {
  cudaEvent_t begin, end;
  CheckCuda(cudaEventCreate(&begin));
  CheckCuda(cudaEventCreate(&end));
  for (int i = 0; i < 3; ++i) run(i);
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) {
    CheckCuda(cudaEventRecord(begin, stream));
    run(i);
    CheckCuda(cudaEventRecord(end, stream));
    CheckCuda(cudaEventSynchronize(end));
    float ms = 0;
    CheckCuda(cudaEventElapsedTime(&ms, begin, end));
    seconds.push_back(ms * 1e-3);
  }
  CheckCuda(cudaEventDestroy(begin));
  CheckCuda(cudaEventDestroy(end));
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

// Bytes read and written per second by a device copy.
inline double CopyBandwidth(cudaStream_t stream) {
  const int64_t bytes = int64_t{2} << 30;
  const DeviceBytes from(bytes), to(bytes);
  const double s = MedianSeconds(stream, 10, [&](int) {
    CheckCuda(cudaMemcpyAsync(to.as<void>(), from.as<void>(), size_t(bytes),
                              cudaMemcpyDeviceToDevice, stream));
  });
  return 2.0 * static_cast<double>(bytes) / s;
}

inline std::vector<bf16> RandomBf16(int64_t n, uint32_t seed) {
  // A short period is enough for timing and quick to make.
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<bf16> pool(1 << 16), x(static_cast<size_t>(n));
  for (bf16& v : pool) v = ToBf16(normal(rng));
  for (size_t i = 0; i < x.size(); ++i) x[i] = pool[(i * 40503 + i / 65536) % pool.size()];
  return x;
}

}  // namespace dsla
