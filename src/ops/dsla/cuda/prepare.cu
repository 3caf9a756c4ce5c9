// Per chunk and KV head: keys with RoPE undone, gates, phi_k, and from them K~ and e^{G-R}.
//
// The products with the weights are transposed, [channels, d] x [d, tokens]: a lane then has runs
// of tokens of few channels in its accumulators, and products over time need registers only. Which
// token a column stands for is free. Slots count tokens outwards from the anchor, 31 .. 0 and then
// 32 .. 63; column 2t + i of tile j is slot 32 (j / 4) + 8 t + 2 (j % 4) + i, so a lane has eight
// slots in a row of each half of the chunk. Rows g and g + 8 of a tile are channels 2g and 2g + 1,
// neighbours in memory.
#include <algorithm>

#include "ops/dsla/cuda/prefill.cuh"

namespace dsla::cuda {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kTeams = 2;  // of a block: each has its own chunk, all have the same weights

// What a team of 2 D threads shares. A warp has 16 channels of each block of D.
template <int D, int kSigns>
struct TeamShared {
  // The keys as mma's B operand, 8 tiles of 8 slots: lane 4g + t is at place 4g + (t ^ g / 2), so
  // that neither threads that write a lane of all g nor warps that read meet bank conflicts.
  uint4 plain[D / 16][8][32];  // RoPE undone, as two terms of bf16
  uint4 key[D / 32][8][32];    // as it is; k steps c and c + D / 32
  // Of e^y, and of e^-y if the features need it, per warp and slot: the largest exponent in base 2,
  // and the sum of powers relative to it. Then what makes features of them, at `top`.
  float top[kSigns][D / 16][kChunk];
  float sum[kSigns][D / 16][kChunk];
};

// Weights as mma's A operand: [phi_k, then gates of kBlocks][k step][warp][lane].
template <int D, int kBlocks, int kSigns>
struct PrepareShared {
  uint4 weight[1 + kBlocks][D / 16][D / 16][32];
  TeamShared<D, kSigns> team[kTeams];
};

__device__ __forceinline__ int TokenOf(int slot) {
  return slot < kChunk / 2 ? kChunk / 2 - 1 - slot : slot;
}

template <int D, int kBlocks>
__device__ __forceinline__ void LoadWeights(uint4* to, const Layer& l, int h, int first_block) {
  constexpr int kPieces = D * D / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < (1 + kBlocks) * kPieces; i += blockDim.x) {
    const int m = i / kPieces, tile = i % kPieces / 32, g = i / 4 % 8, t = i % 4;
    const __nv_bfloat16* from =
        m == 0 ? l.weights.phi_k + int64_t{h} * D * D
               : l.weights.gates + (int64_t{h} * (l.SF / D) + first_block + m - 1) * D * D;
    // Columns 2g and 2g + 1 of the packed tile.
    const uint2* at =
        reinterpret_cast<const uint2*>(from) + tile * 64 + (2 * g % 8 * 4 + t) * 2 + g / 4;
    const uint2 even = __ldg(at), odd = __ldg(at + 8);
    to[i] = {even.x, odd.x, even.y, odd.y};
  }
}

__device__ __forceinline__ void LoadPiece(uint32_t (&to)[4], const uint4& from) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

// Each thread has 16 + 16 dimensions of one token: k step c of both halves of the head.
template <int D, bool kFold, typename Shared>
__device__ __forceinline__ void FetchKeys(const PrefillParams& p, const Chunk& chunk, int h,
                                          Shared& s, int thread, int team) {
  const Layer& l = p.layer;
  const int g = thread % 8, c = thread / 8 % (D / 32), j = thread / 8 / (D / 32);
  const int row = TokenOf(j / 4 * 32 + g / 2 * 8 + j % 4 * 2 + g % 2);
  uint4 pieces[4]{};
  float4 cos[4]{}, sin[4]{};
  if (Enters(l, chunk, row)) {
    const int e = chunk.e0 + row;
    const __nv_bfloat16* k;
    if constexpr (kFold)
      k = RowOf<D>(l, p.pages, chunk.n, h, e).k;
    else
      k = RowOf<D>(l, p.rows, chunk.n, h, e).k;
    const int64_t angle = (int64_t{e} * (D / 2) + 16 * c) / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pieces[i] = *reinterpret_cast<const uint4*>(k + 16 * c + i / 2 * (D / 2) + i % 2 * 8);
      cos[i] = reinterpret_cast<const float4*>(l.cos)[angle + i];
      sin[i] = reinterpret_cast<const float4*>(l.sin)[angle + i];
    }
  }
  Barrier<2 * D>(team);  // all have read the keys before
