// The states of sequences that `fold` has cut into several segments.
#include "ops/dsla/cuda/fold.cuh"

namespace dsla::cuda {
namespace {

// S' = e^{decay} S + what a segment adds, over those of a wave.
// grid (threads for 4 columns of the states or 4 norms each, Hkv, N)
constexpr int kThreads = 256, kAhead = 8;
template <int D>
__global__ void __launch_bounds__(kThreads) CombineKernel(const __grid_constant__ PrefillParams p) {
  AwaitPrevious();
  AllowNext();
  const Layer& l = p.layer;
  const int n = blockIdx.z, h = blockIdx.y, lane = threadIdx.x % 32;
  const int segments = FoldSegments(p, n);
  if (segments == 1) return;
  int first = 0;  // the sequence's first segment, counted from the wave's
  for (int i = lane; i < n; i += 32) first += FoldSegments(p, i);
  first = __reduce_add_sync(~0u, first) - p.wave * p.wave_segments;
  const int begin = max(first, 0), end = min(first + segments, p.wave_segments);
  const int index = blockIdx.x * kThreads + threadIdx.x, states = l.SF * D / 4;
  if (begin >= end || index >= states + l.SF / 4) return;

  const bool is_norm = index >= states;
  const int at = is_norm ? index - states : index;
  const int64_t stride = int64_t{l.Hkv} * l.SF, head = int64_t{h} * l.SF;
  const float* decays = p.start_decay + begin * stride + head + (is_norm ? 4 * at : 4 * at / D);
  const float* adds = is_norm ? p.start_norm + begin * stride + head + 4 * at
                              : p.start + (begin * stride + head) * D + int64_t{4} * at;
  float4* to = reinterpret_cast<float4*>(SlotBase(l, n) + (is_norm ? l.at.norm : l.at.state)) +
               head * (is_norm ? 1 : D) / 4 + at;
  float4 x = first >= 0 ? float4{} : *to;
  for (int base = begin; base < end; base += kAhead) {
    float4 add[kAhead], decay[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i >= end) continue;
      add[i] = *reinterpret_cast<const float4*>(adds);
      if (is_norm) {
        decay[i] = *reinterpret_cast<const float4*>(decays);
      } else {
        decay[i].x = decay[i].y = decay[i].z = decay[i].w = *decays;
      }
      adds += stride * (is_norm ? 1 : D);
      decays += stride;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i >= end) continue;
      x = {decay[i].x * x.x + add[i].x, decay[i].y * x.y + add[i].y, decay[i].z * x.z + add[i].z,
           decay[i].w * x.w + add[i].w};
    }
  }
  *to = x;
}

template <int D>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  const int parts = p.layer.SF * (D + 1) / 4;
  const dim3 grid((parts + kThreads - 1) / kThreads, p.layer.Hkv, p.layer.N);
  Start<CombineKernel<D>>("combine", grid, kThreads, 0, p, stream);
}

}  // namespace

void LaunchCombine(const PrefillParams& p, int D, cudaStream_t stream) {
  D == 64 ? Launch<64>(p, stream) : Launch<128>(p, stream);
}

}  // namespace dsla::cuda
