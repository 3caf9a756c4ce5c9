// What `prepare` has in shared memory, and phi_k from the products with the keys. Slots and the
// order of channels as prepare.cu states them.
#pragma once

#include "ops/dsla/cuda/prefill.cuh"
#include "ops/dsla/cuda/warpgroup.cuh"

namespace dsla::cuda {

// Teams of a block: each has its own chunk, all have the same weights.
template <int D>
inline constexpr int kTeams = D == 128 ? 2 : 4;

// Of a chunk: the first row that enters, and how many do; negative if there is no chunk.
struct EnteringRows {
  int from, count;
  __device__ __forceinline__ EnteringRows(const Layer& l, const Chunk& chunk)
      : from(max(chunk.lo, l.S - chunk.e0)), count(chunk.n < 0 ? -1 : max(chunk.hi - from, 0)) {}
};

// Looks up one chunk of the wave after another.
struct WaveChunks {
  const PrefillParams& p;
  const int first_pos = p.layer.pos[0];
  __device__ __forceinline__ Chunk At(int index) const {
    if (p.only_rows > 0) return OnlySequence(p, first_pos).ChunkAt(index);
    return index < p.wave_chunks ? ChunkOf(p, index) : Chunk{-1, 0, 0, 0};
  }
};

// Whether warps of their own fetch keys and undo RoPE for all teams: where warps can divide
// registers among themselves, which is where `fold` has its own kernel.
template <int D, bool kFold>
inline constexpr bool kHasFetchers = D == 128 && !kFold;
inline constexpr int kFetchThreads = 128;

template <int D>
using KeyTile = uint4[kChunk * D / 8];  // as warpgroup.cuh has it, rows at RowOfSlot

// What a team of 2 D threads shares. A warp has 16 channels of each block of D.
template <int D, int kSigns>
struct __align__(1024) TeamShared {
  KeyTile<D> key;    // as it is
  KeyTile<D> plain;  // RoPE undone, fp16
  // Of e^y, and of e^-y if the features need it, per warp and slot: the sum of its powers, and what
  // makes features. One sign: minus the inverse of the whole sum. Two: minus its logarithm in base
  // 2. Each warp has its own copy of that.
  float sum[kSigns][D / 16][kChunk];
  float scale[kSigns][D / 16][kChunk];
};

// Weights: phi_k in bf16, then gates of kBlocks in fp16. Each as tiles of 64 channels, one for each
// warpgroup.
template <int D, int kBlocks, int kSigns>
struct PrepareShared {
  KeyTile<D> weight[1 + kBlocks][D / 64];
  float2 bias[kBlocks][D / 2];
  TeamShared<D, kSigns> team[kTeams<D>];
  // With fetchers, of each team's chunks, counted in warps: keys are there, also those without
  // RoPE; they have been read.
  uint64_t key_there[kTeams<D>], plain_there[kTeams<D>], key_free[kTeams<D>], plain_free[kTeams<D>];
  EnteringRows entering[kTeams<D>];
};

// Each other's inverse, and the same.
__device__ __forceinline__ int TokenOf(int slot) {
  return slot < kChunk / 2 ? kChunk / 2 - 1 - slot : slot;
}
__device__ __forceinline__ int SlotOf(int token) { return TokenOf(token); }
// Bits h t t j j i of a slot, in the order h j j t t i.
__device__ __forceinline__ int RowOfSlot(int slot) {
  return (slot & 33) | (slot & 6) << 2 | (slot & 24) >> 2;
}
// Piece `c` of row `row` of a tile.
__device__ __forceinline__ int PieceOf(int row, int c) {
  return c / 8 * (kChunk * 8) + Swizzle<8>(row, c % 8);
}

// Undoes RoPE for two dimensions x of the first half of a head and their partners y, to fp16: 11
// bits, saturated.
__device__ __forceinline__ void UndoToHalf(uint32_t x, uint32_t y, float2 cos, float2 sin,
                                           uint32_t& x_half, uint32_t& y_half) {
  x_half = PackHalf(Low(x) * cos.x + Low(y) * sin.x, High(x) * cos.y + High(y) * sin.y);
  y_half = PackHalf(Low(y) * cos.x - Low(x) * sin.x, High(y) * cos.y - High(x) * sin.y);
}

// Over the lanes of all g, of 16 values each: leaves values 8 g2 + 4 g1 + 2 g0 + {0, 1} in the lane
// whose g has bits g2 g1 g0.
template <typename Op>
__device__ __forceinline__ float2 ReduceRows(float (&v)[16], int lane, const Op& op) {
#pragma unroll
  for (int bit = 0; bit < 3; ++bit) {
    const int n = 8 >> bit, other = 16 >> bit;
    const bool upper = lane & other;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= n) continue;
      const float keep = upper ? v[n + i] : v[i], give = upper ? v[i] : v[n + i];
      v[i] = op(keep, __shfl_xor_sync(~0u, give, other));
    }
  }
  return {v[0], v[1]};
}
// The first of the slots whose values ReduceRows leaves in a lane, values being a lane's slots.
__device__ __forceinline__ int ReducedSlot(int lane) {
  return 2 * (lane & 16) + 8 * (lane % 4) + (lane & 8) / 2 + (lane & 4) / 2;
}

