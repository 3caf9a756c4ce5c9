// Products of any number of rows, for weights that are small: many small tiles, so that they fill
// the card.
//
// A block makes a tile of rows of x and features. Stages of 64 or 128 of k of both pass through a
// ring in shared memory; x is the A operand of mma.m16n8k16 and W the B operand. The warps of a
// block are two groups that share the tile and take every other step of 16 of k each. Where `in` is
// long, a cluster of blocks shares the tile and takes every fourth stage each, which fills the card
// with larger tiles. The parts of a sum are added in order of blocks and groups, so the bits of a
// row depend on `in` alone, not on the tile.
//
// The ring is filled with W before the kernel waits for those before it, and x follows.
#include <algorithm>

#include "base/check.h"
#include "ops/cuda/kernel_attribute.cuh"
#include "ops/linear/cuda/cluster.cuh"
#include "ops/linear/cuda/product.cuh"
#include "ops/norm_rope/cuda/elementwise.cuh"

namespace dsla::cuda {
namespace {

constexpr int kGroups = 2;         // of warps
constexpr int kStep = 16;          // of k in an mma
constexpr int kShared = 96 << 10;  // at most, of a block: what every GPU from 8.0 on has

// kDepth: of k in a stage, the more the fewer waits; kPieces: of 16 bytes, of a row of it;
// kCluster: blocks that share a tile.
template <int rows, int features, int depth, int cluster>
struct Tile {
  static constexpr int kRows = rows, kFeatures = features, kCluster = cluster;
  static constexpr int kDepth = depth, kPieces = depth / 8;
  static constexpr int kWarpRows = rows / 2, kWarpFeatures = 32;
  static constexpr int kGroupWarps = 2 * (features / kWarpFeatures);
  static constexpr int kThreads = 32 * kGroupWarps * kGroups;
  static constexpr int kRowsAtOnce = kThreads / kPieces;  // that the block copies
  static constexpr int kStageBytes = (rows + features) * kDepth * 2;
  static constexpr int kStages = kShared / kStageBytes;
  // Of sums in shared memory: the 4 rows that half a warp stores lie in different banks.
  static constexpr int kSumRow = features + 8;
  static constexpr int kSumBytes = kGroups * rows * kSumRow * 4;
  static constexpr int kOwn =
      rows * features / 4 / kThreads / cluster;  // quads of sums of a thread
  static_assert(kSumBytes <= kShared && rows % kRowsAtOnce == 0 && features % kRowsAtOnce == 0);
  static_assert(kOwn * kThreads * cluster * 4 == rows * features);
};

struct TiledParams {
  ProductPair pair;
  bool quads[2];  // y's rows can be moved 4 values at a time, and what is added to is bf16
};

__device__ __forceinline__ uint2 LoadQuad(const ProductParams& p, int row, int result) {
  const int64_t at = row * p.y_stride + result;
  return *reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(p.y) + at);
}
__device__ __forceinline__ void StoreQuad(const ProductParams& p, int row, int result, float4 x) {
  const int64_t at = row * p.y_stride + result;
  if (p.y_f32)
    *reinterpret_cast<float4*>(static_cast<float*>(p.y) + at) = x;
  else
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(p.y) + at) = Round(x);
}

// Of block `rank` of a cluster.
template <typename C>
__host__ __device__ __forceinline__ int Stages(const ProductParams& p, int rank) {
  return ((p.in + C::kDepth - 1) / C::kDepth - rank + C::kCluster - 1) / C::kCluster;
}

