// The products of a task that is split: its new row with the matrices of its KV head.
#pragma once

#include "ops/dsla/cuda/decode_merge.cuh"
#include "ops/dsla/cuda/decode_project.cuh"

namespace dsla::cuda {

__device__ __forceinline__ int LogOf(int power) { return __ffs(power) - 1; }

// Of the block.
__device__ __forceinline__ int FirstStrand(const DecodeParams& p) {
  return p.own_strands < kStrands ? blockIdx.z * p.own_strands : 0;
}

// Products of one row with the matrices of a KV head, gates first, then phi_k, then phi_q. A block
// makes the parts that its own strands' states need; of the others' it has the sums of exponentials
// alone. Parts are dealt to the block's warps in turn.
template <int D, int kG>
struct Projection {
  const DecodeParams& p;
  const int h, gates;    // matrices of gates
  const int shift, all;  // log2 of the parts that a block has of a matrix; of all matrices
  int item;
  PartWeights<D> next;

  __device__ __forceinline__ Projection(const DecodeParams& p, int h, int warp)
      : p(p),
        h(h),
        gates(p.layer.SF / D),
        shift(LogOf(p.own_strands * (D / (kPartColumns * kStrands)))),
        all((gates + 1 + p.layer.G) << shift),
        item(warp) {
    LoadNext();
  }

  // `await_row` is called once, before anything of the row is read that the kernels before this one
  // leave: when only queries are left to be multiplied.
  template <typename AwaitRow>
  __device__ __forceinline__ void Run(const Task<D>& task, Projected<D, kG>& to, uint64_t* mailbox,
                                      const AwaitRow& await_row) {
    const Layer& l = p.layer;
    const int lane = threadIdx.x % 32;
    bool awaited = false;
#pragma unroll 1
    for (;;) {
      const int matrix = item >> shift, part = PartOf(item), head = matrix - gates - 1;
      if (!awaited && (head >= 0 || item >= all)) {
        await_row();
        awaited = true;
      }
      if (item >= all) return;
      const PartWeights<D> w[1] = {next};
      item += p.own_strands * p.steps;
      LoadNext();
      const int entering = Entering(l, task.t);
      const __nv_bfloat16* const row = head >= 0 ? p.q + task.n * p.q_stride + (h * l.G + head) * D
                                       : entering >= 0 ? EnteringKey(task)
                                                       : nullptr;
      uint32_t a[D / 16][4];
      const __nv_bfloat16* const rows[1] = {lane < 4 ? row : nullptr};
      LoadRows<D>(a, rows);
      float y[1][2][4] = {};
      if (matrix < gates) {
        const int position[1] = {max(entering, 0)};
        AddUnrotatedProducts<D>(y, a, position, l, w);
        PutGates(to, matrix, part, y[0], entering >= 0);
      } else {
        AddProducts<D>(y, a, w);
        PutFeatures(to, head < 0 ? l.G : head, part, y[0], mailbox);
      }
    }
  }

 private:
  __device__ __forceinline__ const __nv_bfloat16* EnteringKey(const Task<D>& task) const {
    const Layer& l = p.layer;  // in the ring's place that token t is going to take
    return l.W > 0 ? task.Rows(l.at.ring_k, l.W) + int64_t{task.newest} * D : task.NewKey(p);
  }
  __device__ __forceinline__ int PartOf(int item) const {
    const int i = item & ((1 << shift) - 1), own = i & (p.own_strands - 1);
    return (i >> LogOf(p.own_strands)) * kStrands + FirstStrand(p) + own;
  }
  __device__ __forceinline__ void LoadNext() {
    if (item >= all) return;
    const Layer& l = p.layer;
    const int matrix = item >> shift;
    const int job = matrix < gates    ? l.H + l.Hkv + h * gates + matrix
                    : matrix == gates ? l.H + h
                                      : h * l.G + matrix - gates - 1;
    next.Load(Matrix<D>(l, job), PartOf(item));
  }

  // Of the logits of a part, of which the first quad has the row.
  __device__ __forceinline__ void PutGates(Projected<D, kG>& to, int matrix, int part,
                                           const float (&y)[2][4], bool enters) const {
    const int lane = threadIdx.x % 32;
    const int channel = matrix * D + part * kPartColumns + lane % 4 * 2;
    const float* const bias = p.layer.weights.bias + h * p.layer.SF + channel;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int at = 8 * (c / 2) + c % 2;
      const float gate = GateMinusOne(y[c / 2][c % 2] + bias[at], p.layer.least_gate);
      if (lane < 4) to.gate[channel + at] = enters ? gate : 0.f;
    }
  }
  // The same; sums go to the mailbox of each block of the cluster, if there is one.
  __device__ __forceinline__ void PutFeatures(Projected<D, kG>& to, int m, int part,
                                              const float (&y)[2][4], uint64_t* mailbox) const {
    const int lane = threadIdx.x % 32, column = part * kPartColumns + lane % 4 * 2;
    for (int sign = 0; sign < p.layer.F / D; ++sign) {
      float e[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) e[c] = sign ? -y[c / 2][c % 2] : y[c / 2][c % 2];
      const PartSum sum = Exponentials(e);
      if (lane < 4) {
        float* const phi = to.phi[m] + sign * D + column;
        *reinterpret_cast<float2*>(phi) = {e[0], e[1]};
        *reinterpret_cast<float2*>(phi + 8) = {e[2], e[3]};
      }
      PartSum& at = to.parts[m][sign][part];
      if (mailbox == nullptr) {
        if (lane == 0) at = sum;
      } else if (lane < kStrands / p.own_strands) {
        Send(*mailbox, at.top, sum.top, lane);
        Send(*mailbox, at.sum, sum.sum, lane);
      }
    }
  }
};
template <int D>
__device__ __forceinline__ int PartBytes(const Layer& l) {
  return (l.G + 1) * (l.F / D) * (D / kPartColumns) * int{sizeof(PartSum)};
}

}  // namespace dsla::cuda
