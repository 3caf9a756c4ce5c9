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
  // The keys as mma's B operand, 8 tiles of 8 slots; lanes at PlaceOf.
  uint4 plain[D / 16][8][32];  // RoPE undone, as two terms of bf16
  uint4 key[D / 32][8][32];    // as it is; k steps c and c + D / 32
  // Of e^y, and of e^-y if the features need it, per warp and slot: the largest exponent in base 2,
  // and the sum of powers relative to it. Then what makes features of them, at `top`.
  float top[kSigns][D / 16][kChunk];
  float sum[kSigns][D / 16][kChunk];
  Chunk next;
  int next_index;
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

// Where lane 4g + t of k step c is: threads that write all t of two k steps meet no bank conflicts,
// nor do warps that read.
__device__ __forceinline__ int PlaceOf(int c, int g, int t) { return (4 * g + t) ^ (4 * (c % 2)); }

// Part of the weights on their way to shared memory: all of it if the block has all its
// teams. A k step's columns are dealt such that lane t of a fragment has dimensions
// 4t .. 4t + 3. Each thread fills lanes 4g + t and 4g + t + 2, t < 2, from `base` on.
template <int D, int kBlocks>
struct WeightBatch {
  static constexpr int kPairs = D * D / 16, kAll = (1 + kBlocks) * kPairs;
  static constexpr int kCount = kAll / (kTeams<D> * 2 * D);
  uint2 even[kCount][2], odd[kCount][2];

  __device__ __forceinline__ void Load(const Layer& l, int h, int first_block, int base) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int i = base + u * blockDim.x;
      const int m = i / kPairs, tile = i % kPairs / 16, g = i / 2 % 8, t = i % 2;
      const __nv_bfloat16* from =
          m == 0 ? l.weights.phi_k + int64_t{h} * D * D
                 : l.weights.gates + (int64_t{h} * (l.SF / D) + first_block + m - 1) * D * D;
      // Columns 2g and 2g + 1 of the packed tile; its lanes 2t and 2t + 1.
      const uint2* at =
          reinterpret_cast<const uint2*>(from) + tile * 64 + (2 * g % 8 * 4 + 2 * t) * 2 + g / 4;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        even[u][k] = __ldg(at + 2 * k);
        odd[u][k] = __ldg(at + 2 * k + 8);
      }
    }
  }

  __device__ __forceinline__ void Store(uint4* to, int base) const {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int i = base + u * blockDim.x;
      const uint2(&e)[2] = even[u], (&o)[2] = odd[u];
      const uint4 low{e[0].x, o[0].x, e[1].x, o[1].x}, high{e[0].y, o[0].y, e[1].y, o[1].y};
      // Half of the threads begin with the upper lane: so no bank is met twice.
      const bool swap = i & 4;
      uint4* piece = to + i / 16 * 32 + i / 2 % 8 * 4 + i % 2;
      piece[swap ? 2 : 0] = swap ? high : low;
      piece[swap ? 0 : 2] = swap ? low : high;
    }
  }
};

__device__ __forceinline__ void LoadPiece(uint32_t (&to)[4], const uint4& from) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

// Each thread has dimensions 4 part .. 4 part + 3 of both halves of the head, of rows first + 16 i:
// neighbouring threads read neighbouring bytes of keys and angles.
template <int D>
struct KeyPlace {
  int part, first;
  __device__ __forceinline__ explicit KeyPlace(int thread)
      : part(thread % (D / 8)), first(thread / (D / 8)) {}
};

template <int D, bool kFold>
__device__ __forceinline__ void LoadKeys(uint2 (&keys)[4][2], const PrefillParams& p,
                                         const Chunk& chunk, int h, int thread) {
  // Lane 4 u + i finds row i of the warp's u-th `first`.
  constexpr int kRows = 256 / D;
  const int lane = thread % 32;
  const int row = thread / 32 * kRows + lane / 4 % kRows + 16 * (lane % 4);
  unsigned long long found = 0;
  if (chunk.n >= 0 && Enters(p.layer, chunk, row)) {
    const __nv_bfloat16* k;
    if constexpr (kFold)
      k = RowOf<D>(p.layer, p.pages, chunk.n, h, chunk.e0 + row).k;
    else
      k = RowOf<D>(p.layer, p.rows, chunk.n, h, chunk.e0 + row).k;
    found = reinterpret_cast<unsigned long long>(k);
  }
  const KeyPlace<D> at(thread);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint2* k =
        reinterpret_cast<const uint2*>(__shfl_sync(~0u, found, at.first % kRows * 4 + i));
    keys[i][0] = keys[i][1] = {};
    if (k != nullptr) {
      keys[i][0] = __ldcg(k + at.part);
      keys[i][1] = __ldcg(k + at.part + D / 8);
    }
  }
}

// The keys, and the keys with RoPE undone, to shared memory.
template <int D, typename Shared>
__device__ __forceinline__ void StoreKeys(Shared& s, const uint2 (&keys)[4][2], const Layer& l,
                                          const Chunk& chunk, int thread, int team) {
  const KeyPlace<D> at(thread);
  float4 cos[4], sin[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Keys of rows that do not enter are zeros: any angle does.
    const int row = at.first + 16 * i, time = Enters(l, chunk, row) ? chunk.e0 + row : 0;
    const unsigned angle = time * (D / 8) + at.part;
    cos[i] = reinterpret_cast<const float4*>(l.cos)[angle];
    sin[i] = reinterpret_cast<const float4*>(l.sin)[angle];
  }
  Barrier<2 * D>(team);  // all have read the keys before
  const int c = at.part / 4, q = at.part % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Slots 32 half + slot + 16 u.
    const int slot = half ? at.first : 15 - at.first;
    const int place = PlaceOf(c, slot / 8 * 2 + slot % 2, q), j = half * 4 + slot % 8 / 2;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int i = half ? 2 + u : 1 - u;
      const uint2(&key)[2] = keys[i];
      uint32_t plain[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t x = k ? key[0].y : key[0].x, y = k ? key[1].y : key[1].x;
        const float2 cs = k ? float2{cos[i].z, cos[i].w} : float2{cos[i].x, cos[i].y};
        const float2 sn = k ? float2{sin[i].z, sin[i].w} : float2{sin[i].x, sin[i].y};
        const float u0 = Low(x) * cs.x + Low(y) * sn.x, u1 = High(x) * cs.y + High(y) * sn.y;
        const float w0 = Low(y) * cs.x - Low(x) * sn.x, w1 = High(y) * cs.y - High(x) * sn.y;
        plain[0][k] = Pack(u0, u1);
        plain[0][2 + k] = Pack(u0 - Low(plain[0][k]), u1 - High(plain[0][k]));
        plain[1][k] = Pack(w0, w1);
        plain[1][2 + k] = Pack(w0 - Low(plain[1][k]), w1 - High(plain[1][k]));
      }
      s.key[c][j][place + 16 * u] = {key[0].x, key[0].y, key[1].x, key[1].y};
#pragma unroll
      for (int k = 0; k < 2; ++k)
        s.plain[c + k * (D / 32)][j][place + 16 * u] = {plain[k][0], plain[k][1], plain[k][2],
                                                        plain[k][3]};
    }
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

// Four values of neighbouring slots.
__device__ __forceinline__ void LoadSlots(float (&to)[4], const float* from) {
  const float4 a = *reinterpret_cast<const float4*>(from);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
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
    float reference[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i % 4 == 0) LoadSlots(reference, top + 32 * half + 8 * t + i);
      float(&from)[4] = y[half][i / 2];
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
