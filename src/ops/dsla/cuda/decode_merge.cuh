// The end of a (row, KV head): strands are added up, window and states merged, and the row goes
// into ring and sinks.
#pragma once

#include "ops/dsla/cuda/decode.cuh"

namespace dsla::cuda {

// The strands' sums of one output, merged.
template <int D, int kG>
__device__ __forceinline__ float Merge(const Sums<D, kG>* strands, int g, int column,
                                       bool has_window, float claim) {
  float linear = 0, norm = 0, top = -INFINITY, window = 0, weights = 0;
#pragma unroll
  for (int s = 0; s < kStrands; ++s) {
    linear += strands[s].linear[g][column];
    norm += strands[s].norm[g];
  }
  linear /= norm + kDslaEpsilon;
  if (!has_window) return linear;
#pragma unroll
  for (int s = 0; s < kStrands; ++s) top = fmaxf(top, strands[s].top[g]);
#pragma unroll
  for (int s = 0; s < kStrands; ++s) {
    const float scale = Exp2(strands[s].top[g] - top);  // the new token is in the window
    window = __fmaf_rn(scale, strands[s].window[g][column], window);
    weights = __fmaf_rn(scale, strands[s].weights[g], weights);
  }
  const float lse = __fmaf_rn(top, 0.6931471805599453f, logf(weights));
  const float share = norm < kDslaEpsilon ? 0.f : 1 / (1 + Exp(lse - claim));
  return Blend(share, linear, 1 - share, window / weights);
}

// Sums that the blocks of a cluster send to the first one, which awaits `bytes` of them.
__device__ __forceinline__ void OpenMailbox(uint64_t& mailbox, int bytes) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0)
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\n"
        "fence.mbarrier_init.release.cluster;\n"
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(&mailbox)),
        "r"(bytes)
        : "memory");
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void AwaitOpenMailbox() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// To the place that `to` is in the first block.
__device__ __forceinline__ void Send(uint64_t& mailbox, float& to, float x) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 to, box;\n"
      "mapa.shared::cluster.u32 to, %0, 0;\n"
      "mapa.shared::cluster.u32 box, %1, 0;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [to], %2, [box];\n}" ::"r"(
          SharedAddress(&to)),
      "r"(SharedAddress(&mailbox)), "f"(x)
      : "memory");
#endif
}
__device__ __forceinline__ void AwaitMail(uint64_t& mailbox) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(SharedAddress(&mailbox))
        : "memory");
  } while (done == 0);
#endif
}

// Adds up the steps of a strand as one warp would have, and sends the sums to the first block.
template <int D, int kG>
__device__ __forceinline__ void SendStrand(const DecodeParams& p, const Sums<D, kG>* steps,
                                           int strand, Sums<D, kG>& to, uint64_t& mailbox) {
  for (int i = threadIdx.x; i < p.layer.G * D; i += blockDim.x) {
    const int g = i / D, column = i % D;
    float linear = steps[0].linear[g][column], norm = steps[0].norm[g];
    float window = steps[0].window[g][column], top = steps[0].top[g], weights = steps[0].weights[g];
    for (int j = 1; j < p.steps; ++j) {
      if (kStrands * j + strand < p.tiles) {
        const Scales s(top, steps[j].top[g]);
        window = Blend(s.a, window, s.b, steps[j].window[g][column]);
        weights = Blend(s.a, weights, s.b, steps[j].weights[g]);
        top = s.top;
      }
      if (j < p.state_steps) {
        linear += steps[j].linear[g][column];
        norm += steps[j].norm[g];
      }
    }
    Send(mailbox, to.linear[g][column], linear);
    Send(mailbox, to.window[g][column], window);
    if (column > 0) continue;
    Send(mailbox, to.norm[g], norm);
    Send(mailbox, to.top[g], top);
    Send(mailbox, to.weights[g], weights);
  }
}
template <int D>
constexpr int MailBytes(int G) {
  return kStrands * G * (2 * D + 3) * 4;
}

// Token t into ring and sinks.
template <int D>
__device__ __forceinline__ void StoreRow(const DecodeParams& p, const Task<D>& task) {
  constexpr int kPieces = D / 8;
  const Layer& l = p.layer;
  const int i = threadIdx.x;
  if (l.W == 0 || i >= 2 * kPieces) return;
  const bool is_k = i < kPieces;
  const int column = i % kPieces * 8;
  const uint4 x =
      *reinterpret_cast<const uint4*>((is_k ? task.NewKey(p) : task.NewValue(p)) + column);
  const auto store = [&](int64_t part, int rows, int row) {
    *reinterpret_cast<uint4*>(task.Rows(part, rows) + int64_t{row} * D + column) = x;
  };
  store(is_k ? l.at.ring_k : l.at.ring_v, l.W, task.newest);
  if (task.t < l.S) store(is_k ? l.at.sink_k : l.at.sink_v, l.S, task.t);
}

}  // namespace dsla::cuda
