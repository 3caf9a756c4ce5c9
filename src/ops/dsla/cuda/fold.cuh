// What `fold` has in shared memory, and how its warpgroups hand over.
//
// Tiles are panels as warpgroup.cuh has them. Row 8 j + 2 t + i of a chunk's tiles has token
// 16 t + 2 j + i: a lane of an accumulator with tokens for columns then has 16 tokens in a row.
#pragma once

#include "ops/dsla/cuda/bulk.cuh"
#include "ops/dsla/cuda/prepare.cuh"
#include "ops/dsla/cuda/warpgroup.cuh"

namespace dsla::cuda {

struct FoldParams : PrefillParams {
  bool in_pages;  // a chunk lies in one page, and tensor maps can copy it
  CUtensorMap keys, values, sines, cosines;
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
  Tile gates[kBlocks][kGroups];  // and 64 of them in each
  // Keys with RoPE undone, as two terms of bf16. Until then sines and cosines.
  Tile plain[2][2];
  Tile v[2];
  float4 feature[kChunk * D / 4];  // phi_k of one chunk: see FeaturePlace
  float bias[kBlocks * D];
  FoldPart part;
  // Counted in warps, each for one of two places: gates' operands are there, or read; V is read.
  uint64_t plain_full[2], plain_free[2], value_free[2];
  uint64_t key_here[2], value_here[2];  // of one lane: copies have come
};

// The packed weights of a block's channels, by all of the block's threads. With F > D the blocks of
// D channels of a state take turns in the sign of phi_k's logits: a block of threads has one sign,
// which its weights then have, and a block of D of each state.
template <int D, int kBlocks>
__device__ __forceinline__ void LoadFoldWeights(FoldShared<D, kBlocks>& s, const Layer& l) {
  constexpr int kPieces = D * D / 8;
  const int h = blockIdx.x, first_block = blockIdx.z, next = l.F / D;
#pragma unroll 8
  for (int i = threadIdx.x; i < (1 + kBlocks) * kPieces; i += blockDim.x) {
    const int m = i / kPieces, tile = i % kPieces / 32, g = i / 4 % 8, t = i % 4;
    const __nv_bfloat16* from =
        m == 0 ? l.weights.phi_k + int64_t{h} * D * D
               : l.weights.gates + (int64_t{h} * (l.SF / D) + first_block + (m - 1) * next) * D * D;
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(from) + i % kPieces);
    const uint32_t sign = m == 0 && first_block > 0 ? 0x80008000u : 0;
    // Dimensions 16 c + 2t, 2t + 1 and the same + 8, of channel `channel` and of the 8th from it.
    const int c = tile / (D / 16), channel = tile % (D / 16) * 16 + g;
    const int rows = m == 0 ? D : 64, row = channel % rows;
    uint4* panel = (m == 0 ? s.phi : s.gates[m - 1][channel / 64]) + c / 4 * (rows * 8);
    uint32_t* to = reinterpret_cast<uint32_t*>(panel) + t;
    const int piece = c % 4 * 2;
    to[4 * Swizzle<8>(row, piece)] = x.x ^ sign;
    to[4 * Swizzle<8>(row, piece + 1)] = x.y ^ sign;
    to[4 * Swizzle<8>(row + 8, piece)] = x.z ^ sign;
    to[4 * Swizzle<8>(row + 8, piece + 1)] = x.w ^ sign;
  }
  for (int i = threadIdx.x; i < kBlocks * D; i += blockDim.x)
    s.bias[i] = l.weights.bias[h * l.SF + (first_block + i / D * next) * D + i % D];
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Where `feature` has four tokens of a channel: of the 16 that lane t of a quad has, in the order
// of the tiles' rows, 4 k + {0, 2, 1, 3}. For 16-byte loads by the lanes (channel % 8, t) and
// 8-byte stores by the lanes (2 t + row % 2, channel / 2 % 4), both without conflicts.
template <int D>
__device__ __forceinline__ int FeaturePlace(int channel, int t, int k) {
  const int pair = channel / 2;
  const int in_eight = ((channel ^ pair >> 1) & 1) << 2 | (t ^ (pair & 1) << 1);
  return k * (4 * D) + 8 * pair + in_eight;
}

// phi_k of a chunk, and V with it, go from the warpgroup that has the keys to one that folds at
// barriers of these two: it is there, or it has been read. No arrival is for the round after: each
// side waits for the other between two of its own. `compute-sanitizer --tool racecheck` does not
// follow them, and reports this hand-over. Which of them is told by a register, so the kernel holds
// all 16: two blocks of a multiprocessor can.
enum class Meeting { kFull, kFree };
constexpr int kMeetingThreads = 256;
__device__ __forceinline__ int MeetingId(Meeting meeting, int group) {
  return (meeting == Meeting::kFull ? 2 : 4) + group;
}
__device__ __forceinline__ void ArriveAt(Meeting meeting, int group) {
  asm volatile("bar.arrive %0, %1;" ::"r"(MeetingId(meeting, group)), "n"(kMeetingThreads)
               : "memory");
}
__device__ __forceinline__ void MeetAt(Meeting meeting, int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(MeetingId(meeting, group)), "n"(kMeetingThreads)
               : "memory");
}

#endif

}  // namespace dsla::cuda
