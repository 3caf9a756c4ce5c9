// Per chunk and KV head: keys with RoPE undone, gates, phi_k, and from them K~ and e^{G-R}.
#include "ops/dsla/cuda/prefill.cuh"

namespace dsla::cuda {
namespace {

// One fp32 element pair of a [64, D] tile in shared memory, placed so that neither fragments (rows
// g, pairs 4 j + t) nor rows (one row, 32 pairs) meet bank conflicts.
template <int D>
__device__ __forceinline__ int PairAt(int row, int pair) {
  return row * (D / 2) + (pair ^ ((row & 3) << 2));
}

// Place of the 16-byte piece c of a row of D / 2 angles, such that four rows times two pieces,
// which half a warp reads at a time, lie in different banks.
template <int D>
__device__ __forceinline__ int AnglePiece(int row, int c) {
  return c ^ ((row & 3) << 1);
}

template <int D>
struct PrepareShared {
  float2 y[kChunk * D / 2];     // phi_k's logits in base 2
  float2 gate[kChunk * D / 2];  // e^a - 1
  uint4 weight[D * D / 8];
  float log_sum[2][kChunk];  // of e^y, of e^{-y}, in base 2
  float2 total[4][D / 2];    // products of e^a over 16 rows
};

template <int D>
__device__ __forceinline__ void FetchWeights(uint4* to, const __nv_bfloat16* from) {
  for (int i = threadIdx.x; i < D * D / 8; i += 2 * D)
    CopyAsync(to + i, reinterpret_cast<const uint4*>(from) + i);
  CommitCopies();
}

// acc [16 rows, 64 columns of `half`] += a times the matrix in shared memory.
template <int D>
__device__ __forceinline__ void Multiply(float (&acc)[8][4], const uint32_t (&a)[4], int k,
                                         const uint4* weight, int half, int lane) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint4 b = weight[(k * (D / 16) + half * 4 + j) * 32 + lane];
    Mma(acc[2 * j], a, b.x, b.y);
    Mma(acc[2 * j + 1], a, b.z, b.w);
  }
}

// The logarithms of the sums of e^y, and of e^{-y} if the features need it, of each row.
template <int D>
__device__ __forceinline__ void RowStatistics(PrepareShared<D>& s, int signs, int warp, int lane) {
  for (int row = warp; row < kChunk; row += 2 * D / 32) {
    float2 y[D / 64];
#pragma unroll
    for (int i = 0; i < D / 64; ++i) y[i] = s.y[PairAt<D>(row, lane + 32 * i)];
    for (int sign = 0; sign < signs; ++sign) {
      float top = -INFINITY, sum = 0;
#pragma unroll
      for (int i = 0; i < D / 64; ++i) {
        top = fmaxf(top, fmaxf(y[i].x, y[i].y));
      }
      top = WarpMax(top);
#pragma unroll
      for (int i = 0; i < D / 64; ++i) {
        sum += Exp2(y[i].x - top) + Exp2(y[i].y - top);
        y[i] = {-y[i].x, -y[i].y};
      }
      sum = WarpSum(sum);
      if (lane == 0) s.log_sum[sign][row] = top + Log2(sum);
    }
  }
}

