// Carries the states of a sequence from chunk to chunk:
//   S^ = e^R S,  S' = e^{L-R} (S^ + K~^T V)
// Three kernels of one loop: `summary` finds what a segment adds to states of zero, and its total
// decay; `carry` leaves e^R S of every chunk for its queries; `fold` wants only the last state.
// The state is held transposed, and so is e^R S in memory: its rows are value columns, which the
// queries' product with it reads as it reads K~.
#include "ops/dsla/cuda/carry.cuh"
#include "ops/dsla/cuda/warpgroup.cuh"

namespace dsla::cuda {
namespace {

enum class Pass { kSummary, kCarry, kFold };

// Leaves e^R z of channel i of a block of D channels that has so many before it. `queries` wants
// two rows of bf16 terms, the second as Swizzle has row 1.
template <int D>
__device__ __forceinline__ void StoreNorm(const PrefillParams& p, int64_t before, int i, float z) {
  if (D == 128 || p.form != Form::kQueries) {
    p.norm[before + i] = z;
    return;
  }
  auto* terms = reinterpret_cast<__nv_bfloat16*>(p.norm + before) + i;
  const __nv_bfloat16 high = __float2bfloat16_rn(z);
  terms[0] = high;
  terms[D - i + (i ^ 8)] = __float2bfloat16_rn(z - __bfloat162float(high));
}

// A thread's, for each 16 value columns of its warp and each 8 channels.
template <int D>
using Accumulators = float[D / 64][kCarryChannels<D> / 8][4];

// acc += (K~^T V)^T of a warp's value columns, with tiles in shared memory.
template <int D>
__device__ __forceinline__ void AddProduct(Accumulators<D>& acc, const CarryStage<D>& s) {
  const uint32_t v = SharedAddress(s.v), key = SharedAddress(s.key);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (D == 64) {
    Pin(acc[0]);
    BeginProducts();
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k)
      WarpgroupMma<1, 1>(acc[0], PanelDescriptor(v, k * (16 * 128)),
                         PanelDescriptor(key, k * (16 * 128)));
    EndProducts();
    Pin(acc[0]);
    return;
  }
#endif
  constexpr int kC = kCarryChannels<D>, kM = D / 64;
  const int lane = threadIdx.x % 32, v0 = threadIdx.x / 32 * (D / 4);
#pragma unroll 2  // more would load further ahead than there are registers for
  for (int k = 0; k < kChunk / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
      LoadMatrixTransposed(a[m], v + 16 * Swizzle<D / 8>(16 * k + lane % 8 + lane / 16 * 8,
                                                         v0 / 8 + 2 * m + lane / 8 % 2));
#pragma unroll
    for (int j = 0; j < kC / 16; ++j) {
      uint32_t b[4];
      LoadMatrixTransposed(b, key + 16 * Swizzle<kC / 8>(16 * k + lane % 16, 2 * j + lane / 16));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        Mma(acc[m][2 * j], a[m], b[0], b[1]);
        Mma(acc[m][2 * j + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// By e^R, or by the rest of the chunk's decay, e^{L-R}.
template <int D, bool kRest>
__device__ __forceinline__ void Decay(Accumulators<D>& acc, const CarryStage<D>& s, int t) {
#pragma unroll
  for (int j = 0; j < kCarryChannels<D> / 8; ++j) {
    const float4 decay = s.decay[4 * j + t];  // of channels 2t, 2t + 1: e^R, e^{L-R} each
    const float even = kRest ? decay.y : decay.x, odd = kRest ? decay.w : decay.z;
#pragma unroll
    for (int m = 0; m < D / 64; ++m) {
      acc[m][j][0] *= even;
      acc[m][j][1] *= odd;
      acc[m][j][2] *= even;
      acc[m][j][3] *= odd;
    }
  }
}

// In bf16, as rows of a value column each.
template <int D>
__device__ __forceinline__ void StoreRows(__nv_bfloat16* rows, const Accumulators<D>& acc, int t) {
  auto* to = reinterpret_cast<uint32_t*>(rows) + RowWord(t);
#pragma unroll
  for (int m = 0; m < D / 64; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int j = 0; j < kCarryChannels<D> / 16; ++j) {
        const float(&a)[4] = acc[m][2 * j], (&b)[4] = acc[m][2 * j + 1];
        *reinterpret_cast<uint2*>(to + (16 * m + 8 * r) * (D / 2) + 8 * j) =
            RowWords(Pack(a[2 * r], a[2 * r + 1]), Pack(b[2 * r], b[2 * r + 1]), t);
      }
}

// Zeros, or from the slot, or from a segment's part of `start`.
template <int D, typename InSlot>
__device__ __forceinline__ void LoadStates(Accumulators<D>& acc, bool zero, bool from_slot,
                                           const InSlot& in_slot, const float4* start) {
  constexpr int kM = D / 64, kN = kCarryChannels<D> / 8;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      float4 x{};
      if (!zero && from_slot) {
        const float* from = in_slot(m, j);
        x = {from[0], from[D], from[8], from[D + 8]};
      } else if (!zero) {
        x = start[(m * kN + j) * kCarryThreads];
      }
      acc[m][j][0] = x.x;
      acc[m][j][1] = x.y;
      acc[m][j][2] = x.z;
      acc[m][j][3] = x.w;
    }
}

template <int D, typename InSlot>
__device__ __forceinline__ void StoreStates(const Accumulators<D>& acc, bool to_store,
                                            const InSlot& in_slot, float4* start) {
  constexpr int kM = D / 64, kN = kCarryChannels<D> / 8;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float(&x)[4] = acc[m][j];
      if (to_store) {
        start[(m * kN + j) * kCarryThreads] = {x[0], x[1], x[2], x[3]};
        continue;
      }
      float* to = in_slot(m, j);
      to[0] = x[0];
      to[D] = x[1];
      to[8] = x[2];
      to[D + 8] = x[3];
    }
}

// Takes a chunk into z and the total decay of the thread's channel.
template <int D, Pass kPass>
__device__ __forceinline__ void AdvanceNorm(const PrefillParams& p, float& z, float& total,
                                            const CarryStage<D>& s, int64_t part, int c0) {
  constexpr int kC = kCarryChannels<D>;
  const float2 decay = reinterpret_cast<const float2*>(s.decay)[threadIdx.x];
  const float* sums = reinterpret_cast<const float*>(s.key_sum) + threadIdx.x;
  z *= decay.x;
  if constexpr (kPass == Pass::kCarry) StoreNorm<D>(p, part * p.layer.SF + c0, threadIdx.x, z);
  z = (z + ((sums[0] + sums[kC]) + (sums[2 * kC] + sums[3 * kC]))) * decay.y;
  if constexpr (kPass != Pass::kCarry) total *= decay.x * decay.y;
}

// grid (blocks of channels, Hkv, segments)
template <int D, Pass kPass>
__global__ void __launch_bounds__(kCarryThreads, D == 128 ? 3 : 4)
    CarryKernel(const __grid_constant__ PrefillParams p) {
  constexpr bool kFold = kPass == Pass::kFold;
  constexpr int kC = kCarryChannels<D>;
  extern __shared__ __align__(1024) std::byte memory[];
  auto* stages = reinterpret_cast<CarryStage<D>*>(memory);
  const Layer& l = p.layer;
  const int h = blockIdx.y, c0 = blockIdx.x * kC;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const Segment segment = SegmentOf(p, blockIdx.z);
  const int n = segment.n;
  if (segment.count < 0 || (kPass == Pass::kSummary && (segment.flags & kLast))) {
    AwaitPrevious();
    return;
  }
  const int pos = l.pos[n];
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
      FetchCarryStage<D, kFold>(p, stages[i % kCarryStages], chunk_at(i), pos, row_start, page,
                                segment.at + i, h, c0);
    CommitCopies();
  };
  // With segments all but the scan before `carry` has ended when it starts.
  if (kPass != Pass::kCarry || p.segment == 0) {
    AwaitPrevious();
    AllowNext();
  }
  for (int i = 0; i < kCarryStages - 1; ++i) fetch(i, page_at(i));
  int page = page_at(kCarryStages - 1);
  if (kPass == Pass::kCarry && p.segment > 0) {
    AwaitPrevious();
    AllowNext();
  }

  // Where the states come from and go to: the slot, or this segment's part of `start`. Only the
  // sequence's last segment of a prefill, or a wave's chunks where there are no segments, end in
  // the slot; the scan writes it otherwise.
  const bool alone = p.segment == 0 || IsWhole(segment);
  const bool zero =
      kPass == Pass::kSummary || (kFold && (p.segment > 0 || (segment.flags & kFirst)));
  const bool from_slot = kPass == Pass::kCarry ? alone : !zero;
  const bool to_slot =
      kPass != Pass::kSummary && (alone || (kPass == Pass::kCarry && (segment.flags & kLast)));
  const bool to_store = !to_slot && kPass != Pass::kCarry;
  std::byte* slot = SlotBase(l, n);
  float* state = reinterpret_cast<float*>(slot + l.at.state) + (int64_t{h} * l.SF + c0) * D;
  float* norm = reinterpret_cast<float*>(slot + l.at.norm) + int64_t{h} * l.SF + c0;
  const int64_t store = (int64_t{segment.store} * l.Hkv + h) * l.SF + c0;
  float4* start = reinterpret_cast<float4*>(p.start + store * D) + threadIdx.x;
  const int v0 = warp * (D / 4);  // this warp's value columns
  // Where the slot has the first of four accumulators.
  const auto in_slot = [&](int m, int j) { return state + (8 * j + 2 * t) * D + v0 + 16 * m + g; };
  Accumulators<D> acc;
  float z = 0, total = 1;
  if (!zero && threadIdx.x < kC)
    z = from_slot ? norm[threadIdx.x] : p.start_norm[store + threadIdx.x];
  LoadStates<D>(acc, zero, from_slot, in_slot, start);

  for (int i = 0; i < segment.count; ++i) {
    WaitCopies<kCarryStages - 2>();
    PublishCopies();
    __syncthreads();
    fetch(i + kCarryStages - 1, page);
    page = page_at(i + kCarryStages);
    const CarryStage<D>& s = stages[i % kCarryStages];
    const int64_t part = int64_t{segment.at + i} * l.Hkv + h;
    Decay<D, false>(acc, s, t);
    if constexpr (kPass == Pass::kCarry)
      StoreRows<D>(p.state + (part * l.SF + c0 / D * D + v0 + g) * D + c0 % D, acc, t);
    if (threadIdx.x < kC) AdvanceNorm<D, kPass>(p, z, total, s, part, c0);
    AddProduct<D>(acc, s);
    Decay<D, true>(acc, s, t);
  }
  if (!to_slot && !to_store) return;
  StoreStates<D>(acc, to_store, in_slot, start);
  if (threadIdx.x >= kC) return;
  if (to_store) p.start_decay[store + threadIdx.x] = total;
  (to_store ? p.start_norm + store : norm)[threadIdx.x] = z;
}

template <int D, Pass kPass>
void Launch(const char* name, const PrefillParams& p, cudaStream_t stream) {
  const dim3 grid(p.layer.SF / kCarryChannels<D>, p.layer.Hkv, p.wave_segments);
  Start<CarryKernel<D, kPass>>(name, grid, kCarryThreads, kCarryStages * sizeof(CarryStage<D>), p,
                               stream);
}
template <int D>
void Launch(const char* name, Pass pass, const PrefillParams& p, cudaStream_t stream) {
  if (pass == Pass::kCarry)
    Launch<D, Pass::kCarry>(name, p, stream);
  else if (pass == Pass::kSummary)
    Launch<D, Pass::kSummary>(name, p, stream);
  else
    Launch<D, Pass::kFold>(name, p, stream);
}

}  // namespace

void LaunchSummary(const PrefillParams& p, int D, cudaStream_t stream) {
  const Pass pass = p.fold ? Pass::kFold : Pass::kSummary;
  D == 64 ? Launch<64>("summary", pass, p, stream) : Launch<128>("summary", pass, p, stream);
}

void LaunchCarry(const PrefillParams& p, int D, cudaStream_t stream) {
  D == 64 ? Launch<64>("carry", Pass::kCarry, p, stream)
          : Launch<128>("carry", Pass::kCarry, p, stream);
}

}  // namespace dsla::cuda
