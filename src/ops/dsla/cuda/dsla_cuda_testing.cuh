// What the tests and the benchmark of this folder share: device memory, and a test layer, pool and
// batch of ops/dsla/dsla_testing.h moved to the device.
// Not a .h: it needs the CUDA headers, which a build without a toolkit does not have.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/check.h"
#include "base/half.h"
#include "ops/dsla/cuda/dsla_cuda.h"
#include "ops/dsla/dsla_testing.h"

namespace dsla {

inline void CheckCuda(int error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(static_cast<cudaError_t>(error)));
  DSLA_CHECK(error == cudaSuccess);
}

// Bytes on the device, at first a NaN in every type that is used here.
class DeviceBytes {
 public:
  explicit DeviceBytes(int64_t bytes) : bytes_(bytes) {
    CheckCuda(cudaMalloc(&data_, static_cast<size_t>(bytes > 0 ? bytes : 1)));
    Poison();
  }
  template <typename T>
  explicit DeviceBytes(std::span<const T> from)
      : DeviceBytes(static_cast<int64_t>(from.size_bytes())) {
    Write(from.data());
  }
  template <typename T>
  explicit DeviceBytes(const std::vector<T>& from) : DeviceBytes(std::span<const T>(from)) {}
  ~DeviceBytes() { cudaFree(data_); }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;

  void Poison() { CheckCuda(cudaMemset(data_, 0xFF, static_cast<size_t>(bytes_))); }
  void Write(const void* from) {
    CheckCuda(cudaMemcpy(data_, from, static_cast<size_t>(bytes_), cudaMemcpyHostToDevice));
  }
  void Read(void* to) const {
    CheckCuda(cudaMemcpy(to, data_, static_cast<size_t>(bytes_), cudaMemcpyDeviceToHost));
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_;
};

inline void RoundToBf16(std::vector<float>& x) {
  for (float& v : x) v = ToFloat(ToBf16(v));
}

// A test layer with weights that bf16 holds exactly, here and on the device.
class GpuLayer {
 public:
  GpuLayer(const DslaShape& shape, TestGates gates, int positions, uint32_t seed)
      : GpuLayer(TestLayer(shape, gates, positions, seed)) {}
  explicit GpuLayer(TestLayer layer)
      : host(Rounded(std::move(layer))),
        mix_(host.mix),
        cos_(host.cos),
        sin_(host.sin),
        packed_(cuda::PackedWeightBytes(host.shape)) {
    const DeviceBytes phi_q(host.phi_q), phi_k(host.phi_k), weight(host.gate_weight),
        bias(host.gate_bias);
    DslaParams params;
    params.phi_q = phi_q.as<float>();
    params.phi_k = phi_k.as<float>();
    params.gate_weight = weight.as<float>();
    params.gate_bias = bias.as<float>();
    CheckCuda(cuda::PackWeights(host.shape, params, packed_.as<void>(), nullptr));
    CheckCuda(cudaDeviceSynchronize());
  }
  cuda::DslaWeights weights() const {
    return {packed_.as<void>(), mix_.as<float>(), cos_.as<float>(), sin_.as<float>()};
  }

  const TestLayer host;

 private:
  static TestLayer Rounded(TestLayer layer) {
    RoundToBf16(layer.phi_q);
    RoundToBf16(layer.phi_k);
    RoundToBf16(layer.gate_weight);
    return layer;
  }

  DeviceBytes mix_, cos_, sin_, packed_;
};

}  // namespace dsla
