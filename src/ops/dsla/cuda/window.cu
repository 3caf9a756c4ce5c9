// Exact softmax attention of a chunk's queries over the window and the sinks: tiles of 64 keys,
// online softmax in base 2. Leaves the result in `out` and the log-sum-exp in the workspace, for
// the output kernel to merge with the states.
#include "ops/dsla/cuda/prefill.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 128;

template <int D>
struct WindowShared {
  static constexpr int kStages = D == 64 ? 3 : 2;
  uint4 k[kStages][kChunk * D / 8];
  uint4 v[kStages][kChunk * D / 8];
};

// Keys [first, first + 64), or the sinks. Only tokens that some query of the chunk sees are read;
// the others' values are zero, since a weight of 0 times whatever lies there may be NaN.
template <int D>
__device__ __forceinline__ void Fetch(const PrefillParams& p, uint4* k, uint4* v,
                                      const Chunk& chunk, int h, int first, bool sinks) {
  constexpr int kPieces = D / 8;
  const Layer& l = p.layer;
  const int pos = l.pos[chunk.n];
  const int from = sinks ? 0 : max(l.S, chunk.e0 + chunk.lo + 1);
  const int to = min(sinks ? l.S : INT_MAX, chunk.e0 + chunk.hi + l.W);
  if (!sinks && IsSpan<D>(l, p.rows, chunk.n, first)) {
    const KvSpan span = SpanOf<D>(l, p.rows, chunk.n, h, first);
    CopyTile<D, kThreads>(k, span.row.k, span.k_stride, from - first, to - first);
    CopyTile<D, kThreads>(v, span.row.v, span.v_stride, from - first, to - first);
    return;
  }
  const int rows = sinks ? (l.S + 15) / 16 * 16 : kChunk;  // no more of the sinks are looked at
  for (int i = threadIdx.x; i < rows * kPieces; i += kThreads) {
    const int row = i / kPieces, c = i % kPieces, s = first + row;
    const bool valid = s >= from && s < to;
    KvRow at{p.rows.k, p.rows.v};
    if (valid && sinks && s < pos) {
      const std::byte* slot = SlotBase(l, chunk.n);
      const int64_t place = (int64_t{h} * l.S + s) * D;
      at = {reinterpret_cast<const __nv_bfloat16*>(slot + l.at.sink_k) + place,
            reinterpret_cast<const __nv_bfloat16*>(slot + l.at.sink_v) + place};
    } else if (valid) {
      at = RowOf<D>(l, p.rows, chunk.n, h, s);
    }
    CopyAsync(k + Swizzle<kPieces>(row, c), at.k + 8 * c, valid);
    CopyAsync(v + Swizzle<kPieces>(row, c), at.v + 8 * c, valid);
  }
}

// grid (H, chunks of a wave)
template <int D>
__global__ void __launch_bounds__(kThreads, D == 128 ? 2 : 3)
    WindowKernel(const __grid_constant__ PrefillParams p) {
  constexpr int kStages = WindowShared<D>::kStages;
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<WindowShared<D>*>(memory);
  const Layer& l = p.layer;
  const int head = blockIdx.x, h = head / l.G;
  AllowNext();  // reads nothing of the kernel before it, but ends only after it
  const Chunk chunk = ChunkOf(p, blockIdx.y);
  if (chunk.n < 0) {
    AwaitPrevious();
    return;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  // Keys e0 + 1 .. e0 + W + 63 in tiles from e0 on, after the sinks.
  const int tiles = (l.W + kChunk - 1) / kChunk + 1, sink_tiles = l.S > 0;
  const auto fetch = [&](int i) {
    const bool sinks = i < sink_tiles;
    Fetch<D>(p, shared.k[i % kStages], shared.v[i % kStages], chunk, h,
             sinks ? 0 : chunk.e0 + (i - sink_tiles) * kChunk, sinks);
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < sink_tiles + tiles) fetch(i);
    CommitCopies();
  }

  uint32_t q[D / 16][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = 16 * warp + g + 8 * i;
    const bool valid = j >= chunk.lo && j < chunk.hi;
    const __nv_bfloat16* from =
        p.q + (valid ? (FirstRow(l, chunk) + j) * p.q_stride + head * D : 0);
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      q[c][i] = valid ? *reinterpret_cast<const uint32_t*>(from + 16 * c + 2 * t) : 0;
      q[c][2 + i] = valid ? *reinterpret_cast<const uint32_t*>(from + 16 * c + 2 * t + 8) : 0;
    }
  }
  const float scale = rsqrtf(static_cast<float>(D)) * 1.4426950408889634f;
  float acc[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  for (int i = 0; i < sink_tiles + tiles; ++i) {
    WaitCopies<kStages - 2>();
    __syncthreads();
    if (i + kStages - 1 < sink_tiles + tiles) fetch(i + kStages - 1);
    CommitCopies();
    const bool sinks = i < sink_tiles;
    const int first = sinks ? 0 : chunk.e0 + (i - sink_tiles) * kChunk;
    const uint32_t k = SharedAddress(shared.k[i % kStages]);
    const uint32_t v = SharedAddress(shared.v[i % kStages]);
    // Times of this warp's queries, and the groups of 16 keys that one of them sees.
    const int early = chunk.e0 + l.W + 16 * warp, late = early + 15;
    const int begin = sinks ? 0 : max(early - l.W + 1 - first, 0) / 16;
    const int end = min((sinks ? l.S : kChunk) + 15, late - first + 16) / 16;
    if (begin >= end) continue;
    const bool all_seen =
        !sinks && first > late - l.W && first + kChunk - 1 <= early && first >= l.S;
    float score[8][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) score[2 * j][c] = score[2 * j + 1][c] = 0;
      if (j < begin || j >= end) continue;
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        uint32_t b[4];
        LoadMatrix(
            b, k + 16 * Swizzle<D / 8>(16 * j + lane % 8 + lane / 16 * 8, 2 * c + lane / 8 % 2));
        Mma(score[2 * j], q[c], b[0], b[1]);
        Mma(score[2 * j + 1], q[c], b[2], b[3]);
      }
    }
    if (!all_seen) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int s = first + 8 * j + 2 * t + c % 2, time = early + g + 8 * (c / 2);
          const bool seen = s <= time && (sinks ? s < l.S : s >= l.S && s > time - l.W);
          if (!seen) score[j][c] = -INFINITY;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float next = top[r];
