// Embedding rows, residual sum and RMSNorm, the gated activation. All are bound by memory: one
// pass, each byte moved once. How a row is summed depends on its length alone, so that a token's
// values do not depend on the rows beside it.
#include "base/check.h"
#include "ops/dsla/cuda/common.cuh"
#include "ops/linear/cuda/packed.cuh"
#include "ops/norm_rope/cuda/elementwise.cuh"
#include "ops/norm_rope/cuda/norm_rope_cuda.h"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 256;  // of the kernels in which a thread needs no other

bool Aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Grid of one thread per item.
dim3 Blocks(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  DSLA_CHECK(blocks < (int64_t{1} << 23));  // indices of items are 32-bit
  return dim3(static_cast<unsigned>(blocks));
}

// Where fp32 meets bf16 the threads of a warp take consecutive quads, which keeps both contiguous;
// 8 channels per thread would leave half of each 32-byte sector of fp32 to a second instruction.

struct EmbedParams {
  const int32_t *tokens, *feed, *chosen;
  int chosen_stride;
  const void* embedding;  // [V, quads]
  float4* hidden;         // [T, quads]
  uint32_t quads, items;  // of a row, of all rows
};

template <int bits>
__device__ __forceinline__ float4 Embedding(const EmbedParams& p, int64_t token, uint32_t quad) {
  if constexpr (bits == 16)
    return Widen(static_cast<const uint2*>(p.embedding)[token * p.quads + quad]);
  else
    return PackedQuad<bits>(p.embedding, 4 * p.quads, token, quad);
}

template <int bits>
__global__ void __launch_bounds__(kThreads) EmbedKernel(EmbedParams p) {
  AwaitPrevious();
  AllowNext();
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= p.items) return;
  const uint32_t row = i / p.quads;
  const int32_t feed = p.feed != nullptr ? p.feed[row] : -1;
  const int32_t token = feed < 0 ? p.tokens[row] : p.chosen[int64_t{feed} * p.chosen_stride];
  // A padding row's token may be negative.
  p.hidden[i] = token < 0 ? make_float4(0, 0, 0, 0) : Embedding<bits>(p, token, i - row * p.quads);
}

// One block per row; the row waits in registers for the sum of its squares.
template <int kQuads>
__global__ void __launch_bounds__(1024) AddRmsNormKernel(AddRmsNormArgs a) {
  const int quads = a.C / 4, threads = blockDim.x;
  const auto* weights = reinterpret_cast<const float4*>(a.weight);
  const auto* biases = reinterpret_cast<const float4*>(a.bias);
  // The weight is there before the rows are.
  float4 weight[kQuads];
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int quad = threadIdx.x + i * threads;
    if (quad < quads) weight[i] = weights[quad];
  }
  AllowNext();
  AwaitPrevious();
  const int64_t row = a.rows ? a.rows[blockIdx.x] : static_cast<int>(blockIdx.x);
  if (row < 0) return;
  auto* hidden = reinterpret_cast<float4*>(a.hidden) + row * quads;
  const auto* delta = static_cast<const uint2*>(a.delta) + row * quads;

  float4 x[kQuads];
  uint2 d[kQuads];
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int quad = threadIdx.x + i * threads;
    if (quad >= quads) continue;
    x[i] = hidden[quad];
    if (a.delta) d[i] = delta[quad];
  }
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int quad = threadIdx.x + i * threads;
    if (quad >= quads) continue;
    if (a.delta) x[i] = x[i] + Widen(d[i]);
    if (a.bias) x[i] = x[i] + biases[quad];
    if ((a.delta || a.bias) && !a.rows) hidden[quad] = x[i];
    squares += (x[i].x * x[i].x + x[i].y * x[i].y) + (x[i].z * x[i].z + x[i].w * x[i].w);
  }

  __shared__ float sums[32];
  const int lane = threadIdx.x % 32;
  squares = WarpSum(squares);
  if (lane == 0) sums[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = WarpSum(lane < threads / 32 ? sums[lane] : 0.f);
  const float scale = 1 / sqrtf(squares / static_cast<float>(a.C) + a.eps);

  auto* normed = static_cast<uint2*>(a.normed) + int64_t{blockIdx.x} * quads;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int quad = threadIdx.x + i * threads;
    if (quad >= quads) continue;
    normed[quad] = Round(x[i] * make_float4(scale, scale, scale, scale) * weight[i]);
  }
}

