// The warpgroup of `fold` that has the keys: it copies a chunk's keys and values out of the pages,
// makes phi_k of the keys, and leaves them with RoPE undone.
#pragma once

#include "ops/dsla/cuda/fold.cuh"

namespace dsla::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Of a lane of a warp that fetches: of the warp's 16 tokens of a chunk those from `first` on,
// kRows apart, and of their rows the piece c, or dimensions 4 c .. 4 c + 3 of both halves.
template <int D>
struct FetchPlace {
  static constexpr int kOfRow = D / 8, kRows = 32 / kOfRow, kTimes = 16 / kRows;
  static constexpr int kStep = -4 * kRows * 8;  // pieces of a tile between such rows
  int lane, warp, first, c, row;
  __device__ __forceinline__ FetchPlace() {
    const uint32_t i = Fresh(threadIdx.x);
    lane = i % 32;
    warp = i / 32;
    first = lane / kOfRow;
    c = lane % kOfRow;
    row = (15 - first) / 2 * 8 + 2 * warp + (15 - first) % 2;
  }
  __device__ __forceinline__ int Piece() const {
    return c / 8 * (kChunk * 8) + Swizzle<8>(row, c % 8);
  }
  __device__ __forceinline__ int HalfPiece(int half) const {
    const int d = half * (D / 2) + 4 * c;
    return 2 * (d / 64 * (kChunk * 8) + Swizzle<8>(row, d % 64 / 8)) + d / 4 % 2;
  }
};

// The page and the row in it of the warp's token lane % 16 of chunk i; -1 if it does not enter.
struct PagedToken {
  int page, row;
};
template <int D>
__device__ __forceinline__ PagedToken FindToken(const PrefillParams& p, const FoldPart& part,
                                                const int32_t* pages, int i) {
  const FetchPlace<D> at;
  const int token = part.e0 + i * kChunk + 16 * at.warp + at.lane % 16;
  if (i >= part.chunks || token < p.layer.S || token >= part.until) return {-1, -1};
  return {pages[token / p.pages.page_size], token % p.pages.page_size};
}
// Where it lies, in elements; negative if it does not enter. Asked some time after the page has
// been looked up, so that nobody waits for that.
template <int D>
__device__ __forceinline__ int64_t PlaceOf(const PrefillParams& p, const PagedToken& x) {
  return x.row < 0 ? -1 : PlaceIn<D>(p.pages, x.page, blockIdx.x, x.row);
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
}

// The last position whose angles are read; where nothing enters any row of the tables does.
__device__ __forceinline__ int LastAngle(const FoldPart& part) { return max(part.until - 1, 0); }

// Where the tables have the angles of a lane's rows of a chunk.
template <int D>
struct AnglePlace {
  int first, last;
  __device__ __forceinline__ AnglePlace(const FoldPart& part, int i) {
    const FetchPlace<D> at;
    first = part.e0 + i * kChunk + 16 * at.warp + at.first;
    last = LastAngle(part);
  }
  __device__ __forceinline__ const float4* In(const float* table, int u) const {
    const FetchPlace<D> at;
    // Keys of rows that do not enter are zeros: any angle does.
    return reinterpret_cast<const float4*>(table) + min(first + u * at.kRows, last) * (D / 8) +
           at.c;
  }
};

// Cosines come with the keys, and wait where the second term will be: a lane's rows, of which it
// has half the pieces.
template <int D>
__device__ __forceinline__ void FetchCosines(uint4* to, const float* cos,
                                             const AnglePlace<D>& angles) {
  const FetchPlace<D> at;
  to += at.Piece();
#pragma unroll
  for (int u = 0; u < at.kTimes; ++u) CopyAsync(to + u * at.kStep, angles.In(cos, u));
}

// There is no such place for sines. They are read some rows before their use, and brought to the L2
// cache when the keys are: blocks of all heads want them at once, and all would wait for memory.
template <int D>
__device__ __forceinline__ void PrefetchSines(const float* sin, const FoldPart& part, int i) {
  constexpr int kLines = D / 64;  // of 128 bytes, in a row of the table
  const FetchPlace<D> at;
  const int token = part.e0 + i * kChunk + 16 * at.warp + at.lane / kLines % 16;
  PrefetchToL2(sin + min(token, LastAngle(part)) * (D / 2) + at.lane % kLines * 32);
}
template <int D>
struct Sines {
  static constexpr int kAhead = 256 / D;
  AnglePlace<D> angles;
  const float* sin;
  float4 x[kAhead];

  __device__ __forceinline__ Sines(const float* sin, const AnglePlace<D>& angles)
      : angles(angles), sin(sin) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) x[u] = __ldg(angles.In(sin, u));
  }
  // Of row u; those of one further on are then on their way.
  __device__ __forceinline__ float4 Take(int u) {
    const float4 now = x[u % kAhead];
    if (u + kAhead < FetchPlace<D>::kTimes) x[u % kAhead] = __ldg(angles.In(sin, u + kAhead));
    return now;
  }
};

