// Per chunk and query head: phi_q, Q~, and
//   O = Q~ (e^R S) + tril(Q~ K~^T) V,  denominator = Q~ (e^R z) + row sums of tril(Q~ K~^T),
// merged with the window's result. A warp has 16 rows; all else than Q~ comes through shared
// memory, one block of D of the SF channels at a time.
#include "ops/dsla/cuda/output.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 128;

// Stages of what blocks of channels need. After the last block, a stage has V and the window's
// part.
template <int D>
struct OutputShared {
  static constexpr int kStages = D == 64 ? 3 : 2;
  static constexpr bool kGrowth = D == 64;  // there is room for it

  uint4 matrix[kStages][D * D / 8];    // e^R S, or the window's result; phi_q in the last at first
  uint4 key[kStages][kChunk * D / 8];  // K~, or V
  uint4 norm[kStages][D / 4];          // e^R z
  uint4 growth[kStages][kGrowth ? kChunk * D / 8 : 1];  // e^{G-R}
};

template <int D>
__device__ __forceinline__ void FetchMatrix(uint4* to, const void* from) {
  for (int i = threadIdx.x; i < D * D / 8; i += kThreads)
    CopyAsync(to + i, static_cast<const uint4*>(from) + i);
}
// Rows of D.
template <int D, int kRows>
__device__ __forceinline__ void FetchRows(uint4* to, const __nv_bfloat16* from) {
  for (int i = threadIdx.x; i < kRows * D / 8; i += kThreads)
    CopyAsync(to + Swizzle<D / 8>(i / (D / 8), i % (D / 8)), from + 8 * i);
}
template <int D>
__device__ __forceinline__ void FetchValues(const PrefillParams& p, uint4* to, const Chunk& chunk,
                                            int h) {
  const Layer& l = p.layer;
  if (IsSpan<D>(l, p.rows, chunk.n, chunk.e0)) {
    const KvSpan span = SpanOf<D>(l, p.rows, chunk.n, h, chunk.e0);
    CopyTile<D, kThreads>(to, span.row.v, span.v_stride, max(chunk.lo, l.S - chunk.e0), chunk.hi);
    return;
  }
  for (int i = threadIdx.x; i < kChunk * D / 8; i += kThreads) {
    const int row = i / (D / 8), c = i % (D / 8);
    const bool enters = Enters(l, chunk, row);
    const __nv_bfloat16* v = enters ? RowOf<D>(l, p.rows, chunk.n, h, chunk.e0 + row).v : p.rows.v;
    CopyAsync(to + Swizzle<D / 8>(row, c), v + 8 * c, enters);
  }
}

// Block b of the channels, or, behind the last, V and the window's part; nothing after that.
template <int D>
__device__ __forceinline__ void FetchBlock(const PrefillParams& p, OutputShared<D>& shared, int b,
                                           int blocks) {
  const Layer& l = p.layer;
  const int stage = b % OutputShared<D>::kStages, head = blockIdx.x, h = head / l.G;
  if (b == blocks) {
    const Chunk chunk = ChunkOf(p, blockIdx.y);
    FetchValues<D>(p, shared.key[stage], chunk, h);
    if (l.W > 0)
      CopyTile<D, kThreads>(shared.matrix[stage], p.out + (FirstRow(l, chunk) * l.H + head) * D,
                            int64_t{l.H} * D, chunk.lo, chunk.hi);
  }
  if (b >= blocks) return;
  const int64_t at = (int64_t{blockIdx.y} * l.Hkv + h) * l.SF + b * D;
  FetchRows<D, D>(shared.matrix[stage], p.state + at * D);
  FetchRows<D, kChunk>(shared.key[stage], p.key + at * kChunk);
  if constexpr (OutputShared<D>::kGrowth)
    FetchMatrix<D>(shared.growth[stage], p.growth + at * (kChunk / 2));
  if (threadIdx.x < D / 4)
    CopyAsync(shared.norm[stage] + threadIdx.x, p.norm + at + 4 * threadIdx.x);
}

// The functions below have a warp's rows 16 warp + g and that + 8, g and t being the lane's.

