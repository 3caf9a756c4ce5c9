// What `fold` has in shared memory, and the warps that fill it: keys and values of a chunk out of
// the pages, and the keys with RoPE undone.
//
// Tiles are panels as warpgroup.cuh has them. Row 8 j + 2 t + i of a chunk's tiles has token
// 16 t + 2 j + i: a lane of an accumulator with tokens for columns then has 16 tokens in a row.
#pragma once

#include "ops/dsla/cuda/prepare.cuh"
#include "ops/dsla/cuda/warpgroup.cuh"

namespace dsla::cuda {

// The cut of a sequence into segments: its length and the shape alone decide it.
inline constexpr int kLeastSegment = 8;  // chunks: weights are loaded once for all of them

// Chunks of one sequence that a block folds.
struct FoldPart {
  int n, segment, segments;  // the segment and how many the sequence has; n < 0: none
  int e0, chunks;
  int until;  // the first of the sequence's tokens that does not enter
};

// Chunks [8, ..) of a segment of a sequence with so many chunks.
__device__ __forceinline__ int FoldSegmentChunks(const PrefillParams& p, int chunks) {
  return max(kLeastSegment, (chunks + p.most_segments - 1) / p.most_segments);
}
__device__ __forceinline__ int FoldChunks(const PrefillParams& p, int n) {
  return (max(p.layer.pos[n] - p.layer.W, 0) + kChunk - 1) / kChunk;
}
__device__ __forceinline__ int FoldSegments(const PrefillParams& p, int n) {
  const int chunks = FoldChunks(p, n), each = FoldSegmentChunks(p, chunks);
  return max((chunks + each - 1) / each, 1);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void InitBarrier(uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(&barrier)),
               "r"(arrivals)
               : "memory");
}
// For a whole warp, once all of its lanes have come here.
__device__ __forceinline__ void Arrive(uint64_t& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0)
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(
                     SharedAddress(&barrier))
                 : "memory");
}
// Waits for the end of the barrier's phase `phase`, counted from 0, the last or the one before.
__device__ __forceinline__ void Await(uint64_t& barrier, int phase) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(SharedAddress(&barrier)), "r"(phase & 1)
        : "memory");
  } while (!done);
}

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
    uint32_t* to =
        reinterpret_cast<uint32_t*>(s.weight[m][channel / 64] + c / 4 * (64 * 8)) + t;
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

// One warpgroup: each warp has 16 tokens of every chunk, and reads the keys that it has copied.
template <int D, int kBlocks, int kSigns>
__device__ __forceinline__ void Produce(FoldShared<D, kBlocks, kSigns>& s, const PrefillParams& p) {
  constexpr int kOfRow = D / 8, kRows = 32 / kOfRow, kTimes = 16 / kRows;
  constexpr int kStep = 4 * kRows * 8;  // pieces of a tile between a lane's rows
  constexpr int kAhead = 2;             // angles on their way
  const Layer& l = p.layer;
  const FoldPart part = s.part;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, h = blockIdx.x;
  const int from = l.S, until = part.until;
  // Where lane r finds token r % 16 of the warp's.
  const auto find = [&](int i) -> int64_t {
    const int token = part.e0 + i * kChunk + 16 * warp + lane % 16;
    if (i >= part.chunks || token < from || token >= until) return -1;
    return RowOf<D>(l, p.pages, part.n, h, token).k - p.pages.k;
  };
  // A lane's first row, and its piece of each. It then undoes dimensions 4 c .. 4 c + 3 of both
  // halves.
  const int first = lane / kOfRow, c = lane % kOfRow;
  const int row = first / 2 * 8 + 2 * warp + first % 2;
  const int place = c / 8 * (kChunk * 8) + Swizzle<8>(row, c % 8);
  int half[2];  // in pieces of 8 bytes
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int d = k * (D / 2) + 4 * c;
    half[k] = 2 * (d / 64 * (kChunk * 8) + Swizzle<8>(row, d % 64 / 8)) + d / 4 % 2;
  }
  int64_t next = find(0);
  for (int i = 0; i < part.chunks; ++i) {
    const int64_t found = next;
    auto& stage = s.stage[i % 2];
    const auto copy = [&](uint4* to, const __nv_bfloat16* rows) {
#pragma unroll
      for (int u = 0; u < kTimes; ++u) {
        const int64_t at = __shfl_sync(~0u, found, u * kRows + first);
        CopyAsync(to + place + u * kStep, at < 0 ? rows : rows + at + 8 * c, at >= 0);
      }
      CommitCopies();
    };
    if (i > 0) Await(s.key_free, i - 1);
    copy(s.key, p.pages.k);
    if (i > 1) Await(s.stage_free[i % 2], i / 2 - 1);
    copy(stage.v, p.pages.v);
    next = find(i + 1);

    float4 cos[kAhead], sin[kAhead];
    const auto load = [&](int u) {
      // Keys of rows that do not enter are zeros: any angle does.
      const int token = part.e0 + i * kChunk + 16 * warp + u * kRows + first;
      const unsigned time = token >= from && token < until ? token : 0;
      cos[u % kAhead] = __ldg(reinterpret_cast<const float4*>(l.cos) + time * (D / 8) + c);
      sin[u % kAhead] = __ldg(reinterpret_cast<const float4*>(l.sin) + time * (D / 8) + c);
    };
#pragma unroll
    for (int u = 0; u < kAhead; ++u) load(u);
    WaitCopies<1>();
    PublishCopies();
    Arrive(s.key_full);
#pragma unroll
    for (int u = 0; u < kTimes; ++u) {
      const auto* keys = reinterpret_cast<const uint2*>(s.key + u * kStep);
      const uint2 a = keys[half[0]], b = keys[half[1]];
      const float4 cs = cos[u % kAhead], sn = sin[u % kAhead];
      if (u + kAhead < kTimes) load(u + kAhead);
      uint2 high[2], low[2];
      const auto undo = [&](uint32_t x, uint32_t y, float2 cs, float2 sn, uint32_t(&high)[2],
                            uint32_t(&low)[2]) {
        const float u0 = Low(x) * cs.x + Low(y) * sn.x, u1 = High(x) * cs.y + High(y) * sn.y;
        const float w0 = Low(y) * cs.x - Low(x) * sn.x, w1 = High(y) * cs.y - High(x) * sn.y;
        high[0] = Pack(u0, u1);
        high[1] = Pack(w0, w1);
        low[0] = Pack(u0 - Low(high[0]), u1 - High(high[0]));
        low[1] = Pack(w0 - Low(high[1]), w1 - High(high[1]));
      };
      uint32_t h0[2], h1[2], l0[2], l1[2];
      undo(a.x, b.x, {cs.x, cs.y}, {sn.x, sn.y}, h0, l0);
      undo(a.y, b.y, {cs.z, cs.w}, {sn.z, sn.w}, h1, l1);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        high[k] = {h0[k], h1[k]};
        low[k] = {l0[k], l1[k]};
        reinterpret_cast<uint2*>(stage.plain[0] + u * kStep)[half[k]] = high[k];
        reinterpret_cast<uint2*>(stage.plain[1] + u * kStep)[half[k]] = low[k];
      }
    }
    WaitCopies<0>();
    PublishCopies();
    Arrive(s.stage_full[i % 2]);
  }
}

#endif

}  // namespace dsla::cuda