#pragma unroll
      for (int j = 0; j < 8; ++j) next = fmaxf(next, fmaxf(score[j][2 * r], score[j][2 * r + 1]));
      next = QuadMax(next);
      const float base = next == -INFINITY ? 0.f : next * scale;
      const float shrink = Exp2(top[r] * scale - base);
      top[r] = next;
      sum[r] *= shrink;
      if (__any_sync(~0u, shrink != 1)) {
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          acc[j][2 * r] *= shrink;
          acc[j][2 * r + 1] *= shrink;
        }
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        score[j][2 * r] = Exp2(score[j][2 * r] * scale - base);
        score[j][2 * r + 1] = Exp2(score[j][2 * r + 1] * scale - base);
        sum[r] += score[j][2 * r] + score[j][2 * r + 1];
      }
    }
#pragma unroll
    for (int c = 0; c < kChunk / 16; ++c) {
      if (c < begin || c >= end) continue;
      const uint32_t a[4] = {Pack(score[2 * c][0], score[2 * c][1]),
                             Pack(score[2 * c][2], score[2 * c][3]),
                             Pack(score[2 * c + 1][0], score[2 * c + 1][1]),
                             Pack(score[2 * c + 1][2], score[2 * c + 1][3])};
#pragma unroll
      for (int j = 0; j < D / 16; ++j) {
        uint32_t b[4];
        LoadMatrixTransposed(b, v + 16 * Swizzle<D / 8>(16 * c + lane % 16, 2 * j + lane / 16));
        Mma(acc[2 * j], a, b[0], b[1]);
        Mma(acc[2 * j + 1], a, b[2], b[3]);
      }
    }
  }
  const Chunk again = ChunkOf(p, blockIdx.y);  // read twice: registers are short in between
  const int64_t row0 = FirstRow(l, again);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float all = QuadSum(sum[r]);
    const int j = 16 * warp + g + 8 * r;
    if (j < again.lo || j >= again.hi) continue;
    if (t == 0)
      p.lse[(int64_t{blockIdx.y} * l.H + head) * kChunk + j] =
          top[r] * scale * 0.6931471805599453f + logf(all);
    uint32_t* out = reinterpret_cast<uint32_t*>(p.out + ((row0 + j) * l.H + head) * D);
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
      out[4 * c + t] = Pack(acc[c][2 * r] / all, acc[c][2 * r + 1] / all);
  }
  AwaitPrevious();
}

template <int D>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  Start<WindowKernel<D>>("window", dim3(p.layer.H, p.wave_chunks), kThreads,
                         sizeof(WindowShared<D>), p, stream);
}

}  // namespace

void LaunchWindow(const PrefillParams& p, int D, cudaStream_t stream) {
  D == 64 ? Launch<64>(p, stream) : Launch<128>(p, stream);
}

}  // namespace dsla::cuda
