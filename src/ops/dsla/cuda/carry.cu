// Carries the states of a sequence from chunk to chunk, leaving e^R S of every chunk for its
// queries.
//   S^ = e^R S,  S' = e^{L-R} (S^ + K~^T V)
// The state is held transposed, so that its accumulators are, once rounded, mma's B operand of the
// queries' product with it.
#include "ops/dsla/cuda/prefill.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 128, kStages = 3;

constexpr int kChannels = 32;  // of a block; all value columns

template <int D>
struct CarryStage {
  uint4 v[kChunk * D / 8];
  uint4 key[kChunk * kChannels / 8];
  float4 decay[kChannels / 2];
  float4 key_sum[4 * kChannels / 4];
};

// V of a chunk whose rows do not lie at one distance. Rows that do not enter have K~ = 0, but 0
// times whatever lies there may be NaN.
template <int D, typename Rows>
__device__ __forceinline__ void CopyScattered(const PrefillParams& p, const Rows& rows, uint4* to,
                                              const Chunk& chunk, int h) {
  constexpr int kPieces = D / 8;
  for (int i = threadIdx.x; i < kChunk * kPieces; i += kThreads) {
    const int row = i / kPieces, c = i % kPieces;
    const bool enters = Enters(p.layer, chunk, row);
    const __nv_bfloat16* v =
        enters ? RowOf<D>(p.layer, rows, chunk.n, h, chunk.e0 + row).v : p.key;  // any address
    CopyAsync(to + Swizzle<kPieces>(row, c), v + 8 * c, enters);
  }
}

// `page` is the chunk's page, or -1 if it lies in several; the other scalars are loaded once or one
// chunk ahead, so that no load waits for another here.
template <int D, bool kFold>
__device__ __forceinline__ void Fetch(const PrefillParams& p, CarryStage<D>& s, const Chunk& chunk,
                                      int pos, int64_t row_start, int page, int index, int h,
                                      int c0) {
  constexpr int kC = kChannels, kKeyPieces = kC / 8;
  const Layer& l = p.layer;
  const int64_t part = int64_t{index - p.first} * l.Hkv + h;
  const __nv_bfloat16* key = p.key + (part * l.SF + c0 / D * D) * kChunk + c0 % D;
  for (int i = threadIdx.x; i < kChunk * kKeyPieces; i += kThreads) {
    const int row = i / kKeyPieces, c = i % kKeyPieces;
    CopyAsync(s.key + Swizzle<kKeyPieces>(row, c), key + row * D + 8 * c);
  }
  const int from = max(chunk.lo, l.S - chunk.e0);
  if constexpr (kFold) {
    if (page >= 0) {
      const int64_t at = page * p.pages.page_stride +
                         (int64_t{h} * p.pages.page_size + chunk.e0 % p.pages.page_size) * D;
      CopyTile<D, kThreads>(s.v, p.pages.v + at, D, from, chunk.hi);
    } else {
      CopyScattered<D>(p, p.pages, s.v, chunk, h);
    }
  } else {
    if (chunk.e0 >= pos) {
      const int64_t row = row_start + (chunk.e0 - pos);
      CopyTile<D, kThreads>(s.v, p.rows.v + row * p.rows.v_stride + h * D, p.rows.v_stride, from,
                            chunk.hi);
    } else {
      CopyScattered<D>(p, p.rows, s.v, chunk, h);
    }
  }
  if (threadIdx.x < kC / 2)
    CopyAsync(s.decay + threadIdx.x, p.decay + part * l.SF + c0 + 2 * threadIdx.x);
  if (threadIdx.x < kC) {
    const int quarter = threadIdx.x / (kC / 4), c = threadIdx.x % (kC / 4);
    CopyAsync(s.key_sum + threadIdx.x, p.key_sum + (part * 4 + quarter) * l.SF + c0 + 4 * c);
  }
}