// q as A operand, zeros in place of rows that are not the chunk's.
template <int D>
__device__ __forceinline__ void LoadQueries(uint32_t (&q)[D / 16][4], const PrefillParams& p,
                                            const Chunk& chunk, int warp, int lane) {
  const int64_t row0 = FirstRow(p.layer, chunk);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = 16 * warp + lane / 4 + 8 * i;
    const bool valid = j >= chunk.lo && j < chunk.hi;
    const __nv_bfloat16* from = p.q + (valid ? (row0 + j) * p.q_stride + blockIdx.x * D : 0);
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      const __nv_bfloat16* at = from + 16 * c + 2 * (lane % 4);
      q[c][i] = valid ? *reinterpret_cast<const uint32_t*>(at) : 0;
      q[c][2 + i] = valid ? *reinterpret_cast<const uint32_t*>(at + 8) : 0;
    }
  }
}

template <int D>
__device__ __forceinline__ void AddFeatures(float (&y)[D / 8][4], const uint32_t (&q)[D / 16][4],
                                            const uint4* phi_q, int lane) {
#pragma unroll
  for (int c = 0; c < D / 16; ++c)
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      const uint4 b = phi_q[(c * (D / 16) + j) * 32 + lane];
      Mma(y[2 * j], q[c], b.x, b.y);
      Mma(y[2 * j + 1], q[c], b.z, b.w);
    }
}

// score += Q~ K~^T, acc += Q~ (e^R S), of channels [16 c, 16 c + 16) of a block.
template <int D>
__device__ __forceinline__ void AddChannels(float (&score)[8][4], float (&acc)[D / 8][4],
                                            const uint32_t (&a)[4], uint32_t key, uint32_t state,
                                            int c, int warp, int lane) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j > warp) continue;  // later than all of this warp's rows
    uint32_t k[4];
    LoadMatrix(k,
               key + 16 * Swizzle<D / 8>(16 * j + lane % 8 + lane / 16 * 8, 2 * c + lane / 8 % 2));
    Mma(score[2 * j], a, k[0], k[1]);
    Mma(score[2 * j + 1], a, k[2], k[3]);
  }
#pragma unroll
  for (int j = 0; j < D / 16; ++j) {
    uint32_t s[4];
    LoadMatrix(
        s, state + 16 * Swizzle<D / 8>(16 * j + lane % 8 + lane / 16 * 8, 2 * c + lane / 8 % 2));
    Mma(acc[2 * j], a, s[0], s[1]);
    Mma(acc[2 * j + 1], a, s[2], s[3]);
  }
}

