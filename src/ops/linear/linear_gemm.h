// The fp32 product of many rows through libtorch, behind plain pointers. It is a library of its
// own, libdsla_gemm.so (linear_torch.cc, the only file of the operator that includes ATen headers),
// loaded at the first such product: libtorch alone makes 115 MB resident and takes .15 s to start.
// Each call runs on the calling thread alone: a product is cut into tasks of ours (linear.cc), so
// that libtorch's threads and ours never compete. Internal to this folder.
#pragma once

#include <cstdint>

#include "base/status.h"

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
using Gemm = void (*)(const GemmArgs& args);

// Loaded by the first call; thread-safe. kUnavailable if the library cannot be loaded.
Expected<Gemm> LoadGemm();

}  // namespace dsla
