// Per chunk and KV head: keys with RoPE undone, gates, phi_k, and from them K~ and e^{G-R}.
//
// The products with the weights are transposed, [channels, d] x [d, tokens]: a lane then has runs
// of tokens of few channels in its accumulators, and products over time need registers only. Which
// token a column stands for is free. Slots count tokens outwards from the anchor, 31 .. 0 and then
// 32 .. 63; column 2t + i of tile j is slot 32 (j / 4) + 8 t + 2 (j % 4) + i, so a lane has eight
// slots in a row of each half of the chunk. Rows g and g + 8 of a tile are channels 2g and 2g + 1,
// neighbours in memory.
#include "ops/dsla/cuda/prepare.cuh"

namespace dsla::cuda {
namespace {

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int D>
constexpr int kBlocksPerProcessor = D == 128 ? 1 : 4;

// Before compute capability 9.0 shared memory has room for one team of D = 128.
template <int D>
constexpr int MaxThreads() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return 2 * D;
#else
  return kTeams<D> * 2 * D;
#endif
}

// e^a - 1 of this warp's channels and the slots of one half.
template <int D, int kBlocks>
__device__ __forceinline__ void Gates(float (&gate)[kBlocks][4][4], const uint4* weight,
                                      const uint4* plain, const float2* bias, float least,
                                      int lane) {
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const float2 start = bias[b * (D / 2)];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      gate[b][j][0] = gate[b][j][1] = start.x;
      gate[b][j][2] = gate[b][j][3] = start.y;
    }
  }
#pragma unroll 2
  for (int c = 0; c < D / 16; ++c) {
    uint32_t a[kBlocks][4];
    uint4 x[4];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) LoadPiece(a[b], weight[b * (D * D / 8) + c * (D * 2)]);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = plain[(c * 8 + j) * 32 + PlaceOf(c, lane / 4, lane % 4)];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) Mma(gate[b][j], a[b], x[j].x, x[j].y);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) Mma(gate[b][j], a[b], x[j].z, x[j].w);
  }
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) GatesMinusOne(gate[b], least);
}

// Where a lane's first slot of a half goes, and how far the next slot is.
struct Places {
  float* decay;
  float2* key_sum;
  uint32_t *key, *growth;
};

// Products of e^a outwards from the anchor over one half's slots: what is under 1 is a product, its
// inverse e^{G-R} or 1 / e^{G-R} a reciprocal, so nothing cancels. y: as CombineStatistics has it.
template <int D, int kBlocks, int kSigns, bool kFold, bool kUpper>
__device__ __forceinline__ void WriteHalf(const TeamShared<D, kSigns>& s,
                                          const float (&gate)[kBlocks][4][4],
                                          const float (&y)[4][4], const Places& to, int warp,
                                          int lane) {
  constexpr int kStep = kUpper ? D / 2 : -D / 2, kGrowthStep = kUpper ? 16 : -16;
  constexpr int kBlock = kChunk * D / 2;  // words
  const int t = lane % 4;
  float run[kBlocks][2], sum[kBlocks][2] = {};
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    float total[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x = 1 + gate[b][0][2 * r];
#pragma unroll
      for (int i = 1; i < 8; ++i) x += x * gate[b][i / 2][2 * r + i % 2];
      const float next = __shfl_xor_sync(~0u, x, 1), pair = x * next;
      const float others = __shfl_xor_sync(~0u, pair, 2);
      run[b][r] = (t & 1 ? next : 1.f) * (t & 2 ? others : 1.f);
      total[r] = pair * others;
    }
    if (t == 0) {
      to.decay[b * 2 * D] = total[0];
      to.decay[b * 2 * D + 2] = total[1];
    }
  }
  float scale[kSigns][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int sign = 0; sign < kSigns; ++sign)
      if (i % 4 == 0)
        LoadSlots(scale[sign], s.top[sign][kSigns == 1 ? warp : 0] + 32 * kUpper + 8 * t + i);
    float phi[2];  // negated
    if constexpr (kSigns == 1) {
      phi[0] = y[i / 2][i % 2] * scale[0][i % 4];
      phi[1] = y[i / 2][2 + i % 2] * scale[0][i % 4];
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      float key[2], grown[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (kSigns == 2)
          phi[r] = -Exp2(y[i / 2][2 * r + i % 2] * (b == 0 ? kLog2e : -kLog2e) + scale[b][i % 4]);
        const float x = gate[b][i / 2][2 * r + i % 2];
        if constexpr (kUpper) {
          run[b][r] += run[b][r] * x;
          key[r] = x * phi[r] * Reciprocal(run[b][r]);
          grown[r] = run[b][r];
        } else {
          key[r] = x * phi[r] * run[b][r];
          if constexpr (!kFold) grown[r] = Reciprocal(run[b][r]);
          run[b][r] += run[b][r] * x;
        }
      }
      const uint32_t packed = Pack(key[0], key[1]);
      to.key[b * kBlock + i * kStep] = packed;
      sum[b][0] += Low(packed);
      sum[b][1] += High(packed);
      if constexpr (!kFold) to.growth[b * kBlock + i * kGrowthStep] = Pack(grown[0], grown[1]);
    }
  }
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[b][r] += __shfl_xor_sync(~0u, sum[b][r], 1);
    if (t % 2 == 0) to.key_sum[b * (D / 2)] = {sum[b][0], sum[b][1]};
  }
}