// grid (Hkv, chunks of a wave), 2 D threads: four row tiles times D / 64 halves of the columns for
// the products, then four quarters of the rows times D / 2 pairs of columns for the sums over time.
template <int D, bool kFold>
__global__ void __launch_bounds__(2 * D, 2) PrepareKernel(const __grid_constant__ PrefillParams p) {
  extern __shared__ __align__(16) std::byte memory[];
  PrepareShared<D>& s = *reinterpret_cast<PrepareShared<D>*>(memory);
  const Layer& l = p.layer;
  const int h = blockIdx.x;
  AwaitPrevious();
  AllowNext();
  const Chunk chunk = ChunkOf(p, blockIdx.y);
  if (chunk.n < 0) return;
  const int64_t part = int64_t{blockIdx.y} * l.Hkv + h;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int tile = warp % 4, half = warp / 4, blocks = l.SF / D;
  const int rows[2] = {16 * tile + g, 16 * tile + g + 8};
  const bool enters[2] = {Enters(l, chunk, rows[0]), Enters(l, chunk, rows[1])};

  // The angles of the chunk's positions lie where gates come later.
  float4* angles = reinterpret_cast<float4*>(s.gate);
  for (int i = threadIdx.x; i < 2 * kChunk * D / 8; i += 2 * D) {
    const int row = i / (D / 8) % kChunk, c = i % (D / 8);
    const float* from = (i < kChunk * D / 8 ? l.cos : l.sin);
    const bool enters = Enters(l, chunk, row);
    if (enters) from += int64_t{chunk.e0 + row} * (D / 2) + 4 * c;
    CopyAsync(angles + i / (D / 8) * (D / 8) + AnglePiece<D>(row, c), from, enters);
  }
  FetchWeights<D>(s.weight, l.weights.phi_k + int64_t{h} * D * D);
  uint32_t hi[D / 16][4], lo[D / 16][4];  // the key, then its un-rotated form's two terms
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const __nv_bfloat16* k = nullptr;
    if (enters[i]) {
      if constexpr (kFold)
        k = RowOf<D>(l, p.pages, chunk.n, h, chunk.e0 + rows[i]).k;
      else
        k = RowOf<D>(l, p.rows, chunk.n, h, chunk.e0 + rows[i]).k;
    }
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      hi[c][i] = k ? *reinterpret_cast<const uint32_t*>(k + 16 * c + 2 * t) : 0;
      hi[c][2 + i] = k ? *reinterpret_cast<const uint32_t*>(k + 16 * c + 2 * t + 8) : 0;
    }
  }
  WaitCopies<0>();
  __syncthreads();
  {
    float acc[8][4] = {};
#pragma unroll
    for (int c = 0; c < D / 16; ++c) Multiply<D>(acc, hi[c], c, s.weight, half, lane);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      constexpr float kLog2e = 1.4426950408889634f;
      s.y[PairAt<D>(rows[0], half * 32 + 4 * j + t)] = {acc[j][0] * kLog2e, acc[j][1] * kLog2e};
      s.y[PairAt<D>(rows[1], half * 32 + 4 * j + t)] = {acc[j][2] * kLog2e, acc[j][3] * kLog2e};
    }
  }
  __syncthreads();
  FetchWeights<D>(s.weight, l.weights.gates + int64_t{h} * blocks * D * D);
  RowStatistics<D>(s, l.F / D, warp, lane);
#pragma unroll
  for (int c = 0; c < D / 32; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = rows[i % 2], pair = 8 * c + t + 4 * (i / 2);
      const int at = row * (D / 4) + AnglePiece<D>(row, pair / 2) * 2 + pair % 2;
      const float2 cos = reinterpret_cast<const float2*>(angles)[at];
      const float2 sin = reinterpret_cast<const float2*>(angles)[kChunk * D / 4 + at];
      const float x0 = Low(hi[c][i]), x1 = High(hi[c][i]);
      const float y0 = Low(hi[c + D / 32][i]), y1 = High(hi[c + D / 32][i]);
      const float u0 = x0 * cos.x + y0 * sin.x, u1 = x1 * cos.y + y1 * sin.y;
      const float w0 = y0 * cos.x - x0 * sin.x, w1 = y1 * cos.y - x1 * sin.y;
      hi[c][i] = Pack(u0, u1);
      lo[c][i] = Pack(u0 - Low(hi[c][i]), u1 - High(hi[c][i]));
      hi[c + D / 32][i] = Pack(w0, w1);
      lo[c + D / 32][i] = Pack(w0 - Low(hi[c + D / 32][i]), w1 - High(hi[c + D / 32][i]));
    }

  const int pair = threadIdx.x % (D / 2), quarter = threadIdx.x / (D / 2);
  for (int b = 0; b < blocks; ++b) {
    WaitCopies<0>();
    __syncthreads();
    {
      float acc[8][4];
      const float2* bias =
          reinterpret_cast<const float2*>(l.weights.bias + h * l.SF + b * D + half * 64);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 x = bias[4 * j + t];
        acc[j][0] = acc[j][2] = x.x;
        acc[j][1] = acc[j][3] = x.y;
      }
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        Multiply<D>(acc, hi[c], c, s.weight, half, lane);
        Multiply<D>(acc, lo[c], c, s.weight, half, lane);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float2 gate{};
          if (enters[i])
            gate = {GateMinusOne(acc[j][2 * i], l.floor), GateMinusOne(acc[j][2 * i + 1], l.floor)};
          s.gate[PairAt<D>(rows[i], half * 32 + 4 * j + t)] = gate;
        }
    }
    __syncthreads();
    if (b + 1 < blocks)
      FetchWeights<D>(s.weight, l.weights.gates + (int64_t{h} * blocks + b + 1) * D * D);

    // Products of e^a outwards from the anchor: what is under 1 is a product, its inverse e^{G-R}
    // or 1 / e^{G-R} a reciprocal, so nothing cancels.
    float2 total{1, 1};
