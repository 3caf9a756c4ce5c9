// What a team of `prepare` does with its keys: gates, phi_k, and from them K~ and e^{G-R}.
//
// The products with the weights are transposed, [channels, d] x [d, tokens]: a lane then has runs
// of tokens of few channels in its accumulators, and products over time need registers only. Which
// token a column stands for is free. Slots count tokens outwards from the anchor, 31 .. 0 and then
// 32 .. 63; column 2t + i of tile j is slot 32 (j / 4) + 8 t + 2 (j % 4) + i, so a lane has eight
// slots in a row of each half of the chunk. Rows g and g + 8 of a tile are channels 2g and 2g + 1,
// neighbours in memory.
#pragma once

#include "ops/dsla/cuda/prepare_keys.cuh"

namespace dsla::cuda {

// e^a - 1 in the place of the logits of one half's slots.
template <bool kUpper>
__device__ __forceinline__ void Gates(float (&gate)[8][4], float2 bias, float least) {
  GatesMinusOne(reinterpret_cast<float(&)[4][4]>(gate[4 * kUpper]), bias, least);
}

// Where a lane's first slot of a half goes.
struct Places {
  float* decay;
  float2* key_sum;
  uint32_t *key, *growth;
};

// Products of e^a outwards from the anchor over one half's slots: what is under 1 is a product, its
// inverse e^{G-R} or 1 / e^{G-R} a reciprocal, so nothing cancels. One sign: y is phi_k, negated.
// Two: phi_k is e^{sign y} times 2^scale, by slot.
template <int D, int kSigns, bool kFold, bool kUpper>
__device__ __forceinline__ void WriteHalf(const float (&gate)[8][4], const float (&y)[8][4],
                                          float sign, const float* scale, const Places& to,
                                          int lane) {
  constexpr int kStep = kUpper ? D / 2 : -D / 2, kGrowthStep = kUpper ? 16 : -16;
  const int t = lane % 4;
  float run[2], total[2], sum[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float x = 1 + gate[4 * kUpper][2 * r];
#pragma unroll
    for (int i = 1; i < 8; ++i) x += x * gate[4 * kUpper + i / 2][2 * r + i % 2];
    const float next = __shfl_xor_sync(~0u, x, 1), pair = x * next;
    const float others = __shfl_xor_sync(~0u, pair, 2);
    run[r] = (t & 1 ? next : 1.f) * (t & 2 ? others : 1.f);
    total[r] = pair * others;
  }
  if (t == 0) {
    to.decay[0] = total[0];
    to.decay[2] = total[1];
  }
  float reference[4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (kSigns == 2 && i % 4 == 0) LoadSlots(reference, scale + 32 * kUpper + 8 * t + i);
    float key[2], grown[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float x = gate[4 * kUpper + i / 2][2 * r + i % 2];
      float phi = y[4 * kUpper + i / 2][2 * r + i % 2];
      if constexpr (kSigns == 2) phi = -Exp2(phi * (sign * kLog2e) + reference[i % 4]);
      if constexpr (kUpper) {
        run[r] += run[r] * x;
        key[r] = x * phi * Reciprocal(run[r]);
        grown[r] = run[r];
      } else {
        key[r] = x * phi * run[r];
        if constexpr (!kFold) grown[r] = Reciprocal(run[r]);
        run[r] += run[r] * x;
      }
    }
    const uint32_t packed = Pack(key[0], key[1]);
    to.key[i * kStep] = packed;
    sum[0] += Low(packed);
    sum[1] += High(packed);
    if constexpr (!kFold) to.growth[i * kGrowthStep] = Pack(grown[0], grown[1]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
  if (t % 2 == 0) *to.key_sum = {sum[0], sum[1]};
}

struct Lane {
  unsigned lane, g, t;
  __device__ __forceinline__ explicit Lane(unsigned lane) : lane(lane), g(lane / 4), t(lane % 4) {}
};

// What a warp of a team does.
template <int D, int kBlocks, int kSigns, bool kFold>
struct Team {
  PrepareShared<D, kBlocks, kSigns>& shared;
  const PrefillParams& p;
  const int all_warp;      // one for all of a warp, which the products' operands must be
  const unsigned in_warp;  // the lane

  __device__ __forceinline__ Lane ThisLane() const { return Lane(Fresh(in_warp)); }
  __device__ __forceinline__ int Thread() const { return warp() * 32 + Fresh(in_warp); }
  __device__ __forceinline__ int team() const { return all_warp / (D / 16); }
  __device__ __forceinline__ int warp() const { return all_warp % (D / 16); }
  __device__ __forceinline__ TeamShared<D, kSigns>& keys() const { return shared.team[team()]; }
  __device__ __forceinline__ uint32_t Weight(int m) const {
    return SharedAddress(shared.weight[m][warp() / 4]);
  }

  // A block's logits of gates.
  __device__ __forceinline__ void GateLogits(float (&gate)[8][4], int b) const {
    ScoreKeys<D, kChunk, kChunk, true>(gate, Fresh(Weight(1 + b)),
                                       Fresh(SharedAddress(keys().plain)));
  }

  // phi_k's logits.
  __device__ __forceinline__ void Logits(float (&y)[8][4]) const {
    ScoreKeys<D, kChunk, kChunk>(y, Fresh(Weight(0)), Fresh(SharedAddress(keys().key)));
  }

  // Of both signs; with one sign, powers take the place of y.
  template <bool kRelative>
  __device__ __forceinline__ void SumPowers(float (&y)[8][4]) const {
#pragma unroll
    for (int sign = 0; sign < kSigns; ++sign)
      cuda::SumPowers<kSigns == 1, kRelative>(y, sign == 0 ? 1.f : -1.f, keys().sum[sign][warp()],
                                              ThisLane().lane);
  }

  // Leaves the logarithm of the largest power where SumPowers finds it, and for FindScale.
  __device__ __forceinline__ void FindReference(const float (&y)[8][4],
                                                float2 (&reference)[kSigns]) const {
    const int lane = ThisLane().lane;
#pragma unroll
    for (int sign = 0; sign < kSigns; ++sign)
      LargestLogarithms(y, sign == 0 ? 1.f : -1.f, keys().scale[sign][warp()], lane);
    Barrier<2 * D>(team());
#pragma unroll
    for (int sign = 0; sign < kSigns; ++sign) {
      reference[sign] =
          OverWarps(keys().scale[sign], lane, [](float a, float b) { return fmaxf(a, b); });
      *reinterpret_cast<float2*>(keys().sum[sign][warp()] + 2 * lane) = reference[sign];
    }
    __syncwarp();
  }

  // From the warps' sums, for this warp. True if all are numbers that have an inverse, and so large
  // that what powers lose to flushing is nothing beside them.
  __device__ __forceinline__ bool FindScale(const float2 (&reference)[kSigns]) const {
    const int lane = ThisLane().lane;
    bool fine = true;
#pragma unroll
    for (int sign = 0; sign < kSigns; ++sign) {
      const float2 sum = OverWarps(keys().sum[sign], lane, [](float a, float b) { return a + b; });
      fine = fine && fminf(sum.x, sum.y) > 0x1p-60f && fmaxf(sum.x, sum.y) < 0x1p100f;
      float2 scale;
      if constexpr (kSigns == 1)
        scale = {-Reciprocal(sum.x), -Reciprocal(sum.y)};
      else
        scale = {-(reference[sign].x + Log2(sum.x)), -(reference[sign].y + Log2(sum.y))};
      *reinterpret_cast<float2*>(keys().scale[sign][warp()] + 2 * lane) = scale;
    }
    __syncwarp();
    return __all_sync(~0u, fine);
  }

  // Makes phi_k, negated, of this warp's powers.
  __device__ __forceinline__ void Scale(float (&y)[8][4]) const {
    const float* factors = keys().scale[0][warp()] + 8 * ThisLane().t;
    float scale[4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i % 4 == 0) LoadSlots(scale, factors + i / 8 * 32 + i % 8);
      y[i / 2][i % 2] *= scale[i % 4];
      y[i / 2][2 + i % 2] *= scale[i % 4];
    }
  }

  template <bool kUpper>
  __device__ __forceinline__ void Half(float (&gate)[8][4], const float (&y)[8][4], float2 bias,
                                       int index, int b, const EnteringRows& rows) const {
    const Layer& l = p.layer;
    Gates<kUpper>(gate, bias, l.least_gate);
    const auto [lane, g, t] = ThisLane();
    const unsigned first = kUpper ? kChunk / 2 + 8 * t : kChunk / 2 - 1 - 8 * t;
    if (rows.from > 0 || rows.count < kChunk) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const unsigned row = kUpper ? first + i : first - i;
        if (row - rows.from >= static_cast<unsigned>(rows.count))
          gate[4 * kUpper + i / 2][i % 2] = gate[4 * kUpper + i / 2][2 + i % 2] = 0;
      }
    }
    const int64_t part = int64_t{index} * l.Hkv + blockIdx.x;
    const int64_t blocks = l.SF / D, in_part = blockIdx.z * kBlocks + b;
    const int64_t block = part * blocks + in_part, at = block * (kChunk * D / 2);
    // Rows g and g + 8 of a tile share a lane of the fragment of e^{G-R}.
    const unsigned pair = 8 * warp() + g, quarter = first / 16, row = first % 16;
    const unsigned fragment =
        quarter * (D * 8) + (warp() * 32 + g % 4) * 4 + g / 4 * 2 + row % 8 * 16 + row / 8;
    Places to;
    to.decay = reinterpret_cast<float*>(p.decay + block * D) + kUpper + 4 * pair;
    to.key_sum = reinterpret_cast<float2*>(p.key_sum) + (4 * part * blocks + in_part) * (D / 2) +
                 (quarter * (l.SF / 2) + pair);
    to.key = reinterpret_cast<uint32_t*>(p.key) + at + (first * (D / 2) + pair);
    to.growth = p.growth + at + fragment;
    const int sign = in_part % kSigns;  // of the features
    WriteHalf<D, kSigns, kFold, kUpper>(gate, y, sign == 0 ? 1.f : -1.f, keys().scale[sign][warp()],
                                        to, lane);
  }

