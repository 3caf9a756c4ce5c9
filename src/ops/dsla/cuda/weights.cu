// Packs an adapter's fp32 matrices into bf16 tiles in the order of mma's B operand, and phi_q into
// panels too.
#include "base/check.h"
#include "ops/dsla/cuda/common.cuh"

namespace dsla::cuda {
namespace {

struct PackParams {
  const float *phi_q, *phi_k, *gate_weight, *gate_bias;
  __nv_bfloat16* tiles;
  float* bias;
  int H, Hkv, D, F, states;
};

// phi_q of a head with channels as rows: pieces of eight of their dimensions in swizzled panels.
__device__ __forceinline__ void PackPanels(const float* from, __nv_bfloat16* to, int D) {
  for (int i = threadIdx.x; i < D * D; i += blockDim.x) {
    const int panel = i / (64 * D), channel = i / 64 % D, piece = i / 8 % 8 ^ channel % 8;
    to[i] = __float2bfloat16_rn(from[int64_t{64 * panel + 8 * piece + i % 8} * D + channel]);
  }
}

// One block per matrix; matrix m as ordered in PackedWeights.
__global__ void PackKernel(PackParams p) {
  const int m = blockIdx.x, D = p.D, blocks = p.states * (p.F / D);
  const float* from;
  int stride = D;
  if (const int head = m - p.H - p.Hkv - p.Hkv * blocks; head >= 0) {
    PackPanels(p.phi_q + int64_t{head} * D * D, p.tiles + int64_t{m} * D * D, D);
    return;
  }
  if (m < p.H) {
    from = p.phi_q + int64_t{m} * D * D;
  } else if (m < p.H + p.Hkv) {
    from = p.phi_k + int64_t{m - p.H} * D * D;
  } else {
    const int h = (m - p.H - p.Hkv) / blocks, b = (m - p.H - p.Hkv) % blocks;
    const int state = b / (p.F / D), half = b % (p.F / D);
    from = p.gate_weight + (int64_t{state} * p.Hkv + h) * D * p.F + half * D;
    stride = p.F;
    for (int f = threadIdx.x; f < D; f += blockDim.x)
      p.bias[(int64_t{h} * blocks + b) * D + f] =
          p.gate_bias[(int64_t{state} * p.Hkv + h) * p.F + half * D + f];
  }
  __nv_bfloat16* to = p.tiles + int64_t{m} * D * D;
  for (int i = threadIdx.x; i < D * D; i += blockDim.x) {
    const int word = i % 8, lane = i / 8 % 32, tile = i / 256;
    const int row = 16 * (tile / (D / 16)) + 2 * (lane % 4) + word % 2 + 8 * (word / 2 % 2);
    const int column = 16 * (tile % (D / 16)) + lane / 4 + 8 * (word / 4);
    to[i] = __float2bfloat16_rn(from[int64_t{row} * stride + column]);
  }
}

}  // namespace

const char* Limitation(const DslaShape& s) {
  if (s.D != 64 && s.D != 128) return "a head dim that is neither 64 nor 128";
  if (s.G() > kMaxGroup) return "more than 8 query heads per KV head";
  if (s.sinks > kMaxSinks) return "more than 64 sinks";
  if (!PrepareFits(s)) return "head dim 128 with prompts, in the shared memory of this GPU";
  return nullptr;
}

void CheckShape(const DslaShape& s, const DslaSlotLayout& layout, const DslaStateView& states) {
  DSLA_CHECK(s.D == 64 || s.D == 128);
  DSLA_CHECK(s.H > 0 && s.Hkv > 0 && s.H % s.Hkv == 0);
  DSLA_CHECK(s.F == s.D || s.F == 2 * s.D);
  DSLA_CHECK(s.states == 1 || s.states == 2);
  DSLA_CHECK(s.window >= 0 && s.sinks >= 0 && (s.window > 0 || s.sinks == 0));
  DSLA_CHECK(s.sinks <= kMaxSinks);
  DSLA_CHECK(s.kv_dtype == DType::kBF16);
  DSLA_CHECK(s.gate_floor < 0 && s.gate_floor * (kChunk / 2) >= -80.f);
  DSLA_CHECK(layout.bytes > 0 && states.slot_bytes >= layout.bytes && states.slot_bytes % 64 == 0);
  DSLA_CHECK(reinterpret_cast<uintptr_t>(states.base) % 64 == 0);
}

int64_t PackedWeightBytes(const DslaShape& s) {
  const int64_t matrices = s.H + s.Hkv + int64_t{s.Hkv} * s.SF() / s.D + PanelMatrices(s);
  return matrices * s.D * s.D * 2 + int64_t{s.Hkv} * s.SF() * 4;
}

int PackWeights(const DslaShape& s, const DslaParams& params, void* packed, Stream stream) {
  DSLA_CHECK(params.phi_q && params.phi_k && params.gate_weight && params.gate_bias && packed);
  const PackedWeights w = UnpackWeights(s, packed);
  const PackParams p{params.phi_q,
                     params.phi_k,
                     params.gate_weight,
                     params.gate_bias,
                     const_cast<__nv_bfloat16*>(w.phi_q),
                     const_cast<float*>(w.bias),
                     s.H,
                     s.Hkv,
                     s.D,
                     s.F,
                     s.states};
  const int matrices = s.H + s.Hkv + s.Hkv * (s.SF() / s.D) + PanelMatrices(s);
  PackKernel<<<matrices, 256, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace dsla::cuda
