// The states before each segment of a wave:  S_{s+1} = e^{decay of s} S_s + what s adds.
// A prefill's last segment of a sequence is left to `carry`, which ends with the sequence's state.
#include <algorithm>

#include "ops/dsla/cuda/prefill.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 128, kChannels = 32;
// Segments whose loads are under way at once: with D 128 there are few, and many blocks.
template <int D>
constexpr int kAhead = D == 64 ? 12 : 4;
template <int D>
constexpr int kBlocks = D == 64 ? 2 : 7;
// Of 32 channels: one for each accumulator quad of `carry`, one for the norms.
template <int D>
constexpr int kParts = D / 16 + 1;

// Goes over `count` segments `stride` apart. Of them `adds` add something; at `keep`, what is there
// is replaced by the state before the segment.
template <int kAhead, typename T, typename Load, typename Update>
__device__ __forceinline__ T Scan(T state, T* at, int64_t stride, int count, int adds, bool keep,
                                  const Load& decay_of, const Update& update) {
  for (int base = 0; base < count; base += kAhead) {
    T added[kAhead];
    decltype(decay_of(0)) decay[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i >= adds) continue;
      added[i] = at[(base + i) * stride];
      decay[i] = decay_of(base + i);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (keep && base + i < count) at[(base + i) * stride] = state;
      if (base + i < adds) state = update(state, decay[i], added[i]);
    }
  }
  return state;
}

// A block's part of the segments from `s` on that the wave has of a sequence.
template <int D>
__device__ __forceinline__ void ScanRun(const PrefillParams& p, const Segment& s) {
  const Layer& l = p.layer;
  const int count = s.flags >> kRunShift;
  const bool ends = s.flags & kRunEnds;
  const int adds = ends && !p.fold ? count - 1 : count;
  const bool zero = p.fold && (s.flags & kFirst), keep = !p.fold, write = p.fold || !ends;

  const int h = blockIdx.y, c0 = blockIdx.x / kParts<D> * kChannels, quad = blockIdx.x % kParts<D>;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            t = lane % 4;
  const int64_t stride = int64_t{l.Hkv} * l.SF;  // of channels between segments
  const int64_t part = (int64_t{s.store} * l.Hkv + h) * l.SF + c0;
  const int64_t channel = int64_t{h} * l.SF + c0;
  std::byte* slot = SlotBase(l, s.n);
  if (quad == D / 16) {
    if (thread >= kChannels) return;
    float* to = reinterpret_cast<float*>(slot + l.at.norm) + channel + thread;
    float norm = zero ? 0 : __ldcg(to);  // the slot is as kernels before the summary left it
    AwaitPrevious();
    norm = Scan<kAhead<D>>(
        norm, p.start_norm + part + thread, stride, count, adds, keep,
        [&](int i) { return p.start_decay[part + i * stride + thread]; },
        [](float x, float d, float y) { return d * x + y; });
    if (write) *to = norm;
    return;
  }
  // Accumulator quad (m, j) of `carry`: channels 8 j + 2 t + {0, 1}, columns g + {0, 8}.
  const int m = quad / 4, c = 8 * (quad % 4) + 2 * t, column = warp * (D / 4) + 16 * m + g;
  float* to = reinterpret_cast<float*>(slot + l.at.state) + (channel + c) * D + column;
  float4 state{};
  if (!zero) state = {__ldcg(to), __ldcg(to + D), __ldcg(to + 8), __ldcg(to + D + 8)};
  AwaitPrevious();
  AllowNext();
  state = Scan<kAhead<D>>(
      state, reinterpret_cast<float4*>(p.start) + part * (D / 4) + quad * kThreads + thread,
      stride * (D / 4), count, adds, keep,
      [&](int i) {
        return *reinterpret_cast<const float2*>(p.start_decay + part + i * stride + c);
      },
      [](float4 x, float2 d, float4 y) -> float4 {
        return {d.x * x.x + y.x, d.y * x.y + y.y, d.x * x.z + y.z, d.y * x.w + y.w};
      });
  if (!write) return;
  to[0] = state.x;
  to[D] = state.y;
  to[8] = state.z;
  to[D + 8] = state.w;
}

// grid (SF / 32 blocks of channels times parts, Hkv, so many runs at a time)
template <int D>
__global__ void __launch_bounds__(kThreads, kBlocks<D>)
    ScanKernel(const __grid_constant__ PrefillParams p) {
  int runs = 0;
  for (int base = 0; base < SegmentsOf(p); base += 32) {
    const Segment s = SegmentOf(p, base + threadIdx.x % 32);
    const bool first = s.count >= 0 && s.flags >> kRunShift;
    for (uint32_t left = __ballot_sync(~0u, first); left != 0; left &= left - 1) {
      if (runs++ % gridDim.z != blockIdx.z) continue;
      const Segment s = SegmentOf(p, base + __ffs(left) - 1);
      if (s.count > 0 && !IsWhole(s)) ScanRun<D>(p, s);
    }
  }
  AwaitPrevious();
  AllowNext();
}

template <int D>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  const dim3 grid(p.layer.SF / kChannels * kParts<D>, p.layer.Hkv, std::min(p.layer.N, 8));
  Start<ScanKernel<D>>("scan", grid, kThreads, 0, p, stream);
}

}  // namespace

void LaunchScan(const PrefillParams& p, int D, cudaStream_t stream) {
  D == 64 ? Launch<64>(p, stream) : Launch<128>(p, stream);
}

}  // namespace dsla::cuda
