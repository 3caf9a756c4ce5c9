// The states from chunk to chunk, forward and back, and the causal mask within a chunk.
#include "ops/training/cuda/training.cuh"

namespace dsla::cuda {
namespace {

constexpr int kAhead = 4;  // chunks whose loads are in flight together

// A thread per four columns of a state's row.
__global__ void __launch_bounds__(128) ScanKernel(TrainingScanArgs p) {
  const TrainingShape& s = p.shape;
  const int64_t rows = int64_t{s.B} * s.Hkv * s.K();
  const int quads = s.E() / 4;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= rows * quads) return;
  const int64_t row = i / quads, step = rows * s.E();
  float* products = p.products + i * 4;
  auto* entered = static_cast<__nv_bfloat16*>(p.entered) + i * 4;
  const float *enter = p.enter + row, *leave = p.leave + row;
  float4 state = {0, 0, 0, 0};
  for (int c0 = 0; c0 < s.chunks; c0 += kAhead) {
    float4 added[kAhead];
    float in[kAhead], out[kAhead];
#pragma unroll
    for (int c = 0; c < kAhead; ++c) {
      if (c0 + c >= s.chunks) break;
      added[c] = *reinterpret_cast<const float4*>(products + c * step);
      in[c] = enter[c * rows], out[c] = leave[c * rows];
    }
#pragma unroll
    for (int c = 0; c < kAhead; ++c) {
      if (c0 + c >= s.chunks) break;
      float4 x = {in[c] * state.x, in[c] * state.y, in[c] * state.z, in[c] * state.w};
      StorePair(entered + c * step, make_float2(x.x, x.y));
      StorePair(entered + c * step + 2, make_float2(x.z, x.w));
      x = {x.x + added[c].x, x.y + added[c].y, x.z + added[c].z, x.w + added[c].w};
      *reinterpret_cast<float4*>(products + c * step) = x;
      state = {out[c] * x.x, out[c] * x.y, out[c] * x.z, out[c] * x.w};
    }
    products += kAhead * step, entered += kAhead * step;
    enter += kAhead * rows, leave += kAhead * rows;
  }
}

// A warp per row of a state: dP = e^{L-R} dS', dS = e^L dS' + e^R Q~^T dO.
template <int kEach>
__global__ void __launch_bounds__(128) ScanBackwardKernel(TrainingScanBackwardArgs p) {
  const TrainingShape& s = p.shape;
  const int64_t rows = int64_t{s.B} * s.Hkv * s.K();
  const int E = s.E(), lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int first_query = s.chunks - s.query_chunks;
  auto* const d_products = static_cast<__nv_bfloat16*>(p.d_products);
  float state[kEach] = {};
  float added[kEach], from[kEach], in = 0, out = 0;
  const auto load = [&](int c, float* x, float* y, float* e, float* l) {
    const int64_t at = (c * rows + row) * E;
    const int64_t query = ((c - first_query) * rows + row) * E;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int column = lane + 32 * i;
      x[i] = column < E ? p.products[at + column] : 0;
      y[i] = column < E && c >= first_query ? p.from_queries[query + column] : 0;
    }
    *e = p.enter[c * rows + row], *l = p.leave[c * rows + row];
  };
  load(s.chunks - 1, added, from, &in, &out);
  for (int c = s.chunks - 1; c >= 0; --c) {
    float next_added[kEach], next_from[kEach], next_in = 0, next_out = 0;
    if (c > 0) load(c - 1, next_added, next_from, &next_in, &next_out);
    const int64_t at = (c * rows + row) * E;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int column = lane + 32 * i;
      const float d = out * state[i];
      if (column < E) d_products[at + column] = __float2bfloat16(d);
      sum += added[i] * d;
      state[i] = in * (d + from[i]);
    }
    sum = WarpSum(sum);
    if (lane == 0) p.d_sums[c * rows + row] = sum;
#pragma unroll
    for (int i = 0; i < kEach; ++i) added[i] = next_added[i], from[i] = next_from[i];
    in = next_in, out = next_out;
  }
}

// By selection, not by a product: what stands above the diagonal may be infinite.
__global__ void __launch_bounds__(256) CausalKernel(TrainingCausalArgs p) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  constexpr int kPieces = kC / 8;
  if (i >= p.count * p.rows * kPieces) return;
  const int time = static_cast<int>(i / kPieces % p.rows) % kC;
  const int key = static_cast<int>(i % kPieces) * 8;
  if (key + 7 <= time) return;
  uint4* const at = static_cast<uint4*>(p.x) + i;
  if (key > time) {
    *at = make_uint4(0, 0, 0, 0);
    return;
  }
  auto* const x = reinterpret_cast<__nv_bfloat16*>(at);
  for (int j = time - key + 1; j < 8; ++j) x[j] = __float2bfloat16(0);
}

unsigned Blocks(int64_t threads, int each) {
  return static_cast<unsigned>((threads + each - 1) / each);
}

}  // namespace

int TrainingScan(const TrainingScanArgs& p, Stream stream) {
  const TrainingShape& s = p.shape;
  const int64_t threads = int64_t{s.B} * s.Hkv * s.K() * s.E() / 4;
  ScanKernel<<<Blocks(threads, 128), 128, 0, stream>>>(p);
  return Launched();
}

int TrainingScanBackward(const TrainingScanBackwardArgs& p, Stream stream) {
  const TrainingShape& s = p.shape;
  const int64_t threads = int64_t{s.B} * s.Hkv * s.K() * 32;
  const auto kernel = s.D == 64 ? ScanBackwardKernel<3> : ScanBackwardKernel<5>;
  kernel<<<Blocks(threads, 128), 128, 0, stream>>>(p);
  return Launched();
}

int TrainingCausal(const TrainingCausalArgs& p, Stream stream) {
  const int64_t threads = p.count * p.rows * (kC / 8);
  CausalKernel<<<Blocks(threads, 256), 256, 0, stream>>>(p);
  return Launched();
}

}  // namespace dsla::cuda
