// What `fold` has in shared memory, and the warps that fill it: keys and values of a chunk out of
// the pages, and the keys with RoPE undone.
//
// Tiles are panels as warpgroup.cuh has them. Row 8 j + 2 t + i of a chunk's tiles has token
// 16 t + 2 j + i: a lane of an accumulator with tokens for columns then has 16 tokens in a row.
#pragma once

#include "ops/dsla/cuda/prepare.cuh"
#include "ops/dsla/cuda/warpgroup.cuh"

namespace dsla::cuda {

// Chunks of one sequence that a block folds.
struct FoldPart {
  int n, segments;  // the sequence, none if n < 0, and how many segments it has
  int e0, chunks;
  int until;  // the first of the sequence's tokens that does not enter
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

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#endif

template <int D, int kBlocks, int kSigns>
struct FoldShared {
  static constexpr int kGroups = D / 64;  // warpgroups that have 64 channels of each block of D
  using Tile = uint4[kChunk * D / 8];
  struct Stage {
    Tile plain[2], v;  // keys with RoPE undone, as two terms of bf16
  };
  Tile weight[1 + kBlocks][kGroups];  // phi_k, then gates: rows are channels
  Tile key;
  Stage stage[2];
  // Base-2 logarithms of the sums of e^{+-y} over a warp's channels, and minus those over all.
  float sum[2][kSigns][D / 16][kChunk];
  float norm[2][kGroups][kSigns][kChunk];
  float bias[kBlocks * D];
  FoldPart part;
  float2 total[kBlocks * D];  // z of the segment, and its decay
  // Counted in warps. Of chunk i: keys are there, or read; so the stage; `sum` is there.
  uint64_t key_full, key_free, stage_full[2], stage_free[2], sums_full;
};

// The packed weights of a block's channels, by all of the block's threads.
template <int D, int kBlocks, int kSigns>
__device__ __forceinline__ void LoadFoldWeights(FoldShared<D, kBlocks, kSigns>& s, const Layer& l,
                                                int h, int first_block) {
  constexpr int kPieces = D * D / 8;
#pragma unroll 8
  for (int i = threadIdx.x; i < (1 + kBlocks) * kPieces; i += blockDim.x) {
    const int m = i / kPieces, tile = i % kPieces / 32, g = i / 4 % 8, t = i % 4;
    const __nv_bfloat16* from =
        m == 0 ? l.weights.phi_k + int64_t{h} * D * D
               : l.weights.gates + (int64_t{h} * (l.SF / D) + first_block + m - 1) * D * D;
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(from) + i % kPieces);
    // Dimensions 16 c + 2t, 2t + 1 and the same + 8, of channel `channel` and of the 8th from it.
    const int c = tile / (D / 16), channel = tile % (D / 16) * 16 + g, row = channel % 64;
    uint32_t* to = reinterpret_cast<uint32_t*>(s.weight[m][channel / 64] + c / 4 * (64 * 8)) + t;
    const int piece = c % 4 * 2;
    to[4 * Swizzle<8>(row, piece)] = x.x;
    to[4 * Swizzle<8>(row, piece + 1)] = x.y;
    to[4 * Swizzle<8>(row + 8, piece)] = x.z;
    to[4 * Swizzle<8>(row + 8, piece + 1)] = x.w;
  }
  for (int i = threadIdx.x; i < kBlocks * D; i += blockDim.x)
    s.bias[i] = l.weights.bias[h * l.SF + first_block * D + i];
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Of a lane of a warp that fetches: of the warp's 16 tokens of a chunk those from `first` on,
// kRows apart, and of their rows the piece c, or dimensions 4 c .. 4 c + 3 of both halves.
template <int D>
struct FetchPlace {
  static constexpr int kOfRow = D / 8, kRows = 32 / kOfRow, kTimes = 16 / kRows;
  static constexpr int kStep = 4 * kRows * 8;  // pieces of a tile between such rows
  int lane, warp, first, c, row;
  __device__ __forceinline__ FetchPlace() {
    const int i = ThreadIndex();
    lane = i % 32;
    warp = i / 32;
    first = lane / kOfRow;
    c = lane % kOfRow;
    row = first / 2 * 8 + 2 * warp + first % 2;
  }
  __device__ __forceinline__ int Piece() const {
    return c / 8 * (kChunk * 8) + Swizzle<8>(row, c % 8);
  }
  __device__ __forceinline__ int HalfPiece(int half) const {
    const int d = half * (D / 2) + 4 * c;
    return 2 * (d / 64 * (kChunk * 8) + Swizzle<8>(row, d % 64 / 8)) + d / 4 % 2;
  }
};

// Where the warp's token lane % 16 of chunk i lies, in elements; negative if it does not enter.
template <int D>
__device__ __forceinline__ int64_t FindToken(const PrefillParams& p, const FoldPart& part, int i) {
  const FetchPlace<D> at;
  const int token = part.e0 + i * kChunk + 16 * at.warp + at.lane % 16;
  if (i >= part.chunks || token < p.layer.S || token >= part.until) return -1;
  return RowOf<D>(p.layer, p.pages, part.n, blockIdx.x, token).k - p.pages.k;
}

template <int D>
__device__ __forceinline__ void FetchRows(uint4* to, const __nv_bfloat16* rows, int64_t found) {
  const FetchPlace<D> at;
  to += at.Piece();
  const int64_t base = __shfl_sync(~0u, found, 0);
  if (__all_sync(~0u, base >= 0 && found == base + at.lane % 16 * D)) {
    rows += base + at.first * D + 8 * at.c;
#pragma unroll
    for (int u = 0; u < at.kTimes; ++u) CopyAsync(to + u * at.kStep, rows + u * at.kRows * D);
  } else {
#pragma unroll 1
    for (int u = 0; u < at.kTimes; ++u) {
      const int64_t row = __shfl_sync(~0u, found, u * at.kRows + at.first);
      CopyAsync(to + u * at.kStep, row < 0 ? rows : rows + row + 8 * at.c, row >= 0);
    }
  }
  CommitCopies();
}

// One warpgroup, the block's first. A warp reads only the keys that it has copied itself.
template <int D, int kBlocks, int kSigns>
__device__ __forceinline__ void Fetch(FoldShared<D, kBlocks, kSigns>& s, const PrefillParams& p) {
  constexpr int kAhead = kSigns == 2 && D == 128 ? 1 : 2;  // angles on their way
  const FoldPart& part = s.part;
  int64_t next = FindToken<D>(p, part, 0);
  for (int i = 0; i < part.chunks; ++i) {
    auto& stage = s.stage[i % 2];
    if (i > 0) Await(s.key_free, i - 1);
    FetchRows<D>(s.key, p.pages.k, next);
    if (i > 1) Await(s.stage_free[i % 2], i / 2 - 1);
    FetchRows<D>(stage.v, p.pages.v, next);
    next = FindToken<D>(p, part, i + 1);

    const FetchPlace<D> at;
    const int half[2] = {at.HalfPiece(0), at.HalfPiece(1)};
    const int first = part.e0 + i * kChunk + 16 * at.warp + at.first;
    float4 cos[kAhead], sin[kAhead];
    const auto load = [&](int u) {
      // Keys of rows that do not enter are zeros: any angle does.
      const int angle = min(first + u * at.kRows, part.until - 1) * (D / 8) + at.c;
      cos[u % kAhead] = __ldg(reinterpret_cast<const float4*>(p.layer.cos) + angle);
      sin[u % kAhead] = __ldg(reinterpret_cast<const float4*>(p.layer.sin) + angle);
    };
#pragma unroll
    for (int u = 0; u < kAhead; ++u) load(u);
    WaitCopies<1>();
    PublishCopies();
    Arrive(s.key_full);
#pragma unroll
    for (int u = 0; u < at.kTimes; ++u) {
      const auto* keys = reinterpret_cast<const uint2*>(s.key + u * at.kStep);
      const uint2 a = keys[half[0]], b = keys[half[1]];
      const float4 cs = cos[u % kAhead], sn = sin[u % kAhead];
      uint2 high[2], low[2];
      Undo(a.x, b.x, {cs.x, cs.y}, {sn.x, sn.y}, high[0].x, high[1].x, low[0].x, low[1].x);
      Undo(a.y, b.y, {cs.z, cs.w}, {sn.z, sn.w}, high[0].y, high[1].y, low[0].y, low[1].y);
      if (u + kAhead < at.kTimes) load(u + kAhead);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        reinterpret_cast<uint2*>(stage.plain[0] + u * at.kStep)[half[k]] = high[k];
        reinterpret_cast<uint2*>(stage.plain[1] + u * at.kStep)[half[k]] = low[k];
      }
    }
    WaitCopies<0>();
    PublishCopies();
    Arrive(s.stage_full[i % 2]);
  }
}

#endif

}  // namespace dsla::cuda
