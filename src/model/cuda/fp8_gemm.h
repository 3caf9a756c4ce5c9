// Products of rows and weights in e4m3, each with a scale, on tensor cores of compute capability
// 9.0: through cuBLASLt, whose choice of a kernel for a shape is kept. One per stream.
#pragma once

#include <cublasLt.h>

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <type_traits>

#include "model/cuda/cuda_util.h"

namespace dsla::cuda {

class Fp8Gemm {
 public:
  // The workspace outlives this, and is its own while a product runs.
  Fp8Gemm(cudaStream_t stream, const DeviceBuffer& workspace);
  ~Fp8Gemm();
  Fp8Gemm(const Fp8Gemm&) = delete;
  Fp8Gemm& operator=(const Fp8Gemm&) = delete;

  // e4m3 rows [rows, in] with a scale each; in a multiple of 16.
  struct Operand {
    const void* data;
    const float* scale;
    int64_t rows;
  };
  // y = x W^T, fp32 sums: [x.rows, weight.rows], bf16 or fp32. weight.rows is a multiple of 16.
  void Run(const Operand& weight, const Operand& x, int64_t in, void* y, int64_t y_stride,
           bool y_f32);

 private:
  using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, bool>;
  struct Destroy {
    void operator()(cublasLtMatmulDesc_t product) const { cublasLtMatmulDescDestroy(product); }
    void operator()(cublasLtMatrixLayout_t layout) const { cublasLtMatrixLayoutDestroy(layout); }
  };
  template <typename Handle>
  using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;
  struct Plan {
    Owned<cublasLtMatmulDesc_t> product;
    Owned<cublasLtMatrixLayout_t> weight, x, y;
    cublasLtMatmulAlgo_t algorithm;
  };
  const Plan& PlanOf(const Operand& weight, const Operand& x, int64_t in, int64_t stride, bool f32);

  cudaStream_t stream_;
  const DeviceBuffer& workspace_;
  cublasLtHandle_t handle_ = nullptr;
  std::map<Shape, Plan> plans_;
};

}  // namespace dsla::cuda
