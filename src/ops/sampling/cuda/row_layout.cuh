// What both kernels of the choice share: how a row is cut into parts, slices and groups, what the
// first kernel leaves for the second, and steps of a warp.
#pragma once

#include "ops/dsla/cuda/common.cuh"
#include "ops/sampling/cuda/sampling_cuda.h"

namespace dsla::cuda {

inline constexpr float kInfinity = __builtin_huge_valf();

// A slice is 512 neighbouring logits, 16 for each lane of a warp; those 16 are a group, which with
// kVector is 4 pieces of 4. A part is what a block of the first kernel reads.
inline constexpr int kHeld = 16, kSlice = 32 * kHeld, kSlicesPerPart = 8;
inline constexpr int kPart = kSlicesPerPart * kSlice;
inline constexpr int kPartThreads = 32 * kSlicesPerPart;
inline constexpr int kMaxSlices = kMaxVocabulary / kSlice;

// Of a part's logits: the largest, its lowest id, the sum of e^(l - largest) (0 if that is -inf),
// and whether one is NaN or +inf.
struct alignas(16) Part {
  float max;
  int32_t token;
  float sum;
  int32_t broken;
};

// What both kernels read and what the first one leaves for the second.
struct Rows {
  float* logits;  // [T, V]
  const RowSampling* sampling;
  LogitEdit* edits;
  Part* parts;       // [T, parts_per_row]
  Part* given;       // [T, parts_per_row] of rows with edits: of the logits before them
  uint64_t* top;     // [T, kMostTop, parts_per_row] of rows that ask: the ranks of each part's
                     // likeliest, likeliest first
  float* slice_sum;  // [T, parts_per_row, kSlicesPerPart] of rows that are not greedy: the sum of
                     // e^((l - largest of the part) / temperature)
  float* group_max;  // [T, parts_per_row, kPartThreads], likewise
  int V, parts_per_row;
};

__device__ __forceinline__ bool HasEdits(const RowSampling& row) {
  return row.edits + row.ruled_out + row.allowed > 0;
}

template <bool kVector>
inline constexpr int kWidth = kVector ? 4 : 1;  // of a piece

// Token of element i of a lane's group; kVector: rows are aligned to 16 bytes.
template <bool kVector>
__device__ __forceinline__ int IdOf(int slice, int lane, int i) {
  constexpr int kPiece = kWidth<kVector>;
  return slice * kSlice + (i / kPiece * 32 + lane) * kPiece + i % kPiece;
}

// Elements [i, i + n) of a lane's group, whole pieces; -inf beyond V.
template <bool kVector, int n>
__device__ __forceinline__ void LoadPieces(const float* logits, int V, int slice, int lane, int i,
                                           float (&x)[n]) {
#pragma unroll
  for (int k = 0; k < n; k += kWidth<kVector>) {
    const int id = IdOf<kVector>(slice, lane, i + k);
    if constexpr (kVector) {
      float4 v = make_float4(-kInfinity, -kInfinity, -kInfinity, -kInfinity);
      if (id < V) v = *reinterpret_cast<const float4*>(logits + id);
      x[k] = v.x, x[k + 1] = v.y, x[k + 2] = v.z, x[k + 3] = v.w;
    } else {
      x[k] = id < V ? logits[id] : -kInfinity;
    }
  }
}

// e^((x - max) / temperature) for x <= max; 0 if max, and so all, are -inf.
__device__ __forceinline__ float ExpBelow(float x, float max, float inverse_temperature) {
  return max == -kInfinity ? 0.f : Exp((x - max) * inverse_temperature);
}

// Inclusive.
template <typename T>
__device__ __forceinline__ T WarpScan(T x) {
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const T before = __shfl_up_sync(~0u, x, i);
    if (threadIdx.x % 32 >= i) x += before;
  }
  return x;
}
// What a scan has before this lane: not by a subtraction, so that it is exact for floating point.
template <typename T>
__device__ __forceinline__ T BeforeLane(T scan) {
  const T before = __shfl_up_sync(~0u, scan, 1);
  return threadIdx.x % 32 == 0 ? T{0} : before;
}
template <typename T>
__device__ __forceinline__ T LastLane(T scan) {
  return __shfl_sync(~0u, scan, 31);
}
// The highest lane where it is true; -1: none.
__device__ __forceinline__ int HighestLane(bool x) { return 31 - __clz(__ballot_sync(~0u, x)); }

}  // namespace dsla::cuda
