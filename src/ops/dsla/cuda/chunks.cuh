// States of a KV head that stay in the accumulators of two warpgroups, for the kernels that go over
// a segment's chunks on compute capability 9.0 (D 128, at most 256 channels).
//
// Warpgroup w has value columns [64 w, 64 w + 64) of all channels, transposed: a thread has columns
// g and g + 8 of its warp's 16, and channels 8 j + 2 t and 8 j + 2 t + 1. So the accumulators, once
// rounded, are wgmma's A operand of the queries' product with the states.
#pragma once

#include "ops/dsla/cuda/bulk.cuh"

namespace dsla::cuda {

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
};

// Where a segment's part of `start` has a pair of neighbouring channels in columns `column` and
// `column` + 8: four warps with a quarter of the columns each hold them in the order of their
// accumulators, 32 channels at a time.
__device__ __forceinline__ int StartPlace(int pair, int column) {
  const int j = pair / 4, t = pair % 4, g = column % 8;
  return j / 4 * (8 * kWidth) + column / 16 % 2 * (4 * 128) + j % 4 * 128 + column / 32 * 32 +
         4 * g + t;
}

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
      x = reinterpret_cast<const float4*>(start)[StartPlace(4 * j + at.t, at.column())];
    }
    acc[j][0] = x.x;
    acc[j][1] = x.y;
    acc[j][2] = x.z;
    acc[j][3] = x.w;
  }
}
// To a slot's.
template <int kChannels>
__device__ __forceinline__ void StoreStates(const float (&acc)[kChannels / 8][4],
                                            const StatePlace& at, float* slot) {
#pragma unroll
  for (int j = 0; j < kChannels / 8; ++j) {
    const float(&x)[4] = acc[j];
    float* to = slot + (8 * j + 2 * at.t) * kWidth + at.column();
    to[0] = x[0];
    to[kWidth] = x[1];
    to[8] = x[2];
    to[kWidth + 8] = x[3];
  }
}

// Starts the copy of a chunk's K~, kChannels * kChunk * 2 bytes, into panels so many pieces apart.
template <int kChannels>
__device__ __forceinline__ void CopyKeys(uint4* to, int apart, const TileMaps& maps, int64_t part,
                                         uint64_t& barrier) {
  constexpr int kOfBlock = kWidth / 64;
#pragma unroll
  for (int panel = 0; panel < kChannels / 64; ++panel) {
    const auto block = static_cast<int>(part) * (kChannels / kWidth) + panel / kOfBlock;
    CopyTile(to + panel * apart, maps.key, block * kChunk, panel % kOfBlock, barrier);
  }
}

// Panel `panel` of a chunk's V, by kThreads threads: zeros where no row enters. For chunks of
// which not all rows do, or that lie in the ring.
template <int kThreads>
__device__ __forceinline__ void FetchValues(const PrefillParams& p, uint4* to, const Chunk& chunk,
                                            int h, int panel, int thread) {
#pragma unroll 1
  for (int i = thread; i < kPanel; i += kThreads) {
    const int row = i / kPanelPieces, c = i % kPanelPieces;
    const bool enters = Enters(p.layer, chunk, row);
    const __nv_bfloat16* v =
        enters ? RowOf<kWidth>(p.layer, p.rows, chunk.n, h, chunk.e0 + row).v : p.rows.v;
    CopyAsync(to + Swizzle<kPanelPieces>(row, c), v + 64 * panel + 8 * c, enters);
  }
}

#endif

}  // namespace dsla::cuda
