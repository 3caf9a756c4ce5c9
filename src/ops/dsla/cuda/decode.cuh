// What the kernels of a decode step share.
#pragma once

#include "ops/dsla/cuda/common.cuh"

namespace dsla::cuda {

struct DecodeParams {
  Layer layer;
  NewRows rows;
  const __nv_bfloat16* q;
  int64_t q_stride;
  const float* claim;
  __nv_bfloat16* out;
  // Workspace, fp32.
  float* phi_q;    // [N, H, F]
  float* phi_k;    // [N, Hkv, F]
  float* gate;     // [N, Hkv, SF]: e^a - 1, 0 where no token enters
  float* linear;   // [N, Hkv, splits, G, D]
  float* norm;     // [N, Hkv, splits, G]
  float* window;   // [N, Hkv, parts, G, D]: sum of p v
  float* softmax;  // [N, Hkv, parts, G, 2]: maximum in base 2, sum
  int splits, ring_parts, parts;
};

// The token that enters the states at time t, or -1.
__device__ __forceinline__ int Entering(const Layer& l, int t) {
  const int e = t - l.W;
  return e >= (l.W > 0 ? l.S : 0) ? e : -1;
}

// The row of K (or V) of the entering token: the ring's place that token t is going to take.
template <int D>
__device__ __forceinline__ KvRow EnteringRow(const DecodeParams& p, int n, int h, int t) {
  if (p.layer.W > 0) return RowOf<D>(p.layer, p.rows, n, h, t - p.layer.W);
  return {p.rows.k + n * p.rows.k_stride + h * D, p.rows.v + n * p.rows.v_stride + h * D};
}

void LaunchProject(const DecodeParams& p, int D, cudaStream_t stream);

}  // namespace dsla::cuda