// acc += tril(score) V, norm += its rows' sums. What is above the diagonal is lost.
template <int D>
__device__ __forceinline__ void AddChunkValues(float (&acc)[D / 8][4], float (&norm)[2],
                                               float (&score)[8][4], uint32_t v, int warp,
                                               int lane) {
#pragma unroll
  for (int c = 0; c < kChunk / 16; ++c) {
    if (c > warp) continue;  // all zeros
    uint32_t a[4];
    MaskScores(a, score, c, warp, lane, norm);
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      uint32_t b[4];
      LoadMatrixTransposed(b, v + 16 * Swizzle<D / 8>(16 * c + lane % 16, 2 * j + lane / 16));
      Mma(acc[2 * j], a, b[0], b[1]);
      Mma(acc[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// What the rows' shares are told by: the window's log-sum-exp, and the claim.
struct WindowSums {
  float lse[2] = {}, claim[2] = {};
  __device__ __forceinline__ WindowSums(const PrefillParams& p, const Chunk& chunk, int warp,
                                        int lane) {
    const Layer& l = p.layer;
    const int head = blockIdx.x;
    const int64_t row0 = FirstRow(l, chunk);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int j = 16 * warp + lane / 4 + 8 * r;
      if (l.W == 0 || j < chunk.lo || j >= chunk.hi) continue;
      lse[r] = p.lse[(int64_t{blockIdx.y} * l.H + head) * kChunk + j];
      claim[r] = p.claim[(row0 + j) * l.H + head];
    }
  }
};

// The states' part merged with the window's, which is in `window`.
template <int D>
__device__ __forceinline__ void WriteRows(const PrefillParams& p, const Chunk& chunk,
                                          const float (&acc)[D / 8][4], const float (&norm)[2],
                                          const WindowSums& sums, const uint4* window, int warp,
                                          int lane) {
  const Layer& l = p.layer;
  const int64_t row0 = FirstRow(l, chunk);
  const int t = lane % 4;
  const uint32_t* from = reinterpret_cast<const uint32_t*>(window) + t;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float denominator = QuadSum(norm[r]);
    const int j = 16 * warp + lane / 4 + 8 * r;
    if (j < chunk.lo || j >= chunk.hi) continue;
    const float scaled = 1 / (denominator + kDslaEpsilon);
    uint32_t* out = reinterpret_cast<uint32_t*>(p.out + ((row0 + j) * l.H + blockIdx.x) * D) + t;
    float w = 1;
    if (l.W > 0) w = StatesShare(denominator, sums.lse[r], sums.claim[r]);
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      float x0 = w * (acc[c][2 * r] * scaled), x1 = w * (acc[c][2 * r + 1] * scaled);
      if (l.W > 0) {
        const uint32_t x = from[4 * Swizzle<D / 8>(j, c)];
        x0 += (1 - w) * Low(x);
        x1 += (1 - w) * High(x);
      }
      out[4 * c] = Pack(x0, x1);
    }
  }
}

// grid (H, chunks of a wave)
template <int D>
__global__ void __launch_bounds__(kThreads, D == 128 ? 2 : 3)
    OutputKernel(const __grid_constant__ PrefillParams p) {
  constexpr int kStages = OutputShared<D>::kStages;
  constexpr bool kGrowth = OutputShared<D>::kGrowth;
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<OutputShared<D>*>(memory);
  const Layer& l = p.layer;
  const int head = blockIdx.x;
  const Chunk chunk = ChunkOf(p, blockIdx.y);
  if (chunk.n < 0) {
    AwaitPrevious();
    return;
  }
  const int64_t part = int64_t{blockIdx.y} * l.Hkv + head / l.G;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int blocks = l.SF / D;

  FetchMatrix<D>(shared.matrix[kStages - 1], l.weights.phi_q + int64_t{head} * D * D);
  CommitCopies();
  float y[D / 8][4] = {};
  {
    uint32_t q[D / 16][4];
    LoadQueries<D>(q, p, chunk, warp, lane);
    AwaitPrevious();
    AllowNext();
#pragma unroll
    for (int b = 0; b < kStages - 1; ++b) {
      FetchBlock<D>(p, shared, b, blocks);
      CommitCopies();
    }
    WaitCopies<kStages - 1>();
    __syncthreads();
    AddFeatures<D>(y, q, shared.matrix[kStages - 1], lane);
    __syncthreads();  // phi_q's place is free
  }
  float log_sum[2][2];
  LogSums<D>(y, l.F > D, log_sum);

  const LogMix log_mix(l, head);
  float acc[D / 8][4] = {}, score[8][4] = {}, norm[2] = {};
  for (int b = 0; b < blocks; ++b) {
    FetchBlock<D>(p, shared, b + kStages - 1, blocks);
    CommitCopies();
    const BlockOfFeatures features(b, l.F > D, log_mix, log_sum);
    const uint4* growth;
    if constexpr (kGrowth)
      growth = shared.growth[b % kStages] + warp * (D * 2) + lane;
    else
      growth = reinterpret_cast<const uint4*>(p.growth) +
               ((part * blocks + b) * 4 + warp) * (D * 2) + lane;
    const float2* z = reinterpret_cast<const float2*>(shared.norm[b % kStages]) + lane % 4;
    uint4 ahead{};
    if (!kGrowth) ahead = growth[0];
    WaitCopies<kStages - 1>();
    __syncthreads();
    const uint32_t state = SharedAddress(shared.matrix[b % kStages]);
    const uint32_t key = SharedAddress(shared.key[b % kStages]);
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      uint4 grown = ahead;
      if constexpr (kGrowth)
        grown = growth[c * 32];
      else if (c + 1 < D / 16)
        ahead = growth[(c + 1) * 32];
      uint32_t a[4];
      MakeQueries<D>(a, y, c, features, grown, z, norm);
      AddChannels<D>(score, acc, a, key, state, c, warp, lane);
    }
    __syncthreads();  // the other half's copies of the next round may overwrite this block
  }
  const Chunk again = ChunkOf(p, blockIdx.y);  // read twice: registers are short in between
  const WindowSums sums(p, again, warp, lane);
  WaitCopies<0>();
  __syncthreads();
  AddChunkValues<D>(acc, norm, score, SharedAddress(shared.key[blocks % kStages]), warp, lane);
  WriteRows<D>(p, again, acc, norm, sums, shared.matrix[blocks % kStages], warp, lane);
}

template <int D>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  Start<OutputKernel<D>>("output", dim3(p.layer.H, p.wave_chunks), kThreads,
                         sizeof(OutputShared<D>), p, stream);
}

}  // namespace

void LaunchOutput(const PrefillParams& p, int D, cudaStream_t stream) {
  D == 64 ? Launch<64>(p, stream) : Launch<128>(p, stream);
}

}  // namespace dsla::cuda
