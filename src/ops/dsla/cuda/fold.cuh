// What `fold` has in shared memory, and how its warpgroups hand over.
//
// Tiles are panels as warpgroup.cuh has them. Row 32 h + 8 j + 2 t + i of a chunk's tiles has token
// 32 h + 8 t + 2 j + i: a lane of an accumulator with tokens for columns then has 8 tokens in a row
// of each half.
#pragma once

#include "ops/dsla/cuda/bulk.cuh"
#include "ops/dsla/cuda/prepare.cuh"
#include "ops/dsla/cuda/warpgroup.cuh"

namespace dsla::cuda {

// 128 have the keys, and 128 fold for each 64 channels.
template <int D>
inline constexpr int kFoldThreads = 2 * D + 128;

struct FoldParams : PrefillParams {
  // Of the exponent of e^a in base 2: the floor, and its share that a logit t of GateMinusOneOf is.
  // There is none where it is so near that it bounds gates of which 1 + e^-x matters.
  float lowest = 0, share = 0;
  bool near_floor = false;
  bool in_pages = false;  // a chunk lies in one page, and tensor maps can copy it
  CUtensorMap keys = {}, values = {}, sines = {}, cosines = {};
};

// Chunks of one sequence that a block folds.
struct FoldPart {
  int n, segments;  // the sequence, none if n < 0, and how many segments it has
  int e0, chunks;
  int lead, tail;  // chunks from `lead` on and before `tail` enter whole
  int until;       // the first of the sequence's tokens that does not enter
  int first_page;  // in the list of all sequences' pages
  float pages_of_token;
};

// Chunks of a segment of a sequence that has so many: nothing else, and the shape, decide the cut.
__device__ __forceinline__ int FoldSegmentChunks(const PrefillParams& p, int chunks) {
  return max(kLeastFoldSegment, (chunks + p.most_segments - 1) / p.most_segments);
}
__device__ __forceinline__ int FoldChunks(const PrefillParams& p, int n) {
  return (max(p.layer.pos[n] - p.layer.W, 0) + kChunk - 1) / kChunk;
}
__device__ __forceinline__ int FoldSegments(const PrefillParams& p, int n) {
  const int chunks = FoldChunks(p, n), each = FoldSegmentChunks(p, chunks);
  return max((chunks + each - 1) / each, 1);
}

template <int D, int kBlocks>
struct FoldShared {
  static constexpr int kGroups = D / 64;  // warpgroups that have 64 channels of each block of D
  using Tile = uint4[kChunk * D / 8];
  uint4 phi[D * D / 8];          // weights: rows are channels, all in one tile
  Tile gates[kBlocks][kGroups];  // and 64 of them in each, in fp16
  Tile key, cosines;             // of one chunk
  Tile plain[2];                 // sines, then keys with RoPE undone, in fp16
  Tile v[2];
  float4 feature[kChunk * D / 4];  // phi_k of one chunk: see FeaturePlace
  float bias[kBlocks * D];         // of gates, as ScaleLogits has it
  float scale[kBlocks * D];        // units of the channels of the states: see Folder
  FoldPart part;
  // Counted in warps, each for one of two places: gates' keys are there, or read; V is read.
  uint64_t plain_full[2], plain_free[2], value_free[2];
  // For each warpgroup that folds: phi_k, and V with it, are there; phi_k is read.
  uint64_t feature_full[kGroups], feature_free[kGroups];
  uint64_t key_here, value_here;  // of one lane: copies have come, keys' with their angles
};

// The packed weights of a block's channels, by all of the block's threads. With F > D the blocks of
// D channels of a state take turns in the sign of phi_k's logits: a block of threads has one sign,
// which its weights then have, and a block of D of each state.
template <int D, int kBlocks>
__device__ __forceinline__ void LoadFoldWeights(FoldShared<D, kBlocks>& s, const Layer& l) {
  constexpr int kPieces = D * D / 8, kTimes = CeilDiv(kPieces, kFoldThreads<D>);
  const int h = blockIdx.x, first_block = blockIdx.z, next = l.F / D;
  const uint32_t sign = first_block > 0 ? 0x80008000u : 0;
  const int g = threadIdx.x / 4 % 8, t = threadIdx.x % 4;
  const auto load = [&](const __nv_bfloat16* from, auto* tiles, const auto& as_operand) {
    constexpr int kRows = sizeof(*tiles) / (D * 2);
    uint4 pieces[kTimes];  // all, before the first is waited for
#pragma unroll
    for (int u = 0; u < kTimes; ++u) {
      const int i = u * kFoldThreads<D> + threadIdx.x;
      if (i < kPieces) pieces[u] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    }
#pragma unroll
    for (int u = 0; u < kTimes; ++u) {
      const int i = u * kFoldThreads<D> + threadIdx.x;
      if (i >= kPieces) break;
      const uint4 x = pieces[u];
      // Dimensions 16 c + 2t, 2t + 1 and the same + 8, of channel `channel` and of the 8th from it.
      const int c = i / 32 / (D / 16), channel = i / 32 % (D / 16) * 16 + g, row = channel % kRows;
      auto* to = reinterpret_cast<uint32_t*>(tiles[channel / kRows]) + t +
                 4 * (c / 4 * (kRows * 8) + Swizzle<8>(row, c % 4 * 2));
      // The next piece is the one that swizzling pairs with it; 8 rows on are swizzled alike.
      to[0] = as_operand(x.x);
      to[4 - (row & 1) * 8] = as_operand(x.y);
      to[8 * 32] = as_operand(x.z);
      to[8 * 32 + 4 - (row & 1) * 8] = as_operand(x.w);
    }
  };
  load(l.weights.phi_k + int64_t{h} * D * D, &s.phi, [&](uint32_t x) { return x ^ sign; });
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
    load(l.weights.gates + (int64_t{h} * (l.SF / D) + first_block + b * next) * D * D, s.gates[b],
         HalfOf);
  for (int i = threadIdx.x; i < kBlocks * D; i += kFoldThreads<D>) {
    s.bias[i] = -kLog2e * l.weights.bias[h * l.SF + (first_block + i / D * next) * D + i % D];
    s.scale[i] = 1;
  }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Where `feature` has four tokens of a channel: of the 16 that lane t of a quad has, 8 of each
// half, in the order of the tiles' rows, 4 k + {0, 2, 1, 3}. For 16-byte loads by the lanes
// (channel % 8, t) and 8-byte stores by the lanes (2 t + row % 2, channel / 2 % 4), both without
// conflicts.
template <int D>
__device__ __forceinline__ int FeaturePlace(int channel, int t, int k) {
  const int pair = channel / 2;
  const int in_eight = ((channel ^ pair >> 1) & 1) << 2 | (t ^ (pair & 1) << 1);
  return k * (4 * D) + 8 * pair + in_eight;
}

#endif

}  // namespace dsla::cuda
