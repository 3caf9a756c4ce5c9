// What a segment adds to states of zero, and its total decay. As `carry`'s other kernels, with all
// states of a KV head in one block: for compute capability 9.0.
#include "ops/dsla/cuda/chunks.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 2 * kTeam, kStages = 4;

template <int kChannels>
struct Stage {
  uint4 key[kChunk * kChannels / 8];
  uint4 v[2][kPanel];           // each team's columns
  float4 decay[kChannels / 2];  // of two channels: e^R, e^{L-R} each
  float key_sum[4][kChannels];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int kChannels>
__device__ __forceinline__ void Fetch(const PrefillParams& p, Stage<kChannels>& s,
                                      const Chunk& chunk, int index, int h) {
  const int thread = threadIdx.x, team = thread / kTeam;
  const int64_t part = int64_t{index} * p.layer.Hkv + h;
  FetchKeys<kChannels, kThreads>(s.key, p.key + part * kChannels * kChunk, thread);
  FetchValues(p, p.rows, s.v[team], chunk, h, 64 * team, thread % kTeam);
  if (thread < kChannels / 2) CopyAsync(s.decay + thread, p.decay + part * kChannels + 2 * thread);
  if (thread < kChannels)
    CopyAsync(&s.key_sum[0][0] + 4 * thread, p.key_sum + part * 4 * kChannels + 4 * thread);
}

// Scales by e^R or by e^{L-R}.
template <int kChannels, bool kEnd>
__device__ __forceinline__ void Decay(float (&acc)[kChannels / 8][4], const float4* decay, int t) {
#pragma unroll
  for (int j = 0; j < kChannels / 8; ++j) {
    const float4 d = decay[4 * j + t];
    acc[j][0] *= kEnd ? d.y : d.x;
    acc[j][1] *= kEnd ? d.w : d.z;
    acc[j][2] *= kEnd ? d.y : d.x;
    acc[j][3] *= kEnd ? d.w : d.z;
  }
}

template <int kChannels>
__device__ __forceinline__ void Sum(const PrefillParams& p) {
  extern __shared__ __align__(1024) std::byte memory[];
  auto* stages = reinterpret_cast<Stage<kChannels>*>(memory);
  const Layer& l = p.layer;
  const int h = blockIdx.x, thread = threadIdx.x;
  AwaitPrevious();
  AllowNext();
  const Segment segment = SegmentOf(p, blockIdx.y);
  if (segment.count < 0 || (segment.flags & kLast)) return;
  const auto fetch = [&](int i) {
    if (i < segment.count)
      Fetch<kChannels>(p, stages[i % kStages],
                       {segment.n, segment.e0 + i * kChunk, i == 0 ? segment.lo : 0,
                        i == segment.count - 1 ? segment.hi : kChunk},
                       segment.at + i, h);
    CommitCopies();
  };
  for (int i = 0; i < kStages - 1; ++i) fetch(i);

  const StatePlace at(thread);
  const int64_t store = (int64_t{segment.store} * l.Hkv + h) * kChannels;
  float acc[kChannels / 8][4] = {};
  float z = 0, total = 1;
  for (int i = 0; i < segment.count; ++i) {
    WaitCopies<kStages - 2>();
    PublishCopies();
    __syncthreads();
    fetch(i + kStages - 1);
    const Stage<kChannels>& s = stages[i % kStages];
    Decay<kChannels, false>(acc, s.decay, at.t);
    Pin(acc);
    BeginProducts();
    AddKeys<kChannels>(acc, SharedAddress(s.v[__shfl_sync(~0u, at.team, 0)]), SharedAddress(s.key));
    CommitProducts();
    if (thread < kChannels) {
      const float2 decay = reinterpret_cast<const float2*>(s.decay)[thread];
      const float sums = (s.key_sum[0][thread] + s.key_sum[1][thread]) +
                         (s.key_sum[2][thread] + s.key_sum[3][thread]);
      z = (z * decay.x + sums) * decay.y;
      total *= decay.x * decay.y;
    }
    WaitProducts<0>();
    Pin(acc);
    Decay<kChannels, true>(acc, s.decay, at.t);
  }
  StoreStates<kChannels>(acc, at, nullptr, p.start + store * kWidth);
  if (thread >= kChannels) return;
  p.start_norm[store + thread] = z;
  p.start_decay[store + thread] = total;
}

#endif

// grid (Hkv, segments)
template <int kChannels>
__global__ void __launch_bounds__(kThreads, 1)
    ChunksSummaryKernel(const __grid_constant__ PrefillParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  Sum<kChannels>(p);
#else
  __trap();  // OnHopper says where it may be called
#endif
}

template <int kChannels>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  Start<ChunksSummaryKernel<kChannels>>("summary", dim3(p.layer.Hkv, p.wave_segments), kThreads,
                                        kStages * sizeof(Stage<kChannels>), p, stream);
}

}  // namespace

void LaunchChunksSummary(const PrefillParams& p, cudaStream_t stream) {
  p.layer.states == 2 ? Launch<256>(p, stream) : Launch<128>(p, stream);
}

}  // namespace dsla::cuda
