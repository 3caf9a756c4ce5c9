// Products of any number of rows, for weights that are small: many small tiles, so that they fill
// the card.
//
// A block makes a tile of rows of x and features. Stages of 64 of k of both pass through a ring in
// shared memory; x is the A operand of mma.m16n8k16 and W the B operand. The warps of a block are
// kSplits groups that share the tile and take every kSplits'th step of 16 of k each; their sums are
// added in order of the groups. How many groups there are follows from `in`, so the bits of a row
// depend on in alone, not on the tile.
//
// The ring is filled with W before the kernel waits for those before it, and x follows.
#include <algorithm>

#include "base/check.h"
#include "ops/linear/cuda/product.cuh"
#include "ops/norm_rope/cuda/elementwise.cuh"

namespace dsla::cuda {
namespace {

constexpr int kDepth = 64;           // of k in a stage
constexpr int kPieces = kDepth / 8;  // of 16 bytes, of a row of a stage
constexpr int kStep = 16;            // of k in an mma
constexpr int kShared = 96 << 10;    // at most, of a block: what every GPU from 8.0 on has

template <int rows, int features, int splits>
struct Tile {
  static constexpr int kRows = rows, kFeatures = features, kSplits = splits;
  static constexpr int kWarpRows = rows / 2, kWarpFeatures = 32;
  static constexpr int kGroupWarps = 2 * (features / kWarpFeatures);
  static constexpr int kThreads = 32 * kGroupWarps * splits;
  static constexpr int kRowsAtOnce = kThreads / kPieces;  // that the block copies
  static constexpr int kStageBytes = (rows + features) * kDepth * 2;
  static constexpr int kStages = kShared / kStageBytes;
  // Of sums in shared memory: the 4 rows that half a warp stores lie in different banks.
  static constexpr int kSumRow = features + 8;
  static constexpr int kSumBytes = splits * rows * kSumRow * 4;
  static constexpr int kOwn = rows * features / 4 / kThreads;  // quads of sums of a thread
  static_assert(kSumBytes <= kShared && rows % kRowsAtOnce == 0 && features % kRowsAtOnce == 0);
};

struct TiledParams {
  ProductParams p;
  bool quads;  // y's rows can be moved 4 values at a time
};

__device__ __forceinline__ float4 LoadQuad(const ProductParams& p, int row, int result) {
  const int64_t at = row * p.y_stride + result;
  if (p.y_f32) return *reinterpret_cast<const float4*>(static_cast<const float*>(p.y) + at);
  return Widen(*reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(p.y) + at));
}
__device__ __forceinline__ void StoreQuad(const ProductParams& p, int row, int result, float4 x) {
  const int64_t at = row * p.y_stride + result;
  if (p.y_f32)
    *reinterpret_cast<float4*>(static_cast<float*>(p.y) + at) = x;
  else
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(p.y) + at) = Round(x);
}

