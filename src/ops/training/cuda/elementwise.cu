// RoPE, the gated activation, and the losses: each one pass where separate operations take many.
#include "ops/training/cuda/training.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 256;

unsigned Blocks(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

struct Eight {
  float x[8];
  __device__ __forceinline__ static Eight Load(const void* base, int64_t piece) {
    const uint4 raw = static_cast<const uint4*>(base)[piece];
    const auto* const pairs = reinterpret_cast<const __nv_bfloat162*>(&raw);
    Eight e;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __bfloat1622float2(pairs[i]);
      e.x[2 * i] = pair.x, e.x[2 * i + 1] = pair.y;
    }
    return e;
  }
  __device__ __forceinline__ void Store(void* base, int64_t piece) const {
    uint4 raw;
    auto* const pairs = reinterpret_cast<__nv_bfloat162*>(&raw);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pairs[i] = __float22bfloat162_rn(make_float2(x[2 * i], x[2 * i + 1]));
    static_cast<uint4*>(base)[piece] = raw;
  }
};

// A thread per two neighbouring pairs.
__global__ void __launch_bounds__(kThreads) RopeKernel(TrainingRopeArgs p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int half = p.D / 2, each = half / 2;
  if (i >= int64_t{p.B} * p.T * p.h * each) return;
  const int d = static_cast<int>(i % each) * 2;
  const int64_t row = i / each;
  const int head = static_cast<int>(row % p.h), t = static_cast<int>(row / p.h % p.T);
  const int64_t b = row / p.h / p.T;
  const auto* const x =
      static_cast<const __nv_bfloat16*>(p.x) + b * p.x_batch + t * p.x_row + head * p.x_head + d;
  auto* const y = static_cast<__nv_bfloat16*>(p.y) + row * p.D + d;
  const float2 c = LoadPair(p.cos + static_cast<int64_t>(t) * half + d);
  float2 s = LoadPair(p.sin + static_cast<int64_t>(t) * half + d);
  if (p.inverse) s = -1.f * s;
  const float2 x1 = LoadPair(x), x2 = LoadPair(x + half);
  StorePair(y, x1 * c - x2 * s);
  StorePair(y + half, x2 * c + x1 * s);
}

template <bool kBackward>
__global__ void __launch_bounds__(kThreads) SwiGluKernel(TrainingSwiGluArgs p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int pieces = p.width / 8;
  if (i >= p.rows * pieces) return;
  const int64_t row = i / pieces, gate_at = row * 2 * pieces + i % pieces, up_at = gate_at + pieces;
  Eight g = Eight::Load(p.gate_up, gate_at), u = Eight::Load(p.gate_up, up_at);
  if constexpr (kBackward) {
    const Eight d = Eight::Load(p.d_y, i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float sigmoid = 1 / (1 + __expf(-g.x[j])), silu = g.x[j] * sigmoid;
      g.x[j] = d.x[j] * u.x[j] * (sigmoid + silu * (1 - sigmoid));
      u.x[j] = d.x[j] * silu;
    }
    g.Store(p.y, gate_at);
    u.Store(p.y, up_at);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) g.x[j] = g.x[j] / (1 + __expf(-g.x[j])) * u.x[j];
    g.Store(p.y, i);
  }
}

constexpr int kKlThreads = 512, kKlWarps = kKlThreads / 32;

// The sum of e^{x - max} with its maximum, as more numbers come.
struct LogSum {
  float max = -INFINITY, sum = 0;
  __device__ __forceinline__ void Add(float other_max, float other_sum) {
    const float top = fmaxf(max, other_max);
    if (top == -INFINITY) return;
    sum = sum * __expf(max - top) + other_sum * __expf(other_max - top);
    max = top;
  }
  __device__ __forceinline__ void Add(const Eight& e) {
    float top = max;
#pragma unroll
    for (int j = 0; j < 8; ++j) top = fmaxf(top, e.x[j]);
    if (top == -INFINITY) return;
    sum *= __expf(max - top);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += __expf(e.x[j] - top);
    max = top;
  }
};

__device__ float BlockLogSum(LogSum l, float2* shared) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2)
    l.Add(__shfl_xor_sync(~0u, l.max, i), __shfl_xor_sync(~0u, l.sum, i));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = {l.max, l.sum};
  __syncthreads();
  LogSum all;
#pragma unroll
  for (int w = 0; w < kKlWarps; ++w) all.Add(shared[w].x, shared[w].y);
  return all.max + logf(all.sum);
}

