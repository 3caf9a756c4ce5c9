// What `prepare` has in shared memory, and phi_k from the products with the keys. Slots and the
// order of channels as prepare.cu states them.
#pragma once

#include "ops/dsla/cuda/prefill.cuh"
#include "ops/dsla/cuda/warpgroup.cuh"

namespace dsla::cuda {

// Teams of a block: each has its own chunk, all have the same weights. Smaller weights are shared
// by none: blocks of one team spread more evenly.
template <int D>
inline constexpr int kTeams = D == 128 ? 2 : 1;

// Of a chunk: the first row that enters, and how many do; negative if there is no chunk.
struct EnteringRows {
  int from, count;
  __device__ __forceinline__ EnteringRows(const Layer& l, const Chunk& chunk)
      : from(max(chunk.lo, l.S - chunk.e0)), count(chunk.n < 0 ? -1 : max(chunk.hi - from, 0)) {}
};

__device__ __forceinline__ Chunk ChunkAt(const PrefillParams& p, int index) {
  return index < p.wave_chunks ? ChunkOf(p, index) : Chunk{-1, 0, 0, 0};
}

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
  KeyTile<D> key, plain[2];  // as it is; RoPE undone, as two terms of bf16
  // Of e^y, and of e^-y if the features need it, per warp and slot: the largest exponent in base 2,
  // and the sum of powers relative to it. One sign: then at `top` what makes features of a warp's
  // powers. Two: at `norm` minus the logarithm of the whole sum, for all warps.
  float top[kSigns][D / 16][kChunk];
  float sum[kSigns][D / 16][kChunk];
  float norm[kSigns][kChunk];
};

// Weights: phi_k, then gates of kBlocks. Each as tiles of 64 channels, one for each warpgroup.
template <int D, int kBlocks, int kSigns>
struct PrepareShared {
  KeyTile<D> weight[1 + kBlocks][D / 64];
  TeamShared<D, kSigns> team[kTeams<D>];
  // With fetchers, of each team's chunks, counted in warps: keys are there, also those without
  // RoPE; they have been read.
  uint64_t full[2], key_free[2], plain_free[2];
  EnteringRows entering[2];
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
// Piece `c` of row `row` of a tile of 64 rows.
__device__ __forceinline__ int PieceOf(int row, int c) {
  return c / 8 * (kChunk * 8) + Swizzle<8>(row, c % 8);
}

// Undoes RoPE for two dimensions x of the first half of a head and their partners y: two terms
// each.
__device__ __forceinline__ void Undo(uint32_t x, uint32_t y, float2 cos, float2 sin,
                                     uint32_t& x_high, uint32_t& y_high, uint32_t& x_low,
                                     uint32_t& y_low) {
  const float x0 = Low(x) * cos.x + Low(y) * sin.x, x1 = High(x) * cos.y + High(y) * sin.y;
  const float y0 = Low(y) * cos.x - Low(x) * sin.x, y1 = High(y) * cos.y - High(x) * sin.y;
  x_high = Pack(x0, x1);
  y_high = Pack(y0, y1);
  x_low = Pack(x0 - Low(x_high), x1 - High(x_high));
  y_low = Pack(y0 - Low(y_high), y1 - High(y_high));
}

// Over the lanes of all g, of 16 values each: leaves values 8 g0 + 4 g1 + 2 g2 + {0, 1} in the lane
// whose g has bits g2 g1 g0.
template <typename Op>
__device__ __forceinline__ float2 ReduceRows(float (&v)[16], int lane, const Op& op) {
#pragma unroll
  for (int bit = 0; bit < 3; ++bit) {
    const int n = 8 >> bit;
    const bool upper = lane & (4 << bit);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= n) continue;
      const float keep = upper ? v[n + i] : v[i], give = upper ? v[i] : v[n + i];
      v[i] = op(keep, __shfl_xor_sync(~0u, give, 4 << bit));
    }
  }
  return {v[0], v[1]};
}

// Four values of neighbouring slots.
__device__ __forceinline__ void LoadSlots(float (&to)[4], const float* from) {
  const float4 a = *reinterpret_cast<const float4*>(from);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
}

// Of this warp's channels: the largest exponent and the sum of e^{sign y} per slot. With kKeep the
// powers take the place of y.
template <bool kKeep>
__device__ __forceinline__ void Statistics(float (&y)[8][4], float sign, float* top, float* sum,
                                           int lane) {
  const int g = lane / 4, t = lane % 4;
  const int slot = 32 * (g & 1) + 8 * t + 4 * (g >> 1 & 1) + 2 * (g >> 2);
  float v[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float(&from)[4] = y[i / 2];
    v[i] = fmaxf(sign * from[i % 2], sign * from[2 + i % 2]);
  }
  const float2 most = ReduceRows(v, lane, [](float a, float b) { return fmaxf(a, b); });
  *reinterpret_cast<float2*>(top + slot) = {most.x * kLog2e, most.y * kLog2e};
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float reference[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i % 4 == 0) LoadSlots(reference, top + 32 * half + 8 * t + i);
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
  *reinterpret_cast<float2*>(sum + slot) =
      ReduceRows(v, lane, [](float a, float b) { return a + b; });
}

// From the warps' statistics of one slot. One sign: the factor of each warp's powers that makes
// them features, negated. Two: minus the logarithm of the whole sum.
template <int D, int kSigns>
__device__ __forceinline__ void CombineStatistics(TeamShared<D, kSigns>& s, int sign, int slot) {
  float most = -INFINITY, sum = 0, power[D / 16];
#pragma unroll
  for (int w = 0; w < D / 16; ++w) {
    power[w] = s.top[sign][w][slot];
    most = fmaxf(most, power[w]);
  }
#pragma unroll
  for (int w = 0; w < D / 16; ++w) {
    power[w] = Exp2(power[w] - most);
    sum += s.sum[sign][w][slot] * power[w];
  }
  if constexpr (kSigns == 2) {
    s.norm[sign][slot] = -(most + Log2(sum));
  } else {
    const float scale = -Reciprocal(sum);
#pragma unroll
    for (int w = 0; w < D / 16; ++w) s.top[0][w][slot] = power[w] * scale;
  }
}

}  // namespace dsla::cuda