// The copies of a thread: one piece of every kRowsAtOnce'th row of x and of W.
template <typename C>
class Copies {
 public:
  __device__ __forceinline__ Copies(const ProductParams& p, int tile, uint4* ring) : in_(p.in) {
    const int row = threadIdx.x / C::kPieces, piece = threadIdx.x % C::kPieces;
    k_ = blockIdx.z * C::kDepth + piece * 8;
    to_ = ring + Swizzle<C::kPieces>(row, piece);
#pragma unroll
    for (int i = 0; i < kX; ++i) {
      const int from = blockIdx.x * C::kRows + row + i * C::kRowsAtOnce;
      x_[i] = {p.x + from * p.x_stride, from < p.T};
    }
#pragma unroll
    for (int i = 0; i < kW; ++i) {
      const int from = WeightRow<C::kFeatures>(p, tile, row + i * C::kRowsAtOnce);
      w_[i] = {p.weight + static_cast<int64_t>(from) * p.in, from >= 0};
    }
  }
  __device__ __forceinline__ void X(int stage, int slot) const { Copy(x_, 0, stage, slot); }
  __device__ __forceinline__ void Weight(int stage, int slot) const {
    Copy(w_, C::kRows, stage, slot);
  }

 private:
  static constexpr int kX = C::kRows / C::kRowsAtOnce, kW = C::kFeatures / C::kRowsAtOnce;
  struct Row {
    const __nv_bfloat16* at;
    bool valid;
  };
  template <int count>
  __device__ __forceinline__ void Copy(const Row (&rows)[count], int first, int stage,
                                       int slot) const {
    const int k = stage * C::kCluster * C::kDepth + k_;
    uint4* const to = to_ + slot * (C::kStageBytes / 16) + first * C::kPieces;
#pragma unroll
    for (int i = 0; i < count; ++i)
      CopyAsync(to + i * C::kRowsAtOnce * C::kPieces, rows[i].at + k, rows[i].valid && k < in_);
  }

  int in_, k_;
  uint4* to_;
  Row x_[kX], w_[kW];
};

