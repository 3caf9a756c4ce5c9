// The features of a warpgroup's queries, what they are multiplied by in pairs, and the mix of the
// states.
#pragma once

#include "ops/dsla/cuda/output.cuh"
#include "ops/dsla/cuda/queries.cuh"

namespace dsla::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// e = 2^(y - base), or 2^(-y - base), and their sums by row.
template <int kSign, bool kBased>
__device__ __forceinline__ void Exponentials(float (&e)[kD / 8][4], float (&sum)[2],
                                             const float (&y)[kD / 8][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float base = -INFINITY;
#pragma unroll
    for (int j = 0; j < kD / 8 && kBased; ++j)
      base = fmaxf(base, fmaxf(kSign * y[j][2 * r], kSign * y[j][2 * r + 1]));
    base = QuadMax(base);
    sum[r] = 0;
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
#pragma unroll
      for (int c = 2 * r; c < 2 * r + 2; ++c)
        sum[r] += e[j][c] = Exp2(kBased ? kSign * y[j][c] - base : kSign * y[j][c]);
    sum[r] = QuadSum(sum[r]);
  }
}
template <bool kBased>
__device__ __forceinline__ void Exponentials(float (&e)[1][kD / 8][4], float (&sum)[1][2],
                                             const float (&y)[kD / 8][4]) {
  Exponentials<1, kBased>(e[0], sum[0], y);
}
template <bool kBased>
__device__ __forceinline__ void Exponentials(float (&e)[2][kD / 8][4], float (&sum)[2][2],
                                             const float (&y)[kD / 8][4]) {
  Exponentials<1, kBased>(e[0], sum[0], y);
  Exponentials<-1, kBased>(e[1], sum[1], y);
}

// The features e^y / sum e^y of q phi_q, and those of -y if there are two signs, as A operands.
// Nothing is taken from y unless a sum comes near the ends of fp32.
template <int kSigns>
__device__ __forceinline__ void MakeFeatures(uint32_t (&a)[kSigns][kD / 16][4],
                                             float (&y)[kD / 8][4], float factor) {
  float e[kSigns][kD / 8][4], sum[kSigns][2];
#pragma unroll
  for (int j = 0; j < kD / 8; ++j)
    for (float& x : y[j]) x *= kLog2e;
  Pin(y);  // lest the other sign has a multiplication of its own
  Exponentials<false>(e, sum, y);
  bool fits = true;
  for (const auto& of_sign : sum)
    for (float x : of_sign) fits &= x >= 0x1p-60f && x <= 0x1p60f;
  if (!__all_sync(~0u, fits)) Exponentials<true>(e, sum, y);
#pragma unroll
  for (int sign = 0; sign < kSigns; ++sign) {
    const float share[2] = {factor * Reciprocal(sum[sign][0]), factor * Reciprocal(sum[sign][1])};
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        a[sign][j / 2][j % 2 * 2 + r] =
            Pack(e[sign][j][2 * r] * share[r], e[sign][j][2 * r + 1] * share[r]);
  }
}

// Of two bf16 each.
__device__ __forceinline__ uint32_t Product(uint32_t a, uint32_t b) {
  const auto x = *reinterpret_cast<const __nv_bfloat162*>(&a);
  const auto y = *reinterpret_cast<const __nv_bfloat162*>(&b);
  const __nv_bfloat162 product = __hmul2(x, y);
  return *reinterpret_cast<const uint32_t*>(&product);
}

// Features have the mix of the last state; what came of the one before it is multiplied by the
// ratio of its mix to that. A mix may be 0.
struct Mix {
  float last, ratio = 1;
  __device__ __forceinline__ Mix(const Layer& l, int head) {
    const float* of = l.mix + head * l.states;
    last = of[l.states - 1];
    if (l.states == 1) return;
    last = fmaxf(last, fmaxf(of[0] * 0x1p-60f, 0x1p-120f));
    ratio = of[0] * Reciprocal(last);
  }
};

#endif

}  // namespace dsla::cuda
