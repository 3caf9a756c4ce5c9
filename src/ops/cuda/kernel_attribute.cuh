// Attributes of kernels. To set one takes as long as a launch, so that is done once for a device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>

namespace dsla::cuda {

// From here on the attribute is at least `value`, above 0, on the current device.
template <auto kKernel, cudaFuncAttribute kAttribute>
cudaError_t RaiseAttribute(int value) {
  constexpr int kDevices = 64;  // that are remembered
  static std::atomic<int> known[kDevices];
  static std::mutex mutex;
  int device = 0;
  cudaGetDevice(&device);
  if (device >= kDevices) return cudaFuncSetAttribute(kKernel, kAttribute, value);
  if (value <= known[device].load(std::memory_order_acquire)) return cudaSuccess;
  const std::lock_guard lock(mutex);
  if (value <= known[device].load(std::memory_order_relaxed)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, kAttribute, value);
  if (error == cudaSuccess) known[device].store(value, std::memory_order_release);
  return error;
}

// So many bytes of dynamic shared memory.
template <auto kKernel>
cudaError_t AllowShared(int bytes) {
  return RaiseAttribute<kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize>(bytes);
}

}  // namespace dsla::cuda
