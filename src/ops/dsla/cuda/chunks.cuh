// States of a KV head that stay in the accumulators of two warpgroups, for the kernels that go over
// a segment's chunks on compute capability 9.0 (D 128, at most 256 channels).
//
// Warpgroup w has value columns [64 w, 64 w + 64) of all channels, transposed: a thread has columns
// g and g + 8 of its warp's 16, and channels 8 j + 2 t and 8 j + 2 t + 1. So the accumulators, once
// rounded, are wgmma's A operand of the queries' product with the states.
#pragma once

#include "ops/dsla/cuda/prefill.cuh"
#include "ops/dsla/cuda/warpgroup.cuh"

namespace dsla::cuda {

inline constexpr int kWidth = 128;                    // D
inline constexpr int kTeam = 128;                     // threads of a warpgroup
inline constexpr int kPanelPieces = 8;                // of 16 bytes: a panel has 64 columns
inline constexpr int kPanel = kChunk * kPanelPieces;  // pieces of a tile's panel
inline constexpr int kPanelBytes = 16 * kPanel;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Where a thread's first column is in the whole.
struct StatePlace {
  int team, warp, g, t;
  __device__ __forceinline__ explicit StatePlace(int thread)
      : team(thread / kTeam), warp(thread / 32 % 4), g(thread / 4 % 8), t(thread % 4) {}
  __device__ __forceinline__ int column() const { return 64 * team + 16 * warp + g; }
  // Its first quad of a segment's part of `start`, which four warps with a quarter of the columns
  // each hold in the order of their accumulators, 32 channels at a time.
  __device__ __forceinline__ int start() const {
    return warp % 2 * 4 * 128 + (2 * team + warp / 2) * 32 + 4 * g + t;
  }
};

// From a slot's states, or else from a segment's part of `start`.
template <int kChannels>
__device__ __forceinline__ void LoadStates(float (&acc)[kChannels / 8][4], const StatePlace& at,
                                           const float* slot, const float* start) {
#pragma unroll
  for (int j = 0; j < kChannels / 8; ++j) {
    float4 x{};
    if (slot != nullptr) {
      const float* from = slot + (8 * j + 2 * at.t) * kWidth + at.column();
      x = {from[0], from[kWidth], from[8], from[kWidth + 8]};
    } else if (start != nullptr) {
      x = reinterpret_cast<const float4*>(start)[at.start() + j / 4 * (8 * kWidth) + j % 4 * 128];
    }
    acc[j][0] = x.x;
    acc[j][1] = x.y;
    acc[j][2] = x.z;
    acc[j][3] = x.w;
  }
}
template <int kChannels>
__device__ __forceinline__ void StoreStates(const float (&acc)[kChannels / 8][4],
                                            const StatePlace& at, float* slot, float* start) {
#pragma unroll
  for (int j = 0; j < kChannels / 8; ++j) {
    const float(&x)[4] = acc[j];
    if (slot != nullptr) {
      float* to = slot + (8 * j + 2 * at.t) * kWidth + at.column();
      to[0] = x[0];
      to[kWidth] = x[1];
      to[8] = x[2];
      to[kWidth + 8] = x[3];
    } else {
      reinterpret_cast<float4*>(start)[at.start() + j / 4 * (8 * kWidth) + j % 4 * 128] = {
          x[0], x[1], x[2], x[3]};
    }
  }
}

// Issues S^T += V^T K~: this warpgroup's panel of V, all panels of K~.
template <int kChannels>
__device__ __forceinline__ void AddKeys(float (&acc)[kChannels / 8][4], uint32_t v, uint32_t key) {
#pragma unroll
  for (int c = 0; c < kChunk / 16; ++c)
    WarpgroupMma<1, 1>(acc, PanelDescriptor(v, c * (16 * 128)),
                       PanelDescriptor(key, c * (16 * 128), kPanelBytes));
}

// K~ of a chunk into panels, by kThreads threads.
template <int kChannels, int kThreads>
__device__ __forceinline__ void FetchKeys(uint4* to, const __nv_bfloat16* from, int thread) {
  constexpr int kPieces = kWidth / 8, kStep = kThreads / kPieces;
  static_assert(kStep % 8 == 0);  // rows of a thread are swizzled alike
  const int row = thread / kPieces, c = thread % kPieces;
  to += c / kPanelPieces * kPanel + Swizzle<kPanelPieces>(row, c % kPanelPieces);
  from += 8 * thread;
#pragma unroll
  for (int block = 0; block < kChannels / kWidth; ++block)
#pragma unroll
    for (int i = 0; i < kChunk; i += kStep)
      CopyAsync(to + block * (2 * kPanel) + i * kPanelPieces, from + (block * kChunk + i) * kWidth);
}

// Columns [c0, c0 + 64) of a chunk's V into a panel, by a warpgroup; zeros where no row enters.
template <typename Rows>
__device__ __forceinline__ void FetchValues(const PrefillParams& p, const Rows& rows, uint4* to,
                                            const Chunk& chunk, int h, int c0, int thread) {
  const Layer& l = p.layer;
  const int c = thread % kPanelPieces, first = thread / kPanelPieces;
  to += Swizzle<kPanelPieces>(first, c);
  constexpr int kStep = kTeam / kPanelPieces;
  if (IsSpan<kWidth>(l, rows, chunk.n, chunk.e0)) {
    const KvSpan span = SpanOf<kWidth>(l, rows, chunk.n, h, chunk.e0);
    const __nv_bfloat16* from = span.row.v + first * span.v_stride + c0 + 8 * c;
    const int begin = max(chunk.lo, l.S - chunk.e0);
#pragma unroll
    for (int i = 0; i < kChunk; i += kStep) {
      CopyAsync(to + i * kPanelPieces, from, first + i >= begin && first + i < chunk.hi);
      from += kStep * span.v_stride;
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kChunk; i += kStep) {
    const int row = first + i;
    const bool enters = Enters(l, chunk, row);
    const __nv_bfloat16* v = enters ? RowOf<kWidth>(l, rows, chunk.n, h, chunk.e0 + row).v : rows.v;
    CopyAsync(to + i * kPanelPieces, v + c0 + 8 * c, enters);
  }
}

#endif

}  // namespace dsla::cuda