#pragma unroll
    for (int r = 0; r < 16; ++r) {
      const float2 gate = s.gate[PairAt<D>(16 * quarter + r, pair)];
      total.x += total.x * gate.x;
      total.y += total.y * gate.y;
    }
    s.total[quarter][pair] = total;
    __syncthreads();
    if (quarter == 0) {
      const float2 t1 = s.total[1][pair], t2 = s.total[2][pair], t3 = s.total[3][pair];
      reinterpret_cast<float4*>(p.decay)[part * (l.SF / 2) + b * (D / 2) + pair] = {
          total.x * t1.x, t2.x * t3.x, total.y * t1.y, t2.y * t3.y};
    }
    float2 run{1, 1};
    if (quarter == 0) run = s.total[1][pair];
    if (quarter == 3) run = s.total[2][pair];
    const bool negative = b % (l.F / D) == 1;
    const float sign = negative ? -1.f : 1.f;
    const float* log_sum = s.log_sum[negative ? 1 : 0] + 16 * quarter;
    uint32_t* key = reinterpret_cast<uint32_t*>(p.key) + (part * l.SF + b * D) * (kChunk / 2) +
                    16 * quarter * (D / 2) + pair;
    float2 sum{};
    // Rows g and g + 8 of a tile share a lane of the fragment.
    uint32_t* growth = p.growth + ((part * blocks + b) * 4 + quarter) * (D * 8) +
                       (pair / 8 * 32 + pair % 4) * 4 + pair / 4 % 2 * 2;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int r = quarter < 2 ? 15 - i : i, row = 16 * quarter + r;
      const float2 gate = s.gate[PairAt<D>(row, pair)], y = s.y[PairAt<D>(row, pair)];
      const float base = -log_sum[r];
      const float kx = -gate.x * Exp2(sign * y.x + base), ky = -gate.y * Exp2(sign * y.y + base);
      uint32_t packed, grown;
      if (quarter < 2) {
        packed = Pack(kx * run.x, ky * run.y);
        grown = Pack(Reciprocal(run.x), Reciprocal(run.y));
        run.x += run.x * gate.x;
        run.y += run.y * gate.y;
      } else {
        run.x += run.x * gate.x;
        run.y += run.y * gate.y;
        packed = Pack(kx * Reciprocal(run.x), ky * Reciprocal(run.y));
        grown = Pack(run.x, run.y);
      }
      if constexpr (!kFold) growth[r % 8 * 16 + r / 8] = grown;
      key[r * (D / 2)] = packed;
      sum.x += Low(packed);
      sum.y += High(packed);
    }
    reinterpret_cast<float2*>(p.key_sum)[(part * 4 + quarter) * (l.SF / 2) + b * (D / 2) + pair] =
        sum;
  }
}

template <int D, bool kFold>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  Start<PrepareKernel<D, kFold>>("prepare", dim3(p.layer.Hkv, p.wave_chunks), 2 * D,
                                 sizeof(PrepareShared<D>), p, stream);
}

}  // namespace

void LaunchPrepare(const PrefillParams& p, int D, cudaStream_t stream) {
  if (D == 64)
    p.fold ? Launch<64, true>(p, stream) : Launch<64, false>(p, stream);
  else
    p.fold ? Launch<128, true>(p, stream) : Launch<128, false>(p, stream);
}

}  // namespace dsla::cuda
