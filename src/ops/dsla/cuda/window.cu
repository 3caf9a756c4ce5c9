// Exact softmax attention of a chunk's queries over the window and the sinks: tiles of 64 keys,
// online softmax in base 2. Leaves the result in `out` and the log-sum-exp in the workspace, for
// the output kernel to merge with the states.
//
// A block has two chunks of a wave, a warpgroup for each. Where the second follows the first, all
// tiles of keys but one serve both. A row's arithmetic does not depend on that: it goes through the
// sinks, then through its own chunk's tiles from e0 on, all of each, and what other rows see
// changes neither its scores nor when its sums are scaled.
#include "ops/dsla/cuda/prefill.cuh"
#include "ops/dsla/cuda/warpgroup.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSinkGroup = 16;  // sinks are looked at in groups

// Two, if a tile has room for the sinks of both.
__host__ __device__ __forceinline__ int ChunksOfBlock(const Layer& l) {
  return 2 * l.S <= kChunk ? 2 : 1;
}

// A chunk, and where its rows are. Of the block's tiles the i-th has the tokens from base + 64 i
// on, as long as they are this part's; some query sees those in [from, to), of the other chunk too
// where the two share tiles.
struct Part {
  Chunk chunk;
  int base, from, to, pos = 0;
  // Of token 0, if it were in this call, and of the block's KV head.
  const __nv_bfloat16 *k = nullptr, *v = nullptr;
  int64_t row = 0;  // of q and out that belongs to the chunk's row 0
};

template <int D>
struct Tile {  // panels of 64 rows
  uint4 pieces[kChunk * D / 8];
};
template <int D>
struct WindowShared {
  static constexpr int kStages = D == 64 ? 3 : 2;
  Tile<D> q[2], k[kStages], v[kStages];  // the last stage begins with the sinks, group by group
  Part part[2];
};
// Blocks of a multiprocessor, as far as shared memory goes; `mma` takes more registers than wgmma.
template <int D>
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr int kBlocks = D == 128 ? 2 : 3;
#else
inline constexpr int kBlocks = D == 128 ? 1 : 2;
#endif
// Keys of a tile that are taken in at a time: as many as so many blocks have registers for.
template <int D>
inline constexpr int kStep = D == 128 ? kChunk : 32;
template <int D>
inline constexpr int kSinkPieces = kSinkGroup* D / 8;

// Rows [first, first + 64) of 64 columns a panel, zeros instead of those outside of [from, until).
template <int D>
__device__ __forceinline__ void CopyRows(Tile<D>& to, const __nv_bfloat16* row0, int64_t stride,
                                         int first, int from, int until) {
  const int thread = ThreadIndex(), c = thread % 8;
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
template <int D>
__device__ __forceinline__ void FetchTile(const PrefillParams& p, Tile<D>& k, Tile<D>& v,
                                          const Part& part, int h, int first) {
  const int from = part.from, to = part.to;
  if (first >= part.pos) {
    CopyRows<D>(k, part.k, p.rows.k_stride, first, from, to);
    CopyRows<D>(v, part.v, p.rows.v_stride, first, from, to);
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < kChunk * D / 8; i += kThreads) {
    const int row = i / (D / 8), c = i % (D / 8), s = first + row;
    const int place = c / 8 * (kChunk * 8) + Swizzle<8>(row, c % 8);
    const bool valid = s >= from && s < to;
    KvRow at{p.rows.k, p.rows.v};
    if (valid) at = RowOf<D>(p.layer, p.rows, part.chunk.n, h, s);
    CopyAsync(k.pieces + place, at.k + 8 * c, valid);
    CopyAsync(v.pieces + place, at.v + 8 * c, valid);
  }
}

template <int D>
__device__ __forceinline__ void FetchSinks(const PrefillParams& p, uint4* k, uint4* v,
                                           const Part& part, int h) {
  const Layer& l = p.layer;
  const int rows = (l.S + kSinkGroup - 1) / kSinkGroup * kSinkGroup;
  const int to = min(l.S, part.to);
  for (int i = threadIdx.x; i < rows * (D / 8); i += kThreads) {
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

// Rows g and g + 8 of a warp's 16.
template <int D>
struct Rows {
  float acc[D / 64][8][4] = {};
  float base[2] = {-1e30f, -1e30f}, sum[2] = {};  // weights are 2^(score - base)
};
// A row's base follows its largest score only when that is so far above. Weights that are larger
// than 1 are no less exact, and most tiles leave the sums as they are.
constexpr float kFar = 8;

// Takes in keys [first, first + kKeys), at `k` and `v` in tiles of kRows rows. Unless all of them
// are seen, row r of the warp's sees `range(r)`: from which on, and how many (0 at least).
template <int D, int kKeys, int kRows, typename Range>
__device__ __forceinline__ void Attend(Rows<D>& rows, uint32_t q, uint32_t k, uint32_t v,
                                       float scale, int first, bool all_seen, const Range& range) {
  float score[kKeys / 8][4];
  ScoreKeys<D, kKeys, kRows>(score, q, k);
  if (!all_seen) {
    const int thread = ThreadIndex();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int2 seen = range(thread / 4 % 8 + 8 * r);
      const int place = first + thread % 4 * 2 - seen.x;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (static_cast<unsigned>(place + 8 * j + c) >= static_cast<unsigned>(seen.y))
            score[j][2 * r + c] = -INFINITY;
    }
  }
  float shrink[2] = {1, 1};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
      top = fmaxf(top, fmaxf(score[j][2 * r], score[j][2 * r + 1]));
    top = QuadMax(top) * scale;
    if (top > rows.base[r] + kFar) {
      shrink[r] = Exp2(rows.base[r] - top);
      rows.base[r] = top;
    }
  }
  if (__any_sync(~0u, shrink[0] != 1 || shrink[1] != 1)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) rows.sum[r] *= shrink[r];
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) rows.acc[panel][j][c] *= shrink[c / 2];
  }
  uint32_t weights[kKeys / 16][4];
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float a = Exp2(score[j][2 * r] * scale - rows.base[r]);
      const float b = Exp2(score[j][2 * r + 1] * scale - rows.base[r]);
      rows.sum[r] += a + b;
      weights[j / 2][j % 2 * 2 + r] = Pack(a, b);
    }
  AddValues<D, kKeys, kRows>(rows.acc, weights, v);
}

