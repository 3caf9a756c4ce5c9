// What a segment adds to states of zero, and its total decay. As `carry`'s other kernels, with all
// states of a KV head in one block: for compute capability 9.0.
#include "ops/dsla/cuda/chunks.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 2 * kTeam + 32, kStages = 4;

template <int kChannels>
struct Stage {
  uint4 key[kChunk * kChannels / 8];
  uint4 v[2][kPanel];
  float2 decay[kChannels];  // e^R, e^{L-R}
  float key_sum[4][kChannels];
};
template <int kChannels>
struct SummaryShared {
  Stage<kChannels> stages[kStages];
  uint64_t full[kStages], free[kStages];  // a stage has been copied; read
};
static_assert(sizeof(SummaryShared<256>) <= 227 * 1024);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Chunk `i` to its stage but for V, by one lane; V too if it enters whole.
template <int kChannels>
__device__ __forceinline__ void Copy(const ChunksParams& p, Stage<kChannels>& s, uint64_t& full,
                                     int64_t part, int row, int h, bool whole) {
  ArriveExpecting(full, whole ? sizeof(s) : sizeof(s) - sizeof(s.v));
  CopyKeys<kChannels>(s.key, kPanel, p.maps, part, full);
  CopyBulk(s.decay, p.decay + part * kChannels, sizeof(s.decay), full);
  CopyBulk(s.key_sum, p.key_sum + part * 4 * kChannels, sizeof(s.key_sum), full);
  if (!whole) return;
#pragma unroll
  for (int panel = 0; panel < 2; ++panel) CopyTile(s.v[panel], p.maps.v, row, 2 * h + panel, full);
}

// One warp copies chunks to the stages, one after another.
template <int kChannels>
__device__ __forceinline__ void Fetch(const ChunksParams& p, SummaryShared<kChannels>& shared,
                                      const Segment& segment, int h) {
  const Layer& l = p.layer;
  const int pos = l.pos[segment.n];
  const int begin = max(pos, l.S), row0 = l.row_start[segment.n] - pos;
  for (int i = 0; i < segment.count; ++i) {
    Stage<kChannels>& s = shared.stages[i % kStages];
    const Chunk chunk{segment.n, segment.e0 + i * kChunk, i == 0 ? segment.lo : 0,
                      i == segment.count - 1 ? segment.hi : kChunk};
    const bool whole = chunk.e0 >= begin && chunk.lo == 0 && chunk.hi == kChunk;
    if (i >= kStages) Await(shared.free[i % kStages], i / kStages - 1);
    if (!whole) {
#pragma unroll
      for (int panel = 0; panel < 2; ++panel)
        FetchValues<32>(p, s.v[panel], chunk, h, panel, threadIdx.x % 32);
      CommitCopies();
      WaitCopies<0>();
      PublishCopies();
      __syncwarp();
    }
    if (Elect())
      Copy<kChannels>(p, s, shared.full[i % kStages], int64_t{segment.at + i} * l.Hkv + h,
                      row0 + chunk.e0, h, whole);
  }
}

// A warpgroup's channels of the states, and z of as many channels as there are threads. Here
// channels are the rows of the accumulators, so that a thread has few decays: rows g and g + 8 of
// each 64, and of eight columns 2 t and 2 t + 1.
template <int kChannels>
struct Summary {
  static constexpr int kTiles = kChannels / 2 / 64;
  const ChunksParams& p;
  SummaryShared<kChannels>& shared;
  const Segment& segment;
  int h, team;
  float acc[kTiles][kWidth / 8][4] = {};

  // The first of this thread's rows of a tile.
  __device__ __forceinline__ int channel(int tile) const {
    const int thread = threadIdx.x % kTeam;
    return 64 * (kTiles * team + tile) + thread / 32 * 16 + thread % 32 / 4;
  }
  // By e^R, or by e^{L-R}.
  template <bool kEnd>
  __device__ __forceinline__ void Decay(const Stage<kChannels>& s) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 both = s.decay[channel(tile) + 8 * r];
        const float decay = kEnd ? both.y : both.x;
#pragma unroll
        for (int j = 0; j < kWidth / 8; ++j) {
          acc[tile][j][2 * r] *= decay;
          acc[tile][j][2 * r + 1] *= decay;
        }
      }
  }
  // S += K~^T V.
  __device__ __forceinline__ void Add(const Stage<kChannels>& s) {
    const uint32_t key = SharedAddress(s.key), v = SharedAddress(s.v);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) Pin(acc[tile]);
    BeginProducts();
