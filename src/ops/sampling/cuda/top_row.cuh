// The likeliest tokens of a row as it is given: first those of each part, then those of the row.
// Both count, for each candidate, those that rank before it, and stop where that is enough.
#pragma once

#include "ops/sampling/cuda/row_layout.cuh"
#include "ops/sampling/logit_order.h"

namespace dsla::cuda {

// Rises with the logit and, among equals, falls with the id. All of a row differ.
__device__ __forceinline__ uint64_t RankOf(float logit, int token) {
  return uint64_t{KeyOf(logit)} << 32 | static_cast<uint32_t>(~token);
}
__device__ __forceinline__ float LogitOf(uint64_t rank) {
  return FromKey(static_cast<uint32_t>(rank >> 32));
}
__device__ __forceinline__ int TokenOf(uint64_t rank) {
  return static_cast<int>(~static_cast<uint32_t>(rank));
}

// How many of [count] are above `rank`; `enough` or more where it need not be known better.
__device__ __forceinline__ int CountAbove(const uint64_t* ranks, int count, uint64_t rank,
                                          int enough) {
  constexpr int kAtOnce = 8;
  int above = 0;
#pragma unroll 1
  for (int i = 0; i < count && above < enough; i += kAtOnce) {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (i + k < count) above += ranks[i + k] > rank;
  }
  return above;
}

struct PartTopShared {
  uint64_t group_max[kPartThreads];
  uint64_t candidates[kMostTop * kHeld];
  int count;
};

// The `top` likeliest of the part that `slice` is of go to to[i * stride]. There are as many, as
// what is beyond V counts as -inf.
template <bool kVector>
__device__ __forceinline__ void PartTop(const float* logits, int V, int slice, int top,
                                        uint64_t* to, int stride) {
  __shared__ PartTopShared s;
  const auto each_of_group = [&](auto visit) {
    constexpr int kPiece = kWidth<kVector>;
#pragma unroll 1
    for (int i = 0; i < kHeld; i += kPiece) {  // not all at once, as registers are few
      float x[kPiece];
      LoadPieces<kVector>(logits, V, slice, threadIdx.x % 32, i, x);
#pragma unroll
      for (int k = 0; k < kPiece; ++k)
        visit(RankOf(x[k], IdOf<kVector>(slice, threadIdx.x % 32, i + k)));
    }
  };
  uint64_t max = 0;
  each_of_group([&](uint64_t rank) { max = rank > max ? rank : max; });
  s.group_max[threadIdx.x] = max;
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  // They are in the `top` groups with the largest maxima.
  if (CountAbove(s.group_max, kPartThreads, max, top) < top)
    each_of_group([&](uint64_t rank) { s.candidates[atomicAdd(&s.count, 1)] = rank; });
  __syncthreads();
  const int count = s.count;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kPartThreads) {
    const uint64_t rank = s.candidates[i];
    const int above = CountAbove(s.candidates, count, rank, top);
    if (above < top) to[above * stride] = rank;
  }
}

// ranks: [top, parts] as PartTop left them, so that the largest, which rule out the most, come
// first. For a block of kThreads.
template <int kThreads>
__device__ __forceinline__ void RowTop(const uint64_t* ranks, int parts, int top, float max,
                                       float log_sum, TokenLogprob* to) {
  const int count = top * parts;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const uint64_t rank = ranks[i];
    const int above = CountAbove(ranks, count, rank, top);
    if (above >= top) continue;
    const float logit = LogitOf(rank);
    to[above] = logit == -kInfinity ? TokenLogprob{-1, -kInfinity}
                                    : TokenLogprob{TokenOf(rank), logit - max - log_sum};
  }
}

}  // namespace dsla::cuda
