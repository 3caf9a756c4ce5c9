// The states' part of a decode step: a warp has 16 channels of one (row, KV head) at a time. A lane
// owns four value columns of [channel, value] rows, so the sums over channels need no shuffles but
// where a warp's load has two rows.
#pragma once

#include "ops/dsla/cuda/decode_project.cuh"

namespace dsla::cuda {

template <int D>
__device__ __forceinline__ std::byte* StateTile(const Layer& l, const Task<D>& task, int tile) {
  return task.slot + l.at.state + (int64_t{task.h} * l.SF + tile * kTile) * (D * 4) + Lane() * 16;
}

// A tile of states to shared memory, by one warp; a lane's pieces are those that it is going to
// use.
template <int D>
__device__ __forceinline__ void FetchStates(const Layer& l, const Task<D>& task, uint4* to,
                                            int tile) {
  const std::byte* from = StateTile(l, task, tile);
  to += Lane();
#pragma unroll
  for (int i = 0; i < TileBytes(D) / 512; ++i) CopyAsync(to + 32 * i, from + 512 * i);
}

template <int D, int kG>
struct States {
  static constexpr int kStride = kG == 3 ? 4 : kG;  // for whole vectors
  struct Shared {                                   // of a warp
    alignas(16) float query[kTile][kStride];
    float2 factor[kTile];  // e^a, k'
  };
  // What does not wait for features and gates.
  struct Slot {
    float z;         // of channel lane % 16, the sum of keys
    uint2 entering;  // value of the token that enters, in this lane's columns
  } slot;
  float gate, phi_k, q[kG];  // of channel lane % 16

  __device__ __forceinline__ void LoadSlot(const DecodeParams& p, const Task<D>& task, int tile) {
    const Layer& l = p.layer;
    slot = {*Norm(l, task, tile), {}};
    if (Entering(l, task.t) >= 0) {  // from the ring's place that token t is going to take
      const __nv_bfloat16* from =
          l.W > 0 ? task.Rows(l.at.ring_v, l.W) + int64_t{task.newest} * D : task.NewValue(p);
      slot.entering = *reinterpret_cast<const uint2*>(from + Column());
    }
  }
  // Of `project`.
  __device__ __forceinline__ void LoadProjected(const DecodeParams& p, const Task<D>& task,
                                                int tile) {
    const Layer& l = p.layer;
    const int c = tile * kTile + Lane() % kTile, second = c >= l.F, f = c - second * l.F;
    const int head = task.n * l.Hkv + task.h;
    gate = p.gate[head * l.SF + c];
    phi_k = p.phi_k[head * l.F + f];
#pragma unroll
    for (int g = 0; g < kG; ++g) {  // without a branch, so that no load waits for another
      const int qh = task.h * l.G + min(g, l.G - 1);
      q[g] = __fmul_rn(l.mix[qh * l.states + second], p.phi_q[(task.n * l.H + qh) * l.F + f]);
    }
  }
  // Of the block's own.
  __device__ __forceinline__ void LoadProjected(const Layer& l, int tile,
                                                const Projected<D, kG>& from) {
    const int c = tile * kTile + Lane() % kTile, second = c >= l.F, f = c - second * l.F;
    // A tile's channels are all of one part: lane i has the share of matrix i.
    const PartSum* const parts = from.parts[min(static_cast<int>(Lane()), l.G)][f / D];
    const float share = ShareOf<D>(parts, f % D / kPartColumns);
    gate = from.gate[c];
    phi_k = __fmul_rn(from.phi[l.G][f], __shfl_sync(~0u, share, l.G));
#pragma unroll
    for (int g = 0; g < kG; ++g) {
      const int head = min(g, l.G - 1);
      q[g] = __fmul_rn(from.mix[head * l.states + second],
                       __fmul_rn(from.phi[head][f], __shfl_sync(~0u, share, head)));
    }
  }

  // Updates a tile on its way from shared memory to the slot. Adds the numerators and q' z to
  // those in `sums`, or begins them; a lane sees what it has written.
  __device__ __forceinline__ void Update(const Layer& l, const Task<D>& task, int tile,
                                         const uint4* from, Shared& shared, Sums<D, kG>& sums,
                                         bool begins) {
    constexpr int kRows = 128 / D;  // channels per load of a warp
    const int lane = Lane(), sub = lane / (D / 4), column = Column();
    const float decay = 1 + gate, k = Entering(l, task.t) >= 0 ? -gate * phi_k : 0;
    const float z = __fmaf_rn(decay, slot.z, k);
    if (lane < kTile) {
      *Norm(l, task, tile) = z;
      shared.factor[lane] = {decay, k};
#pragma unroll
      for (int g = 0; g < kG; ++g) shared.query[lane][g] = q[g];
    }
#pragma unroll
    for (int g = 0; g < kG; ++g) {
      float sum = __fmul_rn(q[g], z);
#pragma unroll
      for (int i = kTile / 2; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
      if (lane == 0) sums.norm[g] = begins ? sum : sums.norm[g] + sum;
    }
    __syncwarp();
    const uint2 entering = slot.entering;
    const float4 v{Low(entering.x), High(entering.x), Low(entering.y), High(entering.y)};
    std::byte* const to = StateTile(l, task, tile);
    float4 acc[kG] = {};
#pragma unroll 4
    for (int i = 0; i < kTile / kRows; ++i) {
      const int c = i * kRows + sub;
      const float2 f = shared.factor[c];
      float4 s = *reinterpret_cast<const float4*>(from + 32 * i + lane);
      s.x = Blend(f.x, s.x, f.y, v.x);
      s.y = Blend(f.x, s.y, f.y, v.y);
      s.z = Blend(f.x, s.z, f.y, v.z);
      s.w = Blend(f.x, s.w, f.y, v.w);
      __stcs(reinterpret_cast<float4*>(to + 512 * i), s);
#pragma unroll
      for (int g = 0; g < kG; ++g) {
        const float x = shared.query[c][g];
        acc[g].x = __fmaf_rn(x, s.x, acc[g].x);
        acc[g].y = __fmaf_rn(x, s.y, acc[g].y);
        acc[g].z = __fmaf_rn(x, s.z, acc[g].z);
        acc[g].w = __fmaf_rn(x, s.w, acc[g].w);
      }
    }
#pragma unroll
    for (int g = 0; g < kG; ++g) {
      if (D == 64) {
        acc[g].x += __shfl_xor_sync(~0u, acc[g].x, 16);
        acc[g].y += __shfl_xor_sync(~0u, acc[g].y, 16);
        acc[g].z += __shfl_xor_sync(~0u, acc[g].z, 16);
        acc[g].w += __shfl_xor_sync(~0u, acc[g].w, 16);
      }
      if (sub > 0) continue;
      float4& at = *reinterpret_cast<float4*>(&sums.linear[g][column]);
      at = begins ? acc[g]
                  : float4{at.x + acc[g].x, at.y + acc[g].y, at.z + acc[g].z, at.w + acc[g].w};
    }
  }

 private:
  __device__ __forceinline__ static int Column() { return Lane() % (D / 4) * 4; }
  __device__ __forceinline__ static float* Norm(const Layer& l, const Task<D>& task, int tile) {
    return reinterpret_cast<float*>(task.slot + l.at.norm) + int64_t{task.h} * l.SF + tile * kTile +
           Lane() % kTile;
  }
};

}  // namespace dsla::cuda
