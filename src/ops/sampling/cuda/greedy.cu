// The greedy choice in two launches: blocks of 4096 logits each, which the registers hold between
// the search of the maximum and the sum of exponentials, then a warp per row over the row's blocks.
// How a row is cut and summed depends on V alone.
#include <climits>

#include "base/check.h"
#include "ops/dsla/cuda/common.cuh"
#include "ops/sampling/cuda/sampling_cuda.h"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kHeld = 16;
constexpr int kPart = kThreads * kHeld;  // logits of a block
constexpr int kMergeWarps = 4;

// Of a block's logits: the largest, its lowest id, the sum of e^(l - largest) (0 if that is -inf),
// and whether one is NaN or +inf.
struct alignas(16) Part {
  float max;
  int32_t token;
  float sum;
  int32_t broken;
};

struct PartParams {
  const float* logits;  // [T, V]
  Part* parts;          // [T, parts_per_row]
  int V, parts_per_row;
};
struct MergeParams {
  const Part* parts;
  GreedyChoice* choices;
  int T, parts_per_row;
};

constexpr float kInfinity = __builtin_huge_valf();

// e^(x - max) for x <= max; 0 if max, and so all, are -inf.
__device__ __forceinline__ float Weight(float x, float max) {
  return max == -kInfinity ? 0.f : Exp(x - max);
}

// kVector: rows are aligned to 16 bytes.
template <bool kVector>
__global__ void __launch_bounds__(kThreads) PartKernel(PartParams p) {
  AwaitPrevious();
  AllowNext();
  const int row = blockIdx.x / p.parts_per_row;
  const int begin = (static_cast<int>(blockIdx.x) - row * p.parts_per_row) * kPart;
  const float* logits = p.logits + static_cast<int64_t>(row) * p.V;
  constexpr int kWidth = kVector ? 4 : 1;
  const auto id = [&](int i) {
    return begin + (i / kWidth * kThreads + static_cast<int>(threadIdx.x)) * kWidth + i % kWidth;
  };
  float x[kHeld];
  if constexpr (kVector) {
#pragma unroll
    for (int i = 0; i < kHeld; i += 4) {
      float4 v = make_float4(-kInfinity, -kInfinity, -kInfinity, -kInfinity);
      if (id(i) < p.V) v = *reinterpret_cast<const float4*>(logits + id(i));
      x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] = id(i) < p.V ? logits[id(i)] : -kInfinity;
  }

  __shared__ float maxima[kWarps], sums[kWarps];
  __shared__ int32_t tokens[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float max = -kInfinity;
  bool broken = false;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    max = fmaxf(max, x[i]);  // of x and NaN: x
    broken |= !(x[i] < kInfinity);
  }
  max = WarpMax(max);
  if (lane == 0) maxima[warp] = max;
  broken = __syncthreads_or(broken);
  max = WarpMax(maxima[lane % kWarps]);

  int token = INT_MAX;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (x[i] == max) token = min(token, id(i));
    sum += Weight(x[i], max);
  }
  token = __reduce_min_sync(~0u, token);
  sum = WarpSum(sum);
  if (lane == 0) {
    tokens[warp] = token;
    sums[warp] = sum;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int i = 1; i < kWarps; ++i) {
    token = min(token, tokens[i]);
    sum += sums[i];
  }
  p.parts[blockIdx.x] = {max, token, sum, broken};
}

__global__ void __launch_bounds__(32 * kMergeWarps) MergeKernel(MergeParams p) {
  AwaitPrevious();
  AllowNext();
  const int row = blockIdx.x * kMergeWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.T) return;
  const Part* parts = p.parts + static_cast<int64_t>(row) * p.parts_per_row;
  float max = -kInfinity;
  int token = INT_MAX;
  bool broken = false;
  for (int i = lane; i < p.parts_per_row; i += 32) {
    const Part part = parts[i];
    broken |= part.broken != 0;
    if (part.max > max || i == lane) max = part.max, token = part.token;  // ids rise with i
  }
  const float largest = WarpMax(max);
  token = __reduce_min_sync(~0u, max == largest ? token : INT_MAX);
  broken = __any_sync(~0u, broken) || largest == -kInfinity;
  float sum = 0;
  for (int i = lane; i < p.parts_per_row; i += 32)
    sum += parts[i].sum * Weight(parts[i].max, largest);
  sum = WarpSum(sum);
  if (lane > 0) return;
  if (broken)
    p.choices[row] = {0, -kInfinity, 1};
  else
    p.choices[row] = {token, 0 - logf(sum), 0};
}

int PartsPerRow(int V) { return (V + kPart - 1) / kPart; }

}  // namespace

int64_t GreedyWorkspaceBytes(int T, int V) {
  return int64_t{T} * PartsPerRow(V) * static_cast<int64_t>(sizeof(Part));
}

int Greedy(const float* logits, int T, int V, GreedyChoice* choices, void* workspace,
           int64_t workspace_bytes, Stream stream) {
  DSLA_CHECK(T >= 0 && V > 0 && V < INT_MAX - kPart);
  if (T == 0) return cudaSuccess;
  DSLA_CHECK(logits && choices && workspace);
  DSLA_CHECK(reinterpret_cast<uintptr_t>(workspace) % alignof(Part) == 0);
  DSLA_CHECK(workspace_bytes >= GreedyWorkspaceBytes(T, V));
  const int parts = PartsPerRow(V);
  DSLA_CHECK(int64_t{T} * parts <= INT_MAX);
  auto* part = static_cast<Part*>(workspace);
  const PartParams p{logits, part, V, parts};
  const bool aligned = V % 4 == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  StartEarly(aligned ? PartKernel<true> : PartKernel<false>, dim3(T * parts), kThreads, p, stream);
  StartEarly(MergeKernel, dim3((T + kMergeWarps - 1) / kMergeWarps), 32 * kMergeWarps,
             MergeParams{part, choices, T, parts}, stream);
  return cudaGetLastError();
}

}  // namespace dsla::cuda
