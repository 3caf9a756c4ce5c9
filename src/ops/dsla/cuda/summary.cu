// What a segment adds to states of zero, and its total decay:
//   S^ = e^R S,  S' = e^{L-R} (S^ + K~^T V)
// for one chunk after another. A fold ends with the states of a sequence: it begins with what is in
// the slot where there are no segments, and leaves the rest to `scan` where there are.
#include "ops/dsla/cuda/prefill.cuh"

namespace dsla::cuda {
namespace {

// Groups of 128 threads have 32 channels each, and share V.
constexpr int kGroup = 128, kGroups = 2, kThreads = kGroups * kGroup, kStages = 3;
constexpr int kGroupChannels = 32, kChannels = kGroups * kGroupChannels;

template <int D>
struct SummaryStage {
  uint4 v[kChunk * D / 8];
  uint4 key[kChunk * kChannels / 8];
  float4 decay[kChannels / 2];
};

// `page` is the chunk's page, or -1 if it lies in several; the other scalars are loaded once or one
// chunk ahead, so that no load waits for another here.
template <int D, bool kFold>
__device__ __forceinline__ void Fetch(const PrefillParams& p, SummaryStage<D>& s,
                                      const Chunk& chunk, int pos, int64_t row_start, int page,
                                      int index, int h, int c0) {
  constexpr int kKeyPieces = kChannels / 8;
  const Layer& l = p.layer;
  const int64_t part = int64_t{index} * l.Hkv + h;
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
      CopyScattered<D, kThreads>(p, p.pages, s.v, chunk, h);
    }
  } else {
    if (chunk.e0 >= pos) {
      const int64_t row = row_start + (chunk.e0 - pos);
      CopyTile<D, kThreads>(s.v, p.rows.v + row * p.rows.v_stride + h * D, p.rows.v_stride, from,
                            chunk.hi);
    } else {
      CopyScattered<D, kThreads>(p, p.rows, s.v, chunk, h);
    }
  }
  if (threadIdx.x < kChannels / 2)
    CopyAsync(s.decay + threadIdx.x, p.decay + part * l.SF + c0 + 2 * threadIdx.x);
}