  // Chunk `index` of the wave, when its keys are there; `plain_there` awaits those without RoPE.
  // `keys_read` comes when all of the team have done with the keys, `all_read` when this warp's
  // products have read those without RoPE.
  template <typename PlainThere, typename KeysRead, typename AllRead>
  __device__ __forceinline__ void Run(int index, const EnteringRows& rows,
                                      const PlainThere& plain_there, const KeysRead& keys_read,
                                      const AllRead& all_read) const {
    float y[8][4], gate[8][4];
    float2 reference[kSigns] = {};
    // Sums of e^y need no search for the largest y, unless logits are far from 0: then all of the
    // team find so and begin again.
    for (bool far = false;; far = true) {
      Logits(y);
      if (far) {
        FindReference(y, reference);
        SumPowers<true>(y);
      } else {
        SumPowers<false>(y);
      }
      Barrier<2 * D>(team());  // all have done with the keys, and left their sums
      if (FindScale(reference) || far) break;
    }
    keys_read();
    if constexpr (kSigns == 1) Scale(y);
    plain_there();
#pragma unroll 1
    for (int b = 0; b < kBlocks; ++b) {
      GateLogits(gate, b);
      const float2 bias = shared.bias[b][8 * warp() + ThisLane().g];
      if (b == kBlocks - 1) all_read();
      Half<false>(gate, y, bias, index, b, rows);
      Half<true>(gate, y, bias, index, b, rows);
    }
  }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  // The team's chunks, as they are fetched.
  __device__ __forceinline__ void RunFetched() const {
    int index = blockIdx.y + gridDim.y * team();
    for (int i = 0;; ++i) {
      Await(shared.key_there[team()], i);
      const EnteringRows rows = shared.entering[team()];
      if (rows.count < 0) break;
      Run(
          index, rows, [&] { Await(shared.plain_there[team()], i); },
          [&] { Arrive(shared.key_free[team()]); }, [&] { Arrive(shared.plain_free[team()]); });
      index += gridDim.y * kTeams<D>;
    }
  }
#endif

