// What the kernels share: arguments as they read them, addresses of rows, the gate.
//
// A matrix of weights or a state is kept as tiles of k16 x n16 in the order of mma's B operand:
// lane 4 g + t of tile (i, j) holds, in 16 bytes, rows 16 i + {2t, 2t+1, 2t+8, 2t+9} of column 16 j
// + g and then of column 16 j + 8 + g. So a warp loads a tile with one conflict-free 16-byte load.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "ops/dsla/cuda/dsla_cuda.h"
#include "ops/dsla/cuda/mma.cuh"

namespace dsla::cuda {

inline constexpr int kChunk = kDslaChunk;

// Parts of the packed weights: [H] phi_q, [Hkv] phi_k, [Hkv, states * F / D] gates, each D x D in
// fragment order; where D and F are 128 [H] phi_q again, channels as rows of panels in the order of
// warpgroup.cuh; then the biases [Hkv, SF].
struct PackedWeights {
  const __nv_bfloat16 *phi_q, *phi_k, *gates, *phi_q_panels;
  const float* bias;
};
inline int PanelMatrices(const DslaShape& s) { return s.D == 128 && s.F == s.D ? s.H : 0; }
inline PackedWeights UnpackWeights(const DslaShape& s, const void* packed) {
  const auto* base = static_cast<const __nv_bfloat16*>(packed);
  const int64_t tile = int64_t{s.D} * s.D, gates = int64_t{s.Hkv} * s.SF() / s.D;
  PackedWeights w;
  w.phi_q = base;
  w.phi_k = w.phi_q + s.H * tile;
  w.gates = w.phi_k + s.Hkv * tile;
  w.phi_q_panels = w.gates + gates * tile;
  w.bias = reinterpret_cast<const float*>(w.phi_q_panels + PanelMatrices(s) * tile);
  return w;
}

// Dimensions and addresses common to all kernels, passed by value.
struct Layer {
  int H, Hkv, G, F, states, SF, W, S;
  float least_gate;  // e^floor - 1
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
          std::expm1(s.gate_floor),
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
constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Takes parts of a workspace, 256-byte aligned; only counts them while there is none.
struct Carver {
  std::byte* base = nullptr;
  int64_t used = 0;
  template <typename T>
  T* Take(int64_t n) {
    std::byte* at = base + used;
    used += CeilDiv(n * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return reinterpret_cast<T*>(at);
  }
};

inline constexpr int kMaxGroup = 8;       // query heads per KV head up to which decode works
inline constexpr int kMaxSinks = kChunk;  // one tile of keys
void CheckShape(const DslaShape& shape, const DslaSlotLayout& layout, const DslaStateView& states);

// Whether the current device has the shared memory that `prepare` needs.
bool PrepareFits(const DslaShape& shape);

// What launchers ask of the current device: found out once by each thread for the device in use.
struct Device {
  int major = 0, minor = 0, multiprocessors = 0;
  int most_shared = 0;  // bytes of a block
};
inline const Device& CurrentDevice() {
  thread_local int known = -1;
  thread_local Device device;
  int now = 0;
  cudaGetDevice(&now);
  if (now == known) return device;
  known = now;
  cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, now);
  cudaDeviceGetAttribute(&device.minor, cudaDevAttrComputeCapabilityMinor, now);
  cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, now);
  cudaDeviceGetAttribute(&device.most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, now);
  return device;
}

// Launches a kernel that may start while the one before it ends, since it says itself where it must
// wait. `cluster` blocks along z make a cluster: 1 below compute capability 9.0. An error stays for
// cudaGetLastError.
template <typename Params>
void StartEarly(void (*kernel)(Params), dim3 grid, int threads, const Params& p,
                cudaStream_t stream, size_t dynamic_shared_bytes = 0, int cluster = 1) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {1, 1, static_cast<unsigned>(cluster)};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = dynamic_shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = CurrentDevice().major < 9 ? 0 : cluster > 1 ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, p);
}

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
// Where a page has a row, in elements.
template <int D>
__device__ __forceinline__ int64_t PlaceIn(const PagedRows& rows, int page, int h, int row) {
  return page * rows.page_stride + (static_cast<int64_t>(h) * rows.page_size + row) * D;
}
template <int D>
__device__ __forceinline__ KvRow RowOf(const Layer&, const PagedRows& rows, int n, int h, int s) {
  const int page = rows.pages[rows.page_start[n] + s / rows.page_size];
  const int64_t at = PlaceIn<D>(rows, page, h, s % rows.page_size);
  return {rows.k + at, rows.v + at};
}