#pragma unroll
  for (int q = 0; q < 4; ++q) {  // lane 4g + q of the fragments
    uint32_t key[4], plain[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4& x = pieces[i];
      key[i] = q == 0 ? x.x : q == 1 ? x.y : q == 2 ? x.z : x.w;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 &cos4 = cos[2 * i + q / 2], &sin4 = sin[2 * i + q / 2];
      const float2 cs = q % 2 ? float2{cos4.z, cos4.w} : float2{cos4.x, cos4.y};
      const float2 sn = q % 2 ? float2{sin4.z, sin4.w} : float2{sin4.x, sin4.y};
      const float x0 = Low(key[i]), x1 = High(key[i]);
      const float y0 = Low(key[2 + i]), y1 = High(key[2 + i]);
      const float u0 = x0 * cs.x + y0 * sn.x, u1 = x1 * cs.y + y1 * sn.y;
      const float w0 = y0 * cs.x - x0 * sn.x, w1 = y1 * cs.y - x1 * sn.y;
      plain[0][i] = Pack(u0, u1);
      plain[0][2 + i] = Pack(u0 - Low(plain[0][i]), u1 - High(plain[0][i]));
      plain[1][i] = Pack(w0, w1);
      plain[1][2 + i] = Pack(w0 - Low(plain[1][i]), w1 - High(plain[1][i]));
    }
    const int place = 4 * g + (q ^ (g / 2));
    s.key[c][j][place] = {key[0], key[1], key[2], key[3]};
#pragma unroll
    for (int i = 0; i < 2; ++i)
      s.plain[c + i * (D / 32)][j][place] = {plain[i][0], plain[i][1], plain[i][2], plain[i][3]};
  }
  Barrier<2 * D>(team);
}

// Over the lanes of all g, of 16 values each: leaves values 8 g0 + 4 g1 + 2 g2 + {0, 1} in the lane
// whose g has bits g2 g1 g0.
template <typename Op>
__device__ __forceinline__ float2 ReduceRows(float (&v)[16], int lane, const Op& op) {
#pragma unroll
  for (int bit = 0; bit < 3; ++bit) {
    const int n = 8 >> bit;
    const bool upper = lane & (4 << bit);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= n) continue;
      const float keep = upper ? v[n + i] : v[i], give = upper ? v[i] : v[n + i];
      v[i] = op(keep, __shfl_xor_sync(~0u, give, 4 << bit));
    }
  }
  return {v[0], v[1]};
}

// Eight values of neighbouring slots.
__device__ __forceinline__ void LoadSlots(float (&to)[8], const float* from) {
  const float4 a = reinterpret_cast<const float4*>(from)[0];
  const float4 b = reinterpret_cast<const float4*>(from)[1];
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
  to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

// Of this warp's channels: the largest exponent and the sum of e^{sign y} per slot. With kKeep the
// powers take the place of y.
template <bool kKeep>
__device__ __forceinline__ void Statistics(float (&y)[2][4][4], float sign, float* top, float* sum,
                                           int lane) {
  const int g = lane / 4, t = lane % 4;
  const int slot = 32 * (g & 1) + 8 * t + 4 * (g >> 1 & 1) + 2 * (g >> 2);
  float v[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float(&from)[4] = y[i / 8][i / 2 % 4];
    v[i] = fmaxf(sign * from[i % 2], sign * from[2 + i % 2]);
  }
  const float2 most = ReduceRows(v, lane, [](float a, float b) { return fmaxf(a, b); });
  *reinterpret_cast<float2*>(top + slot) = {most.x * kLog2e, most.y * kLog2e};
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float reference[8];
    LoadSlots(reference, top + 32 * half + 8 * t);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float(&from)[4] = y[half][i / 2];
      const float e0 = Exp2(from[i % 2] * (sign * kLog2e) - reference[i]);
      const float e1 = Exp2(from[2 + i % 2] * (sign * kLog2e) - reference[i]);
      v[8 * half + i] = e0 + e1;
      if constexpr (kKeep) {
        from[i % 2] = e0;
        from[2 + i % 2] = e1;
      }
    }
  }
  *reinterpret_cast<float2*>(sum + slot) =
      ReduceRows(v, lane, [](float a, float b) { return a + b; });
}