// Undoes the RoPE of the keys that lie in the first term's place.
template <int D>
__device__ __forceinline__ void UndoRope(uint4* high, uint4* low, Sines<D>& sines) {
  const FetchPlace<D> at;
  const int half[2] = {at.HalfPiece(0), at.HalfPiece(1)};
#pragma unroll
  for (int u = 0; u < at.kTimes; ++u) {
    auto* to_high = reinterpret_cast<uint2*>(high + u * at.kStep);
    auto* to_low = reinterpret_cast<uint2*>(low + u * at.kStep);
    const float4 cs = *reinterpret_cast<const float4*>(low + at.Piece() + u * at.kStep);
    const uint2 a = to_high[half[0]], b = to_high[half[1]];
    const float4 sn = sines.Take(u);
    uint2 x[2], y[2];  // both terms of both halves
    Undo(a.x, b.x, {cs.x, cs.y}, {sn.x, sn.y}, x[0].x, x[1].x, y[0].x, y[1].x);
    Undo(a.y, b.y, {cs.z, cs.w}, {sn.z, sn.w}, x[0].y, x[1].y, y[0].y, y[1].y);
    __syncwarp();  // all have the row's cosines
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      to_high[half[k]] = x[k];
      to_low[half[k]] = y[k];
    }
  }
}

// Of a quad's two tokens: softmax of the logits over the channels.
template <int D>
__device__ __forceinline__ void Normalise(float (&y)[D / 8][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float most = -INFINITY, sum = 0;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) most = fmaxf(most, fmaxf(y[j][2 * r], y[j][2 * r + 1]));
    most = QuadMax(most) * kLog2e;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = y[j][2 * r + e];
        x = Exp2(x * kLog2e - most);
        sum += x;
      }
    const float inverse = Reciprocal(QuadSum(sum));
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      y[j][2 * r] *= inverse;
      y[j][2 * r + 1] *= inverse;
    }
  }
}

// For the warpgroup that folds these 64 channels.
template <int D, int kBlocks>
__device__ __forceinline__ void StoreFeatures(FoldShared<D, kBlocks>& s, int group,
                                              const float (&y)[D / 8][4]) {
  const uint32_t i = Fresh(threadIdx.x);
  const int warp = i / 32, g = i / 4 % 8, t = i % 4;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int place = FeaturePlace<D>(64 * group + 2 * t + e, g / 2, warp);
    float2* to = reinterpret_cast<float2*>(s.feature + place) + g % 2;
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j * 64] = {y[8 * group + j][e], y[8 * group + j][2 + e]};
  }
}

// All that the block's first warpgroup does. A warp undoes the RoPE of the keys that it has copied.
template <int D, int kBlocks>
__device__ __forceinline__ void FoldKeys(FoldShared<D, kBlocks>& s, const PrefillParams& p) {
  const FoldPart& part = s.part;
  const int32_t* pages = p.pages.pages + p.pages.page_start[part.n];
  int64_t now = PlaceOf<D>(p, FindToken<D>(p, part, pages, 0));
  FetchRows<D>(s.plain[0][0], p.pages.k, now);
  FetchCosines<D>(s.plain[0][1], p.layer.cos, {part, 0});
  CommitCopies();
  for (int i = 0; i < part.chunks; ++i) {
    auto& plain = s.plain[i % 2];
    const PagedToken following = FindToken<D>(p, part, pages, i + 1);
    WaitCopies<0>();
    PublishCopies();
    Barrier<128>(0);
    Sines<D> sines(p.layer.sin, {part, i});
    float y[D / 8][4];
    ScoreKeys<D, D, D>(y, SharedAddress(plain[0]), SharedAddress(s.phi));
    Barrier<128>(0);  // all have done with the keys as they were
    UndoRope<D>(plain[0], plain[1], sines);
    PublishCopies();
    Arrive(s.plain_full[i % 2]);

    if (i > 0) Await(s.value_free[i % 2], (i - 1) / 2);
    FetchRows<D>(s.v[i % 2], p.pages.v, now);
    CommitCopies();
    now = PlaceOf<D>(p, following);
    if (i + 1 < part.chunks) {
      if (i > 0) Await(s.plain_free[(i + 1) % 2], (i - 1) / 2);
      FetchRows<D>(s.plain[(i + 1) % 2][0], p.pages.k, now);
      FetchCosines<D>(s.plain[(i + 1) % 2][1], p.layer.cos, {part, i + 1});
      PrefetchSines<D>(p.layer.sin, part, i + 1);
    }
    CommitCopies();

    Normalise<D>(y);
    WaitCopies<1>();
    PublishCopies();
#pragma unroll
    for (int group = 0; group < s.kGroups; ++group) {
      if (i > 0) MeetAt(Meeting::kFree, group);
      StoreFeatures(s, group, y);
      ArriveAt(Meeting::kFull, group);
    }
  }
  // Nobody is to be left at a barrier.
  for (int group = 0; group < s.kGroups && part.chunks > 0; ++group) MeetAt(Meeting::kFree, group);
}

#endif

}  // namespace dsla::cuda
