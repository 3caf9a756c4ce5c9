// What the kernels share: arguments as they read them, addresses of rows, the gate.
//
// A matrix of weights or a state is kept as tiles of k16 x n16 in the order of mma's B operand:
// lane 4 g + t of tile (i, j) holds, in 16 bytes, rows 16 i + {2t, 2t+1, 2t+8, 2t+9} of column 16 j
// + g and then of column 16 j + 8 + g. So a warp loads a tile with one conflict-free 16-byte load.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ops/dsla/cuda/dsla_cuda.h"
#include "ops/dsla/cuda/mma.cuh"

namespace dsla::cuda {

inline constexpr int kChunk = kDslaChunk;

// Parts of the packed weights: [H] phi_q, [Hkv] phi_k, [Hkv, states * F / D] gates, each D x D in
// fragment order, then the biases [Hkv, SF].
struct PackedWeights {
  const __nv_bfloat16 *phi_q, *phi_k, *gates;
  const float* bias;
};
inline PackedWeights UnpackWeights(const DslaShape& s, const void* packed) {
  const auto* base = static_cast<const __nv_bfloat16*>(packed);
  const int64_t tile = int64_t{s.D} * s.D, gates = int64_t{s.Hkv} * s.SF() / s.D;
  PackedWeights w;
  w.phi_q = base;
  w.phi_k = w.phi_q + s.H * tile;
  w.gates = w.phi_k + s.Hkv * tile;
  w.bias = reinterpret_cast<const float*>(w.gates + gates * tile);
  return w;
}

// Dimensions and addresses common to all kernels, passed by value.
struct Layer {
  int H, Hkv, G, F, states, SF, W, S;
  float floor;
  PackedWeights weights;
  const float *mix, *cos, *sin;
  std::byte* pool;
  int64_t slot_bytes;
  DslaSlotLayout at;
  const int32_t *slots, *pos, *row_start;
  int N;
};
template <typename Args>
Layer MakeLayer(const Args& a) {
  const DslaShape& s = a.shape;
  return {s.H,
          s.Hkv,
          s.G(),
          s.F,
          s.states,
          s.SF(),
          s.window,
          s.sinks,
          s.gate_floor,
          UnpackWeights(s, a.weights.packed),
          a.weights.mix,
          a.weights.rope_cos,
          a.weights.rope_sin,
          a.states.base,
          a.states.slot_bytes,
          a.layout,
          a.slots,
          a.rows.pos,
          a.rows.row_start,
          a.rows.N};
}

// Aborts unless the kernels are written for the shape and the slots.
void CheckShape(const DslaShape& shape, const DslaSlotLayout& layout, const DslaStateView& states);

__device__ __forceinline__ std::byte* SlotBase(const Layer& l, int n) {
  return l.pool + static_cast<int64_t>(l.slots[n]) * l.slot_bytes;
}

// Where the rows of K and V lie: new rows and the slot's ring, or pages.
struct NewRows {
  const __nv_bfloat16 *k, *v;
  int64_t k_stride, v_stride;
};
struct PagedRows {
  const __nv_bfloat16 *k, *v;
  int64_t page_stride;
  int page_size;
  const int32_t *page_start, *pages;
};

struct KvRow {
  const __nv_bfloat16 *k, *v;
};
// Token s of sequence n, KV head h; a token before pos must still be in the ring.
template <int D>
__device__ __forceinline__ KvRow RowOf(const Layer& l, const NewRows& rows, int n, int h, int s) {
  const int pos = l.pos[n];
  if (s >= pos) {
    const int64_t row = l.row_start[n] + (s - pos);
    return {rows.k + row * rows.k_stride + h * D, rows.v + row * rows.v_stride + h * D};
  }
  const std::byte* slot = SlotBase(l, n);
  const int64_t at = (static_cast<int64_t>(h) * l.W + s % l.W) * D;
  return {reinterpret_cast<const __nv_bfloat16*>(slot + l.at.ring_k) + at,
          reinterpret_cast<const __nv_bfloat16*>(slot + l.at.ring_v) + at};
}
template <int D>
__device__ __forceinline__ KvRow RowOf(const Layer& l, const PagedRows& rows, int n, int h, int s) {
  const int64_t page = rows.pages[rows.page_start[n] + s / rows.page_size];
  const int64_t at =
      page * rows.page_stride + (static_cast<int64_t>(h) * rows.page_size + s % rows.page_size) * D;
  return {rows.k + at, rows.v + at};
}

// e^a - 1 of the gate a = max(logsigmoid(x) / 16, floor), relative error some 1e-6 down to the
// slowest gates: near 0 both functions are taken from their series, since the differences that
// define them would cancel.
__device__ __forceinline__ float GateMinusOne(float x, float floor) {
  const float u = Exp(-fabsf(x));
  const float series = u * (1 - u * (0.5f - u * (0.33333333f - u * (0.25f - u * 0.2f))));
  const float log1p = u < 0.0625f ? series : __logf(1 + u);
  const float a = fmaxf((fminf(x, 0.f) - log1p) * (1 / kDslaGateDivisor), floor);
  const float expm1 =
      a * (1 + a * (0.5f + a * (0.16666667f + a * (0.041666667f + a * 0.0083333333f))));
  return a > -0.125f ? expm1 : Exp(a) - 1;
}

}  // namespace dsla::cuda
