// A fold in one kernel, for compute capability 9.0: pages to states, with nothing of a chunk in
// memory in between. Queries want K~ relative to the middle of a chunk; a fold only what the chunk
// adds at its end,
//   S' = e^L S + K^T V,  K_t = e^{L - G_t} (1 - e^{a_t}) phi_k(k_t),
// so weights are products of e^a backwards from the end, all at most 1.
//
// A block folds a segment of a sequence for one KV head, with one set of weights. One of its
// warpgroups has the keys: it fetches chunks, makes phi_k, undoes RoPE. The others each have 64
// channels of a block of D of every state: gates' logits as [channels, d] x [d, tokens] by wgmma,
// so that a lane has runs of tokens of its two channels and products over time stay in registers;
// K^T, rounded, is the A operand of its product with V, and the states are accumulators from the
// first chunk to the last. Products run under the arithmetic of the step before, and of others.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "base/check.h"
#include "ops/dsla/cuda/fold_keys.cuh"
#include "ops/dsla/cuda/fold_states.cuh"

namespace dsla::cuda {
namespace {

// Blocks at a time of the GPU that this is for, with 132 multiprocessors. A sequence is cut into as
// many segments, so results depend on the number; any will do.
template <int D>
constexpr int kBlocksAtOnce = D == 128 ? 132 : 264;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Registers of a thread of the warpgroup that has the keys, and of the others. Both are as few as
// their accumulators leave, and with D 128 all that there are.
constexpr int kKeysRegisters = 104;
template <int D>
constexpr int kFoldRegisters = D == 64 ? 152 : 200;

// Segment `index` of the call's, by a warp.
__device__ __forceinline__ FoldPart PartOf(const PrefillParams& p, int index) {
  const int lane = threadIdx.x % 32;
  for (int base = 0; base < p.layer.N; base += 32) {
    const int count = base + lane < p.layer.N ? FoldSegments(p, base + lane) : 0;
    int end = count;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const int other = __shfl_up_sync(~0u, end, i);
      if (lane >= i) end += other;
    }
    const unsigned after = __ballot_sync(~0u, end > index);
    if (after == 0) {
      index -= __shfl_sync(~0u, end, 31);
      continue;
    }
    const int found = __ffs(static_cast<int>(after)) - 1, n = base + found;
    const int segment = index - __shfl_sync(~0u, end - count, found);
    const int chunks = FoldChunks(p, n), each = FoldSegmentChunks(p, chunks);
    const int e0 = segment * each * kChunk, until = max(p.layer.pos[n] - p.layer.W, 0);
    return {n,
            FoldSegments(p, n),
            e0,
            max(min(each, chunks - segment * each), 0),
            (max(p.layer.S - e0, 0) + kChunk - 1) / kChunk,
            (until - e0) / kChunk,
            until,
            p.pages.page_start[n],
            1.f / static_cast<float>(p.pages.page_size)};
  }
  return {-1, 0, 0, 0, 0, 0, 0, 0, 0};
}

template <int D, int kBlocks>
__device__ __forceinline__ void FoldSegment(FoldShared<D, kBlocks>& s, const FoldParams& p) {
  constexpr int kFoldWarps = D / 16;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  LoadFoldWeights(s, p.layer);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      InitBarrier(s.plain_full[i], 4);
      InitBarrier(s.plain_free[i], kFoldWarps);
      InitBarrier(s.value_free[i], kFoldWarps);
    }
    for (int group = 0; group < s.kGroups; ++group) {
      InitBarrier(s.feature_full[group], 4);
      InitBarrier(s.feature_free[group], 4);
    }
    InitCopyBarrier(s.key_here);
    InitCopyBarrier(s.value_here);
  }
  AwaitPrevious();
  AllowNext();
  if (warp == 0) {
    const FoldPart part = PartOf(p, p.wave * p.wave_segments + blockIdx.y);
    if (lane == 0) s.part = part;
  }
  PublishCopies();
  __syncthreads();
  if (s.part.n < 0) return;
  if (warp < 4) {
    GiveUpRegisters<kKeysRegisters>();
    FoldKeys(s, p, warp);
  } else {
    TakeRegisters<kFoldRegisters<D>>();
    Folder<D, kBlocks> folder{s, p};
    folder.Run();
    folder.Write();
  }
}

#endif

// grid (Hkv, segments of a wave, F / D)
template <int D, int kBlocks>
__global__ void __launch_bounds__(kFoldThreads<D>, D == 128 ? 1 : 2)
    FoldKernel(const __grid_constant__ FoldParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::byte memory[];
  FoldSegment(*reinterpret_cast<FoldShared<D, kBlocks>*>(memory), p);
#else
  __trap();  // OnHopper says where it may be called
#endif
}

FoldParams WithMaps(const PrefillParams& p, int D) {
  constexpr float kNear = -1, kNone = -126;
  FoldParams x{p};
  x.lowest = std::max(std::log2(1 + p.layer.least_gate), kNone);
  x.near_floor = x.lowest > kNear;
  if (x.near_floor) x.lowest = kNone;
  x.share = -1 / (x.lowest * kDslaGateDivisor);
  x.in_pages = p.pages.page_size % kChunk == 0;
  for (const void* from :
       std::initializer_list<const void*>{p.pages.k, p.pages.v, p.layer.sin, p.layer.cos})
    x.in_pages = x.in_pages && reinterpret_cast<uintptr_t>(from) % 16 == 0;
  if (!x.in_pages) return x;
  x.keys = ChunkMapOf(p.pages.k, D);
  x.values = ChunkMapOf(p.pages.v, D);
  x.sines = ChunkMapOf(p.layer.sin, D);
  x.cosines = ChunkMapOf(p.layer.cos, D);
  return x;
}

template <int D, int kBlocks>
void Launch(const FoldParams& p, cudaStream_t stream) {
  const dim3 grid(p.layer.Hkv, p.wave_segments, p.layer.F / D);
  Start<FoldKernel<D, kBlocks>>("fold", grid, kFoldThreads<D>, sizeof(FoldShared<D, kBlocks>), p,
                                stream);
}
template <int D>
void Launch(const FoldParams& p, cudaStream_t stream) {
  p.layer.states == 2 ? Launch<D, 2>(p, stream) : Launch<D, 1>(p, stream);
}

}  // namespace

int MostFoldSegments(const DslaShape& s) {
  const int blocks = s.Hkv * s.F / s.D;
  return std::max((s.D == 64 ? kBlocksAtOnce<64> : kBlocksAtOnce<128>) / blocks, 1);
}

void LaunchFold(const PrefillParams& p, int D, cudaStream_t stream) {
  DSLA_CHECK(p.pages.page_stride % D == 0);
  const FoldParams x = WithMaps(p, D);
  D == 64 ? Launch<64>(x, stream) : Launch<128>(x, stream);
}

}  // namespace dsla::cuda