__global__ void __launch_bounds__(kKlThreads) KlKernel(TrainingKlArgs p) {
  __shared__ float2 shared[kKlWarps];
  const int64_t row = blockIdx.x;
  const int pieces = p.V / 8;
  const void* const teacher = static_cast<const uint4*>(p.teacher) + row * pieces;
  void* const student = static_cast<uint4*>(p.student) + row * pieces;
  LogSum of_teacher, of_student;
  for (int i = threadIdx.x; i < pieces; i += kKlThreads) {
    of_teacher.Add(Eight::Load(teacher, i));
    of_student.Add(Eight::Load(student, i));
  }
  const float lse_t = BlockLogSum(of_teacher, shared), lse_s = BlockLogSum(of_student, shared);
  const float weight = p.weight[row];
  float kl = 0;
  for (int i = threadIdx.x; i < pieces; i += kKlThreads) {
    const Eight t = Eight::Load(teacher, i);
    Eight s = Eight::Load(student, i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float log_t = t.x[j] - lse_t, log_s = s.x[j] - lse_s, p_t = __expf(log_t);
      if (p_t > 0) kl += p_t * (log_t - log_s);
      s.x[j] = weight * (__expf(log_s) - p_t);
    }
    s.Store(student, i);
  }
  kl = WarpSum(kl);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32].x = kl;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0;
  for (int w = 0; w < kKlWarps; ++w) sum += shared[w].x;
  p.kl[row] = sum;
}

__global__ void __launch_bounds__(kThreads) ErrorSumsKernel(TrainingErrorArgs p) {
  __shared__ float2 shared[kThreads / 32];
  const int pieces = p.width / 8;
  float2 sum = {0, 0};
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.rows * pieces;
       i += int64_t{gridDim.x} * kThreads) {
    const float counted = p.counted == nullptr ? 1 : p.counted[i / pieces];
    if (counted == 0) continue;
    const Eight y = Eight::Load(p.y, i), o = Eight::Load(p.o, i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float d = counted * (y.x[j] - o.x[j]), r = counted * o.x[j];
      sum.x += d * d, sum.y += r * r;
    }
  }
  sum = {WarpSum(sum.x), WarpSum(sum.y)};
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = {0, 0};
  for (const float2 part : shared) sum = sum + part;
  StorePair(p.parts + 2 * blockIdx.x, sum);
}

__global__ void __launch_bounds__(kThreads) ErrorGradientKernel(TrainingErrorArgs p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int pieces = p.width / 8;
  if (i >= p.rows * pieces) return;
  const float scale = 2 * *p.scale * (p.counted == nullptr ? 1 : p.counted[i / pieces]);
  Eight y = Eight::Load(p.y, i);
  const Eight o = Eight::Load(p.o, i);
#pragma unroll
  for (int j = 0; j < 8; ++j) y.x[j] = scale * (y.x[j] - o.x[j]);
  y.Store(p.gradient, i);
}

}  // namespace

int TrainingRope(const TrainingRopeArgs& p, Stream stream) {
  DSLA_CHECK(p.D % 4 == 0);
  RopeKernel<<<Blocks(int64_t{p.B} * p.T * p.h * (p.D / 4)), kThreads, 0, stream>>>(p);
  return Launched();
}
int TrainingSwiGlu(const TrainingSwiGluArgs& p, Stream stream) {
  DSLA_CHECK(p.width % 8 == 0);
  SwiGluKernel<false><<<Blocks(p.rows * (p.width / 8)), kThreads, 0, stream>>>(p);
  return Launched();
}
int TrainingSwiGluBackward(const TrainingSwiGluArgs& p, Stream stream) {
  DSLA_CHECK(p.width % 8 == 0);
  SwiGluKernel<true><<<Blocks(p.rows * (p.width / 8)), kThreads, 0, stream>>>(p);
  return Launched();
}
int TrainingKl(const TrainingKlArgs& p, Stream stream) {
  DSLA_CHECK(p.V % 8 == 0);
  KlKernel<<<static_cast<unsigned>(p.rows), kKlThreads, 0, stream>>>(p);
  return Launched();
}
int TrainingErrorSums(const TrainingErrorArgs& p, Stream stream) {
  DSLA_CHECK(p.width % 8 == 0);
  ErrorSumsKernel<<<kTrainingErrorBlocks, kThreads, 0, stream>>>(p);
  return Launched();
}
int TrainingErrorGradient(const TrainingErrorArgs& p, Stream stream) {
  ErrorGradientKernel<<<Blocks(p.rows * (p.width / 8)), kThreads, 0, stream>>>(p);
  return Launched();
}

}  // namespace dsla::cuda
