// A fold in one kernel, for compute capability 9.0: pages to states, with nothing of a chunk in
// memory in between. Queries want K~ relative to the middle of a chunk; a fold only what the chunk
// adds at its end,
//   S' = e^L S + K^T V,  K_t = e^{L - G_t} (1 - e^{a_t}) phi_k(k_t),
// so weights are products of e^a backwards from the end, all at most 1.
//
// A block folds a segment of a sequence for one KV head, with one set of weights. Of its
// warpgroups one fetches chunks and undoes RoPE, the others each have 64 channels of every block of
// D: logits as [channels, d] x [d, tokens] by wgmma, so that a lane has 16 tokens of
// its two channels and products over time stay in registers; K^T, rounded, is in these registers
// the A operand of its product with V, and the states are accumulators from the first chunk to the
// last. One warpgroup's products run under the other's exponentials.
#include <algorithm>

#include "ops/dsla/cuda/fold_states.cuh"

namespace dsla::cuda {
namespace {

// Blocks at a time of the GPU that this is for, with 132 multiprocessors. A sequence is cut into as
// many segments, so results depend on the number; any will do.
template <int D>
constexpr int kBlocksAtOnce = D == 128 ? 132 : 264;
constexpr int BlocksOfPart(const DslaShape& s) { return s.states == 1 && s.F == s.D ? 1 : 2; }

template <int D>
constexpr int kThreads = 2 * D + 128;
// Registers of a thread of the warps that fetch, which need few, and of the others.
template <int D, int kSigns>
constexpr int kFetchRegisters = D == 64       ? 72
                                : kSigns == 2 ? 40
                                              : 56;
template <int D, int kSigns>
constexpr int kFoldRegisters = D == 64       ? 184
                               : kSigns == 2 ? 232
                                             : 224;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

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
    return {n, FoldSegments(p, n), segment * each * kChunk,
            max(min(each, chunks - segment * each), 0), max(p.layer.pos[n] - p.layer.W, 0)};
  }
  return {-1, 0, 0, 0, 0};
}

template <int D, int kBlocks, int kSigns>
__device__ __forceinline__ void FoldSegment(FoldShared<D, kBlocks, kSigns>& s,
                                            const PrefillParams& p) {
  constexpr int kFoldWarps = D / 16;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  LoadFoldWeights(s, p.layer, blockIdx.x, blockIdx.z * kBlocks);
  if (threadIdx.x == 0) {
    InitBarrier(s.key_full, 4);
    InitBarrier(s.key_free, kFoldWarps);
    for (int i = 0; i < 2; ++i) {
      InitBarrier(s.stage_full[i], 4);
      InitBarrier(s.stage_free[i], kFoldWarps);
    }
    InitBarrier(s.sums_full, kFoldWarps);
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
    GiveUpRegisters<kFetchRegisters<D, kSigns>>();
    Fetch(s, p);
  } else {
    TakeRegisters<kFoldRegisters<D, kSigns>>();
    Folder<D, kBlocks, kSigns> folder{s, p};
    folder.Run();
    folder.Write();
  }
}

#endif

// grid (Hkv, segments of a wave, SF / D / kBlocks)
template <int D, int kBlocks, int kSigns>
__global__ void __launch_bounds__(kThreads<D>, D == 128 ? 1 : 2)
    FoldKernel(const __grid_constant__ PrefillParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::byte memory[];
  FoldSegment(*reinterpret_cast<FoldShared<D, kBlocks, kSigns>*>(memory), p);
#else
  __trap();  // FoldsInOne says where it may be called
#endif
}

template <int D, int kBlocks, int kSigns>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  const dim3 grid(p.layer.Hkv, p.wave_segments, p.layer.SF / D / kBlocks);
  Start<FoldKernel<D, kBlocks, kSigns>>("fold", grid, kThreads<D>,
                                        sizeof(FoldShared<D, kBlocks, kSigns>), p, stream);
}
template <int D>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  if (p.layer.F > D)
    Launch<D, 2, 2>(p, stream);
  else if (p.layer.states == 2)
    Launch<D, 2, 1>(p, stream);
  else
    Launch<D, 1, 1>(p, stream);
}

}  // namespace

bool FoldsInOne() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major == 9;
}

int MostFoldSegments(const DslaShape& s) {
  const int blocks = s.Hkv * s.SF() / s.D / BlocksOfPart(s);
  return std::max((s.D == 64 ? kBlocksAtOnce<64> : kBlocksAtOnce<128>) / blocks, 1);
}

void LaunchFold(const PrefillParams& p, int D, cudaStream_t stream) {
  D == 64 ? Launch<64>(p, stream) : Launch<128>(p, stream);
}

}  // namespace dsla::cuda
