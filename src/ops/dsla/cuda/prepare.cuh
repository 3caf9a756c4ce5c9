// What `prepare` has in shared memory: weights and keys as operands of its products, and phi_k from
// the products with the keys. Slots and the order of channels as prepare.cu states them.
#pragma once

#include "ops/dsla/cuda/prefill.cuh"

namespace dsla::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;
// Teams of a block: each has its own chunk, all have the same weights. Smaller weights are shared
// by none: blocks of one team spread more evenly.
template <int D>
inline constexpr int kTeams = D == 128 ? 2 : 1;

// What a team of 2 D threads shares. A warp has 16 channels of each block of D.
template <int D, int kSigns>
struct TeamShared {
  // The keys as mma's B operand, 8 tiles of 8 slots: lane 4g + t is at place 4g + (t ^ g / 2), so
  // that neither threads that write a lane of all g nor warps that read meet bank conflicts.
  uint4 plain[D / 16][8][32];  // RoPE undone, as two terms of bf16
  uint4 key[D / 32][8][32];    // as it is; k steps c and c + D / 32
  // Of e^y, and of e^-y if the features need it, per warp and slot: the largest exponent in base 2,
  // and the sum of powers relative to it. Then what makes features of them, at `top`.
  float top[kSigns][D / 16][kChunk];
  float sum[kSigns][D / 16][kChunk];
  Chunk next;
};

// Weights as mma's A operand: [phi_k, then gates of kBlocks][k step][warp][lane].
template <int D, int kBlocks, int kSigns>
struct PrepareShared {
  uint4 weight[1 + kBlocks][D / 16][D / 16][32];
  float2 bias[kBlocks * D / 2];
  TeamShared<D, kSigns> team[kTeams<D>];
};

__device__ __forceinline__ int TokenOf(int slot) {
  return slot < kChunk / 2 ? kChunk / 2 - 1 - slot : slot;
}

