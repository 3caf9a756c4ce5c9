// Products with weights on the GPU: y = x W^T, bf16 in, fp32 sums; through cuBLAS, or where that is
// measured to be faster (PrefersSkinny) by our own kernel for few rows. One per stream.
#pragma once

#include <cublas_v2.h>

#include "model/cuda/cuda_util.h"
#include "model/cuda/cuda_weights.h"

namespace dsla::cuda {

class Gemm {
 public:
  explicit Gemm(cudaStream_t stream);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  // x: [T, in] bf16 with x_stride elements between rows; y: [T, out] in bf16, or fp32. With `from`
  // (on the GPU) y += x W^T, and x is zero in, or nothing happens to, rows below *from.
  enum class Out { kBf16, kF32 };
  void Run(const Matrix& weight, const void* x, int64_t x_stride, int64_t T, void* y,
           int64_t y_stride, Out type = Out::kBf16, const int32_t* from = nullptr);

 private:
  cudaStream_t stream_;
  cublasHandle_t handle_ = nullptr;
  DeviceBuffer workspace_;  // of its own, so that a captured graph finds it where it was
};

}  // namespace dsla::cuda
