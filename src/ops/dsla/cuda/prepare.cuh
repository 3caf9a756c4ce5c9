// What `prepare` has in shared memory: weights and keys as operands of its products, and phi_k from
// the products with the keys. Slots and the order of channels as prepare.cu states them.
#pragma once

#include "ops/dsla/cuda/prefill.cuh"
#include "ops/dsla/cuda/warpgroup.cuh"

namespace dsla::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;
// Teams of a block: each has its own chunk, all have the same weights. Smaller weights are shared
// by none: blocks of one team spread more evenly.
template <int D>
inline constexpr int kTeams = D == 128 ? 2 : 1;

template <int D>
using KeyTile = uint4[kChunk * D / 8];  // as warpgroup.cuh has it, rows at RowOfSlot

// What a team of 2 D threads shares. A warp has 16 channels of each block of D.
template <int D, int kSigns>
struct __align__(1024) TeamShared {
  KeyTile<D> key, plain[2];  // as it is; RoPE undone, as two terms of bf16
  // Of e^y, and of e^-y if the features need it, per warp and slot: the largest exponent in base 2,
  // and the sum of powers relative to it. Then what makes features of them, at `top`.
  float top[kSigns][D / 16][kChunk];
  float sum[kSigns][D / 16][kChunk];
};

// Weights: phi_k, then gates of kBlocks. Each as tiles of 64 channels, one for each warpgroup.
template <int D, int kBlocks, int kSigns>
struct PrepareShared {
  KeyTile<D> weight[1 + kBlocks][D / 64];
  TeamShared<D, kSigns> team[kTeams<D>];
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

// Among the four lanes of a quad: word k of lane t goes to word t of lane k.
__device__ __forceinline__ void TransposeQuad(uint32_t (&x)[4], int t) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t &low = x[bit == 1 ? 2 * i : i], &high = x[bit == 1 ? 2 * i + 1 : i + 2];
      const bool upper = t & bit;
      const uint32_t other = __shfl_xor_sync(~0u, upper ? low : high, bit);
      (upper ? low : high) = other;
    }
}

// The packed weights to shared memory, channels as rows: a quad of lanes has two channels' 16
// dimensions in two pieces each.
template <int D, int kBlocks, typename Shared>
__device__ __forceinline__ void LoadWeights(Shared& shared, const Layer& l, int h,
                                            int first_block) {
  constexpr int kOf = D / 16, kTiles = (1 + kBlocks) * kOf * kOf;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 4
  for (int i = threadIdx.x / 32; i < kTiles; i += blockDim.x / 32) {
    const int m = i / (kOf * kOf), k = i / kOf % kOf, j = i % kOf;
    const __nv_bfloat16* from =
        m == 0 ? l.weights.phi_k + int64_t{h} * D * D
               : l.weights.gates + (int64_t{h} * (l.SF / D) + first_block + m - 1) * D * D;
    const uint4 packed = __ldg(reinterpret_cast<const uint4*>(from) + (k * kOf + j) * 32 + lane);
    uint32_t x[4] = {packed.x, packed.y, packed.z, packed.w};
    TransposeQuad(x, t);
    const int row = 16 * (j % 4) + g / 2 + t / 2 * 4 + g % 2 * 8;
    shared.weight[m][j / 4][PieceOf(row, 2 * k + t % 2)] = {x[0], x[1], x[2], x[3]};
  }
}

// The chunk's keys on their way to shared memory; zeros for rows that do not enter.
template <int D, typename Rows>
__device__ __forceinline__ void FetchKeys(KeyTile<D>& to, const PrefillParams& p, const Rows& rows,
                                          const Chunk& chunk, int h, int thread) {
  // A thread takes piece `c` of rows first + 16 i.
  const int c = thread % (D / 8), first = thread / (D / 8);
  const Layer& l = p.layer;
  const auto copy = [&](int row, const __nv_bfloat16* key, bool enters) {
    CopyAsync(to + PieceOf(RowOfSlot(SlotOf(row)), c), key + 8 * c, enters);
  };
  if (IsSpan<D>(l, rows, chunk.n, chunk.e0)) {
    const KvSpan span = SpanOf<D>(l, rows, chunk.n, h, chunk.e0);
    const int from = max(chunk.lo, l.S - chunk.e0), until = chunk.hi;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + 16 * i;
      copy(row, span.row.k + row * span.k_stride, row >= from && row < until);
    }
  } else {
#pragma unroll 1
    for (int row = first; row < kChunk; row += 16) {
      const bool enters = Enters(l, chunk, row);
      copy(row, enters ? RowOf<D>(l, rows, chunk.n, h, chunk.e0 + row).k : p.key, enters);
    }
  }
  CommitCopies();
}

// Undoes the RoPE of the keys that FetchKeys has left.
template <int D, int kSigns>
__device__ __forceinline__ void UndoRope(TeamShared<D, kSigns>& s, const Layer& l,
                                         const Chunk& chunk, int thread, int team) {
  // A thread takes eight dimensions of both halves of the head, in both halves of the chunk.
  // Neighbouring rows are four apart in the tile, so that no bank is met twice.
  constexpr int kOfRow = D / 16;
  const int c = thread % kOfRow, r = thread / kOfRow, slot = r / 2 + r % 2 * 16;
  float4 cos[2][2], sin[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Keys of rows that do not enter are zeros: any angle does.
    const int row = TokenOf(32 * half + slot), time = Enters(l, chunk, row) ? chunk.e0 + row : 0;
    const unsigned angle = time * (D / 8) + 2 * c;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      cos[half][i] = __ldg(reinterpret_cast<const float4*>(l.cos) + angle + i);
      sin[half][i] = __ldg(reinterpret_cast<const float4*>(l.sin) + angle + i);
    }
  }
  WaitCopies<0>();
  Barrier<2 * D>(team);  // the keys are there; all have done with those before
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = RowOfSlot(slot) + 32 * half, low = PieceOf(row, c),
              high = PieceOf(row, c + kOfRow);
    const uint4 a = s.key[low], b = s.key[high];
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    uint32_t u[2][4], w[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 &cs = cos[half][i / 2], &sn = sin[half][i / 2];
      const float c0 = i % 2 ? cs.z : cs.x, c1 = i % 2 ? cs.w : cs.y;
      const float s0 = i % 2 ? sn.z : sn.x, s1 = i % 2 ? sn.w : sn.y;
      const float u0 = Low(x[i]) * c0 + Low(y[i]) * s0, u1 = High(x[i]) * c1 + High(y[i]) * s1;
      const float w0 = Low(y[i]) * c0 - Low(x[i]) * s0, w1 = High(y[i]) * c1 - High(x[i]) * s1;
      u[0][i] = Pack(u0, u1);
      u[1][i] = Pack(u0 - Low(u[0][i]), u1 - High(u[0][i]));
      w[0][i] = Pack(w0, w1);
      w[1][i] = Pack(w0 - Low(w[0][i]), w1 - High(w[0][i]));
    }
#pragma unroll
    for (int term = 0; term < 2; ++term) {
      s.plain[term][low] = {u[term][0], u[term][1], u[term][2], u[term][3]};
      s.plain[term][high] = {w[term][0], w[term][1], w[term][2], w[term][3]};
    }
  }
  PublishCopies();
  Barrier<2 * D>(team);
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
    s.top[sign][0][slot] = -(most + Log2(sum));
  } else {
    const float scale = -Reciprocal(sum);
#pragma unroll
    for (int w = 0; w < D / 16; ++w) s.top[0][w][slot] = power[w] * scale;
  }
}

}  // namespace dsla::cuda
