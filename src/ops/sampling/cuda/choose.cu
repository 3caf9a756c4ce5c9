// The choice of a token in two launches: blocks of 4096 logits each, which the registers hold
// between the search of the maximum and the sums of exponentials, then a block per row. A greedy
// row needs no more there than one warp over the parts; for the others the block finds the cut that
// the filters make, and draws. How a row is cut and summed depends on V alone.
#include <climits>
#include <utility>

#include "base/check.h"
#include "ops/sampling/cuda/choose_row.cuh"
#include "ops/sampling/cuda/edit_row.cuh"
#include "ops/sampling/cuda/top_row.cuh"
#include "ops/sampling/philox.h"

namespace dsla::cuda {
namespace {

struct RowParams {
  Rows rows;
  RowChoice* choices;
  TokenLogprob* top;
};

// The block's part, of which the warp has `slice`, to to[blockIdx.x].
template <bool kVector>
__device__ __forceinline__ void ReadPart(const Rows& p, const float* logits, int slice,
                                         float inverse_temperature, Part* to) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float x[kHeld];
  LoadPieces<kVector>(logits, p.V, slice, lane, 0, x);
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
  to[blockIdx.x] = {max, token, sum, broken};
}

template <bool kVector>
__global__ void __launch_bounds__(kPartThreads) PartKernel(Rows p) {
  AwaitPrevious();
  AllowNext();
  const int row = blockIdx.x / p.parts_per_row;
  const int part = static_cast<int>(blockIdx.x) - row * p.parts_per_row;
  const RowSampling& sampling = p.sampling[row];
  const int slice = part * kSlicesPerPart + threadIdx.x / 32;
  float* const logits = p.logits + static_cast<int64_t>(row) * p.V;
  if (sampling.top > 0)
    PartTop<kVector>(logits, p.V, slice, sampling.top,
                     p.top + static_cast<int64_t>(row) * kMostTop * p.parts_per_row + part,
                     p.parts_per_row);
  if (HasEdits(sampling)) {
    ReadPart<kVector>(p, logits, slice, 0, p.given);
    EditPart(sampling, p.edits, logits, p.V, part * kPart);
  }
  ReadPart<kVector>(p, logits, slice, sampling.inverse_temperature, p.parts);
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
  const bool greedy = inverse_temperature == 0, edits = HasEdits(sampling);
  if (greedy && !edits && sampling.top == 0 && threadIdx.x >= 32) return;
  const int64_t first_part = int64_t{blockIdx.x} * rows.parts_per_row;
  const Part all = Merge(rows.parts + first_part, rows.parts_per_row);
  RowChoice& choice = p.choices[blockIdx.x];
  if (greedy && !edits && sampling.top == 0) {
    if (threadIdx.x == 0)
      choice =
          all.broken ? RowChoice{0, -kInfinity, 1} : RowChoice{all.token, 0 - logf(all.sum), 0};
    return;
  }
  // Kept here, as registers are few.
  __shared__ RowShared shared;
  __shared__ float given_max, log_sum;
  __shared__ int token;
  __shared__ float logit;
  {
    const Part given = edits ? Merge(rows.given + first_part, rows.parts_per_row) : all;
    if (given.broken || all.broken) {
      if (threadIdx.x == 0) choice = {0, -kInfinity, 1};
      return;
    }
    const float log_given = logf(given.sum);
    if (threadIdx.x == 0) given_max = given.max, log_sum = log_given;
    if (sampling.top > 0)
      RowTop<kRowThreads>(rows.top + first_part * kMostTop, rows.parts_per_row, sampling.top,
                          given.max, log_given, p.top + int64_t{blockIdx.x} * kMostTop);
  }
  if (greedy) {
    if (threadIdx.x == 0) token = all.token;
  } else {
    BlockRow<kVector> row(shared, rows, all.max, inverse_temperature);
    const Cut cut = Filter(row, sampling);
    row.Mass(cut);
    if (threadIdx.x < 32) {
      const int drawn = row.Draw(cut, UniformAt(sampling.seed, sampling.position));
      if (threadIdx.x == 0) token = drawn;
    }
  }
  if (!edits && threadIdx.x > 0) return;
  if (threadIdx.x == 0) logit = rows.logits[int64_t{blockIdx.x} * rows.V + token];
  if (edits) {
    __syncthreads();
    FindGiven<kRowThreads>(sampling, rows.edits, token, logit);
    __syncthreads();
  }
  if (threadIdx.x == 0) choice = {token, logit - given_max - log_sum, 0};
}

int PartsPerRow(int V) { return (V + kPart - 1) / kPart; }

// In the order in which they lie; each begins at a multiple of 8 bytes.
constexpr int64_t kPartBytes = 2 * sizeof(Part), kTopBytes = kMostTop * sizeof(uint64_t),
                  kSumBytes = kSlicesPerPart * sizeof(float),
                  kMaxBytes = kPartThreads * sizeof(float);

}  // namespace

int64_t ChooseWorkspaceBytes(int T, int V) {
  return int64_t{T} * PartsPerRow(V) * (kPartBytes + kTopBytes + kSumBytes + kMaxBytes);
}

int Choose(const ChooseArgs& a, Stream stream) {
  DSLA_CHECK(a.T >= 0 && a.V > 0 && a.V < kMaxVocabulary);
  if (a.T == 0) return cudaSuccess;
  DSLA_CHECK(a.logits && a.rows && a.choices && a.workspace);
  DSLA_CHECK(reinterpret_cast<uintptr_t>(a.workspace) % alignof(Part) == 0);
  DSLA_CHECK(a.workspace_bytes >= ChooseWorkspaceBytes(a.T, a.V));
  const int parts_per_row = PartsPerRow(a.V);
  const int64_t parts = int64_t{a.T} * parts_per_row;
  DSLA_CHECK(parts <= INT_MAX);
  auto* next = static_cast<std::byte*>(a.workspace);
  const auto take = [&](int64_t bytes_per_part) {
    return std::exchange(next, next + parts * bytes_per_part);
  };
  Rows p{};
  p.logits = a.logits;
  p.sampling = a.rows;
  p.edits = a.edits;
  p.parts = reinterpret_cast<Part*>(take(kPartBytes));
  p.given = p.parts + parts;
  p.top = reinterpret_cast<uint64_t*>(take(kTopBytes));
  p.slice_sum = reinterpret_cast<float*>(take(kSumBytes));
  p.group_max = reinterpret_cast<float*>(take(kMaxBytes));
  p.V = a.V;
  p.parts_per_row = parts_per_row;
  const bool aligned = a.V % 4 == 0 && reinterpret_cast<uintptr_t>(a.logits) % 16 == 0;
  StartEarly(aligned ? PartKernel<true> : PartKernel<false>, dim3(static_cast<unsigned>(parts)),
             kPartThreads, p, stream);
  StartEarly(aligned ? RowKernel<true> : RowKernel<false>, dim3(static_cast<unsigned>(a.T)),
             kRowThreads, RowParams{p, a.choices, a.top}, stream);
  return cudaGetLastError();
}

}  // namespace dsla::cuda
