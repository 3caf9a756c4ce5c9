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

// Blocks of a multiprocessor, as far as shared memory goes. Before compute capability 9.0 that has
// room for one team of D = 128, or three blocks of D = 64.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <int D>
constexpr int kBlocksPerProcessor = D == 128 ? 1 : 3;
template <int D>
constexpr int kMaxThreads = 2 * D;
#else
template <int D>
constexpr int kBlocksPerProcessor = D == 128 ? 1 : 4;
template <int D>
constexpr int kMaxThreads = kTeams<D> * 2 * D;
#endif

// e^a - 1 in the place of the logits of one half's slots.
template <bool kUpper>
__device__ __forceinline__ void Gates(float (&gate)[8][4], float least) {
  GatesMinusOne(reinterpret_cast<float(&)[4][4]>(gate[4 * kUpper]), least);
}

// Where a lane's first slot of a half goes.
struct Places {
  float* decay;
  float2* key_sum;
  uint32_t *key, *growth;
};

// Products of e^a outwards from the anchor over one half's slots: what is under 1 is a product, its
// inverse e^{G-R} or 1 / e^{G-R} a reciprocal, so nothing cancels. One sign: y is phi_k, negated.
// Two: phi_k is e^{sign y} times 2^scale, by slot.
template <int D, int kSigns, bool kFold, bool kUpper>
__device__ __forceinline__ void WriteHalf(const float (&gate)[8][4], const float (&y)[8][4],
                                          float sign, const float* scale, const Places& to,
                                          int lane) {
  constexpr int kStep = kUpper ? D / 2 : -D / 2, kGrowthStep = kUpper ? 16 : -16;
  const int t = lane % 4;
  float run[2], total[2], sum[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float x = 1 + gate[4 * kUpper][2 * r];
#pragma unroll
    for (int i = 1; i < 8; ++i) x += x * gate[4 * kUpper + i / 2][2 * r + i % 2];
    const float next = __shfl_xor_sync(~0u, x, 1), pair = x * next;
    const float others = __shfl_xor_sync(~0u, pair, 2);
    run[r] = (t & 1 ? next : 1.f) * (t & 2 ? others : 1.f);
    total[r] = pair * others;
  }
  if (t == 0) {
    to.decay[0] = total[0];
    to.decay[2] = total[1];
  }
  float reference[4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (kSigns == 2 && i % 4 == 0) LoadSlots(reference, scale + 32 * kUpper + 8 * t + i);
    float key[2], grown[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float x = gate[4 * kUpper + i / 2][2 * r + i % 2];
      float phi = y[4 * kUpper + i / 2][2 * r + i % 2];
      if constexpr (kSigns == 2) phi = -Exp2(phi * (sign * kLog2e) + reference[i % 4]);
      if constexpr (kUpper) {
        run[r] += run[r] * x;
        key[r] = x * phi * Reciprocal(run[r]);
        grown[r] = run[r];
      } else {
        key[r] = x * phi * run[r];
        if constexpr (!kFold) grown[r] = Reciprocal(run[r]);
        run[r] += run[r] * x;
      }
    }
    const uint32_t packed = Pack(key[0], key[1]);
    to.key[i * kStep] = packed;
    sum[0] += Low(packed);
    sum[1] += High(packed);
    if constexpr (!kFold) to.growth[i * kGrowthStep] = Pack(grown[0], grown[1]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
  if (t % 2 == 0) *to.key_sum = {sum[0], sum[1]};
}

// grid (Hkv, groups of chunks, SF / D / kBlocks), teams of 2 D threads. A block goes over chunks
// with one set of weights; each of its teams takes the next, on its own: one's products and copies
// run behind the other's arithmetic.
template <int D, int kBlocks, int kSigns, bool kFold>
__global__ void __launch_bounds__(kMaxThreads<D>, kBlocksPerProcessor<D>)
    PrepareKernel(const __grid_constant__ PrefillParams p) {
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<PrepareShared<D, kBlocks, kSigns>*>(memory);
  const Layer& l = p.layer;
  const int h = blockIdx.x, first_block = blockIdx.z * kBlocks, blocks = l.SF / D;
  // One for all of a warp, which the products' operands must be.
  const int all_warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int team = all_warp / (D / 16), warp = all_warp % (D / 16);
  const int thread = threadIdx.x % (2 * D), lane = thread % 32, g = lane / 4, t = lane % 4;
  const int pair = 8 * warp + g;  // this lane's channels are 2 pair and 2 pair + 1 of each block
  TeamShared<D, kSigns>& s = shared.team[team];
  LoadWeights<D, kBlocks>(shared, l, h, first_block);
  AwaitPrevious();
  AllowNext();

  const int step = gridDim.y * (blockDim.x / (2 * D));
  int index = blockIdx.y + gridDim.y * team;
  const auto chunk_at = [&](int i) {
    return i < p.wave_chunks ? ChunkOf(p, i) : Chunk{-1, 0, 0, 0};
  };
  Chunk chunk = chunk_at(index);
  const auto fetch = [&](const Chunk& of) {
    if constexpr (kFold)
      FetchKeys<D>(s.key, p, p.pages, of, h, thread);
    else
      FetchKeys<D>(s.key, p, p.rows, of, h, thread);
  };
  if (chunk.n >= 0) fetch(chunk);
  PublishCopies();  // the weights
  __syncthreads();
  const uint32_t key = SharedAddress(s.key), plain = SharedAddress(s.plain);
  const auto weight = [&](int m) { return SharedAddress(shared.weight[m][warp / 4]); };
  const auto begin_gates = [&](float(&gate)[8][4], int b) {
    const float2 bias = __ldg(
        reinterpret_cast<const float2*>(l.weights.bias + h * l.SF + (first_block + b) * D) + pair);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      gate[j][0] = gate[j][1] = bias.x;
      gate[j][2] = gate[j][3] = bias.y;
    }
    Pin(gate);
  };
  const auto add_gates = [&](float(&gate)[8][4], int b) {
    AddScores<D, kChunk, kChunk>(gate, weight(1 + b), plain);
    AddScores<D, kChunk, kChunk>(gate, weight(1 + b), plain + sizeof(KeyTile<D>));
    CommitProducts();
  };
  // The second team begins when the first is in the midst of its chunk, so that one's waits for
  // products, keys and angles fall into the other's arithmetic.
  const bool staggers = kTeams<D> == 2 && blockDim.x > 2 * D;
  if (team == 1 && chunk_at(blockIdx.y).n >= 0)
    asm volatile("bar.sync 3, %0;" ::"n"(4 * D) : "memory");
  while (chunk.n >= 0) {
    UndoRope(s, l, chunk, thread, team);
    float y[8][4] = {}, gate[8][4];
    Pin(y);
    begin_gates(gate, 0);
    BeginProducts();
    AddScores<D, kChunk, kChunk>(y, weight(0), key);
    CommitProducts();
    add_gates(gate, 0);
    // The first row that enters, and how many do.
    const int from = max(chunk.lo, l.S - chunk.e0);
    const unsigned entering = max(chunk.hi - from, 0);
    const Chunk next = chunk_at(index + step);
    WaitProducts<1>();
    Pin(y);
#pragma unroll
    for (int sign = 0; sign < kSigns; ++sign)
      Statistics<kSigns == 1>(y, sign == 0 ? 1.f : -1.f, s.top[sign][warp], s.sum[sign][warp],
                              lane);
    Barrier<2 * D>(team);  // all have done with the keys, and left their statistics
    if (thread < kSigns * kChunk) CombineStatistics(s, thread / kChunk, thread % kChunk);
    if (next.n >= 0) fetch(next);
    Barrier<2 * D>(team);  // the statistics are combined
    if constexpr (kSigns == 1) {
      float scale[4];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (i % 4 == 0) LoadSlots(scale, s.top[0][warp] + i / 8 * 32 + 8 * t + i % 8);
        y[i / 2][i % 2] *= scale[i % 4];
        y[i / 2][2 + i % 2] *= scale[i % 4];
      }
    }
    const int64_t part = int64_t{index} * l.Hkv + h;
#pragma unroll 1
    for (int b = 0; b < kBlocks; ++b) {
      if (b > 0) {
        begin_gates(gate, b);
        BeginProducts();
        add_gates(gate, b);
      }
      WaitProducts<0>();
      Pin(gate);
      const int64_t block = part * blocks + first_block + b, at = block * (kChunk * D / 2);
      float* decay = reinterpret_cast<float*>(p.decay + block * D + 2 * pair);
      float2* key_sum = reinterpret_cast<float2*>(p.key_sum) +
                        (part * 4 * blocks + first_block + b) * (D / 2) + pair;
      const auto half = [&]<bool kUpper>() {
        Gates<kUpper>(gate, l.least_gate);
        const int first = TokenOf(32 * kUpper + 8 * t);
        if (from > 0 || entering < kChunk) {
          int begin = from;  // unknown to the compiler, which would compare ahead for every chunk
          asm volatile("" : "+r"(begin));
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int row = kUpper ? first + i : first - i;
            if (static_cast<unsigned>(row - begin) >= entering)
              gate[4 * kUpper + i / 2][i % 2] = gate[4 * kUpper + i / 2][2 + i % 2] = 0;
          }
        }
        const int quarter = first / 16, row = first % 16;
        Places to;
        to.decay = decay + kUpper;
        to.key_sum = key_sum + quarter * (l.SF / 2);
        to.key = reinterpret_cast<uint32_t*>(p.key) + at + first * (D / 2) + pair;
        // Rows g and g + 8 of a tile share a lane of the fragment.
        to.growth = p.growth + at + quarter * (D * 8) + (warp * 32 + g % 4) * 4 + g / 4 * 2 +
                    row % 8 * 16 + row / 8;
        WriteHalf<D, kSigns, kFold, kUpper>(gate, y, b == 0 ? 1.f : -1.f,
                                            s.top[kSigns == 1 ? 0 : b][0], to, lane);
      };
      half.template operator()<false>();
      if (staggers && b == 0 && index == blockIdx.y)
        asm volatile("bar.arrive 3, %0;" ::"n"(4 * D) : "memory");
      half.template operator()<true>();
    }
    chunk = next;
    index += step;
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
  // a chunk, but all that run at once should end together. Results do not depend on it.
  const int64_t pairs = p.layer.SF / D / kBlocks;
  int64_t groups = 0, least = INT64_MAX;
  for (int each = 1; each <= 64 / kBlocksPerProcessor<D>; ++each) {
    const int64_t n = CeilDiv(p.wave_chunks, teams * each);
    const int64_t rounds = CeilDiv(n * p.layer.Hkv * pairs, processors * kBlocksPerProcessor<D>);
    const int64_t cost = rounds * (4 * each + 1);
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
