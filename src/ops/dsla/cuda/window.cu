// Exact softmax attention of a chunk's queries over the window and the sinks: tiles of 64 keys,
// online softmax in base 2. Leaves the result in `out` and the log-sum-exp in the workspace, for
// the output kernel to merge with the states.
//
// A block has two chunks of a wave, a warpgroup for each. Where the second follows the first, all
// tiles of keys but one serve both. A row's arithmetic does not depend on that: it goes through the
// sinks, then through its own chunk's tiles from e0 on, all of each, and what other rows see
// changes neither its scores nor when its sums are scaled.
#include "ops/dsla/cuda/window.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 256;

// Two, if a tile has room for the sinks of both.
__host__ __device__ __forceinline__ int ChunksOfBlock(const Layer& l) {
  return 2 * l.S <= kChunk ? 2 : 1;
}

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

// The block's parts, by two threads.
__device__ __forceinline__ void PlaceParts(const PrefillParams& p, Part* parts, int h, int D) {
  if (threadIdx.x >= 2) return;
  const Layer& l = p.layer;
  const int chunks = ChunksOfBlock(l), index = chunks * blockIdx.y;
  const Chunk a = ChunkOf(p, index), none{-1, 0, 0, 0};
  const Chunk b = chunks == 2 && index + 1 < p.wave_chunks ? ChunkOf(p, index + 1) : none;
  const bool joined = a.n >= 0 && b.n == a.n && b.e0 == a.e0 + kChunk;
  const Chunk chunk = threadIdx.x == 0 ? a : b;
  Part part(p, chunk, h, D);
  if (joined) {  // the two share tiles
    part.base = a.e0;
    part.from = max(l.S, a.e0 + a.lo);
    part.to = b.e0 + b.hi + l.W;
  } else if (threadIdx.x == 1) {
    part.base -= TilesOf(l) * kChunk;
  }
  parts[threadIdx.x] = part;
}

// The second part's sinks behind the first's, unless they are the same.
template <int D>
inline constexpr int kSecondSinks = kChunk / 2 * D / 8;

template <int D>
__device__ __forceinline__ void FetchQueriesAndSinks(const PrefillParams& p,
                                                     WindowShared<D>& shared, int h, bool joined) {
  constexpr int kLast = WindowShared<D>::kStages - 1;
  for (int i = 0; i < 2 && shared.part[i].chunk.n >= 0; ++i) {
    const Part& part = shared.part[i];
    CopyRows<D, kThreads>(shared.q[i], p.q + part.row * p.q_stride + blockIdx.x * D, p.q_stride, 0,
                          part.chunk.lo, part.chunk.hi);
    const int at = i * kSecondSinks<D>;
    if (i == 0 || !joined)
      FetchSinks<D, kThreads>(p, shared.k[kLast].pieces + at, shared.v[kLast].pieces + at, part, h);
  }
}

// Log-sum-exp and result of a warp's rows.
template <int D>
__device__ __forceinline__ void WriteRows(const PrefillParams& p, const Part& part, int index,
                                          const Rows<D>& rows, int warp, int lane) {
  const Layer& l = p.layer;
  const int head = blockIdx.x, g = lane / 4, t = lane % 4;
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float all = QuadSum(rows.sum[r]);
    inverse[r] = 1 / all;
    const int j = 16 * warp + g + 8 * r;
    if (t == 0 && j >= part.chunk.lo && j < part.chunk.hi)
      p.lse[(int64_t{index} * l.H + head) * kChunk + j] = rows.base[r] * kLn2 + logf(all);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int j = 16 * warp + g + 8 * r;
    const bool valid = j >= part.chunk.lo && j < part.chunk.hi;
    auto* out = reinterpret_cast<uint32_t*>(p.out + ((part.row + j) * l.H + head) * D) + RowWord(t);
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      const float(&a)[4] = rows.acc[c / 4][c % 4 * 2], (&b)[4] = rows.acc[c / 4][c % 4 * 2 + 1];
      const uint2 words = RowWords(Pack(a[2 * r] * inverse[r], a[2 * r + 1] * inverse[r]),
                                   Pack(b[2 * r] * inverse[r], b[2 * r + 1] * inverse[r]), t);
      if (valid) *reinterpret_cast<uint2*>(out + 8 * c) = words;
    }
  }
}

// grid (H, chunks of a wave / chunks of a block)
template <int D>
__global__ void __launch_bounds__(kThreads, kBlocks<D>)
    WindowKernel(const __grid_constant__ PrefillParams p) {
  constexpr int kStages = WindowShared<D>::kStages;
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<WindowShared<D>*>(memory);
  const Layer& l = p.layer;
  const int h = blockIdx.x / l.G;
  AllowNext();  // reads nothing of the kernel before it, but ends only after it
  const int tiles = TilesOf(l);
  PlaceParts(p, shared.part, h, D);
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
    FetchTile<D, kThreads>(p, shared.k[i % kStages], shared.v[i % kStages], of, h,
                           of.base + i * kChunk);
  };
  FetchQueriesAndSinks<D>(p, shared, h, joined);
  CommitCopies();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < count) fetch(i);
    CommitCopies();
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // one for all of a warp
  const bool mine = part[group].chunk.n >= 0;
  const int begin = group ? second : 0;
  // The first and the last time of this warp's queries.
  const int early = part[group].chunk.e0 + l.W + 16 * warp, late = early + 15;
  const auto of_window = [&](int r) { return SeenOfWindow(l, early + r); };
  const auto of_sinks = [&](int r) { return SeenOfSinks(l, early + r); };
  const float scale = rsqrtf(static_cast<float>(D)) * kLog2e;
  const uint32_t q = SharedAddress(shared.q + group);
  Rows<D> rows;
  WaitCopies<kStages - 1>();
  PublishCopies();
  __syncthreads();
  for (int i = 0; mine && i < sink_groups; ++i) {
    const int at = i * kSinkPieces<D> + (joined ? 0 : group * kSecondSinks<D>);
    Attend<D, kSinkGroup, kSinkGroup>(rows, q, SharedAddress(shared.k[kStages - 1].pieces + at),
                                      SharedAddress(shared.v[kStages - 1].pieces + at), scale,
                                      kSinkGroup * i, false, of_sinks);
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
  WriteRows<D>(p, part[group], ChunksOfBlock(l) * blockIdx.y + group, rows, warp, lane);
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