// grid (Hkv, groups of chunks, SF / D / kBlocks), teams of 2 D threads. A block goes over chunks
// with one set of weights; each of its teams takes the next, on its own.
template <int D, int kBlocks, int kSigns, bool kFold>
__global__ void __launch_bounds__(MaxThreads<D>(), kBlocksPerProcessor<D>)
    PrepareKernel(const __grid_constant__ PrefillParams p) {
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<PrepareShared<D, kBlocks, kSigns>*>(memory);
  const Layer& l = p.layer;
  const int h = blockIdx.x, first_block = blockIdx.z * kBlocks, blocks = l.SF / D;
  const int team = threadIdx.x / (2 * D), thread = threadIdx.x % (2 * D);
  const int lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int teams = blockDim.x / (2 * D);
  TeamShared<D, kSigns>& s = shared.team[team];
  using Batch = WeightBatch<D, kBlocks>;
  Batch batch;
  batch.Load(l, h, first_block, threadIdx.x);
  for (int i = threadIdx.x; i < kBlocks * D / 2; i += blockDim.x)
    shared.bias[i] =
        reinterpret_cast<const float2*>(l.weights.bias + h * l.SF + first_block * D)[i];
  AwaitPrevious();
  AllowNext();

  int index = blockIdx.y + gridDim.y * team;
  const auto chunk_at = [&](int i) {
    return i < p.wave_chunks ? ChunkOf(p, i) : Chunk{-1, 0, 0, 0};
  };
  Chunk chunk = chunk_at(index);
  uint2 keys[4][2];
  LoadKeys<D, kFold>(keys, p, chunk, h, thread);
  for (int base = threadIdx.x;;) {
    batch.Store(&shared.weight[0][0][0][0], base);
    base += Batch::kCount * blockDim.x;
    if (base >= Batch::kAll) break;
    batch.Load(l, h, first_block, base);
  }
  __syncthreads();
  while (chunk.n >= 0) {
    StoreKeys<D>(s, keys, l, chunk, thread, team);
    float y[2][4][4] = {};
// With two signs more registers are taken.
#pragma unroll(kSigns == 1 ? 2 : 1)
    for (int c = 0; c < D / 32; ++c) {
      uint32_t a[4], b[4];
      LoadPiece(a, shared.weight[0][c][warp][lane]);
      LoadPiece(b, shared.weight[0][c + D / 32][warp][lane]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint4 x = s.key[c][j][PlaceOf(c, g, t)];
        Mma(y[j / 4][j % 4], a, x.x, x.y);
        Mma(y[j / 4][j % 4], b, x.z, x.w);
      }
    }
#pragma unroll
    for (int sign = 0; sign < kSigns; ++sign)
      Statistics<kSigns == 1>(y, sign == 0 ? 1.f : -1.f, s.top[sign][warp], s.sum[sign][warp],
                              lane);
    Barrier<2 * D>(team);
    if (thread == 2 * D - 1) {
      s.next_index = index + gridDim.y * teams;
      s.next = chunk_at(s.next_index);
    }
    if (thread < kSigns * kChunk) CombineStatistics(s, thread / kChunk, thread % kChunk);

    const bool whole = Enters(l, chunk, 0) && chunk.hi == kChunk;
    const auto half = [&]<bool kUpper>() {
      float gate[kBlocks][4][4];
      Gates<D, kBlocks>(gate, &shared.weight[1][0][warp][lane], &s.plain[0][4 * kUpper][0],
                        &shared.bias[8 * warp + g], l.least_gate, lane);
      const int first = TokenOf(32 * kUpper + 8 * t);
      if (!whole) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (!Enters(l, chunk, kUpper ? first + i : first - i)) {
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) gate[b][i / 2][i % 2] = gate[b][i / 2][2 + i % 2] = 0;
          }
      }
      if constexpr (kUpper) {  // the next chunk's keys are under way meanwhile
        LoadKeys<D, kFold>(keys, p, s.next, h, thread);
      } else {
        Barrier<2 * D>(team);  // the statistics are combined
      }
      const int64_t part = int64_t{index} * l.Hkv + blockIdx.x;
      const int64_t block = part * blocks + first_block, quarter = first / 16, row = first % 16;
      const int pair = 8 * warp + g;
      Places to;
      to.decay = reinterpret_cast<float*>(p.decay) + (block * D + 2 * pair) * 2 + kUpper;
      to.key_sum = reinterpret_cast<float2*>(p.key_sum) +
                   ((part * 4 + quarter) * blocks + first_block) * (D / 2) + pair;
      to.key = reinterpret_cast<uint32_t*>(p.key) + (block * kChunk + first) * (D / 2) + pair;
      // Rows g and g + 8 of a tile share a lane of the fragment.
      to.growth = p.growth + (block * 4 + quarter) * (D * 8) + (warp * 32 + g % 4) * 4 + g / 4 * 2 +
                  row % 8 * 16 + row / 8;
      WriteHalf<D, kBlocks, kSigns, kFold, kUpper>(s, gate, y[kUpper], to, warp, lane);
    };
    half.template operator()<false>();
    half.template operator()<true>();
    chunk = s.next;
    index = s.next_index;
  }
}