// grid (H, chunks of a wave / chunks of a block)
template <int D>
__global__ void __launch_bounds__(kThreads, kBlocks<D>)
    WindowKernel(const __grid_constant__ PrefillParams p) {
  constexpr int kStages = WindowShared<D>::kStages;
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<WindowShared<D>*>(memory);
  const Layer& l = p.layer;
  const int head = blockIdx.x, h = head / l.G;
  AllowNext();  // reads nothing of the kernel before it, but ends only after it
  // Keys e0 + 1 .. e0 + W + 63 of a chunk in tiles from e0 on.
  const int tiles = (l.W + kChunk - 1) / kChunk + 1;
  if (threadIdx.x < 2) {
    const int chunks = ChunksOfBlock(l), index = chunks * blockIdx.y;
    const Chunk a = ChunkOf(p, index), none{-1, 0, 0, 0};
    const Chunk b = chunks == 2 && index + 1 < p.wave_chunks ? ChunkOf(p, index + 1) : none;
    const bool joined = a.n >= 0 && b.n == a.n && b.e0 == a.e0 + kChunk;
    const Chunk chunk = threadIdx.x == 0 ? a : b;
    const Chunk begin = joined ? a : chunk, end = joined ? b : chunk;
    Part part{chunk, begin.e0, max(l.S, begin.e0 + begin.lo + 1), end.e0 + end.hi + l.W};
    if (threadIdx.x == 1 && !joined) part.base -= tiles * kChunk;
    if (chunk.n >= 0) {
      part.pos = l.pos[chunk.n];
      const int64_t row = l.row_start[chunk.n] - part.pos;
      part.k = p.rows.k + row * p.rows.k_stride + h * D;
      part.v = p.rows.v + row * p.rows.v_stride + h * D;
      part.row = row + chunk.e0 + l.W;
    }
    shared.part[threadIdx.x] = part;
  }
  __syncthreads();
  const Part(&part)[2] = shared.part;
  if (part[0].chunk.n < 0) {  // nor is there a second
    AwaitPrevious();
    return;
  }
  const bool joined =
      part[1].chunk.n == part[0].chunk.n && part[1].chunk.e0 == part[0].chunk.e0 + kChunk;
  const int second = joined ? 1 : tiles;  // the first of the second chunk's
  const int count = part[1].chunk.n < 0 ? tiles : second + tiles;
  const int sink_groups = (l.S + kSinkGroup - 1) / kSinkGroup;
  const auto fetch = [&](int i) {
    const Part& of = part[i >= tiles];
    FetchTile<D>(p, shared.k[i % kStages], shared.v[i % kStages], of, h, of.base + i * kChunk);
  };
  uint4* sink_k = shared.k[kStages - 1].pieces;
  uint4* sink_v = shared.v[kStages - 1].pieces;
  constexpr int kSecondSinks = kChunk / 2 * D / 8;
  for (int i = 0; i < 2 && part[i].chunk.n >= 0; ++i) {
    CopyRows<D>(shared.q[i], p.q + part[i].row * p.q_stride + head * D, p.q_stride, 0,
                part[i].chunk.lo, part[i].chunk.hi);
    if (i == 0 || !joined)
      FetchSinks<D>(p, sink_k + i * kSecondSinks, sink_v + i * kSecondSinks, part[i], h);
  }
  CommitCopies();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < count) fetch(i);
    CommitCopies();
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // one for all of a warp
  const bool mine = part[group].chunk.n >= 0;
  const int begin = group ? second : 0;
  // The first and the last time of this warp's queries.
  const int early = part[group].chunk.e0 + l.W + 16 * warp, late = early + 15;
  const auto of_window = [&](int r) {
    const int time = early + r, from = max(l.S, time - l.W + 1);
    return make_int2(from, max(time - from + 1, 0));
  };
  const auto of_sinks = [&](int r) { return make_int2(0, max(min(l.S, early + r + 1), 0)); };
  const float scale = rsqrtf(static_cast<float>(D)) * 1.4426950408889634f;
  const uint32_t q = SharedAddress(shared.q + group);
  Rows<D> rows;
  WaitCopies<kStages - 1>();
  PublishCopies();
  __syncthreads();
  for (int i = 0; mine && i < sink_groups; ++i) {
    const int at = i * kSinkPieces<D> + (joined ? 0 : group * kSecondSinks);
    Attend<D, kSinkGroup, kSinkGroup>(rows, q, SharedAddress(sink_k + at),
                                      SharedAddress(sink_v + at), scale, kSinkGroup * i, false,
                                      of_sinks);
  }
  for (int i = 0; i < count; ++i) {
    WaitCopies<kStages - 2>();
    PublishCopies();
    __syncthreads();
    if (i + kStages - 1 < count) fetch(i + kStages - 1);
    CommitCopies();
    if (!mine || i < begin || i >= begin + tiles) continue;
#pragma unroll 1
    for (int row = 0; row < kChunk; row += kStep<D>) {
      const int at = part[group].base + i * kChunk + row;
      const bool all_seen = at > late - l.W && at + kStep<D> - 1 <= early && at >= l.S;
      Attend<D, kStep<D>, kChunk>(rows, q, SharedAddress(shared.k + i % kStages) + row * 128,
                                  SharedAddress(shared.v + i % kStages) + row * 128, scale, at,
                                  all_seen, of_window);
    }
  }

  const Part& own = part[group];
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float all = QuadSum(rows.sum[r]);
    inverse[r] = 1 / all;
    const int j = 16 * warp + g + 8 * r;
    if (t == 0 && j >= own.chunk.lo && j < own.chunk.hi)
      p.lse[(int64_t{ChunksOfBlock(l) * blockIdx.y + group} * l.H + head) * kChunk + j] =
          rows.base[r] * 0.6931471805599453f + logf(all);
  }
  // Lanes of even t take all four columns of two lanes of one half of 16 columns, their neighbours
  // those of the other half, so that a row's 32 bytes are written at once.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int j = 16 * warp + g + 8 * r;
    const bool valid = j >= own.chunk.lo && j < own.chunk.hi;
    uint2* out =
        reinterpret_cast<uint2*>(p.out + ((own.row + j) * l.H + head) * D) + (t % 2 * 2 + t / 2);
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      const float(&a)[4] = rows.acc[c / 4][c % 4 * 2], (&b)[4] = rows.acc[c / 4][c % 4 * 2 + 1];
      const uint32_t low = Pack(a[2 * r] * inverse[r], a[2 * r + 1] * inverse[r]);
      const uint32_t high = Pack(b[2 * r] * inverse[r], b[2 * r + 1] * inverse[r]);
      const uint32_t other = __shfl_xor_sync(~0u, t % 2 ? low : high, 1);
      if (valid) out[4 * c] = t % 2 ? make_uint2(other, high) : make_uint2(low, other);
    }
  }
  AwaitPrevious();
}

template <int D>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  const int chunks = ChunksOfBlock(p.layer);
  Start<WindowKernel<D>>("window", dim3(p.layer.H, (p.wave_chunks + chunks - 1) / chunks), kThreads,
                         sizeof(WindowShared<D>), p, stream);
}

}  // namespace

void LaunchWindow(const PrefillParams& p, int D, cudaStream_t stream) {
  D == 64 ? Launch<64>(p, stream) : Launch<128>(p, stream);
}

}  // namespace dsla::cuda
