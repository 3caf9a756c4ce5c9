// Products with the adapter's matrices, a part of 16 columns at a time: for `project`, which has 16
// rows at once, and for `split`, which has one. Both make the same sums in the same order, so a row
// has the same bits in either.
#pragma once

#include "ops/dsla/cuda/decode.cuh"

namespace dsla::cuda {

inline constexpr int kPartColumns = 16;

// Where matrix `job`, in the order of PackedWeights, begins.
template <int D>
__device__ __forceinline__ const __nv_bfloat16* Matrix(const Layer& l, int job) {
  return l.weights.phi_q + int64_t{job} * D * D;
}

// A part of a matrix as B.
template <int D>
struct PartWeights {
  uint4 b[D / 16];

  __device__ __forceinline__ void Load(const __nv_bfloat16* matrix, int part) {
    const uint4* from = reinterpret_cast<const uint4*>(matrix) + part * 32 + threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) b[k] = __ldg(from + k * (D / 16) * 32);
  }
};

// Rows as A: a lane has row lane / 4 and, of two, that + 8. One that is null counts as zeros.
template <int D, int kRows>
__device__ __forceinline__ void LoadRows(uint32_t (&a)[D / 16][4],
                                         const __nv_bfloat16* const (&rows)[kRows]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat16* const row = rows[i % kRows];
      a[k][i] = i % 2 < kRows && row
                    ? *reinterpret_cast<const uint32_t*>(row + 16 * k + 2 * t + 8 * (i / 2))
                    : 0;
    }
}

// Products of rows with parts. y[part][c / 2][2 i + c % 2] is column 8 (c / 2) + 2 (lane % 4) + c %
// 2 of the lane's i-th row.
template <int D, int kParts>
__device__ __forceinline__ void AddProducts(float (&y)[kParts][2][4],
                                            const uint32_t (&a)[D / 16][4],
                                            const PartWeights<D> (&w)[kParts]) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      Mma(y[j][0], a[k], w[j].b[k].x, w[j].b[k].y);
      Mma(y[j][1], a[k], w[j].b[k].z, w[j].b[k].w);
    }
}
// The same of rotated keys, once RoPE has been undone, of which these are the positions. That is
// done in fp32, and the product with the rest makes up for rounding to bf16.
template <int D, int kRows, int kParts>
__device__ __forceinline__ void AddUnrotatedProducts(float (&y)[kParts][2][4],
                                                     const uint32_t (&key)[D / 16][4],
                                                     const int (&position)[kRows], const Layer& l,
                                                     const PartWeights<D> (&w)[kParts]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int k = 0; k < D / 32; ++k) {
    uint32_t hi[2][4] = {}, lo[2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i % 2 >= kRows) continue;
      const int64_t at = int64_t{position[i % kRows]} * (D / 2) + 16 * k + 2 * t + 8 * (i / 2);
      const float2 cos = *reinterpret_cast<const float2*>(l.cos + at);
      const float2 sin = *reinterpret_cast<const float2*>(l.sin + at);
      const float x0 = Low(key[k][i]), x1 = High(key[k][i]);
      const float y0 = Low(key[k + D / 32][i]), y1 = High(key[k + D / 32][i]);
      const float u0 = Blend(x0, cos.x, y0, sin.x), u1 = Blend(x1, cos.y, y1, sin.y);
      const float w0 = Blend(y0, cos.x, -x0, sin.x), w1 = Blend(y1, cos.y, -x1, sin.y);
      hi[0][i] = Pack(u0, u1);
      lo[0][i] = Pack(u0 - Low(hi[0][i]), u1 - High(hi[0][i]));
      hi[1][i] = Pack(w0, w1);
      lo[1][i] = Pack(w0 - Low(hi[1][i]), w1 - High(hi[1][i]));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const uint4 b = w[j].b[k + half * (D / 32)];
        Mma(y[j][0], hi[half], b.x, b.y);
        Mma(y[j][1], hi[half], b.z, b.w);
        Mma(y[j][0], lo[half], b.x, b.y);
        Mma(y[j][1], lo[half], b.z, b.w);
      }
  }
}

// The softmax over a row's D columns is put together of its parts': a part's largest logit, and the
// sum of e^(logit - that).
struct alignas(8) PartSum {
  float top, sum;
};
// Of the logits that a quad has of a part; leaves e^(logit - the part's largest).
__device__ __forceinline__ PartSum Exponentials(float (&y)[4]) {
  const float top = QuadMax(fmaxf(fmaxf(y[0], y[1]), fmaxf(y[2], y[3])));
#pragma unroll
  for (float& x : y) x = Exp(x - top);
  return {top, QuadSum((y[0] + y[1]) + (y[2] + y[3]))};
}
// What the exponentials of part `part` are to be multiplied by.
template <int D>
__device__ __forceinline__ float ShareOf(const PartSum* parts, int part) {
  float top = -INFINITY, sum = 0;
#pragma unroll
  for (int i = 0; i < D / kPartColumns; ++i) top = fmaxf(top, parts[i].top);
#pragma unroll
  for (int i = 0; i < D / kPartColumns; ++i)
    sum = __fmaf_rn(parts[i].sum, Exp(parts[i].top - top), sum);
  return Exp(parts[part].top - top) / sum;
}

// What `split` has of one task's features and gates, in shared memory.
template <int D, int kG>
struct Projected {
  float phi[kG + 1][2 * D];  // of the query heads and, at G, of the key; to be multiplied by shares
  float gate[4 * D];
  float mix[2 * kG];                           // [G, states]
  PartSum parts[kG + 1][2][D / kPartColumns];  // [2]: of y and of -y
};

}  // namespace dsla::cuda
