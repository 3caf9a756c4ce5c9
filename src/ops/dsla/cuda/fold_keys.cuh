// The warpgroup of `fold` that has the keys: it copies a chunk's keys and values out of the pages,
// makes phi_k of the keys, and leaves them with RoPE undone.
#pragma once

#include "ops/dsla/cuda/fold.cuh"

namespace dsla::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Of a lane of a warp that fetches: of the warp's 16 tokens of a chunk, 8 of each half, those from
// `first` on, kRows apart, and of their rows the piece c, or dimensions 4 c .. 4 c + 3 of both
// halves of a head.
template <int D>
struct FetchPlace {
  static constexpr int kOfRow = D / 8, kRows = 32 / kOfRow, kTimes = 16 / kRows;
  static constexpr int kStep = 4 * kRows * 8;  // pieces of a tile between such rows
  int lane, warp, first, c, row;
  __device__ __forceinline__ FetchPlace() {
    const uint32_t i = ThreadAgain();
    lane = i % 32;
    warp = i / 32;
    first = lane / kOfRow;
    c = lane % kOfRow;
    row = first / 2 * 8 + 2 * warp + first % 2;
  }
  // The chunk's token that is number first + kRows u of the warp's.
  __device__ __forceinline__ int Token(int u) const {
    const int m = first + u * kRows;
    return m / 8 * (kChunk / 2) + 8 * warp + m % 8;
  }
  __device__ __forceinline__ int Piece() const {
    return c / 8 * (kChunk * 8) + Swizzle<8>(row, c % 8);
  }
  __device__ __forceinline__ int HalfPiece(int half) const {
    const int d = half * (D / 2) + 4 * c;
    return 2 * (d / 64 * (kChunk * 8) + Swizzle<8>(row, d % 64 / 8)) + d / 4 % 2;
  }
};

// Chunk i is copied by tensor maps: it enters whole, and a page has all of it.
__device__ __forceinline__ bool IsWhole(const FoldParams& p, const FoldPart& part, int i) {
  return p.in_pages && i >= part.lead && i < part.tail;
}

struct PagedToken {
  int page, row;  // in the sequence's list of pages, in that page
};
__device__ __forceinline__ PagedToken FindToken(const PrefillParams& p, const FoldPart& part,
                                                int token) {
  // The quotient may be one off.
  int page = static_cast<int>(static_cast<float>(token) * part.pages_of_token);
  int row = token - page * p.pages.page_size;
  const int step = row < 0 ? -1 : row >= p.pages.page_size ? 1 : 0;
  return {part.first_page + page + step, row - step * p.pages.page_size};
}
// The row of page number `number` among those of all pages, of this block's head.
template <int D>
__device__ __forceinline__ int RowOf(const PrefillParams& p, int number, int row) {
  const int rows = static_cast<int>(p.pages.page_stride / D),
            h = static_cast<int>(Fresh(blockIdx.x));
  return number * rows + h * p.pages.page_size + row;
}

// A lane's rows of chunk i, one by one; zeros for what does not enter.
template <int D>
__device__ __forceinline__ void FetchRows(uint4* to, const PrefillParams& p, const FoldPart& part,
                                          const __nv_bfloat16* rows, int i) {
  const FetchPlace<D> at;
  // Each lane finds one of the rows that it has in common with others.
  const int token = part.e0 + i * kChunk + at.Token(at.c % at.kTimes);
  int found = -1;
  if (token >= p.layer.S && token < part.until) {
    const PagedToken x = FindToken(p, part, token);
    found = RowOf<D>(p, p.pages.pages[x.page], x.row);
  }
  __syncwarp();
  to += at.Piece();
  rows += 8 * at.c;
#pragma unroll 1
  for (int u = 0; u < at.kTimes; ++u) {
    const int row = __shfl_sync(~0u, found, u, at.kOfRow);
    CopyAsync(to + u * at.kStep, rows + int64_t{max(row, 0)} * D, row >= 0);
  }
}

// The angles of the same tokens, of which a row has half the pieces. Keys of rows that do not enter
// are zeros: any angle does.
template <int D>
__device__ __forceinline__ void FetchAngles(uint4* to, const FoldPart& part, const float* table,
                                            int i) {
  const FetchPlace<D> at;
  const int first = part.e0 + i * kChunk;
  to += at.Piece();
#pragma unroll 1
  for (int u = 0; u < at.kTimes; ++u) {
    const int64_t token = min(first + at.Token(u), part.until - 1);
    CopyAsync(to + u * at.kStep, table + token * (D / 2) + 4 * at.c);
  }
}

// Undoes the RoPE of keys, in whose place their sines are.
template <int D>
__device__ __forceinline__ void UndoRope(const uint4* keys, const uint4* cosines, uint4* plain) {
  const FetchPlace<D> at;
  const int half[2] = {at.HalfPiece(0), at.HalfPiece(1)};
#pragma unroll
  for (int u = 0; u < at.kTimes; ++u) {
    const int row = u * at.kStep;
    const float4 sn = *reinterpret_cast<const float4*>(plain + at.Piece() + row);
    const float4 cs = *reinterpret_cast<const float4*>(cosines + at.Piece() + row);
    const auto* from = reinterpret_cast<const uint2*>(keys + row);
    auto* to = reinterpret_cast<uint2*>(plain + row);
    const uint2 a = from[half[0]], b = from[half[1]];
    uint2 x[2];
    UndoToHalf(a.x, b.x, {cs.x, cs.y}, {sn.x, sn.y}, x[0].x, x[1].x);
    UndoToHalf(a.y, b.y, {cs.z, cs.w}, {sn.z, sn.w}, x[0].y, x[1].y);
    __syncwarp();  // all have the row's angles
    to[half[0]] = x[0];
    to[half[1]] = x[1];
  }
}

