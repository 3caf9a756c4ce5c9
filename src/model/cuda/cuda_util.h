// Errors and memory of the CUDA runtime as the host code of this folder uses them.
#pragma once

#include <cuda_runtime.h>
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include "model/device.h"

namespace dsla::cuda {

// Throws std::bad_alloc when memory was short, DeviceError for everything else.
inline void Check(int error, const char* what) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is not one of those that stay
    throw std::bad_alloc();
  }
  throw DeviceError(
      fmt::format("CUDA: {}: {}", what, cudaGetErrorString(static_cast<cudaError_t>(error))));
}

// Memory of the device, or pinned memory of the host.
enum class Place { kDevice, kPinned };
template <Place kPlace>
class CudaBuffer {
 public:
  CudaBuffer() = default;
  explicit CudaBuffer(int64_t bytes) { Grow(bytes); }
  CudaBuffer(CudaBuffer&& other) noexcept { *this = std::move(other); }
  CudaBuffer& operator=(CudaBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~CudaBuffer() { Free(); }

  // At least `bytes`; what was in it is lost if it has to grow. True if it did.
  bool Grow(int64_t bytes) {
    if (bytes <= bytes_) return false;
    Free();
    const auto size = static_cast<size_t>(bytes);
    Check(kPlace == Place::kDevice ? cudaMalloc(&data_, size) : cudaMallocHost(&data_, size),
          "allocating memory");
    bytes_ = bytes;
    return true;
  }

  template <typename T = std::byte>
  T* as(int64_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(data_) + byte_offset);
  }
  int64_t bytes() const { return bytes_; }

 private:
  void Free() {
    if (data_ != nullptr) kPlace == Place::kDevice ? cudaFree(data_) : cudaFreeHost(data_);
    data_ = nullptr;
    bytes_ = 0;
  }

  void* data_ = nullptr;
  int64_t bytes_ = 0;
};
using DeviceBuffer = CudaBuffer<Place::kDevice>;
using PinnedBuffer = CudaBuffer<Place::kPinned>;

}  // namespace dsla::cuda
