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
  // A (row, KV head) is cut into `parts` by the shape alone. A part has every parts-th tile of
  // the window's `keys`, sinks included, and the first `splits` parts some channels of the states.
  int splits, parts, keys;
  // Workspace, fp32 but for the counters.
  float* phi_q;    // [N, H, F]
  float* phi_k;    // [N, Hkv, F]
  float* gate;     // [N, Hkv, SF]: e^a - 1, 0 where no token enters
  float* partial;  // [N, Hkv, parts] of PartFloats(G, D); unused where there is one part
  int* arrived;    // [N, Hkv]: parts that have been left in `partial`
};

// A part's sums of one (row, KV head), one after the other: [G, D] numerators of the states, [G, D]
// of the window, [G] denominators, [G] largest scores in base 2, [G] sums of weights.
__host__ __device__ constexpr int PartFloats(int G, int D) { return G * (2 * D + 3); }

// The token that enters the states at time t, or -1.
__device__ __forceinline__ int Entering(const Layer& l, int t) {
  const int e = t - l.W;
  return e >= (l.W > 0 ? l.S : 0) ? e : -1;
}

// Both kernels of a step ask for the same division of an SM's memory, since blocks that want
// another one do not start beside those that run. An error stays for cudaGetLastError.
template <typename Kernel>
void PreferShared(Kernel kernel) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                       cudaSharedmemCarveoutMaxShared);
}

void LaunchProject(const DecodeParams& p, int D, cudaStream_t stream);

}  // namespace dsla::cuda