// The part of the tile that a warp multiplies.
template <typename C>
class WarpTile {
 public:
  __device__ __forceinline__ explicit WarpTile(const void* ring) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int place = warp % C::kGroupWarps;
    group_ = warp / C::kGroupWarps;
    row_ = place % 2 * C::kWarpRows;
    feature_ = place / 2 * C::kWarpFeatures;
    // ldmatrix's four are, of x, rows and the 8 rows after them at two places of k, and of W the
    // two places of k of 8 features and of the 8 after them. The pieces are where Swizzle puts
    // them.
    x_ = SharedAddress(ring) + (row_ + lane % 16) * kRowBytes;
    w_ = SharedAddress(ring) + (C::kRows + feature_ + lane % 8 + lane / 16 * 8) * kRowBytes;
    x_piece_ = (2 * group_ + lane / 16) ^ lane % 8;
    w_piece_ = (2 * group_ + lane / 8 % 2) ^ lane % 8;
  }

  __device__ __forceinline__ void Multiply(int slot) {
    const uint32_t x = x_ + slot * C::kStageBytes, w = w_ + slot * C::kStageBytes;
#pragma unroll
    for (int step = 0; step < C::kDepth / kStep; step += kGroups) {
      uint32_t b[kFeatureTiles / 2][4];
#pragma unroll
      for (int n = 0; n < kFeatureTiles / 2; ++n)
        LoadMatrix(b[n], w + n * 16 * kRowBytes + (w_piece_ ^ 2 * step) * 16);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        uint32_t a[4];
        LoadMatrix(a, x + m * 16 * kRowBytes + (x_piece_ ^ 2 * step) * 16);
#pragma unroll
        for (int n = 0; n < kFeatureTiles; ++n)
          Mma(sums_[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }

  // Sums [kGroups, kRows, kSumRow].
  __device__ __forceinline__ void Store(float* to) const {
    const int lane = threadIdx.x % 32;
    to += (group_ * C::kRows + row_ + lane / 4) * C::kSumRow + feature_ + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kFeatureTiles; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(to + (m * 16 + half * 8) * C::kSumRow + n * 8) = {
              sums_[m][n][2 * half], sums_[m][n][2 * half + 1]};
  }

 private:
  static constexpr int kRowTiles = C::kWarpRows / 16, kFeatureTiles = C::kWarpFeatures / 8;
  static constexpr int kRowBytes = C::kDepth * 2;
  int group_, row_, feature_;
  uint32_t x_, w_;
  int x_piece_, w_piece_;
  float sums_[kRowTiles][kFeatureTiles][4] = {};
};

// Where quad i of a thread's sums stands in the tile, and what of y it is for.
struct Place {
  int tile_row, tile_feature, row, result;
};
template <typename C>
__device__ __forceinline__ Place PlaceOf(const ProductParams& p, int tile, int i) {
  const int index = (blockIdx.z * C::kOwn + i) * C::kThreads + threadIdx.x;
  const int row = index / (C::kFeatures / 4), feature = index % (C::kFeatures / 4) * 4;
  const int width = TileResults<C::kFeatures>(p);
  // The second half of a gated tile is for no results of its own.
  return {row, feature, static_cast<int>(blockIdx.x) * C::kRows + row,
          feature < width ? tile * width + feature : p.results()};
}

// The results of a place: the sums of all groups of all blocks.
template <typename C>
__device__ __forceinline__ float4 Sum(const float* sums, int row, int feature) {
  float4 total{};
#pragma unroll
  for (int i = 0; i < C::kCluster * kGroups; ++i) {
    const float* const part = sums + (i % kGroups * C::kRows + row) * C::kSumRow + feature;
    if constexpr (C::kCluster == 1)
      total = total + *reinterpret_cast<const float4*>(part);
    else
      total = total + LoadFromBlock(SharedAddress(part), i / kGroups);
  }
  return total;
}
template <typename C>
__device__ __forceinline__ float4 Results(const ProductParams& p, const float* sums, Place at) {
  const float4 y = Sum<C>(sums, at.tile_row, at.tile_feature);
  if (!p.gated) return y;
  return SiluTimes(y, Sum<C>(sums, at.tile_row, at.tile_feature + C::kFeatures / 2));
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2)
    TiledKernel(const __grid_constant__ TiledParams params) {
  extern __shared__ uint4 ring[];
  const int first_tiles = Tiles<C::kFeatures>(params.pair.of[0]);
  const bool second = static_cast<int>(blockIdx.y) >= first_tiles;
  const ProductParams& p = params.pair.of[second];
  const int tile = second ? blockIdx.y - first_tiles : blockIdx.y;
  int first_row = 0;
  if (p.first_row) {
    first_row = __ldcg(p.first_row);
    if (first_row >= p.T) {
      // Who waits for this grid also relies on what it would have waited for.
      if (blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0) AwaitPrevious();
      return;
    }
  }
  // The last rows' blocks wait.
  if (first_row >= static_cast<int>(blockIdx.x + 1) * C::kRows) return;
  const int stages = Stages<C>(p, blockIdx.z);

  // A slot stays free: a stage is copied when the one before the current one has been used.
  const Copies<C> copies(p, tile, ring);
#pragma unroll 1
  for (int i = 0; i < min(stages, C::kStages - 1); ++i) copies.Weight(i, i);
  AllowNext();
  AwaitPrevious();
#pragma unroll 1
  for (int i = 0; i < C::kStages - 1; ++i) {
    if (i < stages) copies.X(i, i);
    CommitCopies();
  }
  // What is added to is on its way too.
  uint2 before[C::kOwn] = {};
  if (p.add && params.quads[second]) {
#pragma unroll
    for (int i = 0; i < C::kOwn; ++i) {
      const Place at = PlaceOf<C>(p, tile, i);
      if (at.row < p.T && at.result < p.results()) before[i] = LoadQuad(p, at.row, at.result);
    }
  }

  WarpTile<C> part(ring);
  int slot = 0;
  for (int stage = 0; stage < stages; ++stage) {
    WaitCopies<C::kStages - 2>();
    __syncthreads();  // the stage is there for all, and all are done with the one before
    const int next = stage + C::kStages - 1, free = slot == 0 ? C::kStages - 1 : slot - 1;
    if (next < stages) {
      copies.Weight(next, free);
      copies.X(next, free);
    }
    CommitCopies();
    part.Multiply(slot);
    slot = slot + 1 == C::kStages ? 0 : slot + 1;
  }

  __syncthreads();  // the sums take the ring's place
  float* const sums = reinterpret_cast<float*>(ring);
  part.Store(sums);
  if constexpr (C::kCluster == 1)
    __syncthreads();
  else
    SyncCluster();

  if (params.quads[second]) {
#pragma unroll
    for (int i = 0; i < C::kOwn; ++i) {
      const Place at = PlaceOf<C>(p, tile, i);
      if (at.row < first_row || at.row >= p.T || at.result >= p.results()) continue;
      StoreQuad(p, at.row, at.result, Results<C>(p, sums, at) + Widen(before[i]));
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < C::kOwn; ++i) {
      const Place at = PlaceOf<C>(p, tile, i);
      if (at.row < first_row || at.row >= p.T || at.result >= p.results()) continue;
      const float4 quad = Results<C>(p, sums, at);
      const float values[] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int result = at.result + j;
        if (result >= p.results()) break;
        StoreResult(p, at.row, result, p.add ? values[j] + LoadOld(p, at.row, result) : values[j]);
      }
    }
  }
  if constexpr (C::kCluster > 1) LeaveCluster();
}

template <typename C>
dim3 Grid(const ProductPair& pair) {
  return dim3((pair.of[0].T + C::kRows - 1) / C::kRows, Tiles<C::kFeatures>(pair), C::kCluster);
}

template <typename C>
int Start(const TiledParams& params, Stream stream) {
  const cudaError_t status =
      AllowShared<TiledKernel<C>>(std::max(C::kStages * C::kStageBytes, C::kSumBytes));
  if (status != cudaSuccess) return status;
  // Short products take no more than they need, so that more blocks find a place.
  const int stages = std::min(C::kStages, Stages<C>(params.pair.of[0], 0));
  StartEarly(TiledKernel<C>, Grid<C>(params.pair), C::kThreads, params, stream,
             std::max(stages * C::kStageBytes, C::kSumBytes), C::kCluster);
  return cudaGetLastError();
}

// Large tiles read x and W less often, small ones spread over more processors: the smallest of
// those that have no more than `most` blocks, or the largest of all.
template <typename Smallest, typename... Larger>
int StartSmallest(const TiledParams& params, int most, Stream stream) {
  if constexpr (sizeof...(Larger) > 0) {
    const dim3 grid = Grid<Smallest>(params.pair);
    if (int64_t{grid.x} * grid.y * grid.z > most)
      return StartSmallest<Larger...>(params, most, stream);
  }
  return Start<Smallest>(params, stream);
}

bool InQuads(const ProductParams& p) {
  const auto y = reinterpret_cast<uintptr_t>(p.y);
  return p.split == p.results() && p.results() % 4 == 0 && p.y_stride % 4 == 0 &&
         y % (p.y_f32 ? 16 : 8) == 0 && !(p.add && p.y_f32);
}

}  // namespace

int LaunchTiled(const ProductPair& pair, Stream stream) {
  const TiledParams params{pair, {InQuads(pair.of[0]), InQuads(pair.of[1])}};
  const int in = pair.of[0].in;
  const int processors = CurrentDevice().multiprocessors;
  if (in > 1024 && CurrentDevice().major >= 9)
    return StartSmallest<Tile<64, 32, 64, 4>, Tile<64, 64, 64, 4>>(params, processors, stream);
  // Two blocks fit a processor.
  return StartSmallest<Tile<32, 32, 128, 1>, Tile<64, 32, 128, 1>, Tile<64, 64, 64, 1>,
                       Tile<128, 64, 64, 1>>(params, 2 * processors, stream);
}

}  // namespace dsla::cuda
