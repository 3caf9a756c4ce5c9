// What the GPU benchmarks share: medians over CUDA events, the rate of a device copy, random
// values.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#include "ops/dsla/cuda/dsla_cuda_testing.cuh"

namespace dsla {

// Holds a stream back until all that is to be timed has been queued on it, as in a step of a model,
// whose launches are ahead of the GPU. Else the time of short work is that of its launches.
class StreamGate {
 public:
  StreamGate() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    CheckCuda(cudaGetDriverEntryPointByVersion("cuStreamWaitValue32", &found, 12000,
                                               cudaEnableDefault, &result));
    wait_ = reinterpret_cast<decltype(&cuStreamWaitValue32)>(found);
    CheckCuda(cudaHostAlloc(&open_, sizeof(uint32_t), cudaHostAllocMapped));
  }
  StreamGate(const StreamGate&) = delete;
  StreamGate& operator=(const StreamGate&) = delete;
  ~StreamGate() { cudaFreeHost(const_cast<uint32_t*>(open_)); }

  // What came before on the stream has ended.
  void Close(cudaStream_t stream) {
    *open_ = 0;
    CheckCuda(wait_(stream, reinterpret_cast<CUdeviceptr>(open_), 1, CU_STREAM_WAIT_VALUE_EQ));
  }
  void Open() { *open_ = 1; }

 private:
  decltype(&cuStreamWaitValue32) wait_;
  volatile uint32_t* open_ = nullptr;
};

// `run` must not wait for the stream.
inline double MedianSeconds(cudaStream_t stream, int repeats, const std::function<void(int)>& run) {
  cudaEvent_t begin, end;
  CheckCuda(cudaEventCreate(&begin));
  CheckCuda(cudaEventCreate(&end));
  StreamGate gate;
  for (int i = 0; i < 3; ++i) run(i);
  CheckCuda(cudaStreamSynchronize(stream));
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) {
    gate.Close(stream);
    CheckCuda(cudaEventRecord(begin, stream));
    run(i);
    CheckCuda(cudaEventRecord(end, stream));
    gate.Open();
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
