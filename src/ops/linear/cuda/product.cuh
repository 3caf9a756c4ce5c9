// What the kernels of linear_cuda.h share: arguments as they read them, and how results are stored.
#pragma once

#include "ops/dsla/cuda/common.cuh"
#include "ops/linear/cuda/linear_cuda.h"

namespace dsla::cuda {

struct ProductParams {
  union {
    const __nv_bfloat16* weight;
    const void* packed;  // of 8 or 4 bits
  };
  const float* scale;  // of the features of one in e4m3, or null
  const __nv_bfloat16* x;
  int64_t x_stride;
  int out, in, bits, T;
  const int32_t* first_row;
  // Results below `split` go to y, those after it to claim.
  int split;
  void* y;
  int64_t y_stride;
  bool y_f32, add;
  bool gated;  // the results are silu(W x) of the first half of the features times the second half
  float* claim;
  const float* claim_bias;

  __host__ __device__ int results() const { return gated ? out / 2 : out; }
};

// Products of one launch: as many rows and `in` have both. The second one may have no features.
struct ProductPair {
  ProductParams of[2];
};

// For up to kMostSkinnyRows rows, and for any number.
int LaunchSkinny(const ProductPair& pair, Stream stream);
int LaunchTiled(const ProductPair& pair, Stream stream);

// A tile of kFeatures features; with a gate one half of it is gates, the other what they multiply,
// and it makes half as many results.
template <int kFeatures>
__host__ __device__ __forceinline__ int TileResults(const ProductParams& p) {
  return p.gated ? kFeatures / 2 : kFeatures;
}
template <int kFeatures>
__host__ __device__ __forceinline__ int Tiles(const ProductParams& p) {
  const int width = TileResults<kFeatures>(p);
  return (p.results() + width - 1) / width;
}
// The second product's tiles follow those of the first.
template <int kFeatures>
__host__ __device__ __forceinline__ int Tiles(const ProductPair& pair) {
  return Tiles<kFeatures>(pair.of[0]) + Tiles<kFeatures>(pair.of[1]);
}
// The weight's row that is feature m of a tile, or -1.
template <int kFeatures>
__device__ __forceinline__ int WeightRow(const ProductParams& p, int tile, int m) {
  if (!p.gated) {
    const int row = tile * kFeatures + m;
    return row < p.out ? row : -1;
  }
  const int half = p.out / 2, gate = tile * (kFeatures / 2) + m % (kFeatures / 2);
  return gate >= half ? -1 : m < kFeatures / 2 ? gate : half + gate;
}

__device__ __forceinline__ float LoadOld(const ProductParams& p, int row, int result) {
  const int64_t at = row * p.y_stride + result;
  return p.y_f32 ? static_cast<const float*>(p.y)[at]
                 : __bfloat162float(static_cast<const __nv_bfloat16*>(p.y)[at]);
}
__device__ __forceinline__ void StoreResult(const ProductParams& p, int row, int result, float x) {
  const int64_t at = row * p.y_stride + result;
  if (result >= p.split)
    p.claim[row * static_cast<int64_t>(p.out - p.split) + result - p.split] =
        x + p.claim_bias[result - p.split];
  else if (p.y_f32)
    static_cast<float*>(p.y)[at] = x;
  else
    static_cast<__nv_bfloat16*>(p.y)[at] = __float2bfloat16_rn(x);
}

}  // namespace dsla::cuda