template <int D, int kBlocks, int kSigns, bool kFold>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  using Shared = PrepareShared<D, kBlocks, kSigns>;
  int device = 0, most = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  int teams = kTeams<D>, bytes = sizeof(Shared);
  if (bytes > most) {
    teams = 1;
    bytes = sizeof(Shared) - (kTeams<D> - 1) * sizeof(TeamShared<D, kSigns>);
  }
  // How many chunks each team takes: weights are loaded once per block, at the cost of a quarter of
  // a chunk, but all multiprocessors should end together. Results do not depend on it.
  const int64_t pairs = p.layer.SF / D / kBlocks;
  int64_t groups = 0, least = INT64_MAX;
  for (int each = 1; each <= 8 / kBlocksPerProcessor<D>; ++each) {
    const int64_t n = CeilDiv(p.wave_chunks, teams * each);
    const int64_t cost = CeilDiv(n * p.layer.Hkv * pairs, processors) * (4 * each + 1);
    if (cost < least) groups = n, least = cost;
  }
  const dim3 grid(p.layer.Hkv, static_cast<unsigned>(groups), static_cast<unsigned>(pairs));
  Start<PrepareKernel<D, kBlocks, kSigns, kFold>>("prepare", grid, teams * 2 * D, bytes, p, stream);
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

void LaunchPrepare(const PrefillParams& p, int D, cudaStream_t stream) {
  if (D == 64)
    p.fold ? Launch<64, true>(p, stream) : Launch<64, false>(p, stream);
  else
    p.fold ? Launch<128, true>(p, stream) : Launch<128, false>(p, stream);
}

}  // namespace dsla::cuda