// Of a quad's two tokens: exponentials of the logits over the channels, and what makes their
// softmax of them.
template <int D>
__device__ __forceinline__ float2 Exponentials(float (&y)[D / 8][4]) {
  float most[2] = {y[0][0], y[0][2]}, sum[2] = {};
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) most[r] = fmaxf(most[r], fmaxf(y[j][2 * r], y[j][2 * r + 1]));
#pragma unroll
  for (int r = 0; r < 2; ++r) most[r] = QuadMax(most[r]) * kLog2e;
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      y[j][e] = Exp2(y[j][e] * kLog2e - most[e / 2]);
      sum[e / 2] += y[j][e];
    }
  return {Reciprocal(QuadSum(sum[0])), Reciprocal(QuadSum(sum[1]))};
}

// Where a lane has its features of channels 2t and 2t + 1 to go: 16 bits each, for one register.
template <int D>
__device__ __forceinline__ uint32_t LaneFeatures() {
  const uint32_t i = threadIdx.x, warp = i / 32, g = i / 4 % 8, t = i % 4;
  return (2 * FeaturePlace<D>(2 * t, g / 2, warp) + g % 2) |
         (2 * FeaturePlace<D>(2 * t + 1, g / 2, warp) + g % 2) << 16;
}
// For the warpgroup that folds these 64 channels.
template <int D, int kBlocks>
__device__ __forceinline__ void StoreFeatures(FoldShared<D, kBlocks>& s, int group, uint32_t places,
                                              const float (&y)[D / 8][4], float2 scale) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float2* to = reinterpret_cast<float2*>(s.feature) + (e == 0 ? places & 0xffff : places >> 16);
#pragma unroll
    for (int j = 8 * group; j < 8 * group + 8; ++j)
      to[j * 64] = {y[j][e] * scale.x, y[j][2 + e] * scale.y};
  }
}

// All that the block's first warpgroup does. One lane starts the copies of whole chunks, and all
// lanes those of others.
template <int D, int kBlocks>
__device__ __forceinline__ void FoldKeys(FoldShared<D, kBlocks>& s, const FoldParams& p, int warp) {
  constexpr int kBytes = sizeof(typename FoldShared<D, kBlocks>::Tile), kPanels = D / 64;
  const FoldPart& part = s.part;
  if (part.chunks == 0) return;
  const uint32_t places = LaneFeatures<D>();
  // Of chunk i, whose first row is `row`.
  const auto fetch_keys = [&](int i, int row) {
    uint4* sines = s.plain[i % 2];
    if (IsWhole(p, part, i)) {
      if (warp > 0 || !Elect()) return;
      ArriveExpecting(s.key_here, 3 * kBytes);
      CopyChunk<kPanels>(s.key, p.keys, row, s.key_here);
      CopyChunk<kPanels>(sines, p.sines, part.e0 + i * kChunk, s.key_here);
      CopyChunk<kPanels>(s.cosines, p.cosines, part.e0 + i * kChunk, s.key_here);
    } else {
      FetchRows<D>(s.key, p, part, p.pages.k, i);
      FetchAngles<D>(sines, part, p.layer.sin, i);
      FetchAngles<D>(s.cosines, part, p.layer.cos, i);
      CommitCopies();
      if (warp == 0 && Elect()) ArriveExpecting(s.key_here, 0);  // phases go on
    }
  };
  const auto fetch_values = [&](int i, int row) {
    if (IsWhole(p, part, i)) {
      if (warp > 0 || !Elect()) return;
      ArriveExpecting(s.value_here, kBytes);
      CopyChunk<kPanels>(s.v[i % 2], p.values, row, s.value_here);
    } else {
      FetchRows<D>(s.v[i % 2], p, part, p.pages.v, i);
      CommitCopies();
      if (warp == 0 && Elect()) ArriveExpecting(s.value_here, 0);
    }
  };
  const auto row_of = [&](int i) {
    const PagedToken x = FindToken(p, part, min(part.e0 + i * kChunk, part.until - 1));
    return RowOf<D>(p, p.pages.pages[x.page], x.row);
  };
  int row = row_of(0);
  fetch_keys(0, row);
  for (int i = 0; i < part.chunks; ++i) {
    const int next = row_of(i + 1);
    const bool whole = IsWhole(p, part, i);
    if (!whole) {
      WaitCopies<0>();
      PublishCopies();
      Barrier<128>(0);
    }
    Await(s.key_here, i);
    float y[D / 8][4];
    StartScores<D, D, D>(y, SharedAddress(s.key), SharedAddress(s.phi));
    UndoRope<D>(s.key, s.cosines, s.plain[i % 2]);
    PublishCopies();
    Arrive(s.plain_full[i % 2]);
    WaitProducts<0>();
    Pin(y);
    Barrier<128>(0);  // all have done with keys and angles

    if (i + 1 < part.chunks) {
      if (i > 0) Await(s.plain_free[(i + 1) % 2], (i - 1) / 2);
      fetch_keys(i + 1, next);
    }
    if (i > 1) Await(s.value_free[i % 2], (i - 1) / 2);
    fetch_values(i, row);
    row = next;
    const float2 scale = Exponentials<D>(y);
    if (!whole) {
      WaitCopies<0>();
      PublishCopies();
    }
    Await(s.value_here, i);
#pragma unroll
    for (int group = 0; group < s.kGroups; ++group) {
      if (i > 0) Await(s.feature_free[group], i - 1);
      StoreFeatures(s, group, Fresh(places), y, scale);
      Arrive(s.feature_full[group]);
    }
  }
}

#endif

}  // namespace dsla::cuda
