// The states of sequences that `fold` has cut into several segments.
#include "ops/dsla/cuda/fold.cuh"

namespace dsla::cuda {
namespace {

// S' = e^{decay} S + what a segment adds, over those of a wave.
// grid (threads for 4 columns of the states or a norm each, Hkv, N)
constexpr int kThreads = 128, kAhead = 16;
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
  if (begin >= end || index >= states + l.SF) return;

  const bool is_norm = index >= states;
  const int at = is_norm ? index - states : index;
  const int64_t stride = int64_t{l.Hkv} * l.SF, head = int64_t{h} * l.SF;
  const float* decays = p.start_decay + begin * stride + head + (is_norm ? at : 4 * at / D);
  const float* adds = is_norm ? p.start_norm + begin * stride + head + at
                              : p.start + (begin * stride + head) * D + int64_t{4} * at;
  float* to = reinterpret_cast<float*>(SlotBase(l, n) + (is_norm ? l.at.norm : l.at.state)) +
              head * (is_norm ? 1 : D) + at * (is_norm ? 1 : 4);
  const auto load = [&](const float* from) {
    return is_norm ? float4{*from} : *reinterpret_cast<const float4*>(from);
  };
  float4 x = first >= 0 ? float4{} : load(to);
  for (int base = begin; base < end; base += kAhead) {
    float4 add[kAhead];
    float decay[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i >= end) continue;
      add[i] = load(adds);
      decay[i] = *decays;
      adds += stride * (is_norm ? 1 : D);
      decays += stride;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i >= end) continue;
      x = {decay[i] * x.x + add[i].x, decay[i] * x.y + add[i].y, decay[i] * x.z + add[i].z,
           decay[i] * x.w + add[i].w};
    }
  }
  if (is_norm)
    *to = x.x;
  else
    *reinterpret_cast<float4*>(to) = x;
}

template <int D>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  const int parts = p.layer.SF * (D / 4 + 1);
  const dim3 grid((parts + kThreads - 1) / kThreads, p.layer.Hkv, p.layer.N);
  Start<CombineKernel<D>>("combine", grid, kThreads, 0, p, stream);
}

}  // namespace

void LaunchCombine(const PrefillParams& p, int D, cudaStream_t stream) {
  D == 64 ? Launch<64>(p, stream) : Launch<128>(p, stream);
}

}  // namespace dsla::cuda
