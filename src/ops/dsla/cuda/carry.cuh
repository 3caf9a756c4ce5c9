// What a block of `carry`, and of the summary and the fold that are the same loop, fetches of a
// chunk.
#pragma once

#include "ops/dsla/cuda/prefill.cuh"

namespace dsla::cuda {

inline constexpr int kCarryThreads = 128, kCarryStages = 3;

// Of a block, which has all value columns: V is read once for so many.
template <int D>
inline constexpr int kCarryChannels = D == 128 ? 32 : 64;

template <int D>
struct alignas(1024) CarryStage {
  uint4 v[kChunk * D / 8];
  uint4 key[kChunk * kCarryChannels<D> / 8];
  float4 decay[kCarryChannels<D> / 2];
  float4 key_sum[4 * kCarryChannels<D> / 4];
};

// V of a chunk whose rows do not lie at one distance. Rows that do not enter have K~ = 0, but 0
// times whatever lies there may be NaN.
template <int D, typename Rows>
__device__ __forceinline__ void CopyScattered(const PrefillParams& p, const Rows& rows, uint4* to,
                                              const Chunk& chunk, int h) {
  constexpr int kPieces = D / 8;
  for (int i = threadIdx.x; i < kChunk * kPieces; i += kCarryThreads) {
    const int row = i / kPieces, c = i % kPieces;
    const bool enters = Enters(p.layer, chunk, row);
    const __nv_bfloat16* v =
        enters ? RowOf<D>(p.layer, rows, chunk.n, h, chunk.e0 + row).v : p.key;  // any address
    CopyAsync(to + Swizzle<kPieces>(row, c), v + 8 * c, enters);
  }
}

template <int D, bool kFold>
__device__ __forceinline__ void FetchCarryValues(const PrefillParams& p, uint4* to,
                                                 const Chunk& chunk, int pos, int64_t row_start,
                                                 int page, int h) {
  const uint32_t thread = ThreadIndex();
  const int from = max(chunk.lo, p.layer.S - chunk.e0);
  if constexpr (kFold) {
    if (page >= 0) {
      const int64_t at = page * p.pages.page_stride +
                         (int64_t{h} * p.pages.page_size + chunk.e0 % p.pages.page_size) * D;
      CopyTile<D, kCarryThreads>(to, p.pages.v + at, D, from, chunk.hi, thread);
    } else {
      CopyScattered<D>(p, p.pages, to, chunk, h);
    }
  } else {
    if (chunk.e0 >= pos) {
      const int64_t row = row_start + (chunk.e0 - pos);
      CopyTile<D, kCarryThreads>(to, p.rows.v + row * p.rows.v_stride + h * D, p.rows.v_stride,
                                 from, chunk.hi, thread);
    } else {
      CopyScattered<D>(p, p.rows, to, chunk, h);
    }
  }
}

// `page` is the chunk's page, or -1 if it lies in several; the other scalars are loaded once or one
// chunk ahead, so that no load waits for another here.
template <int D, bool kFold>
__device__ __forceinline__ void FetchCarryStage(const PrefillParams& p, CarryStage<D>& s,
                                                const Chunk& chunk, int pos, int64_t row_start,
                                                int page, int index, int h, int c0) {
  constexpr int kC = kCarryChannels<D>, kKeyPieces = kC / 8;
  const Layer& l = p.layer;
  const int64_t part = int64_t{index} * l.Hkv + h;
  const __nv_bfloat16* key = p.key + (part * l.SF + c0 / D * D) * kChunk + c0 % D;
  const uint32_t thread = ThreadIndex();
  constexpr int kRows = kCarryThreads / kKeyPieces;  // a multiple of 8, so swizzled alike
  const uint32_t row = thread / kKeyPieces, piece = thread % kKeyPieces;
  uint4* to = s.key + Swizzle<kKeyPieces>(row, piece);
  key += row * D + 8 * piece;
#pragma unroll
  for (int i = 0; i < kChunk / kRows; ++i) CopyAsync(to + i * kCarryThreads, key + i * kRows * D);
  FetchCarryValues<D, kFold>(p, s.v, chunk, pos, row_start, page, h);
  if (thread < kC / 2) CopyAsync(s.decay + thread, p.decay + part * l.SF + c0 + 2 * thread);
  if (thread < kC) {
    const uint32_t quarter = thread / (kC / 4), c = thread % (kC / 4);
    CopyAsync(s.key_sum + thread, p.key_sum + (part * 4 + quarter) * l.SF + c0 + 4 * c);
  }
}

}  // namespace dsla::cuda
