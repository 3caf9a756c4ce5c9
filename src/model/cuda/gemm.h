// Products with weights on the GPU: y = x W^T, bf16 in, fp32 sums; through cuBLAS, or where that is
// measured to be faster (PrefersSmallProduct) by our own kernels. A packed weight that is not held
// in bf16 too cuBLAS gets some features at a time; by weights in fp8 few rows are multiplied as
// they are, and many are rounded to fp8. One per stream.
#pragma once

#include <cublas_v2.h>

#include "model/cuda/cuda_util.h"
#include "model/cuda/cuda_weights.h"
#include "model/cuda/fp8_gemm.h"
#include "ops/linear/cuda/linear_cuda.h"

namespace dsla::cuda {

class Gemm {
 public:
  explicit Gemm(cudaStream_t stream);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  // Before there are products with packed weights or weights in fp8: room for some of the features
  // in bf16, or of the rows in fp8.
  void MakeRoom() { room_.Grow(kRoomBytes); }
  static constexpr int64_t kRoomBytes = int64_t{64} << 20;

  static constexpr int64_t kMostRowsUnit = 128;
  // cuBLAS looks for a kernel when it first sees a number of rows, which takes as long as many
  // launches. So beyond 64 rows it is told of so many: x and y have room for them.
  static int64_t Rows(int64_t T) {
    const int64_t unit = T <= 512 ? 64 : kMostRowsUnit;
    return T <= 64 ? T : (T + unit - 1) / unit * unit;
  }

  // x: [T, in] bf16 with x_stride elements between rows; y: [T, out] in bf16, or fp32. With `from`
  // (on the GPU) y += x W^T in the rows from *from on, and the others are left alone.
  enum class Out { kBf16, kF32 };
  void Run(const Matrix& weight, const void* x, int64_t x_stride, int64_t T, void* y,
           int64_t y_stride, Out type = Out::kBf16, const int32_t* from = nullptr);
  // y = x W^T, and the adapter's first product with the same rows.
  void RunJoint(const Matrix& weight, void* y, int64_t y_stride, const AdapterInArgs& adapter);
  // y = silu(x G^T) * (x U^T), [T, out / 2] bf16, of a weight whose first half is G and whose
  // second is U; x and y are dense. The product may need `room`: [T, out] bf16.
  void RunGated(const Matrix& gate_up, const void* x, int64_t T, void* room, void* y);

 private:
  // y = x W^T of a bf16 weight [out, in], by cuBLAS.
  void Multiply(const void* weight, int64_t out, int64_t in, const void* x, int64_t x_stride,
                int64_t T, void* y, int64_t y_stride, Out type);
  void MultiplyUnpacked(const Matrix& weight, const void* x, int64_t x_stride, int64_t T, void* y,
                        int64_t y_stride, Out type);
  void MultiplyRounded(const Matrix& weight, const void* x, int64_t x_stride, int64_t T, void* y,
                       int64_t y_stride, Out type);

  cudaStream_t stream_;
  cublasHandle_t handle_ = nullptr;
  DeviceBuffer workspace_;  // of its own, so that a captured graph finds it where it was
  DeviceBuffer room_;
  Fp8Gemm fp8_;
};

}  // namespace dsla::cuda
