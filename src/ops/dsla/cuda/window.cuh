// Softmax attention of a chunk's queries over the window and the sinks: what fetches keys and
// values, and the online softmax in base 2.
#pragma once

#include "ops/dsla/cuda/prefill.cuh"
#include "ops/dsla/cuda/warpgroup.cuh"

namespace dsla::cuda {

inline constexpr int kSinkGroup = 16;  // sinks are looked at in groups

template <int D>
struct Tile {  // panels of 64 rows
  uint4 pieces[kChunk * D / 8];
};
template <int D>
inline constexpr int kSinkPieces = kSinkGroup* D / 8;

// Keys e0 + 1 .. e0 + W + 63 of a chunk in tiles from e0 on.
__device__ __forceinline__ int TilesOf(const Layer& l) { return (l.W + kChunk - 1) / kChunk + 1; }

// A chunk, and where its rows are. Of the block's tiles the i-th has the tokens from base + 64 i
// on, as long as they are this part's: those in [from, to), all that its queries see.
struct Part {
  Chunk chunk;
  int base, from, to, pos = 0;
  // Of token 0, if it were in this call, and of the block's KV head.
  const __nv_bfloat16 *k = nullptr, *v = nullptr;
  int64_t row = 0;  // of q and out that belongs to the chunk's row 0

  Part() = default;
  __device__ __forceinline__ Part(const PrefillParams& p, const Chunk& chunk, int h, int D)
      : chunk(chunk),
        base(chunk.e0),
        from(max(p.layer.S, chunk.e0 + chunk.lo)),
        to(chunk.e0 + chunk.hi + p.layer.W) {
    const Layer& l = p.layer;
    if (chunk.n < 0) return;
    pos = l.pos[chunk.n];
    row = l.row_start[chunk.n] - pos;
    k = p.rows.k + row * p.rows.k_stride + h * D;
    v = p.rows.v + row * p.rows.v_stride + h * D;
    row += chunk.e0 + l.W;
  }
};

// Rows [first, first + 64) of 64 columns a panel, zeros instead of those outside of [from, until).
// As the functions below by kThreads threads: all of a block, or a warpgroup.
template <int D, int kThreads>
__device__ __forceinline__ void CopyRows(Tile<D>& to, const __nv_bfloat16* row0, int64_t stride,
                                         int first, int from, int until) {
  const int thread = ThreadIndex() % kThreads, c = thread % 8;
  const auto bytes = static_cast<int>(2 * stride);  // 32 bits: an address is one multiplication
#pragma unroll
  for (int i = 0; i < kChunk * 8 / kThreads; ++i) {
    const int row = thread / 8 + i * (kThreads / 8);
    const char* at =
        reinterpret_cast<const char*>(row0 + 8 * c) + int64_t{first + row} * int64_t{bytes};
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel)
      CopyAsync(to.pieces + panel * (kChunk * 8) + Swizzle<8>(row, c), at + 128 * panel,
                first + row >= from && first + row < until);
  }
}

// Tokens [first, first + 64) of a part's.
template <int D, int kThreads>
__device__ __forceinline__ void FetchTile(const PrefillParams& p, Tile<D>& k, Tile<D>& v,
                                          const Part& part, int h, int first) {
  const int from = part.from, to = part.to;
  if (first >= part.pos) {
    CopyRows<D, kThreads>(k, part.k, p.rows.k_stride, first, from, to);
    CopyRows<D, kThreads>(v, part.v, p.rows.v_stride, first, from, to);
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x % kThreads; i < kChunk * D / 8; i += kThreads) {
    const int row = i / (D / 8), c = i % (D / 8), s = first + row;
    const int place = c / 8 * (kChunk * 8) + Swizzle<8>(row, c % 8);
    const bool valid = s >= from && s < to;
    KvRow at{p.rows.k, p.rows.v};
    if (valid) at = RowOf<D>(p.layer, p.rows, part.chunk.n, h, s);
    CopyAsync(k.pieces + place, at.k + 8 * c, valid);
    CopyAsync(v.pieces + place, at.v + 8 * c, valid);
  }
}

template <int D, int kThreads>
__device__ __forceinline__ void FetchSinks(const PrefillParams& p, uint4* k, uint4* v,
                                           const Part& part, int h) {
  const Layer& l = p.layer;
  const int rows = (l.S + kSinkGroup - 1) / kSinkGroup * kSinkGroup;
  const int to = min(l.S, part.to);
  for (int i = threadIdx.x % kThreads; i < rows * (D / 8); i += kThreads) {
    const int s = i / (D / 8), c = i % (D / 8);
    const int place = s / kSinkGroup * kSinkPieces<D> + c / 8 * (kSinkGroup * 8) +
                      Swizzle<8>(s % kSinkGroup, c % 8);
    KvRow at{p.rows.k, p.rows.v};
    if (s < to && s < part.pos) {
      const std::byte* slot = SlotBase(l, part.chunk.n);
      const int64_t row = (int64_t{h} * l.S + s) * D;
      at = {reinterpret_cast<const __nv_bfloat16*>(slot + l.at.sink_k) + row,
            reinterpret_cast<const __nv_bfloat16*>(slot + l.at.sink_v) + row};
    } else if (s < to) {
      at = {part.k + s * p.rows.k_stride, part.v + s * p.rows.v_stride};
    }
    CopyAsync(k + place, at.k + 8 * c, s < to);
    CopyAsync(v + place, at.v + 8 * c, s < to);
  }
}

