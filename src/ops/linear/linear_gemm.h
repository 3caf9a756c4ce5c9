// Matrix products of many rows through libtorch, behind plain pointers: linear_torch.cc is the only
// file of the operator that includes ATen headers. Each call runs on the calling thread alone: a
// product is cut into tasks of ours (linear.cc), so that libtorch's threads and ours never compete.
// Internal to this folder.
#pragma once

#include <cstdint>

namespace dsla {

// y[T, out] (+)= x[T, in] w[out, in]^T, all fp32 and row-major with the given strides.
struct GemmArgs {
  const float* x = nullptr;
  int64_t x_stride = 0;
  const float* w = nullptr;
  int64_t w_stride = 0;
  float* y = nullptr;
  int64_t y_stride = 0;
  int64_t T = 0, in = 0, out = 0;
  bool accumulate = false;
};
void GemmF32(const GemmArgs& args);

}  // namespace dsla
