// Products of up to 32 rows with a weight: bound by the memory that holds the weight.
//
// W is the A operand of mma.m16n8k16 and x the B operand, so up to 8 rows cost what one costs. A
// warp takes kTiles tiles of 16 output features; along k it takes 32 at a time, a stage, in which
// each lane needs 16 consecutive bytes of each of its rows: k is permuted within the stage, in W
// and x alike. A lane copies to shared memory, with cp.async, just what it reads itself, so a
// warp's ring of stages needs no barrier at all. The 8 warps of a block share the features and take
// every eighth stage each; their sums are added in order of the warps. So the bits of a row depend
// on in alone, not on how a kernel is cut.
//
// The ring is filled with W before the kernel waits for those before it, and x follows.
#include <algorithm>

#include "ops/linear/cuda/product.cuh"
#include "ops/norm_rope/cuda/elementwise.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Shared memory of a block that every GPU from 8.0 on has, and that an H100 has.
constexpr int kLeastShared = 99 << 10, kMostShared = 227 << 10;

// How a kernel is cut. kColumns: tiles of 8 rows of x; kStages: stages in a warp's ring, at most
// `stages` and what fits in `shared` bytes.
template <int columns, int tiles, int stages, int shared>
struct Cut {
  static constexpr int kColumns = columns, kTiles = tiles;
  static constexpr int kPieces = 2 * tiles + columns;  // of 16 bytes, of a lane and stage
  static constexpr int kStageBytes = kWarps * kPieces * 512;
  static constexpr int kStages = shared / kStageBytes < stages ? shared / kStageBytes : stages;
  static constexpr int kFeatures = tiles * 16;
  static constexpr int kRow = kFeatures + 4;  // of sums in shared memory, without bank conflicts
  static constexpr int kResults = kFeatures * columns * 8;
  static constexpr int kOwn = (kResults + kThreads - 1) / kThreads;  // results of a thread, at most
  static constexpr int kSumBytes = kWarps * columns * 8 * kRow * 4;
  static constexpr int kBytes = std::max(kStages * kStageBytes, kSumBytes);
};

template <typename C>
__global__ void __launch_bounds__(kThreads, 2)
    SkinnyKernel(const __grid_constant__ ProductPair pair) {
  extern __shared__ uint4 ring[];
  const int first_tiles = Tiles<C::kFeatures>(pair.of[0]);
  const bool second = static_cast<int>(blockIdx.x) >= first_tiles;
  const ProductParams& p = pair.of[second];
  const int tile = second ? blockIdx.x - first_tiles : blockIdx.x;
  int first_row = 0;
  if (p.first_row) {
    first_row = __ldcg(p.first_row);
    if (first_row >= p.T) {
      // Who waits for this grid also relies on what it would have waited for.
      if (blockIdx.x == 0) AwaitPrevious();
      return;
    }
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint4* const mine = ring + warp * C::kStages * C::kPieces * 32 + lane;
  const int first_k = 32 * warp + 8 * t;
  const int stages = max(0, ((p.in + 31) / 32 - warp + kWarps - 1) / kWarps);

  const __nv_bfloat16* w[2 * C::kTiles];
#pragma unroll
  for (int i = 0; i < 2 * C::kTiles; ++i) {
    const int row = WeightRow<C::kFeatures>(p, tile, 8 * i + g);
    w[i] = row >= 0 ? p.weight + static_cast<int64_t>(row) * p.in + first_k : nullptr;
  }
  const auto copy_w = [&](int stage, int slot) {
    const int k = 32 * kWarps * stage;
#pragma unroll
    for (int i = 0; i < 2 * C::kTiles; ++i)
      CopyAsync(mine + (slot * C::kPieces + i) * 32, w[i] ? w[i] + k : p.weight,
                w[i] && first_k + k < p.in);
  };
  const auto copy_x = [&](int stage, int slot) {
    const int k = first_k + 32 * kWarps * stage;
#pragma unroll
    for (int i = 0; i < C::kColumns; ++i) {
      const int row = i * 8 + g;
      const bool valid = row < p.T && k < p.in;
      CopyAsync(mine + (slot * C::kPieces + 2 * C::kTiles + i) * 32,
                valid ? p.x + row * p.x_stride + k : p.x, valid);
    }
  };

#pragma unroll
  for (int i = 0; i < C::kStages; ++i) {
    if (i < stages) copy_w(i, i);
    CommitCopies();
  }
  AllowNext();
  AwaitPrevious();
#pragma unroll
  for (int i = 0; i < C::kStages; ++i) {
    if (i < stages) copy_x(i, i);
    CommitCopies();
  }

  // f(i, row, feature of the tile, result) of a thread's results.
  const int width = TileResults<C::kFeatures>(p);
  const auto own = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < C::kOwn; ++i) {
      const int index = i * kThreads + threadIdx.x;
      const int row = index / C::kFeatures, m = index % C::kFeatures;
      const int result = tile * width + m;
      if (row < p.T && row < C::kColumns * 8 && m < width && result < p.results())
        f(i, row, m, result);
    }
  };
  // What is added to is on its way too.
  float before[C::kOwn] = {};
  if (p.add) own([&](int i, int row, int, int result) { before[i] = LoadOld(p, row, result); });

  float sums[C::kTiles][C::kColumns][4] = {};
  int slot = 0;
  for (int stage = 0; stage < stages; ++stage) {
    // W and x of a stage are complete when all but the kStages - 1 last groups are.
    WaitCopies<C::kStages - 1>();
    const uint4* from = mine + slot * C::kPieces * 32;
    uint4 x[C::kColumns];
#pragma unroll
    for (int n = 0; n < C::kColumns; ++n) x[n] = from[(2 * C::kTiles + n) * 32];
#pragma unroll
    for (int m = 0; m < C::kTiles; ++m) {
      const uint4 top = from[2 * m * 32], bottom = from[(2 * m + 1) * 32];
      const uint32_t low[4] = {top.x, bottom.x, top.y, bottom.y};
      const uint32_t high[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
      for (int n = 0; n < C::kColumns; ++n) {
        Mma(sums[m][n], low, x[n].x, x[n].y);
        Mma(sums[m][n], high, x[n].z, x[n].w);
      }
    }
    if (stage + C::kStages < stages) {
      copy_w(stage + C::kStages, slot);
      copy_x(stage + C::kStages, slot);
    }
    CommitCopies();
    slot = slot + 1 == C::kStages ? 0 : slot + 1;
  }

  __syncthreads();  // the sums take the ring's place
  float* const all = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int m = 0; m < C::kTiles; ++m)
