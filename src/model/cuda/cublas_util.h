// Errors of cuBLAS as cuda_util.h has those of the CUDA runtime.
#pragma once

#include <cublas_v2.h>

#include "model/cuda/cuda_util.h"

namespace dsla::cuda {

inline void CheckCublas(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  if (status == CUBLAS_STATUS_ALLOC_FAILED) throw std::bad_alloc();
  throw DeviceError(fmt::format("cuBLAS: {}: {}", what, cublasGetStatusString(status)));
}

}  // namespace dsla::cuda