  __device__ __forceinline__ void Fetch(const Chunk& chunk) const {
    if (chunk.n < 0) return;
    if constexpr (kFold)
      FetchKeys<D>(keys().key, p, p.pages, chunk, blockIdx.x, Thread());
    else
      FetchKeys<D>(keys().key, p, p.rows, chunk, blockIdx.x, Thread());
  }

  // The first chunk of a team that fetches for itself, its keys on their way.
  __device__ __forceinline__ Chunk FetchFirst() const {
    const Chunk chunk = WaveChunks{p}.At(blockIdx.y + gridDim.y * team());
    Fetch(chunk);
    return chunk;
  }

  // All chunks of such a team, one of `teams`, from the first one on.
  __device__ __forceinline__ void RunAll(int teams, Chunk chunk) const {
    const Layer& l = p.layer;
    const int step = gridDim.y * teams;
    int index = blockIdx.y + gridDim.y * team();
    const WaveChunks chunks{p};
    while (chunk.n >= 0) {
      UndoRope(keys(), l, chunk, Thread(), team());
      const EnteringRows rows(l, chunk);
      chunk = chunks.At(index + step);
      Run(
          index, rows, [] {}, [&] { Fetch(chunk); }, [] {});
      index += step;
    }
  }
};

}  // namespace dsla::cuda