// grid (blocks of channels, Hkv, N)
template <int D, bool kFold>
__global__ void __launch_bounds__(kThreads, D == 128 ? 3 : 4)
    CarryKernel(const __grid_constant__ PrefillParams p) {
  constexpr int kC = kChannels, kM = D / 64, kN = kC / 8;
  extern __shared__ __align__(16) std::byte memory[];
  auto* stages = reinterpret_cast<CarryStage<D>*>(memory);
  const Layer& l = p.layer;
  const int n = blockIdx.z, h = blockIdx.y, c0 = blockIdx.x * kC;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int begin = max(p.chunk_start[n], p.first);
  const int end = min(p.chunk_start[n + 1], p.first + p.wave_chunks);
  // A sequence without chunks still is reset by a fold, in the call's first wave.
  const bool empty = kFold && p.first == 0 && p.chunk_start[n] == p.chunk_start[n + 1];
  if (begin >= end && !empty) return;
  const bool fresh = kFold && (empty || begin == p.chunk_start[n]);

  const int pos = l.pos[n], first_chunk = p.chunk_start[n], last_chunk = p.chunk_start[n + 1] - 1;
  const int64_t row_start = kFold ? 0 : l.row_start[n];
  Chunk first{}, last{};
  if (!empty) {
    first = p.chunks[first_chunk];
    last = p.chunks[last_chunk];
  }
  const auto chunk_at = [&](int index) -> Chunk {
    return {n, first.e0 + (index - first_chunk) * kChunk, index == first_chunk ? first.lo : 0,
            index == last_chunk ? last.hi : kChunk};
  };
  const auto page_at = [&](int index) {
    if (!kFold || index >= end) return -1;
    const int e0 = chunk_at(index).e0;
    return IsSpan<D>(l, p.pages, n, e0)
               ? p.pages.pages[p.pages.page_start[n] + e0 / p.pages.page_size]
               : -1;
  };
  const auto fetch = [&](int index, int page) {
    if (index < end)
      Fetch<D, kFold>(p, stages[(index - begin) % kStages], chunk_at(index), pos, row_start, page,
                      index, h, c0);
    CommitCopies();
  };
  for (int i = 0; i < kStages - 1; ++i) fetch(begin + i, page_at(begin + i));
  int page = page_at(begin + kStages - 1);
  std::byte* slot = SlotBase(l, n);
  float* state = reinterpret_cast<float*>(slot + l.at.state) + (int64_t{h} * l.SF + c0) * D;
  float* norm = reinterpret_cast<float*>(slot + l.at.norm) + int64_t{h} * l.SF + c0;
  const int v0 = warp * (D / 4);  // this warp's value columns
  float acc[kM][kN][4];
  float z = fresh || threadIdx.x >= kC ? 0 : norm[threadIdx.x];
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        acc[m][j][i] =
            fresh ? 0 : state[(8 * j + 2 * t + i % 2) * D + v0 + 16 * m + g + 8 * (i / 2)];

  for (int index = begin; index < end; ++index) {
    WaitCopies<kStages - 2>();
    __syncthreads();
    fetch(index + kStages - 1, page);
    page = page_at(index + kStages);
    const CarryStage<D>& s = stages[(index - begin) % kStages];
    const int64_t part = int64_t{index - p.first} * l.Hkv + h;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float4 decay = s.decay[4 * j + t];  // of channels 2t, 2t + 1: e^R, e^{L-R} each
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        acc[m][j][0] *= decay.x;
        acc[m][j][1] *= decay.z;
        acc[m][j][2] *= decay.x;
        acc[m][j][3] *= decay.z;
      }
    }
    if constexpr (!kFold) {
      uint4* to = reinterpret_cast<uint4*>(p.state + (part * l.SF + c0 / D * D) * D);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int j = 0; j < kN / 2; ++j) {
          const float(&a)[4] = acc[m][2 * j], (&b)[4] = acc[m][2 * j + 1];
          const int tile = (c0 % D / 16 + j) * (D / 16) + v0 / 16 + m;
          to[tile * 32 + lane] = {Pack(a[0], a[1]), Pack(b[0], b[1]), Pack(a[2], a[3]),
                                  Pack(b[2], b[3])};
        }
    }
    if (threadIdx.x < kC) {
      const float2 decay = reinterpret_cast<const float2*>(s.decay)[threadIdx.x];
      const float* sums = reinterpret_cast<const float*>(s.key_sum) + threadIdx.x;
      z *= decay.x;
      if constexpr (!kFold) p.norm[part * l.SF + c0 + threadIdx.x] = z;
      z = (z + ((sums[0] + sums[kC]) + (sums[2 * kC] + sums[3 * kC]))) * decay.y;
    }
    const uint32_t v = SharedAddress(s.v), key = SharedAddress(s.key);
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m)
        LoadMatrixTransposed(a[m], v + 16 * Swizzle<D / 8>(16 * k + lane % 8 + lane / 16 * 8,
                                                           v0 / 8 + 2 * m + lane / 8 % 2));
#pragma unroll
      for (int j = 0; j < kN / 2; ++j) {
        uint32_t b[4];
        LoadMatrixTransposed(b, key + 16 * Swizzle<kC / 8>(16 * k + lane % 16, 2 * j + lane / 16));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          Mma(acc[m][2 * j], a[m], b[0], b[1]);
          Mma(acc[m][2 * j + 1], a[m], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float4 decay = s.decay[4 * j + t];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        acc[m][j][0] *= decay.y;
        acc[m][j][1] *= decay.w;
        acc[m][j][2] *= decay.y;
        acc[m][j][3] *= decay.w;
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        state[(8 * j + 2 * t + i % 2) * D + v0 + 16 * m + g + 8 * (i / 2)] = acc[m][j][i];
  if (threadIdx.x < kC) norm[threadIdx.x] = z;
}

template <int D, bool kFold>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  const dim3 grid(p.layer.SF / kChannels, p.layer.Hkv, p.layer.N);
  Start(CarryKernel<D, kFold>, grid, kThreads, kStages * sizeof(CarryStage<D>), p, stream);
}

}  // namespace

void LaunchCarry(const PrefillParams& p, int D, cudaStream_t stream) {
  if (D == 64)
    p.fold ? Launch<64, true>(p, stream) : Launch<64, false>(p, stream);
  else
    p.fold ? Launch<128, true>(p, stream) : Launch<128, false>(p, stream);
}

}  // namespace dsla::cuda
