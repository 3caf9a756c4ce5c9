// The chunked form's kernels and what they hand to one another. Notation as in ops/dsla/README.md.
//
// A chunk is 64 places in the stream of entering tokens, [64 c, 64 c + 64) of token positions e;
// row j of it also is the query of time e + W. The anchor lies between rows 31 and 32: R = G_31.
#pragma once

#include "ops/dsla/cuda/common.cuh"

namespace dsla::cuda {

// Chunk of sequence n from token e0 on (negative before the window is full), rows [lo, hi) of which
// belong to this call.
struct Chunk {
  int n, e0, lo, hi;
};

struct PrefillParams {
  Layer layer;
  NewRows rows;
  PagedRows pages;
  const __nv_bfloat16* q;
  int64_t q_stride;
  const float* claim;
  __nv_bfloat16* out;
  bool fold;

  // Workspace: the plan of the whole call, then what one wave of chunks needs, [chunk, Hkv, ..].
  int* chunk_start;    // [N + 1] first chunk of each sequence
  Chunk* chunks;       // [chunk_start[N]]
  float2* decay;       // [SF]: e^R, e^{L-R}
  float* key_sum;      // [4, SF]: sums of K~ over each 16 rows
  float* norm;         // [SF]: e^R z
  float* lse;          // [chunk, H, 64] of the window, natural log
  uint32_t* growth;    // e^{G-R} bf16 [SF / D][4 tiles of 16 rows][D / 16] in the order of mma's A
  __nv_bfloat16* key;  // K~ [SF / D][64][D]
  __nv_bfloat16* state;  // e^R S [SF / D], each D x D in fragment order
  int wave_chunks;       // chunks that the wave's part has room for
  int first;             // first chunk of this wave
};

// The token of row j enters the states in this call.
__device__ __forceinline__ bool Enters(const Layer& l, const Chunk& c, int j) {
  return j >= c.lo && j < c.hi && c.e0 + j >= l.S;
}

// The row of q and out that belongs to row 0 of the chunk; before the call's first row if lo > 0.
__device__ __forceinline__ int64_t FirstRow(const Layer& l, const Chunk& c) {
  return l.row_start[c.n] + (c.e0 + l.W - l.pos[c.n]);
}

// Launches with more shared memory than a kernel has by default. These kernels do not start early:
// a grid that waits takes room from one that runs (258 -> 294 us for a prompt of 8192 with three
// heads).
template <typename Kernel>
void Start(Kernel* kernel, dim3 grid, int threads, int shared_bytes, const PrefillParams& p,
           cudaStream_t stream) {
  if (shared_bytes > 0)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  kernel<<<grid, threads, shared_bytes, stream>>>(p);  // an error stays for cudaGetLastError
}
void LaunchPrepare(const PrefillParams& p, int D, cudaStream_t stream);
void LaunchCarry(const PrefillParams& p, int D, cudaStream_t stream);
void LaunchWindow(const PrefillParams& p, int D, cudaStream_t stream);
void LaunchOutput(const PrefillParams& p, int D, cudaStream_t stream);

}  // namespace dsla::cuda