struct SiluParams {
  const uint4* gate_up;    // [T, 2, pieces]
  uint4* out;              // [T, pieces]
  uint32_t pieces, items;  // 8 channels; of a row of out, of all of it
};

__device__ __forceinline__ uint32_t SiluPair(uint32_t gate, uint32_t up) {
  return Pack(SiluTimes(Low(gate), Low(up)), SiluTimes(High(gate), High(up)));
}

__global__ void __launch_bounds__(kThreads) SiluKernel(SiluParams p) {
  AllowNext();
  AwaitPrevious();
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= p.items) return;
  // Row i / pieces of [gate, up] begins as many pieces further on as the rows before it have of up.
  const uint64_t at = uint64_t{i} + uint64_t{i / p.pieces} * p.pieces;
  const uint4 gate = p.gate_up[at], up = p.gate_up[at + p.pieces];
  p.out[i] = {SiluPair(gate.x, up.x), SiluPair(gate.y, up.y), SiluPair(gate.z, up.z),
              SiluPair(gate.w, up.w)};
}

template <int kQuads>
void LaunchAddRmsNorm(const AddRmsNormArgs& a, Stream stream) {
  const int per_thread = (a.C / 4 + kQuads - 1) / kQuads;
  StartEarly(AddRmsNormKernel<kQuads>, dim3(a.T), (per_thread + 31) / 32 * 32, a, stream);
}

}  // namespace

int EmbedRows(const EmbedRowsArgs& a, Stream stream) {
  DSLA_CHECK(a.T >= 0 && a.C > 0 && a.C % 8 == 0);
  if (a.T == 0) return cudaSuccess;
  DSLA_CHECK(a.tokens && Aligned16(a.embedding) && Aligned16(a.hidden));
  DSLA_CHECK(a.bits == 16 || a.bits == 8);
  DSLA_CHECK(a.feed == nullptr || a.chosen != nullptr);
  const int64_t items = int64_t{a.T} * (a.C / 4);
  const EmbedParams p{a.tokens,
                      a.feed,
                      a.chosen,
                      a.chosen_stride,
                      a.embedding,
                      reinterpret_cast<float4*>(a.hidden),
                      static_cast<uint32_t>(a.C / 4),
                      static_cast<uint32_t>(items)};
  const auto kernel = a.bits == 16 ? EmbedKernel<16> : EmbedKernel<8>;
  StartEarly(kernel, Blocks(items), kThreads, p, stream);
  return cudaGetLastError();
}

int AddRmsNorm(const AddRmsNormArgs& a, Stream stream) {
  DSLA_CHECK(a.T >= 0 && a.C > 0 && a.C % 8 == 0);
  DSLA_CHECK(a.C <= kMaxNormWidth);  // 4 quads of each of 1024 threads
  if (a.T == 0) return cudaSuccess;
  DSLA_CHECK(a.hidden && a.weight && a.normed);
  for (const void* p :
       {static_cast<const void*>(a.hidden), a.delta, static_cast<const void*>(a.bias),
        static_cast<const void*>(a.weight), static_cast<const void*>(a.normed)})
    DSLA_CHECK(Aligned16(p));
  // Few channels per thread while that costs no more than 256 threads: the sum's last steps take as
  // long as there are warps.
  if (a.C <= 1024)
    LaunchAddRmsNorm<1>(a, stream);
  else if (a.C <= 2048)
    LaunchAddRmsNorm<2>(a, stream);
  else
    LaunchAddRmsNorm<4>(a, stream);
  return cudaGetLastError();
}

int SiluMul(const void* gate_up, int T, int ffn, void* out, Stream stream) {
  DSLA_CHECK(T >= 0 && ffn > 0 && ffn % 8 == 0);
  if (T == 0) return cudaSuccess;
  DSLA_CHECK(gate_up && out && Aligned16(gate_up) && Aligned16(out));
  const int64_t items = int64_t{T} * (ffn / 8);
  const SiluParams p{static_cast<const uint4*>(gate_up), static_cast<uint4*>(out),
                     static_cast<uint32_t>(ffn / 8), static_cast<uint32_t>(items)};
  StartEarly(SiluKernel, Blocks(items), kThreads, p, stream);
  return cudaGetLastError();
}

}  // namespace dsla::cuda