// Tokens [s, s + 64) where they lie at a fixed distance, so that a tile of them needs one address.
struct KvSpan {
  KvRow row;  // of token s
  int64_t k_stride, v_stride;
};
template <int D>
__device__ __forceinline__ bool IsSpan(const Layer& l, const NewRows&, int n, int s) {
  return s >= l.pos[n];
}
template <int D>
__device__ __forceinline__ KvSpan SpanOf(const Layer& l, const NewRows& rows, int n, int h, int s) {
  return {RowOf<D>(l, rows, n, h, s), rows.k_stride, rows.v_stride};
}
template <int D>
__device__ __forceinline__ bool IsSpan(const Layer&, const PagedRows& rows, int, int s) {
  return s >= 0 && s / rows.page_size == (s + kChunk - 1) / rows.page_size;
}
template <int D>
__device__ __forceinline__ KvSpan SpanOf(const Layer& l, const PagedRows& rows, int n, int h,
                                         int s) {
  return {RowOf<D>(l, rows, n, h, s), D, D};
}

// Rows [from, until) of a tile of 64 to swizzled shared memory, zeros elsewhere.
template <int D, int kThreads>
__device__ __forceinline__ void CopyTile(uint4* to, const __nv_bfloat16* row0, int64_t stride,
                                         int from, int until, int thread = threadIdx.x) {
  constexpr int kPieces = D / 8, kStep = kThreads / kPieces;
  const int c = thread % kPieces, first = thread / kPieces;
  static_assert(kStep % 8 == 0);  // rows of a thread are swizzled alike
  to += Swizzle<kPieces>(first, c);
  const __nv_bfloat16* at = row0 + first * stride + 8 * c;
#pragma unroll
  for (int i = 0; i < kChunk / kStep; ++i) {
    const int row = first + i * kStep;
    const bool valid = row >= from && row < until;
    CopyAsync(to + i * kStep * kPieces, at, valid);
    at += kStep * stride;
  }
}

// (1 + u)^(-1/16) - 1 for u in [0, 1], relative error under 1e-5, which is less than what 17 bits
// of key leave of a logit. Near 0 the power and the difference would lose more.
__device__ __forceinline__ float RootMinusOne(float u) {
  static_assert(kDslaGateDivisor == 16);
  float x = 0.0016821599565446377f;
  x = x * u - 0.007103092037141323f;
  x = x * u + 0.014610905200242996f;
  x = x * u - 0.02224414236843586f;
  x = x * u + 0.03315725550055504f;
  x = x * u - 0.06249939650297165f;
  return x * u;
}

// e^a - 1 of the gate a = max(logsigmoid(x) / 16, floor), i.e. of e^a = sigmoid(x)^(1/16), where
// `least` is e^floor - 1 and t is -x log2(e).
__device__ __forceinline__ float GateMinusOneOf(float t, float least) {
  // sigmoid(x) = e^min(x, 0) / (1 + e^-|x|); the first factor is 1 where gates are slow.
  const float root = RootMinusOne(Exp2(-fabsf(t)));
  const float fast = Exp2(fmaxf(t, 0.f) * (-1.f / kDslaGateDivisor));
  return fmaxf(fast * root + (fast - 1), least);
}
__device__ __forceinline__ float GateMinusOne(float x, float least) {
  return GateMinusOneOf(x * -kLog2e, least);
}
// Of logits x without their bias, which is one for x[.][0, 1] and another for x[.][2, 3] and comes
// times -log2(e): leaves t of GateMinusOneOf. True where all of the warp's are positive, as slow
// gates' are: the other factor is 1 then and the floor far.
template <int n>
__device__ __forceinline__ bool ScaleLogits(float (&x)[n][4], float2 bias, float least) {
  const float offset[2] = {bias.x, bias.y};
  uint32_t signs[4] = {~0u, ~0u, ~0u, ~0u};
#pragma unroll
  for (int i = 0; i < 4 * n; ++i) {
    float& t = x[i / 4][i % 4];
    t = t * -kLog2e + offset[i % 4 / 2];
    signs[i % 4] &= __float_as_uint(t);
  }
  return __all_sync(~0u, least < -0.05f ? (signs[0] & signs[1] & signs[2] & signs[3]) >> 31 : 0);
}
template <int n>
__device__ __forceinline__ void SlowGatesMinusOne(float (&t)[n][4]) {
#pragma unroll
  for (int i = 0; i < 4 * n; ++i) t[i / 4][i % 4] = RootMinusOne(Exp2(t[i / 4][i % 4]));
}
template <int n>
__device__ __forceinline__ void AnyGatesMinusOne(float (&t)[n][4], float least) {
#pragma unroll
  for (int i = 0; i < 4 * n; ++i) t[i / 4][i % 4] = GateMinusOneOf(t[i / 4][i % 4], least);
}
template <int n>
__device__ __forceinline__ void GatesMinusOne(float (&x)[n][4], float2 bias, float least) {
  if (ScaleLogits(x, {bias.x * -kLog2e, bias.y * -kLog2e}, least))
    SlowGatesMinusOne(x);
  else
    AnyGatesMinusOne(x, least);
}

}  // namespace dsla::cuda
