// Per chunk and KV head: keys with RoPE undone, gates, phi_k, and from them K~ and e^{G-R}. The
// kernel and its launch.
#include <algorithm>

#include "ops/dsla/cuda/prepare_team.cuh"

namespace dsla::cuda {
namespace {

// On compute capability 9.0 a multiprocessor has one block of all teams. Elsewhere a block is one
// team: on 8.0 shared memory has room for one block of D = 128, or three of D = 64; on 8.6 and 8.9
// for none of D = 128.
template <int D>
constexpr int kBlocksOfOneTeam = D == 128 ? 1 : 3;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <int D>
constexpr int kMostTeams = 1;
template <int D>
constexpr int kBlocksPerProcessor = kBlocksOfOneTeam<D>;
#else
template <int D>
constexpr int kMostTeams = kTeams<D>;
template <int D>
constexpr int kBlocksPerProcessor = 1;
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Registers of a thread that fetches and of the others, with two teams.
constexpr int kFetchRegisters = 64, kTeamRegisters = 104;
template <int D, bool kFold>
constexpr bool kFetched = kHasFetchers<D, kFold>;
#else
template <int D, bool kFold>
constexpr bool kFetched = false;
#endif
template <int D, bool kFold>
constexpr int kMaxThreads = kMostTeams<D> * 2 * D + (kFetched<D, kFold> ? kFetchThreads : 0);

// grid (Hkv, groups of chunks, SF / D / kBlocks), teams of 2 D threads, and those that fetch. A
// block goes over chunks with one set of weights; each of its teams takes the next, on its own:
// one's products and copies run behind the other's arithmetic.
template <int D, int kBlocks, int kSigns, bool kFold>
__global__ void __launch_bounds__(kMaxThreads<D, kFold>, kBlocksPerProcessor<D>)
    PrepareKernel(const __grid_constant__ PrefillParams p) {
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<PrepareShared<D, kBlocks, kSigns>*>(memory);
  // One for all of a warp, which the products' operands must be.
  const int all_warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  // A shuffle's result stays in a register; from where it can be read again that would take longer.
  const unsigned lane = __shfl_sync(~0u, threadIdx.x % 32, threadIdx.x % 32);
  const Team<D, kBlocks, kSigns, kFold> worker{shared, p, all_warp, lane};
  const auto load_weights = [&](int warps, const auto& meanwhile) {
    LoadWeights<D, kBlocks>(shared, p.layer, blockIdx.x, blockIdx.z * kBlocks, warps, meanwhile);
    PublishCopies();
  };
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (kFetched<D, kFold>) {
    constexpr int kWarps = kTeams<D> * (D / 16);  // of the teams
    if (threadIdx.x < kTeams<D>) {
      InitBarrier(shared.key_there[threadIdx.x], kFetchThreads / 32);
      InitBarrier(shared.plain_there[threadIdx.x], kFetchThreads / 32);
      InitBarrier(shared.key_free[threadIdx.x], D / 16);
      InitBarrier(shared.plain_free[threadIdx.x], D / 16);
    }
    __syncthreads();
    if (all_warp >= kWarps) {
      GiveUpRegisters<kFetchRegisters>();
      AwaitPrevious();
      AllowNext();
      KeyFetcher<D, kBlocks, kSigns>{shared, p}.Run();
    } else {
      load_weights(kWarps, [] {});
      AwaitPrevious();
      AllowNext();
      Barrier<32 * kWarps>(kTeams<D>);
      TakeRegisters<kTeamRegisters>();
      worker.RunFetched();
    }
    return;
  }
#endif
  Chunk first;
  load_weights(blockDim.x / 32, [&] {
    AwaitPrevious();
    AllowNext();
    first = worker.FetchFirst();
  });
  __syncthreads();
  worker.RunAll(blockDim.x / (2 * D), first);
}

template <int D, int kBlocks, int kSigns>
constexpr int SharedBytes(int teams) {
  return sizeof(PrepareShared<D, kBlocks, kSigns>) -
         (kTeams<D> - teams) * sizeof(TeamShared<D, kSigns>);
}

template <int D, int kBlocks, int kSigns, bool kFold>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  const bool hopper = OnHopper();
  const int teams = hopper ? kTeams<D> : 1;
  const int at_once = CurrentDevice().multiprocessors * (hopper ? 1 : kBlocksOfOneTeam<D>);
  const int bytes = SharedBytes<D, kBlocks, kSigns>(teams);
  const int threads = teams * 2 * D + (kHasFetchers<D, kFold> && hopper ? kFetchThreads : 0);
  // How many chunks each team takes: weights are loaded once per block, at the cost of a quarter of
  // a chunk, but all that run at once should end together. Results do not depend on it.
  const int64_t parts = p.layer.SF / D / kBlocks;
  int64_t groups = 0, least = INT64_MAX;
  for (int each = 1; each <= 64; ++each) {
    const int64_t n = CeilDiv(p.wave_chunks, teams * each);
    const int64_t rounds = CeilDiv(n * p.layer.Hkv * parts, at_once);
    const int64_t cost = rounds * (4 * each + 1);
    if (cost < least) groups = n, least = cost;
  }
  // Spread over all processors, if there are fewer blocks.
  groups = std::max(groups, std::min<int64_t>(p.wave_chunks, at_once / (p.layer.Hkv * parts)));
  const dim3 grid(p.layer.Hkv, static_cast<unsigned>(groups), static_cast<unsigned>(parts));
  Start<PrepareKernel<D, kBlocks, kSigns, kFold>>("prepare", grid, threads, bytes, p, stream);
}

// For D = 64 on compute capability 9.0. Of a few chunks, each block of gates is another team's, or
// each half of them: features are then made more than once, but by teams that had nothing to do.
template <int kBlocks, int kSigns>
void LaunchSpread(const PrefillParams& p, cudaStream_t stream) {
  if constexpr (kBlocks > 1) {
    const int64_t tasks = int64_t{p.wave_chunks} * p.layer.Hkv * (p.layer.SF / 64) / (kBlocks / 2);
    if (tasks <= CurrentDevice().multiprocessors * kTeams<64>)
      return LaunchSpread<kBlocks / 2, kSigns>(p, stream);
  }
  Launch<64, kBlocks, kSigns, false>(p, stream);
}
void LaunchSpread(const PrefillParams& p, cudaStream_t stream) {
  const bool two = p.layer.states == 2;
  if (p.layer.F > 64)
    two ? LaunchSpread<4, 2>(p, stream) : LaunchSpread<2, 2>(p, stream);
  else
    two ? LaunchSpread<2, 1>(p, stream) : LaunchSpread<1, 1>(p, stream);
}

template <int D, bool kFold>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  if (p.layer.F > D)
    Launch<D, 2, 2, kFold>(p, stream);
  else if (p.layer.states == 2)
    Launch<D, 2, 1, kFold>(p, stream);
  else
    Launch<D, 1, 1, kFold>(p, stream);
}

}  // namespace

bool PrepareFits(const DslaShape& s) {
  if (s.D == 64) return true;
  const int bytes = s.F > s.D       ? SharedBytes<128, 2, 2>(1)
                    : s.states == 2 ? SharedBytes<128, 2, 1>(1)
                                    : SharedBytes<128, 1, 1>(1);
  return bytes <= CurrentDevice().most_shared;
}

void LaunchPrepare(const PrefillParams& p, int D, cudaStream_t stream) {
  if (D == 64 && OnHopper())  // a fold has its own kernel there
    LaunchSpread(p, stream);
  else if (D == 64)
    p.fold ? Launch<64, true>(p, stream) : Launch<64, false>(p, stream);
  else
    p.fold ? Launch<128, true>(p, stream) : Launch<128, false>(p, stream);
}

}  // namespace dsla::cuda