// From the warps' statistics of one slot. One sign: the factor of each warp's powers that makes
// them features, negated. Two: minus the logarithm of the whole sum.
template <int D, int kSigns>
__device__ __forceinline__ void CombineStatistics(TeamShared<D, kSigns>& s, int sign, int slot) {
  float most = -INFINITY, sum = 0, power[D / 16];
#pragma unroll
  for (int w = 0; w < D / 16; ++w) {
    power[w] = s.top[sign][w][slot];
    most = fmaxf(most, power[w]);
  }
#pragma unroll
  for (int w = 0; w < D / 16; ++w) {
    power[w] = Exp2(power[w] - most);
    sum += s.sum[sign][w][slot] * power[w];
  }
  if constexpr (kSigns == 2) {
    s.top[sign][0][slot] = -(most + Log2(sum));
  } else {
    const float scale = -Reciprocal(sum);
#pragma unroll
    for (int w = 0; w < D / 16; ++w) s.top[0][w][slot] = power[w] * scale;
  }
}

// e^a - 1 of this warp's channels and the slots of one half.
template <int D, int kBlocks>
__device__ __forceinline__ void Gates(float (&gate)[kBlocks][4][4], const uint4* weight,
                                      const uint4* plain, const float2 (&bias)[kBlocks],
                                      float least) {
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      gate[b][j][0] = gate[b][j][1] = bias[b].x;
      gate[b][j][2] = gate[b][j][3] = bias[b].y;
    }
#pragma unroll 2
  for (int c = 0; c < D / 16; ++c) {
    uint32_t a[kBlocks][4];
    uint4 x[4];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) LoadPiece(a[b], weight[b * (D * D / 8) + c * (D * 2)]);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = plain[(c * 8 + j) * 32];
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
  for (int b = 0; b < kBlocks; ++b) {
    uint32_t signs = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) signs |= __float_as_uint(gate[b][i / 4][i % 4]);
    // Where all logits are positive, as slow gates' are, the other factor is 1 and the floor far.
    if (least < -0.05f && !__any_sync(~0u, signs >> 31)) {
#pragma unroll
      for (int i = 0; i < 16; ++i)
        gate[b][i / 4][i % 4] = RootMinusOne(Exp(-gate[b][i / 4][i % 4]));
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i)
        gate[b][i / 4][i % 4] = GateMinusOne(gate[b][i / 4][i % 4], least);
    }
  }
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
  float scale[kSigns][8];