#pragma unroll
    for (int c = 0; c < kChunk / 16; ++c)
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        WarpgroupMma<1, 1>(
            acc[tile], PanelDescriptor(key, (kTiles * team + tile) * kPanelBytes + c * (16 * 128)),
            PanelDescriptor(v, c * (16 * 128), kPanelBytes));
    CommitProducts();
  }
  // As `chunks` has them: neighbouring channels in one lane, columns g and g + 8.
  __device__ __forceinline__ void Store(float* start) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, odd = g % 2;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int j = 0; j < kWidth / 8; j += 2)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float(&low)[4] = acc[tile][j], (&high)[4] = acc[tile][j + 1];
          const float keep[2] = {odd ? low[2 * r + 1] : low[2 * r],
                                 odd ? high[2 * r + 1] : high[2 * r]};
          const float other[2] = {__shfl_xor_sync(~0u, odd ? low[2 * r] : low[2 * r + 1], 4),
                                  __shfl_xor_sync(~0u, odd ? high[2 * r] : high[2 * r + 1], 4)};
          const int pair = (channel(tile) + 8 * r) / 2, column = 8 * j + 2 * t + odd;
          reinterpret_cast<float4*>(start)[StartPlace(pair, column)] =
              odd ? float4{other[0], keep[0], other[1], keep[1]}
                  : float4{keep[0], other[0], keep[1], other[1]};
        }
  }

  __device__ __forceinline__ void Run() {
    const int thread = threadIdx.x;
    float z = 0, total = 1;
    for (int i = 0; i < segment.count; ++i) {
      const Stage<kChannels>& s = shared.stages[i % kStages];
      Await(shared.full[i % kStages], i / kStages);
      Decay<false>(s);
      Add(s);
      if (thread < kChannels) {
        const float2 decay = s.decay[thread];
        const float sums = (s.key_sum[0][thread] + s.key_sum[1][thread]) +
                           (s.key_sum[2][thread] + s.key_sum[3][thread]);
        z = (z * decay.x + sums) * decay.y;
        total *= decay.x * decay.y;
      }
      WaitProducts<0>();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) Pin(acc[tile]);
      Decay<true>(s);
      Arrive(shared.free[i % kStages]);
    }
    const int64_t store = (int64_t{segment.store} * p.layer.Hkv + h) * kChannels;
    Store(p.start + store * kWidth);
    if (thread >= kChannels) return;
    p.start_norm[store + thread] = z;
    p.start_decay[store + thread] = total;
  }
};

#endif

// grid (Hkv, segments)
template <int kChannels>
__global__ void __launch_bounds__(kThreads, 1)
    ChunksSummaryKernel(const __grid_constant__ ChunksParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<SummaryShared<kChannels>*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      InitCopyBarrier(shared.full[i]);
      InitBarrier(shared.free[i], 2 * kTeam / 32);
    }
    PublishCopies();  // the barriers, to the copies
  }
  const Segment segment = SegmentOf(p, blockIdx.y);
  AwaitPrevious();
  AllowNext();
  __syncthreads();
  if (segment.count < 0 || (segment.flags & kLast)) return;
  if (__shfl_sync(~0u, threadIdx.x / kTeam, 0) == 2)
    Fetch<kChannels>(p, shared, segment, blockIdx.x);
  else
    Summary<kChannels>{p, shared, segment, static_cast<int>(blockIdx.x),
                       __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kTeam, 0)}
        .Run();
#else
  __trap();  // OnHopper says where it may be called
#endif
}

template <int kChannels>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  Start<ChunksSummaryKernel<kChannels>>("summary", dim3(p.layer.Hkv, p.wave_segments), kThreads,
                                        sizeof(SummaryShared<kChannels>), WithMaps(p), stream);
}

}  // namespace

void LaunchChunksSummary(const PrefillParams& p, cudaStream_t stream) {
  p.layer.states == 2 ? Launch<256>(p, stream) : Launch<128>(p, stream);
}

}  // namespace dsla::cuda
