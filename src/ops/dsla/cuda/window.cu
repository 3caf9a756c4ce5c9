// Exact softmax attention of a chunk's queries over the window and the sinks: tiles of 64 keys,
// online softmax in base 2. Leaves the result in `out` and the log-sum-exp in the workspace, for
// the output kernel to merge with the states.
//
// A block has two chunks of a wave, a warpgroup for each. Where the second follows the first, all
// tiles of keys but one serve both. A row's arithmetic does not depend on that: it goes through the
// sinks, then through its own chunk's tiles from e0 on, each of them whole.
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

// A chunk, and what is needed to find its rows.
struct Part {
  Chunk chunk;
  int64_t row;      // of q and out that belongs to the chunk's row 0
  int64_t key_row;  // of k and v that would be token 0's
  int pos;
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

// threadIdx.x, such that what follows from it is worked out again in each turn of a loop: kept in
// registers between turns it would be more than there are.
__device__ __forceinline__ int ThreadIndex() {
  int i = threadIdx.x;
  asm volatile("" : "+r"(i));
  return i;
}

// Rows [from, until) of 64 that lie at one distance, zeros elsewhere.
template <int D>
__device__ __forceinline__ void CopyRows(Tile<D>& to, const __nv_bfloat16* row0, int64_t stride,
                                         int from, int until) {
  const int thread = ThreadIndex(), c = thread % 8;
#pragma unroll
  for (int i = 0; i < kChunk * 8 / kThreads; ++i) {
    const int row = thread / 8 + i * (kThreads / 8);
    const __nv_bfloat16* at = row0 + row * stride + 8 * c;
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel)
      CopyAsync(to.pieces + panel * (kChunk * 8) + Swizzle<8>(row, c), at + 64 * panel,
                row >= from && row < until);
  }
}

// Keys [first, first + 64), of which [from, to) are read.
template <int D>
__device__ __forceinline__ void FetchTile(const PrefillParams& p, Tile<D>& k, Tile<D>& v,
                                          const Part& part, int h, int first, int from, int to) {
  const Layer& l = p.layer;
  if (first >= part.pos) {
    const int64_t row = part.key_row + first;
    CopyRows<D>(k, p.rows.k + row * p.rows.k_stride + h * D, p.rows.k_stride, from - first,
                to - first);
    CopyRows<D>(v, p.rows.v + row * p.rows.v_stride + h * D, p.rows.v_stride, from - first,
                to - first);
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < kChunk * D / 8; i += kThreads) {
    const int row = i / (D / 8), c = i % (D / 8), s = first + row;
    const int place = c / 8 * (kChunk * 8) + Swizzle<8>(row, c % 8);
    const bool valid = s >= from && s < to;
    KvRow at{p.rows.k, p.rows.v};
    if (valid) at = RowOf<D>(l, p.rows, part.chunk.n, h, s);
    CopyAsync(k.pieces + place, at.k + 8 * c, valid);
    CopyAsync(v.pieces + place, at.v + 8 * c, valid);
  }
}

template <int D>
__device__ __forceinline__ void FetchSinks(const PrefillParams& p, uint4* k, uint4* v,
                                           const Part& part, int h) {
  const Layer& l = p.layer;
  const int rows = (l.S + kSinkGroup - 1) / kSinkGroup * kSinkGroup;
  const int to = min(l.S, part.chunk.e0 + part.chunk.hi + l.W);
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
      const int64_t row = part.key_row + s;
      at = {p.rows.k + row * p.rows.k_stride + h * D, p.rows.v + row * p.rows.v_stride + h * D};
    }
    CopyAsync(k + place, at.k + 8 * c, s < to);
    CopyAsync(v + place, at.v + 8 * c, s < to);
  }
}

// Rows g and g + 8 of a warp's 16.
template <int D>
struct Rows {
  float acc[D / 64][8][4] = {};
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
};

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
  float base[2], shrink[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float next = rows.top[r];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
      next = fmaxf(next, fmaxf(score[j][2 * r], score[j][2 * r + 1]));
    next = QuadMax(next);
    base[r] = next == -INFINITY ? 0.f : next * scale;
    shrink[r] = Exp2(rows.top[r] * scale - base[r]);
    rows.top[r] = next;
    rows.sum[r] *= shrink[r];
  }
  if (__any_sync(~0u, shrink[0] != 1 || shrink[1] != 1)) {
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
      const float a = Exp2(score[j][2 * r] * scale - base[r]);
      const float b = Exp2(score[j][2 * r + 1] * scale - base[r]);
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
  if (threadIdx.x < 2) {
    const int chunks = ChunksOfBlock(l), index = chunks * blockIdx.y + threadIdx.x;
    Part part{{-1, 0, 0, 0}, 0, 0, 0};
    if (threadIdx.x < chunks && index < p.wave_chunks) part.chunk = ChunkOf(p, index);
    if (part.chunk.n >= 0) {
      part.pos = l.pos[part.chunk.n];
      part.key_row = l.row_start[part.chunk.n] - part.pos;
      part.row = part.key_row + part.chunk.e0 + l.W;
    }
    shared.part[threadIdx.x] = part;
  }
  __syncthreads();
  const Part(&part)[2] = shared.part;
  if (part[0].chunk.n < 0) {  // nor is there a second
    AwaitPrevious();
    return;
  }
  // Keys e0 + 1 .. e0 + W + 63 of a chunk in tiles from e0 on. Of the block's tiles the second
  // chunk's begin at `second`.
  const bool joined =
      part[1].chunk.n == part[0].chunk.n && part[1].chunk.e0 == part[0].chunk.e0 + kChunk;
  const int tiles = (l.W + kChunk - 1) / kChunk + 1, second = joined ? 1 : tiles;
  const int count = part[1].chunk.n < 0 ? tiles : second + tiles;
  const int sink_groups = (l.S + kSinkGroup - 1) / kSinkGroup;
  const auto fetch = [&](int i) {
    const int owner = i >= tiles;
    const Chunk &from = part[owner].chunk, &to = part[joined || owner].chunk;
    FetchTile<D>(p, shared.k[i % kStages], shared.v[i % kStages], part[owner], h,
                 from.e0 + (owner ? i - second : i) * kChunk, max(l.S, from.e0 + from.lo + 1),
                 to.e0 + to.hi + l.W);
  };
  uint4* sink_k = shared.k[kStages - 1].pieces;
  uint4* sink_v = shared.v[kStages - 1].pieces;
  constexpr int kSecondSinks = kChunk / 2 * D / 8;
  for (int i = 0; i < 2 && part[i].chunk.n >= 0; ++i) {
    CopyRows<D>(shared.q[i], p.q + part[i].row * p.q_stride + head * D, p.q_stride,
                part[i].chunk.lo, part[i].chunk.hi);
    if (i == 0 || !joined)
      FetchSinks<D>(p, sink_k + i * kSecondSinks, sink_v + i * kSecondSinks, part[joined ? 1 : i],
                    h);
  }
  CommitCopies();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < count) fetch(i);
    CommitCopies();
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // tells ptxas that a warp has one
  const bool mine = part[group].chunk.n >= 0;
  const int begin = group ? second : 0, e0 = part[group].chunk.e0;
  const int early = e0 + l.W + 16 * warp, late = early + 15;  // times of this warp's queries
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
      const int at = e0 + (i - begin) * kChunk + row;
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
          rows.top[r] * scale * 0.6931471805599453f + logf(all);
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
