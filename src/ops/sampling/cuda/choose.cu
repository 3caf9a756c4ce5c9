// The choice of a token in two launches: blocks of 4096 logits each, which the registers hold
// between the search of the maximum and the sums of exponentials, then a block per row. A greedy
// row needs no more there than one warp over the parts; for the others the block finds the cut that
// the filters make, and draws. How a row is cut and summed depends on V alone.
#include <climits>

#include "base/check.h"
#include "ops/sampling/cuda/choose_row.cuh"
#include "ops/sampling/philox.h"

namespace dsla::cuda {
namespace {

struct RowParams {
  Rows rows;
  RowChoice* choices;
};

template <bool kVector>
__global__ void __launch_bounds__(kPartThreads) PartKernel(Rows p) {
  AwaitPrevious();
  AllowNext();
  const int row = blockIdx.x / p.parts_per_row;
  const int part = static_cast<int>(blockIdx.x) - row * p.parts_per_row;
  const float inverse_temperature = p.sampling[row].inverse_temperature;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slice = part * kSlicesPerPart + warp;
  float x[kHeld];
  LoadPieces<kVector>(p.logits + static_cast<int64_t>(row) * p.V, p.V, slice, lane, 0, x);

  __shared__ float maxima[kSlicesPerPart], sums[kSlicesPerPart];
  __shared__ int32_t tokens[kSlicesPerPart];
  float max = -kInfinity;
  bool broken = false;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    max = fmaxf(max, x[i]);  // of x and NaN: x
    broken |= !(x[i] < kInfinity);
  }
  if (inverse_temperature > 0)
    p.group_max[static_cast<int64_t>(blockIdx.x) * kPartThreads + threadIdx.x] = max;
  max = WarpMax(max);
  if (lane == 0) maxima[warp] = max;
  broken = __syncthreads_or(broken);
  max = WarpMax(maxima[lane % kSlicesPerPart]);

  int token = INT_MAX;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (x[i] == max) token = min(token, IdOf<kVector>(slice, lane, i));
    sum += ExpBelow(x[i], max, 1);
  }
  token = __reduce_min_sync(~0u, token);
  sum = WarpSum(sum);
  if (lane == 0) {
    tokens[warp] = token;
    sums[warp] = sum;
  }
  if (inverse_temperature > 0) {
    float tempered = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) tempered += ExpBelow(x[i], max, inverse_temperature);
    tempered = WarpSum(tempered);
    if (lane == 0) p.slice_sum[blockIdx.x * int64_t{kSlicesPerPart} + warp] = tempered;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int i = 1; i < kSlicesPerPart; ++i) {
    token = min(token, tokens[i]);
    sum += sums[i];
  }
  p.parts[blockIdx.x] = {max, token, sum, broken};
}

// A row's parts, by one warp.
__device__ Part Merge(const Part* parts, int count) {
  const int lane = threadIdx.x % 32;
  float max = -kInfinity;
  int token = INT_MAX;
  bool broken = false;
#pragma unroll 1
  for (int i = lane; i < count; i += 32) {
    const Part part = parts[i];
    broken |= part.broken != 0;
    if (part.max > max || i == lane) max = part.max, token = part.token;  // ids rise with i
  }
  const float largest = WarpMax(max);
  token = __reduce_min_sync(~0u, max == largest ? token : INT_MAX);
  broken = __any_sync(~0u, broken) || largest == -kInfinity;
  float sum = 0;
#pragma unroll 1
  for (int i = lane; i < count; i += 32) sum += parts[i].sum * ExpBelow(parts[i].max, largest, 1);
  return {largest, token, WarpSum(sum), broken};
}

template <bool kVector>
__global__ void __launch_bounds__(kRowThreads, 2) RowKernel(RowParams p) {
  AwaitPrevious();
  AllowNext();
  const Rows& rows = p.rows;
  const RowSampling& sampling = rows.sampling[blockIdx.x];
  const float inverse_temperature = sampling.inverse_temperature;
  const bool greedy = inverse_temperature == 0;
  if (greedy && threadIdx.x >= 32) return;
  const Part all = Merge(rows.parts + int64_t{blockIdx.x} * rows.parts_per_row, rows.parts_per_row);
  RowChoice& choice = p.choices[blockIdx.x];
  if (greedy || all.broken) {
    if (threadIdx.x == 0)
      choice =
          all.broken ? RowChoice{0, -kInfinity, 1} : RowChoice{all.token, 0 - logf(all.sum), 0};
    return;
  }
  __shared__ RowShared shared;
  __shared__ float log_sum;  // kept here, as registers are few
  if (threadIdx.x == 0) log_sum = logf(all.sum);
  BlockRow<kVector> row(shared, rows, all.max, inverse_temperature);
  const Cut cut = Filter(row, sampling);
  row.Mass(cut);
  if (threadIdx.x >= 32) return;
  const int token = row.Draw(cut, UniformAt(sampling.seed, sampling.position));
  if (threadIdx.x == 0)
    choice = {token, rows.logits[int64_t{blockIdx.x} * rows.V + token] - all.max - log_sum, 0};
}

int PartsPerRow(int V) { return (V + kPart - 1) / kPart; }

constexpr int64_t kBytesPerPart =
    static_cast<int64_t>(sizeof(Part) + (kSlicesPerPart + kPartThreads) * sizeof(float));

}  // namespace

int64_t ChooseWorkspaceBytes(int T, int V) { return int64_t{T} * PartsPerRow(V) * kBytesPerPart; }

int Choose(const float* logits, int T, int V, const RowSampling* rows, RowChoice* choices,
           void* workspace, int64_t workspace_bytes, Stream stream) {
  DSLA_CHECK(T >= 0 && V > 0 && V < kMaxVocabulary);
  if (T == 0) return cudaSuccess;
  DSLA_CHECK(logits && rows && choices && workspace);
  DSLA_CHECK(reinterpret_cast<uintptr_t>(workspace) % alignof(Part) == 0);
  DSLA_CHECK(workspace_bytes >= ChooseWorkspaceBytes(T, V));
  const int parts_per_row = PartsPerRow(V);
  const int64_t parts = int64_t{T} * parts_per_row;
  DSLA_CHECK(parts <= INT_MAX);
  auto* const part = static_cast<Part*>(workspace);
  auto* const slice_sum = reinterpret_cast<float*>(part + parts);
  const Rows p{logits, rows, part, slice_sum, slice_sum + parts * kSlicesPerPart, V, parts_per_row};
  const bool aligned = V % 4 == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  StartEarly(aligned ? PartKernel<true> : PartKernel<false>, dim3(static_cast<unsigned>(parts)),
             kPartThreads, p, stream);
  StartEarly(aligned ? RowKernel<true> : RowKernel<false>, dim3(static_cast<unsigned>(T)),
             kRowThreads, RowParams{p, choices}, stream);
  return cudaGetLastError();
}

}  // namespace dsla::cuda