#pragma unroll
    for (int n = 0; n < C::kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        all[(warp * C::kColumns * 8 + n * 8 + 2 * t + i % 2) * C::kRow + m * 16 + i / 2 * 8 + g] =
            sums[m][n][i];
  __syncthreads();
  const auto sum = [&](int row, int m) {
    float total = 0;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) total += all[(k * C::kColumns * 8 + row) * C::kRow + m];
    return total;
  };
  own([&](int i, int row, int m, int result) {
    if (row < first_row) return;
    const float y = sum(row, m);
    StoreResult(p, row, result, p.gated ? SiluTimes(y, sum(row, width + m)) : y + before[i]);
  });
}

template <typename C>
int StartCut(const ProductPair& pair, Stream stream) {
  const cudaError_t status =
      cudaFuncSetAttribute(SkinnyKernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kBytes);
  if (status != cudaSuccess) return status;
  StartEarly(SkinnyKernel<C>, dim3(Tiles<C::kFeatures>(pair)), kThreads, pair, stream, C::kBytes);
  return cudaGetLastError();
}

template <int columns, int tiles, int stages>
int StartColumns(const ProductPair& pair, Stream stream) {
  using Most = Cut<columns, tiles, stages, kMostShared>;
  if constexpr (Most::kBytes > kLeastShared) {
    int device = 0, shared = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (shared < Most::kBytes)
      return StartCut<Cut<columns, tiles, stages, kLeastShared>>(pair, stream);
  }
  return StartCut<Most>(pair, stream);
}

template <int tiles, int stages>
int Start(const ProductPair& pair, Stream stream) {
  const int T = pair.of[0].T;
  if (T <= 8) return StartColumns<1, tiles, stages>(pair, stream);
  if (T <= 16) return StartColumns<2, tiles, stages>(pair, stream);
  return StartColumns<4, tiles, stages>(pair, stream);
}

}  // namespace

int LaunchSkinny(const ProductPair& pair, Stream stream) {
  const ProductParams& p = pair.of[0];
  // The fastest of those tried on an H200 with up to 8 rows. Two tiles per warp read x half as
  // often, one where so few features would leave too few blocks; a deep ring hides the memory's
  // latency where blocks are few, and would keep blocks waiting for a place where they are many and
  // short.
  if (p.out <= 128) return p.in > 1024 ? Start<1, 12>(pair, stream) : Start<1, 3>(pair, stream);
  if (p.out >= 16384) return p.in > 1024 ? Start<2, 4>(pair, stream) : Start<2, 3>(pair, stream);
  if (p.in <= 128 || (p.in <= 1024 && p.out > 2048)) return Start<2, 4>(pair, stream);
  return Start<2, 6>(pair, stream);
}

}  // namespace dsla::cuda