// Four values of neighbouring slots.
__device__ __forceinline__ void LoadSlots(float (&to)[4], const float* from) {
  const float4 a = *reinterpret_cast<const float4*>(from);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
}

// Per slot, the largest logarithm in base 2 of this warp's e^{sign y}.
__device__ __forceinline__ void LargestLogarithms(const float (&y)[8][4], float sign, float* to,
                                                  int lane) {
  float v[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float(&from)[4] = y[i / 2];
    v[i] = fmaxf(sign * from[i % 2], sign * from[2 + i % 2]);
  }
  const float2 most = ReduceRows(v, lane, [](float a, float b) { return fmaxf(a, b); });
  *reinterpret_cast<float2*>(to + ReducedSlot(lane)) = {most.x * kLog2e, most.y * kLog2e};
}

// Per slot, the sum of this warp's e^{sign y}, or with kRelative of their ratios to 2^sum, what is
// there at first. With kKeep these powers take the place of y.
template <bool kKeep, bool kRelative>
__device__ __forceinline__ void SumPowers(float (&y)[8][4], float sign, float* sum, int lane) {
  float v[16];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float reference[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (kRelative && i % 4 == 0) LoadSlots(reference, sum + 32 * half + 8 * (lane % 4) + i);
      float(&from)[4] = y[4 * half + i / 2];
      const float e0 = Exp2(from[i % 2] * (sign * kLog2e) - reference[i % 4]);
      const float e1 = Exp2(from[2 + i % 2] * (sign * kLog2e) - reference[i % 4]);
      v[8 * half + i] = e0 + e1;
      if constexpr (kKeep) {
        from[i % 2] = e0;
        from[2 + i % 2] = e1;
      }
    }
  }
  if constexpr (kRelative) __syncwarp();
  *reinterpret_cast<float2*>(sum + ReducedSlot(lane)) =
      ReduceRows(v, lane, [](float a, float b) { return a + b; });
}

// Over the warps, of a lane's two slots.
template <int kWarps, typename Op>
__device__ __forceinline__ float2 OverWarps(const float (&of)[kWarps][kChunk], int lane,
                                            const Op& op) {
  float2 x[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) x[w] = *reinterpret_cast<const float2*>(of[w] + 2 * lane);
#pragma unroll
  for (int n = kWarps / 2; n > 0; n /= 2)
#pragma unroll
    for (int w = 0; w < n; ++w) x[w] = {op(x[w].x, x[n + w].x), op(x[w].y, x[n + w].y)};
  return x[0];
}

}  // namespace dsla::cuda