// What a query at `time` sees: from which token on, and how many (0 at least).
__device__ __forceinline__ int2 SeenOfWindow(const Layer& l, int time) {
  const int from = max(l.S, time - l.W + 1);
  return make_int2(from, max(time - from + 1, 0));
}
__device__ __forceinline__ int2 SeenOfSinks(const Layer& l, int time) {
  return make_int2(0, max(min(l.S, time + 1), 0));
}

// What a warp's 16 queries see, by `range(r)`: later ones see from later tokens on, and later ones.
struct Seen {
  int2 early, late, row[2];  // of the first and the last; of this lane's rows g and g + 8
  int column;                // this lane's first, 2t
  template <typename Range>
  __device__ __forceinline__ explicit Seen(const Range& range) : early(range(0)), late(range(15)) {
    const int thread = ThreadIndex();
#pragma unroll
    for (int r = 0; r < 2; ++r) row[r] = range(thread / 4 % 8 + 8 * r);
    column = thread % 4 * 2;
  }
};

// Scores of tokens from `first` on that a row does not see become -inf. True for 16 of them that no
// row sees, of which nothing need be worked out.
template <int n>
__device__ __forceinline__ void HideUnseen(float (&score)[n][4], bool (&unseen)[n / 2], int first,
                                           const Seen& seen) {
  int place[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) place[r] = first + seen.column - seen.row[r].x;
#pragma unroll
  for (int c = 0; c < n / 2; ++c) {
    const int at = first + 16 * c;
    unseen[c] = at + 16 <= seen.early.x || at >= seen.late.x + seen.late.y;
    if (at >= seen.late.x && at + 16 <= seen.early.x + seen.early.y) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = i / 2 % 2;
      if (static_cast<unsigned>(place[r] + 16 * c + i / 4 * 8 + i % 2) >=
          static_cast<unsigned>(seen.row[r].y))
        score[2 * c + i / 4][i % 4] = -INFINITY;
    }
  }
}

// Rows g and g + 8 of a warp's 16.
inline constexpr float kNoBase = -1e30f;
template <int D>
struct Rows {
  float acc[D / 64][8][4] = {};
  float base[2] = {kNoBase, kNoBase}, sum[2] = {};  // weights are 2^(score - base)
};

// A row's base follows its largest score only when that is so far above. Weights that are larger
// than 1 are no less exact, and most tiles leave the sums as they are.
constexpr float kFar = 8;
template <int D, int n>
__device__ __forceinline__ void RaiseBase(Rows<D>& rows, const float (&score)[n][4], float scale) {
  float shrink[2] = {1, 1};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < n; ++j) top = fmaxf(top, fmaxf(score[j][2 * r], score[j][2 * r + 1]));
    top = QuadMax(top) * scale;
    if (top > rows.base[r] + kFar) {
      if (rows.base[r] != kNoBase) shrink[r] = Exp2(rows.base[r] - top);
      rows.base[r] = top;
    }
  }
  if (!__any_sync(~0u, shrink[0] != 1 || shrink[1] != 1)) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) rows.sum[r] *= shrink[r];
#pragma unroll
  for (int panel = 0; panel < D / 64; ++panel)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) rows.acc[panel][j][c] *= shrink[c / 2];
}

// The weights of 16 tokens as A operand, added to the rows' sums.
__device__ __forceinline__ void Weigh(uint32_t (&weights)[4], float (&sum)[2],
                                      const float (&left)[4], const float (&right)[4], float scale,
                                      const float (&base)[2], bool unseen = false) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weights[i] = 0;
    if (unseen) continue;
    const int r = i % 2;
    const float(&of)[4] = i < 2 ? left : right;
    const float a = Exp2(of[2 * r] * scale - base[r]);
    const float b = Exp2(of[2 * r + 1] * scale - base[r]);
    sum[r] += a + b;
    weights[i] = Pack(a, b);
  }
}

// Takes in keys [first, first + kKeys), at `k` and `v` in tiles of kRows rows. Unless all of them
// are seen, row r of the warp's sees `range(r)`.
template <int D, int kKeys, int kRows, typename Range>
__device__ __forceinline__ void Attend(Rows<D>& rows, uint32_t q, uint32_t k, uint32_t v,
                                       float scale, int first, bool all_seen, const Range& range) {
  float score[kKeys / 8][4];
  ScoreKeys<D, kKeys, kRows>(score, q, k);
  bool unseen[kKeys / 16] = {};
  if (!all_seen) HideUnseen(score, unseen, first, Seen(range));
  RaiseBase(rows, score, scale);
  uint32_t weights[kKeys / 16][4];
#pragma unroll
  for (int c = 0; c < kKeys / 16; ++c)
    Weigh(weights[c], rows.sum, score[2 * c], score[2 * c + 1], scale, rows.base, unseen[c]);
  AddValues<D, kKeys, kRows>(rows.acc, weights, v);
}

}  // namespace dsla::cuda