// Where a block's quad of sums number `index` stands in its tile.
struct Place {
  int row, m;
};
template <typename C>
__device__ __forceinline__ Place PlaceOf(int index) {
  return {index / (C::kFeatures / 4), index % (C::kFeatures / 4) * 4};
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2) TiledKernel(TiledParams params) {
  extern __shared__ uint4 ring[];
  const ProductParams& p = params.p;
  int first_row = 0;
  if (p.first_row) {
    first_row = __ldcg(p.first_row);
    if (first_row >= p.T) {
      // Who waits for this grid also relies on what it would have waited for.
      if (blockIdx.x == 0 && blockIdx.y == 0) AwaitPrevious();
      return;
    }
  }
  const int block_row = blockIdx.x * C::kRows;
  const bool used = first_row < block_row + C::kRows;
  if (!used && !p.clear) return;  // the last rows' blocks wait
  const int stages = used ? (p.in + kDepth - 1) / kDepth : 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // A thread copies one piece of every kRowsAtOnce'th row.
  constexpr int kCopiesX = C::kRows / C::kRowsAtOnce, kCopiesW = C::kFeatures / C::kRowsAtOnce;
  constexpr int kStagePieces = C::kStageBytes / 16;
  const int copy_row = threadIdx.x / kPieces, copy_k = threadIdx.x % kPieces * 8;
  uint4* const copy_to = ring + Swizzle<kPieces>(copy_row, threadIdx.x % kPieces);
  const __nv_bfloat16* w[kCopiesW];
#pragma unroll
  for (int i = 0; i < kCopiesW; ++i) {
    const int row = WeightRow<C::kFeatures>(p, blockIdx.y, copy_row + i * C::kRowsAtOnce);
    w[i] = row >= 0 ? p.weight + static_cast<int64_t>(row) * p.in : nullptr;
  }
  const auto copy_w = [&](int stage, int slot) {
    const int k = stage * kDepth + copy_k;
#pragma unroll
    for (int i = 0; i < kCopiesW; ++i) {
      const bool valid = w[i] && k < p.in;
      CopyAsync(copy_to + slot * kStagePieces + (C::kRows + i * C::kRowsAtOnce) * kPieces,
                valid ? w[i] + k : p.weight, valid);
    }
  };
  const __nv_bfloat16* const x = p.x + (block_row + copy_row) * p.x_stride;
  const auto copy_x = [&](int stage, int slot) {
    const int k = stage * kDepth + copy_k;
#pragma unroll
    for (int i = 0; i < kCopiesX; ++i) {
      const bool valid = block_row + copy_row + i * C::kRowsAtOnce < p.T && k < p.in;
      CopyAsync(copy_to + slot * kStagePieces + i * C::kRowsAtOnce * kPieces,
                valid ? x + i * C::kRowsAtOnce * p.x_stride + k : p.x, valid);
    }
  };

  // A slot stays free: a stage is copied when the one before the current one has been used.
#pragma unroll 1
  for (int i = 0; i < min(stages, C::kStages - 1); ++i) copy_w(i, i);
  AllowNext();
  AwaitPrevious();
#pragma unroll 1
  for (int i = 0; i < C::kStages - 1; ++i) {
    if (i < stages) copy_x(i, i);
    CommitCopies();
  }

  // What is added to is on its way too.
  const int width = TileResults<C::kFeatures>(p), block_result = blockIdx.y * width;
  float4 before[C::kOwn] = {};
  if (p.add && params.quads) {
#pragma unroll
    for (int i = 0; i < C::kOwn; ++i) {
      const Place at = PlaceOf<C>(i * C::kThreads + threadIdx.x);
      if (block_row + at.row < p.T && block_result + at.m < p.out)
        before[i] = LoadQuad(p, block_row + at.row, block_result + at.m);
    }
  }

  // Of the operands: ldmatrix's rows are 16 of x, and 8 + 8 features at two places of k.
  const int group = warp / C::kGroupWarps, place = warp % C::kGroupWarps;
  const int warp_row = place % 2 * C::kWarpRows, warp_feature = place / 2 * C::kWarpFeatures;
  const int swizzle = lane % 8 * 16;
  const int x_k = (lane / 16 * 16 ^ swizzle) ^ group * 32;
  const int w_k = (lane / 8 % 2 * 16 ^ swizzle) ^ group * 32;
  constexpr int kRowBytes = kDepth * 2;
  const uint32_t x_row = SharedAddress(ring) + (warp_row + lane % 16) * kRowBytes;
  const uint32_t w_row =
      SharedAddress(ring) + (C::kRows + warp_feature + lane % 8 + lane / 16 * 8) * kRowBytes;

  constexpr int kRowTiles = C::kWarpRows / 16, kFeatureTiles = C::kWarpFeatures / 8;
  float sums[kRowTiles][kFeatureTiles][4] = {};
  int slot = 0;
  for (int stage = 0; stage < stages; ++stage) {
    WaitCopies<C::kStages - 2>();
    __syncthreads();  // the stage is there for all, and all are done with the one before
    const int next = stage + C::kStages - 1, free = slot == 0 ? C::kStages - 1 : slot - 1;
    if (next < stages) {
      copy_w(next, free);
      copy_x(next, free);
    }
    CommitCopies();
#pragma unroll
    for (int step = 0; step < kDepth / kStep; step += C::kSplits) {
      uint32_t b[kFeatureTiles / 2][4];
#pragma unroll
      for (int n = 0; n < kFeatureTiles / 2; ++n)
        LoadMatrix(b[n], w_row + slot * C::kStageBytes + n * 16 * kRowBytes + (w_k ^ step * 32));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        uint32_t a[4];
        LoadMatrix(a, x_row + slot * C::kStageBytes + m * 16 * kRowBytes + (x_k ^ step * 32));
#pragma unroll
        for (int n = 0; n < kFeatureTiles; ++n)
          Mma(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
    slot = slot + 1 == C::kStages ? 0 : slot + 1;
  }

  __syncthreads();  // the sums take the ring's place
  float* const all = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < kFeatureTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + m * 16 + half * 8 + lane / 4;
        float* const to =
            all + (group * C::kRows + row) * C::kSumRow + warp_feature + n * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = {sums[m][n][2 * half], sums[m][n][2 * half + 1]};
      }
  __syncthreads();
  const auto sum = [&](int row, int m) {
    float4 total = {};
#pragma unroll
    for (int i = 0; i < C::kSplits; ++i) {
      const float* const part = all + (i * C::kRows + row) * C::kSumRow + m;
      total = total + *reinterpret_cast<const float4*>(part);
    }
    return total;
  };
  const auto finish = [&](Place at) {
    const float4 y = sum(at.row, at.m);
    return p.gated ? SiluTimes(y, sum(at.row, width + at.m)) : y;
  };
  if (params.quads) {
#pragma unroll
    for (int i = 0; i < C::kOwn; ++i) {
      const Place at = PlaceOf<C>(i * C::kThreads + threadIdx.x);
      const int row = block_row + at.row, result = block_result + at.m;
      if (row >= p.T || at.m >= width || result >= p.results()) continue;
      if (row >= first_row)
        StoreQuad(p, row, result, finish(at) + before[i]);
      else if (p.clear)
        StoreQuad(p, row, result, {});
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < C::kOwn; ++i) {
    const Place at = PlaceOf<C>(i * C::kThreads + threadIdx.x);
    const int row = block_row + at.row;
    if (row >= p.T || at.m >= width) continue;
    const float4 quad = finish(at);
    const float values[] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int result = block_result + at.m + j;
      if (result >= p.results()) break;
      if (row >= first_row)
        StoreResult(p, row, result, p.add ? values[j] + LoadOld(p, row, result) : values[j]);
      else if (p.clear && result < p.split)
        StoreResult(p, row, result, 0);
    }
  }
}

template <typename C>
int Start(const TiledParams& params, Stream stream) {
  const ProductParams& p = params.p;
  const int most = std::max(C::kStages * C::kStageBytes, C::kSumBytes);
  const cudaError_t status =
      cudaFuncSetAttribute(TiledKernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (status != cudaSuccess) return status;
  // Short products take no more than they need, so that more blocks find a place.
  const int stages = std::min(C::kStages, (p.in + kDepth - 1) / kDepth);
  const int bytes = std::max(stages * C::kStageBytes, C::kSumBytes);
  const int width = TileResults<C::kFeatures>(p);
  const dim3 grid((p.T + C::kRows - 1) / C::kRows, (p.results() + width - 1) / width);
  StartEarly(TiledKernel<C>, grid, C::kThreads, params, stream, bytes);
  return cudaGetLastError();
}

}  // namespace

int LaunchTiled(const ProductParams& p, Stream stream) {
  const auto y = reinterpret_cast<uintptr_t>(p.y);
  const TiledParams params{p, p.split == p.results() && p.results() % 4 == 0 &&
                                  p.y_stride % 4 == 0 && y % (p.y_f32 ? 16 : 8) == 0};
  // Large tiles read x and W less often; enough blocks keep the card busy.
  constexpr int64_t kEnoughBlocks = 96;
  const auto enough = [&](int rows, int features) {
    return int64_t{(p.T + rows - 1) / rows} * ((p.out + features - 1) / features) >= kEnoughBlocks;
  };
  if (p.in > 1024) {
    if (enough(64, 32)) return Start<Tile<64, 32, 4>>(params, stream);
    return Start<Tile<32, 32, 4>>(params, stream);
  }
  if (enough(128, 64)) return Start<Tile<128, 64, 2>>(params, stream);
  if (enough(64, 64)) return Start<Tile<64, 64, 2>>(params, stream);
  if (enough(64, 32)) return Start<Tile<64, 32, 2>>(params, stream);
  return Start<Tile<32, 32, 2>>(params, stream);
}

}  // namespace dsla::cuda