// grid (blocks of channels, Hkv, segments)
template <int D, bool kFold>
__global__ void __launch_bounds__(kThreads, 2)
    SummaryKernel(const __grid_constant__ PrefillParams p) {
  constexpr int kM = D / 64, kN = kGroupChannels / 8;
  extern __shared__ __align__(16) std::byte memory[];
  auto* stages = reinterpret_cast<SummaryStage<D>*>(memory);
  const Layer& l = p.layer;
  const int h = blockIdx.y, c0 = blockIdx.x * kChannels;
  AwaitPrevious();
  AllowNext();
  const Segment segment = SegmentOf(p, blockIdx.z);
  // A prefill's last segment ends with the sequence's states, so `chunks` alone goes over it.
  if (segment.count < 0 || (!kFold && (segment.flags & kLast))) return;
  const int n = segment.n, pos = l.pos[n];
  const int64_t row_start = kFold ? 0 : l.row_start[n];
  const auto chunk_at = [&](int i) -> Chunk {
    return {n, segment.e0 + i * kChunk, i == 0 ? segment.lo : 0,
            i == segment.count - 1 ? segment.hi : kChunk};
  };
  const auto page_at = [&](int i) {
    if (!kFold || i >= segment.count) return -1;
    const int e0 = segment.e0 + i * kChunk;
    return IsSpan<D>(l, p.pages, n, e0)
               ? p.pages.pages[p.pages.page_start[n] + e0 / p.pages.page_size]
               : -1;
  };
  const auto fetch = [&](int i, int page) {
    if (i < segment.count)
      Fetch<D, kFold>(p, stages[i % kStages], chunk_at(i), pos, row_start, page, segment.at + i, h,
                      c0);
    CommitCopies();
  };
  for (int i = 0; i < kStages - 1; ++i) fetch(i, page_at(i));
  int page = page_at(kStages - 1);

  // Where the states come from and go to: the slot, or this segment's part of `start`.
  const bool alone = p.cut.least == 0 || IsWhole(segment);
  const bool zero = !kFold || p.cut.least > 0 || (segment.flags & kFirst);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % (kGroup / 32), g = lane / 4,
            t = lane % 4;
  const int group = threadIdx.x / kGroup, first = group * kGroupChannels;  // channel
  std::byte* slot = SlotBase(l, n);
  float* state = reinterpret_cast<float*>(slot + l.at.state) + (int64_t{h} * l.SF + c0 + first) * D;
  float* norm = reinterpret_cast<float*>(slot + l.at.norm) + int64_t{h} * l.SF + c0;
  const int64_t store = (int64_t{segment.store} * l.Hkv + h) * l.SF + c0;
  const int v0 = warp * (D / 4);  // this warp's value columns
  float acc[kM][kN][4];
  float z = !zero && threadIdx.x < kChannels ? norm[threadIdx.x] : 0.f, total = 1;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float* from = state + (8 * j + 2 * t) * D + v0 + 16 * m + g;
      acc[m][j][0] = zero ? 0.f : from[0];
      acc[m][j][1] = zero ? 0.f : from[D];
      acc[m][j][2] = zero ? 0.f : from[8];
      acc[m][j][3] = zero ? 0.f : from[D + 8];
    }

  for (int i = 0; i < segment.count; ++i) {
    float key_sum[4] = {};
    if (threadIdx.x < kChannels) {
      const float* sums =
          p.key_sum + (int64_t{segment.at + i} * l.Hkv + h) * 4 * l.SF + c0 + threadIdx.x;
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) key_sum[quarter] = sums[quarter * l.SF];
    }
    WaitCopies<kStages - 2>();
    __syncthreads();
    fetch(i + kStages - 1, page);
    page = page_at(i + kStages);
    const SummaryStage<D>& s = stages[i % kStages];
    const auto scale = [&](bool end) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        // Of channels 2t, 2t + 1: e^R, e^{L-R} each.
        const float4 decay = s.decay[first / 2 + 4 * j + t];
        const float even = end ? decay.y : decay.x, odd = end ? decay.w : decay.z;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          acc[m][j][0] *= even;
          acc[m][j][1] *= odd;
          acc[m][j][2] *= even;
          acc[m][j][3] *= odd;
        }
      }
    };
    scale(false);
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
        LoadMatrixTransposed(b, key + 16 * Swizzle<kChannels / 8>(16 * k + lane % 16,
                                                                  first / 8 + 2 * j + lane / 16));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          Mma(acc[m][2 * j], a[m], b[0], b[1]);
          Mma(acc[m][2 * j + 1], a[m], b[2], b[3]);
        }
      }
    }
    scale(true);
    if (threadIdx.x < kChannels) {
      const float2 decay = reinterpret_cast<const float2*>(s.decay)[threadIdx.x];
      z = (z * decay.x + ((key_sum[0] + key_sum[1]) + (key_sum[2] + key_sum[3]))) * decay.y;
      total *= decay.x * decay.y;
    }
  }
  float4* start = reinterpret_cast<float4*>(p.start + (store + first) * D) + threadIdx.x % kGroup;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float(&x)[4] = acc[m][j];
      if (!alone) {
        start[(m * kN + j) * kGroup] = {x[0], x[1], x[2], x[3]};
        continue;
      }
      float* to = state + (8 * j + 2 * t) * D + v0 + 16 * m + g;
      to[0] = x[0];
      to[D] = x[1];
      to[8] = x[2];
      to[D + 8] = x[3];
    }
  if (threadIdx.x >= kChannels) return;
  if (!alone) p.start_decay[store + threadIdx.x] = total;
  (alone ? norm : p.start_norm + store)[threadIdx.x] = z;
}

template <int D, bool kFold>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  const dim3 grid(p.layer.SF / kChannels, p.layer.Hkv, p.wave_segments);
  Start<SummaryKernel<D, kFold>>("summary", grid, kThreads, kStages * sizeof(SummaryStage<D>), p,
                                 stream);
}

}  // namespace

void LaunchSummary(const PrefillParams& p, int D, cudaStream_t stream) {
  if (D == 64)
    p.fold ? Launch<64, true>(p, stream) : Launch<64, false>(p, stream);
  else
    p.fold ? Launch<128, true>(p, stream) : Launch<128, false>(p, stream);
}

}  // namespace dsla::cuda
