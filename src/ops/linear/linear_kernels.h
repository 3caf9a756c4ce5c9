// The CPU kernels of Linear, internal to this folder. Weights are stored in rows padded with zeros
// to kLinearPad elements and 64-byte aligned, so that no kernel has a tail.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/half.h"

namespace dsla {

// Elements: 32 bf16 are one cache line, and two vectors of 16 floats on AVX-512.
inline constexpr int64_t kLinearPad = 32;

struct LinearRowsArgs {
  const void* weight = nullptr;  // [out, stride] of `dtype`
  DType dtype = DType::kBF16;
  int64_t stride = 0;  // elements between rows of the weight: in, padded
  const float* bias = nullptr;
  const float* x = nullptr;  // [T, stride] packed by PackPiece
  int64_t T = 0;
  float* y = nullptr;  // [T, out]
  int64_t y_stride = 0;
  bool accumulate = false;
};

// The inputs [begin, end) of one row x [in], `begin` a multiple of kLinearPad, to packed [stride]
// in the order in which LinearRows decodes the weights (the same dispatch target must read it);
// with the last inputs come the zeros at the end.
void PackPiece(const float* x, int64_t begin, int64_t end, int64_t in, int64_t stride, DType dtype,
               float* packed);

// y[:, begin..end): the output features [begin, end), all T rows. The sum of one element runs over
// the inputs in one fixed order, whatever T and the range are.
void LinearRows(const LinearRowsArgs& args, int64_t begin, int64_t end);

void WidenBf16(const bf16* from, float* to, int64_t n);
void NarrowBf16(const float* from, bf16* to, int64_t n);

}  // namespace dsla
