// What the kernels of a decode step share.
//
// The work on one (row, KV head) is cut into tiles: 16 keys of the window with their values, or 16
// channels of the states; both are TileBytes(D). Tiles are dealt to kStrands strands, and a
// strand's to `steps` steps, by the shape alone:
//   state tile kStrands * j + s      is strand s's in step j < state_steps
//   window tile kStrands * i + s     is strand s's in step steps - 1 - i % steps
// so that the steps with states have the fewest tiles of the window. Sums are made for each step
// from zero, then added up over the steps of a strand, in their order, and over strands. So it does
// not matter to the bits who does a step: one warp all of a strand's (`whole`), or a warp each
// (`split`).
#pragma once

#include <type_traits>

#include "ops/cuda/kernel_attribute.cuh"
#include "ops/dsla/cuda/common.cuh"

namespace dsla::cuda {

inline constexpr int kTile = 16, kStrands = 4, kMaxSteps = 8;
__host__ __device__ constexpr int TileBytes(int D) { return kTile * D * 4; }

struct DecodeParams {
  Layer layer;
  NewRows rows;
  const __nv_bfloat16* q;
  int64_t q_stride;
  const float* claim;
  __nv_bfloat16* out;
  int keys, tiles;  // of the window, sinks included
  // Each strand has something to do in each step: there are no more steps than state_steps, or more
  // than 8 tiles of the window for each step but the last.
  int steps, state_steps;
  int own_strands;  // of a block of `split`
  // Workspace, fp32: what `project` leaves.
  float* phi_q;  // [N, H, F]
  float* phi_k;  // [N, Hkv, F]
  float* gate;   // [N, Hkv, SF]: e^a - 1, 0 where no token enters
};

// The first of the window's tiles that a strand has in a step; the next one is kStrands * p.steps
// away.
__device__ __forceinline__ int FirstWindowTile(const DecodeParams& p, int strand, int step) {
  return kStrands * (p.steps - 1 - step) + strand;
}

// The token that enters the states at time t, or -1.
__device__ __forceinline__ int Entering(const Layer& l, int t) {
  const int e = t - l.W;
  return e >= (l.W > 0 ? l.S : 0) ? e : -1;
}

// One row and KV head.
template <int D>
struct Task {
  std::byte* slot;
  int n, h, t;
  int newest;  // the ring's place that token t takes

  // Of the row n, which has `slot_index` and the position t.
  __device__ __forceinline__ Task(const Layer& l, int n, int h, int slot_index, int t, int newest)
      : slot(l.pool + slot_index * l.slot_bytes), n(n), h(h), t(t), newest(newest) {}
  // Where token t counts in ring and sinks as one list: a young sink is in both.
  __device__ __forceinline__ int Taken(const Layer& l) const { return t < l.S ? l.W + t : newest; }
  __device__ __forceinline__ const __nv_bfloat16* NewKey(const DecodeParams& p) const {
    return p.rows.k + n * p.rows.k_stride + h * D;
  }
  __device__ __forceinline__ const __nv_bfloat16* NewValue(const DecodeParams& p) const {
    return p.rows.v + n * p.rows.v_stride + h * D;
  }
  // This head's part of ring or sinks, which begins at `part` of the slot.
  __device__ __forceinline__ __nv_bfloat16* Rows(int64_t part, int rows) const {
    return reinterpret_cast<__nv_bfloat16*>(slot + part) + int64_t{h} * rows * D;
  }
};

// Of the calling thread; the same for a warp's threads in a way that the compiler sees.
__device__ __forceinline__ int Warp() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

__device__ __forceinline__ uint32_t Lane() { return Fresh(threadIdx.x) % 32; }

// Sums of a strand or of a step of one.
template <int D, int kG>
struct alignas(16) Sums {
  float linear[kG][D];  // numerators of the states
  float window[kG][D];
  float norm[kG];              // q' z
  float top[kG], weights[kG];  // of the window: largest score in base 2, sum of weights
};

// a x + b y, rounded alike wherever it stands.
__device__ __forceinline__ float Blend(float a, float x, float b, float y) {
  return __fmaf_rn(a, x, __fmul_rn(b, y));
}
// What sums of a softmax count for beside others: e^(their largest score - both's).
struct Scales {
  float top, a, b;
  __device__ __forceinline__ Scales(float top_a, float top_b) : top(fmaxf(top_a, top_b)) {
    const float base = top == -INFINITY ? 0.f : top;  // no key: all weights are 0
    a = Exp2(top_a - base), b = Exp2(top_b - base);
  }
};

// Calls run(std::integral_constant<int, kG>()) with the group size that kernels are made for.
template <typename Run>
void ForGroup(int G, const Run& run) {
  switch (G) {
    case 1:
      return run(std::integral_constant<int, 1>());
    case 2:
      return run(std::integral_constant<int, 2>());
    case 3:
      return run(std::integral_constant<int, 3>());
    case 4:
      return run(std::integral_constant<int, 4>());
    default:
      return run(std::integral_constant<int, kMaxGroup>());
  }
}

// All kernels of a step ask for the same division of an SM's memory, since blocks that want
// another one do not start beside those that run. An error stays for cudaGetLastError.
template <auto kKernel>
void PreferShared() {
  RaiseAttribute<kKernel, cudaFuncAttributePreferredSharedMemoryCarveout>(
      cudaSharedmemCarveoutMaxShared);
}

void LaunchProject(const DecodeParams& p, int D, cudaStream_t stream);
// False, and nothing launched, where a task had better not be split.
bool LaunchSplit(DecodeParams p, int D, cudaStream_t stream);

}  // namespace dsla::cuda
