// Matrix products of many rows through libtorch, behind plain pointers. They are a library of their
// own, libdsla_gemm.so (linear_torch.cc, the only file of the operator that includes ATen headers),
// loaded at the first such product: libtorch alone makes 115 MB resident and takes .15 s to start,
// and what runs on integer weights never needs it. Each call runs on the calling thread alone: a
// product is cut into tasks of ours (linear.cc), so that libtorch's threads and ours never compete.
// Internal to this folder.
#pragma once

#include <cstdint>

#include "base/half.h"
#include "base/status.h"

namespace dsla {

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

// bf16's x has zero rows up to a multiple of this: oneDNN makes and keeps code for every shape that
// it meets, and a server meets batches of every size.
inline constexpr int64_t kBf16Rows = 32;

struct Gemm {
  // y[T, out] (+)= x[T, in] w[out, in]^T, all fp32 and row-major with the given strides.
  void (*f32)(const GemmArgs& args);
  // y (+)= x w^T with x [T, in] and w [out, in] in bf16, dense; args.x and args.w are not read.
  // oneDNN sums in fp32 and rounds the product to bf16. Only fast where the CPU multiplies bf16
  // itself. `in` must be a multiple of 32, AMX's depth: oneDNN reads the last partial block of a
  // row together with the start of the next row, times zeros, and so carries a NaN from one row of
  // the batch to another.
  void (*bf16)(const GemmArgs& args, const dsla::bf16* x, const dsla::bf16* w);
};

// Loaded by the first call; thread-safe. kUnavailable if the library cannot be loaded.
Expected<const Gemm*> LoadGemm();

// Does this CPU have bf16 dot products (AVX512_BF16; every CPU with AMX has it too)?
inline bool CpuMultipliesBf16() { return __builtin_cpu_supports("avx512bf16"); }

}  // namespace dsla