#pragma unroll
  for (int sign = 0; sign < kSigns; ++sign)
    LoadSlots(scale[sign], s.top[sign][kSigns == 1 ? warp : 0] + 32 * kUpper + 8 * t);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float phi[2];  // negated
    if constexpr (kSigns == 1) {
      phi[0] = y[i / 2][i % 2] * scale[0][i];
      phi[1] = y[i / 2][2 + i % 2] * scale[0][i];
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      float key[2], grown[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (kSigns == 2)
          phi[r] = -Exp2(y[i / 2][2 * r + i % 2] * (b == 0 ? kLog2e : -kLog2e) + scale[b][i]);
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
__global__ void __launch_bounds__(kTeams * 2 * D, D == 128 ? 1 : 2)
    PrepareKernel(const __grid_constant__ PrefillParams p) {
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<PrepareShared<D, kBlocks, kSigns>*>(memory);
  const Layer& l = p.layer;
  const int h = blockIdx.x, first_block = blockIdx.z * kBlocks, blocks = l.SF / D;
  const int team = threadIdx.x / (2 * D), thread = threadIdx.x % (2 * D);
  const int lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int teams = blockDim.x / (2 * D);
  TeamShared<D, kSigns>& s = shared.team[team];
  LoadWeights<D, kBlocks>(&shared.weight[0][0][0][0], l, h, first_block);
  float2 bias[kBlocks];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
    bias[b] = *reinterpret_cast<const float2*>(l.weights.bias + h * l.SF + (first_block + b) * D +
                                               16 * warp + 2 * g);
  AwaitPrevious();
  AllowNext();
  __syncthreads();

  const int place = 4 * g + (t ^ (g / 2));
  for (int index = blockIdx.y + gridDim.y * team; index < p.wave_chunks;
       index += gridDim.y * teams) {
    const Chunk chunk = ChunkOf(p, index);
    if (chunk.n < 0) return;
    const int64_t part = int64_t{index} * l.Hkv + h;
    FetchKeys<D, kFold>(p, chunk, h, s, thread, team);
    float y[2][4][4] = {};
#pragma unroll 2
    for (int c = 0; c < D / 32; ++c) {
      uint32_t a[4], b[4];
      LoadPiece(a, shared.weight[0][c][warp][lane]);
      LoadPiece(b, shared.weight[0][c + D / 32][warp][lane]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint4 x = s.key[c][j][place];
        Mma(y[j / 4][j % 4], a, x.x, x.y);
        Mma(y[j / 4][j % 4], b, x.z, x.w);
      }
    }
#pragma unroll
    for (int sign = 0; sign < kSigns; ++sign)
      Statistics<kSigns == 1>(y, sign == 0 ? 1.f : -1.f, s.top[sign][warp], s.sum[sign][warp],
                              lane);
    Barrier<2 * D>(team);
    if (thread < kSigns * kChunk) CombineStatistics(s, thread / kChunk, thread % kChunk);

    const bool whole = Enters(l, chunk, 0) && chunk.hi == kChunk;
    const auto half = [&]<bool kUpper>() {
      float gate[kBlocks][4][4];
      Gates<D, kBlocks>(gate, &shared.weight[1][0][warp][lane], &s.plain[0][4 * kUpper][place],
                        bias, l.least_gate);
      const int first = TokenOf(32 * kUpper + 8 * t);
      if (!whole) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (!Enters(l, chunk, kUpper ? first + i : first - i)) {
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) gate[b][i / 2][i % 2] = gate[b][i / 2][2 + i % 2] = 0;
          }
      }
      if constexpr (!kUpper) Barrier<2 * D>(team);  // the statistics are combined
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
  }
}

template <int D, int kBlocks, int kSigns, bool kFold>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  using Shared = PrepareShared<D, kBlocks, kSigns>;
  int device = 0, most = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  int teams = kTeams, bytes = sizeof(Shared);
  if (bytes > most) {
    teams = 1;
    bytes -= sizeof(TeamShared<D, kSigns>);
  }
  // Up to eight chunks per team, for weights are fetched once per block; but four blocks per
  // multiprocessor first, so that they end together.
  const int pairs = p.layer.SF / D / kBlocks;
  const int64_t chunks = int64_t{p.wave_chunks} * p.layer.Hkv * pairs;
  const int64_t each = teams * std::clamp<int64_t>(chunks / (4 * teams * processors), 1, 8);
  const auto groups = static_cast<unsigned>((p.wave_chunks + each - 1) / each);
  Start<PrepareKernel<D, kBlocks, kSigns, kFold>>("prepare", dim3(p.layer.Hkv, groups, pairs),
                                                  teams * 2 * D, bytes, p, stream);
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