template <int D, int kBlocks>
__device__ __forceinline__ void LoadWeights(uint4* to, const Layer& l, int h, int first_block) {
  // All of a block's loads are under way at once.
  constexpr int kPieces = D * D / 8, kBatch = (1 + kBlocks) * kPieces / (kTeams<D> * 2 * D);
  for (int base = threadIdx.x; base < (1 + kBlocks) * kPieces; base += kBatch * blockDim.x) {
    uint2 even[kBatch], odd[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = base + u * blockDim.x;
      const int m = i / kPieces, tile = i % kPieces / 32, g = i / 4 % 8, t = i % 4;
      const __nv_bfloat16* from =
          m == 0 ? l.weights.phi_k + int64_t{h} * D * D
                 : l.weights.gates + (int64_t{h} * (l.SF / D) + first_block + m - 1) * D * D;
      // Columns 2g and 2g + 1 of the packed tile.
      const uint2* at =
          reinterpret_cast<const uint2*>(from) + tile * 64 + (2 * g % 8 * 4 + t) * 2 + g / 4;
      even[u] = __ldg(at);
      odd[u] = __ldg(at + 8);
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      to[base + u * blockDim.x] = {even[u].x, odd[u].x, even[u].y, odd[u].y};
  }
}

__device__ __forceinline__ void LoadPiece(uint32_t (&to)[4], const uint4& from) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

// Each thread has 16 + 16 dimensions of one token: k step c of both halves of the head.
template <int D>
struct KeyPlace {
  int g, c, j, row;  // row of the chunk
  __device__ __forceinline__ explicit KeyPlace(int thread)
      : g(thread % 8),
        c(thread / 8 % (D / 32)),
        j(thread / 8 / (D / 32)),
        row(TokenOf(j / 4 * 32 + g / 2 * 8 + j % 4 * 2 + g % 2)) {}
};

template <int D, bool kFold>
__device__ __forceinline__ void LoadKeys(uint4 (&pieces)[4], const PrefillParams& p,
                                         const Chunk& chunk, int h, int thread) {
  const KeyPlace<D> at(thread);
  const bool enters = chunk.n >= 0 && Enters(p.layer, chunk, at.row);
  const __nv_bfloat16* k = nullptr;
  if (enters) {
    if constexpr (kFold)
      k = RowOf<D>(p.layer, p.pages, chunk.n, h, chunk.e0 + at.row).k;
    else
      k = RowOf<D>(p.layer, p.rows, chunk.n, h, chunk.e0 + at.row).k;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pieces[i] = {};
    if (enters)
      pieces[i] = *reinterpret_cast<const uint4*>(k + 16 * at.c + i / 2 * (D / 2) + i % 2 * 8);
  }
}

// The keys, and the keys with RoPE undone, to shared memory.
template <int D, typename Shared>
__device__ __forceinline__ void StoreKeys(Shared& s, const uint4 (&pieces)[4], const Layer& l,
                                          const Chunk& chunk, int thread, int team) {
  const KeyPlace<D> at(thread);
  const int g = at.g, c = at.c, j = at.j;
  float4 cos[4]{}, sin[4]{};
  if (Enters(l, chunk, at.row)) {
    const int64_t angle = (int64_t{chunk.e0 + at.row} * (D / 2) + 16 * c) / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      cos[i] = reinterpret_cast<const float4*>(l.cos)[angle + i];
      sin[i] = reinterpret_cast<const float4*>(l.sin)[angle + i];
    }
  }
  Barrier<2 * D>(team);  // all have read the keys before
#pragma unroll
  for (int q = 0; q < 4; ++q) {  // lane 4g + q of the fragments
    uint32_t key[4], plain[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4& x = pieces[i];
      key[i] = q == 0 ? x.x : q == 1 ? x.y : q == 2 ? x.z : x.w;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 &cos4 = cos[2 * i + q / 2], &sin4 = sin[2 * i + q / 2];
      const float2 cs = q % 2 ? float2{cos4.z, cos4.w} : float2{cos4.x, cos4.y};
      const float2 sn = q % 2 ? float2{sin4.z, sin4.w} : float2{sin4.x, sin4.y};
      const float x0 = Low(key[i]), x1 = High(key[i]);
      const float y0 = Low(key[2 + i]), y1 = High(key[2 + i]);
      const float u0 = x0 * cs.x + y0 * sn.x, u1 = x1 * cs.y + y1 * sn.y;
      const float w0 = y0 * cs.x - x0 * sn.x, w1 = y1 * cs.y - x1 * sn.y;
      plain[0][i] = Pack(u0, u1);
      plain[0][2 + i] = Pack(u0 - Low(plain[0][i]), u1 - High(plain[0][i]));
      plain[1][i] = Pack(w0, w1);
      plain[1][2 + i] = Pack(w0 - Low(plain[1][i]), w1 - High(plain[1][i]));
    }
    const int place = 4 * g + (q ^ (g / 2));
    s.key[c][j][place] = {key[0], key[1], key[2], key[3]};
#pragma unroll
    for (int i = 0; i < 2; ++i)
      s.plain[c + i * (D / 32)][j][place] = {plain[i][0], plain[i][1], plain[i][2], plain[i][3]};
  }
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

// Eight values of neighbouring slots.
__device__ __forceinline__ void LoadSlots(float (&to)[8], const float* from) {
  const float4 a = reinterpret_cast<const float4*>(from)[0];
  const float4 b = reinterpret_cast<const float4*>(from)[1];
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
  to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

// Of this warp's channels: the largest exponent and the sum of e^{sign y} per slot. With kKeep the
// powers take the place of y.
template <bool kKeep>
__device__ __forceinline__ void Statistics(float (&y)[2][4][4], float sign, float* top, float* sum,
                                           int lane) {
  const int g = lane / 4, t = lane % 4;
  const int slot = 32 * (g & 1) + 8 * t + 4 * (g >> 1 & 1) + 2 * (g >> 2);
  float v[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float(&from)[4] = y[i / 8][i / 2 % 4];
    v[i] = fmaxf(sign * from[i % 2], sign * from[2 + i % 2]);
  }
  const float2 most = ReduceRows(v, lane, [](float a, float b) { return fmaxf(a, b); });
  *reinterpret_cast<float2*>(top + slot) = {most.x * kLog2e, most.y * kLog2e};
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float reference[8];
    LoadSlots(reference, top + 32 * half + 8 * t);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float(&from)[4] = y[half][i / 2];
      const float e0 = Exp2(from[i % 2] * (sign * kLog2e) - reference[i]);
      const float e1 = Exp2(from[2 + i % 2] * (sign * kLog2e) - reference[i]);
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
