// The end of a (row, KV head): strands are added up, window and states merged, and the row goes
// into ring and sinks.
#pragma once

#include "ops/dsla/cuda/decode.cuh"

namespace dsla::cuda {

// A strand's sums of one output.
struct StrandSums {
  float linear, norm, window, top, weights;
};
// Of kCount strands, from the sums of their first `steps` steps, added up as one warp would have.
template <int kCount, int D, int kG>
__device__ __forceinline__ void AddSteps(StrandSums (&strands)[kCount], const DecodeParams& p,
                                         const Sums<D, kG>* sums, int steps, int g, int column) {
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const Sums<D, kG>& of = sums[s * steps];
    strands[s] = {of.linear[g][column], of.norm[g], of.window[g][column], of.top[g], of.weights[g]};
  }
#pragma unroll 1
  for (int j = 1; j < steps; ++j) {
    if (p.layer.W > 0) {
#pragma unroll
      for (int s = 0; s < kCount; ++s) {
        const Sums<D, kG>& of = sums[s * steps + j];
        StrandSums& to = strands[s];
        const Scales scales(to.top, of.top[g]);
        to.window = Blend(scales.a, to.window, scales.b, of.window[g][column]);
        to.weights = Blend(scales.a, to.weights, scales.b, of.weights[g]);
        to.top = scales.top;
      }
    }
    if (j < p.state_steps) {
#pragma unroll
      for (int s = 0; s < kCount; ++s) {
        strands[s].linear += sums[s * steps + j].linear[g][column];
        strands[s].norm += sums[s * steps + j].norm[g];
      }
    }
  }
}

// The sums of one output, merged.
template <int D, int kG>
__device__ __forceinline__ float Merge(const DecodeParams& p, const Sums<D, kG>* sums, int steps,
                                       int g, int column, float claim) {
  StrandSums strands[kStrands];
  AddSteps(strands, p, sums, steps, g, column);
  float linear = 0, norm = 0, top = -INFINITY, window = 0, weights = 0;
#pragma unroll
  for (int s = 0; s < kStrands; ++s) {
    linear += strands[s].linear;
    norm += strands[s].norm;
  }
  linear /= norm + kDslaEpsilon;
  if (p.layer.W == 0) return linear;
#pragma unroll
  for (int s = 0; s < kStrands; ++s) top = fmaxf(top, strands[s].top);
#pragma unroll
  for (int s = 0; s < kStrands; ++s) {
    const float scale = Exp2(strands[s].top - top);  // the new token is in the window
    window = __fmaf_rn(scale, strands[s].window, window);
    weights = __fmaf_rn(scale, strands[s].weights, weights);
  }
  const float lse = __fmaf_rn(top, kLn2, logf(weights));
  const float share = norm < kDslaEpsilon ? 0.f : 1 / (1 + Exp(lse - claim));
  return Blend(share, linear, 1 - share, window / weights);
}

// The merged outputs of a task, from the sums of its strands' first `steps` steps; by a block.
template <int D, int kG>
__device__ __forceinline__ void StoreOutputs(const DecodeParams& p, const Task<D>& task,
                                             const Sums<D, kG>* sums, int steps,
                                             const float (&claims)[kG]) {
  __nv_bfloat16* const out = p.out + (int64_t{task.n} * p.layer.H + task.h * p.layer.G) * D;
  for (int i = threadIdx.x; i < p.layer.G * D; i += blockDim.x)
    out[i] = __float2bfloat16_rn(Merge(p, sums, steps, i / D, i % D, claims[i / D]));
}

// What blocks of a cluster send to one another: a block awaits `bytes` of them at its mailbox.
__device__ __forceinline__ void OpenMailbox(uint64_t& mailbox, int bytes) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0)
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\n"
        "fence.mbarrier_init.release.cluster;\n"
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(&mailbox)),
        "r"(bytes)
        : "memory");
#endif
}
// This block's are open; then, that all blocks' are.
__device__ __forceinline__ void TellOpenMailboxes() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void AwaitOpenMailboxes() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// To the place that `to` is in the cluster's block `block`.
__device__ __forceinline__ void Send(uint64_t& mailbox, float& to, float x, int block) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 to, box;\n"
      "mapa.shared::cluster.u32 to, %0, %3;\n"
      "mapa.shared::cluster.u32 box, %1, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [to], %2, [box];\n}" ::"r"(
          SharedAddress(&to)),
      "r"(SharedAddress(&mailbox)), "f"(x), "r"(block)
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

// Sends the sums of this block's strands to the first block.
template <int D, int kG>
__device__ __forceinline__ void SendStrands(const DecodeParams& p, const Sums<D, kG>* sums,
                                            Sums<D, kG>* to, uint64_t& mailbox) {
  const int outputs = p.layer.G * D;
  for (int i = threadIdx.x; i < p.own_strands * outputs; i += blockDim.x) {
    const int own = i / outputs, g = i % outputs / D, column = i % D;
    StrandSums strand[1];
    AddSteps(strand, p, sums + own * p.steps, p.steps, g, column);
    Sums<D, kG>& at = to[blockIdx.z * p.own_strands + own];
    Send(mailbox, at.linear[g][column], strand[0].linear, 0);
    Send(mailbox, at.window[g][column], strand[0].window, 0);
    if (column > 0) continue;
    Send(mailbox, at.norm[g], strand[0].norm, 0);
    Send(mailbox, at.top[g], strand[0].top, 0);
    Send(mailbox, at.weights[g], strand[0].weights, 0);
  }
}
template <int D>
constexpr int MailBytes(int G) {
  return kStrands * G * (2 * D + 3) * 4;
}

// Token t on its way into ring and sinks, by the block's last threads: they have the least to do.
template <int D>
struct NewRow {
  static constexpr int kPieces = D / 8;
  uint4 piece;

  __device__ __forceinline__ void Load(const DecodeParams& p, const Task<D>& task) {
    if (IsMine(p))
      piece =
          *reinterpret_cast<const uint4*>((IsKey() ? task.NewKey(p) : task.NewValue(p)) + Column());
  }
  __device__ __forceinline__ void Store(const DecodeParams& p, const Task<D>& task) const {
    if (!IsMine(p)) return;
    const Layer& l = p.layer;
    const auto store = [&](int64_t part, int rows, int row) {
      *reinterpret_cast<uint4*>(task.Rows(part, rows) + int64_t{row} * D + Column()) = piece;
    };
    store(IsKey() ? l.at.ring_k : l.at.ring_v, l.W, task.newest);
    if (task.t < l.S) store(IsKey() ? l.at.sink_k : l.at.sink_v, l.S, task.t);
  }

 private:
  __device__ __forceinline__ static int FromLast() { return blockDim.x - 1 - ThreadIndex(); }
  __device__ __forceinline__ static bool IsMine(const DecodeParams& p) {
    return p.layer.W > 0 && FromLast() < 2 * kPieces;
  }
  __device__ __forceinline__ static bool IsKey() { return FromLast() < kPieces; }
  __device__ __forceinline__ static int Column() { return FromLast() % kPieces * 8; }
};

}  // namespace dsla::cuda
