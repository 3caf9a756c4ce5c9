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
// Of packed weights (packed_weight.h) a stage is 64 of k, in which a lane needs 16 bytes a plane,
// and 4 lanes the same 16 bytes of scales, which one copies: that takes a barrier of the warp.
// Blocks have 8 or 16 warps, by the number of features and of rows. A block makes 32 rows, and
// further rows are other blocks', which find the weight in the L2 cache. Of weights in e4m3 a stage
// is 64 of k, too, in RoundRows' order: 16 bytes of a lane are all of a row that it needs.
//
// The ring is filled with W before the kernel waits for those before it, and x follows.
#include <algorithm>
#include <type_traits>

#include "ops/cuda/kernel_attribute.cuh"
#include "ops/linear/cuda/packed.cuh"
#include "ops/linear/cuda/product.cuh"
#include "ops/norm_rope/cuda/elementwise.cuh"

namespace dsla::cuda {
namespace {

// Shared memory of a block that every GPU from 8.0 on has, and that an H100 has.
constexpr int kLeastShared = 99 << 10, kMostShared = 227 << 10;

// How a weight is held: in bf16, packed in 8 or 4 bits, or in e4m3.
enum class Bits { k16, k8, k4, kE4m3 };

// How a kernel is cut. bits: of a weight; kColumns: tiles of 8 rows of x; kStages: stages in a
// warp's ring, at most `stages` and what fits in `shared` bytes.
template <Bits bits, int warps, int columns, int tiles, int stages, int blocks, int shared>
struct Cut {
  static constexpr int kWarps = warps, kThreads = 32 * warps;
  static constexpr int kColumns = columns, kTiles = tiles;
  static constexpr Bits kBits = bits;
  static constexpr bool kPacked = bits == Bits::k8 || bits == Bits::k4;
  // More rows than a block has are other blocks'.
  static constexpr bool kManyRows = bits != Bits::k16;
  static constexpr int kGroups = bits == Bits::k16 ? 1 : 2;  // of 32 of k in a stage
  static constexpr int kDepth = 32 * kGroups;                // of a stage
  // Pieces of 16 bytes of a lane and stage: of W those of 16 features, then of all; with x's.
  static constexpr int kTilePieces = bits == Bits::k4 ? 1 : 2;
  static constexpr int kWeightPieces = kTilePieces * tiles;
  static constexpr int kPieces = kWeightPieces + kGroups * columns;
  // A warp's stage, of 16 bytes: pieces, then scales.
  static constexpr int kTileScales = kPacked ? kUnitScaleBytes / 16 : 0;
  static constexpr int kStage = kPieces * 32 + kTileScales * tiles;
  static constexpr int kStageBytes = kWarps * kStage * 16;
  static constexpr int kStages = shared / kStageBytes < stages ? shared / kStageBytes : stages;
  static constexpr int kFeatures = tiles * 16;
  static constexpr int kRow = kFeatures + 4;  // of sums in shared memory, without bank conflicts
  static constexpr int kResults = kFeatures * columns * 8;
  static constexpr int kOwn = (kResults + kThreads - 1) / kThreads;  // results of a thread, at most
  static constexpr int kSumBytes = kWarps * columns * 8 * kRow * 4;
  static constexpr int kBytes = std::max(kStages * kStageBytes, kSumBytes);
  static constexpr int kBlocks = blocks;  // of a processor
};

__device__ __forceinline__ uint2 Half(const uint4* piece, int h) {
  return reinterpret_cast<const uint2*>(piece)[h];
}

// Rows of W, of a block's features, in numbers of type T.
template <typename C, typename T>
class DenseRows {
 public:
  __device__ DenseRows(const ProductParams& p, int tile, int warp, int lane)
      : base_(static_cast<const T*>(p.packed)),
        first_k_(C::kDepth * warp + lane % 4 * static_cast<int>(16 / sizeof(T))),
        in_(p.in) {
#pragma unroll
    for (int i = 0; i < C::kWeightPieces; ++i) {
      const int row = WeightRow<C::kFeatures>(p, tile, 8 * i + lane / 4);
      rows_[i] = row >= 0 ? base_ + static_cast<int64_t>(row) * p.in + first_k_ : nullptr;
    }
  }
  // The lane's pieces of a stage.
  __device__ void Copy(uint4* to, int stage, int lane) const {
    const int k = C::kDepth * C::kWarps * stage;
#pragma unroll
    for (int i = 0; i < C::kWeightPieces; ++i)
      CopyAsync(to + i * 32 + lane, rows_[i] ? rows_[i] + k : base_,
                rows_[i] && first_k_ + k < in_);
  }

 private:
  const T *base_, *rows_[C::kWeightPieces];
  int first_k_, in_;
};

// 32 of x of all columns, pieces 32 apart, and 16 features by them.
template <int columns>
struct Columns {
  __device__ __forceinline__ explicit Columns(const uint4* pieces) {
#pragma unroll
    for (int n = 0; n < columns; ++n) x[n] = pieces[n * 32];
  }
  __device__ __forceinline__ void Multiply(const uint32_t (&low)[4], const uint32_t (&high)[4],
                                           float (&sums)[columns][4]) const {
#pragma unroll
    for (int n = 0; n < columns; ++n) {
      Mma(sums[n], low, x[n].x, x[n].y);
      Mma(sums[n], high, x[n].z, x[n].w);
    }
  }
  uint4 x[columns];
};

// In bf16.
template <typename C>
struct PlainWeight : DenseRows<C, __nv_bfloat16> {
  using DenseRows<C, __nv_bfloat16>::DenseRows;
  __device__ static void Multiply(const uint4* from, int, int lane, const uint4* x_pieces,
                                  float (&sums)[C::kTiles][C::kColumns][4]) {
    const Columns<C::kColumns> x(x_pieces);
#pragma unroll
    for (int m = 0; m < C::kTiles; ++m) {
      const uint4 top = from[2 * m * 32 + lane], bottom = from[(2 * m + 1) * 32 + lane];
      const uint32_t low[4] = {top.x, bottom.x, top.y, bottom.y};
      const uint32_t high[4] = {top.z, bottom.z, top.w, bottom.w};
      x.Multiply(low, high, sums[m]);
    }
  }
};

// In e4m3: to bf16 exactly, and a feature's scale is a factor of its sums.
template <typename C>
struct ScaledWeight : DenseRows<C, std::byte> {
  using DenseRows<C, std::byte>::DenseRows;
  __device__ static void Multiply(const uint4* from, int h, int lane, const uint4* x_pieces,
                                  float (&sums)[C::kTiles][C::kColumns][4]) {
    const Columns<C::kColumns> x(x_pieces);
#pragma unroll
    for (int m = 0; m < C::kTiles; ++m) {
      const uint2 top = Half(from + 2 * m * 32 + lane, h),
                  bottom = Half(from + (2 * m + 1) * 32 + lane, h);
      const uint32_t low[4] = {TwoOfE4m3(top.x, 0), TwoOfE4m3(bottom.x, 0), TwoOfE4m3(top.x, 1),
                               TwoOfE4m3(bottom.x, 1)};
      const uint32_t high[4] = {TwoOfE4m3(top.y, 0), TwoOfE4m3(bottom.y, 0), TwoOfE4m3(top.y, 1),
                                TwoOfE4m3(bottom.y, 1)};
      x.Multiply(low, high, sums[m]);
    }
  }
};

// Packed. Integers are multiplied as they are but for an offset (TwoWithOffset). A group's sum over
// k of (d q + m) x is d (sum of (q + offset) x) + (m - offset d) (sum of x), the latter a product
// with ones.
template <typename C>
class PackedWeight {
 public:
  // Where a tile is none of W's features it reads others, and makes results that nobody stores.
  __device__ PackedWeight(const ProductParams& p, int tile, int warp, int lane)
      : copies_scales_(lane < kUnitScaleBytes / 16) {
    const PackedShape shape{.out = p.out, .in = p.in, .bits = 4 * kPlanes};
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i) {
      const int row = max(WeightRow<C::kFeatures>(p, tile, kUnitFeatures * i), 0);
      units_[i] = static_cast<const std::byte*>(p.packed) +
                  row / kUnitFeatures * shape.tile_bytes() + warp * kUnitBytes + 16 * lane;
    }
  }
  __device__ void Copy(uint4* to, int stage, int lane) const {
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i) {
      const std::byte* const from = units_[i] + stage * (C::kWarps * kUnitBytes);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane)
        CopyAsync(to + (i * kPlanes + plane) * 32 + lane, from + plane * kPlaneBytes);
      if (copies_scales_)
        CopyAsync(to + kScales + i * C::kTileScales + lane, from + kPlanes * kPlaneBytes);
    }
  }
  // Of group h of a stage, once all lanes' copies are there.
  __device__ static void Multiply(const uint4* from, int h, int lane, const uint4* x_pieces,
                                  float (&sums)[C::kTiles][C::kColumns][4]) {
    uint32_t low[C::kWeightPieces][4], high[C::kWeightPieces][4];
    float2 scales[C::kTiles][2];  // of features g and g + 8
#pragma unroll
    for (int i = 0; i < C::kWeightPieces; ++i) {
      const uint2 of = Half(from + i * 32 + lane, h);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t word = j % 2 == 0 ? of.x : of.y;
        low[i][j] = TwoWithOffset(word, j / 2, i % kPlanes);
        high[i][j] = TwoWithOffset(word, j / 2 + 2, i % kPlanes);
      }
    }
#pragma unroll
    for (int m = 0; m < C::kTiles; ++m) {
      const uint2 of = Half(from + kScales + m * C::kTileScales + lane / 4, h);
      scales[m][0] = Affine(of.x);
      scales[m][1] = Affine(of.y);
    }
#pragma unroll
    for (int n = 0; n < C::kColumns; ++n) {
      const uint4 x = x_pieces[n * 32];
      constexpr uint32_t kOne = 0x3f803f80, kOnes[4] = {kOne, kOne, kOne, kOne};
      float totals[4] = {};
      Mma(totals, kOnes, x.x, x.y);
      Mma(totals, kOnes, x.z, x.w);
#pragma unroll
      for (int m = 0; m < C::kTiles; ++m) {
        float products[4] = {};
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          Mma(products, low[m * kPlanes + plane], x.x, x.y);
          Mma(products, high[m * kPlanes + plane], x.z, x.w);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 scale = scales[m][i / 2];
          float& sum = sums[m][n][i];
          sum = fmaf(scale.x, products[i], fmaf(scale.y, totals[i % 2], sum));
        }
      }
    }
  }

 private:
  static constexpr int kPlanes = C::kTilePieces;
  static constexpr int kUnitBytes = kPlanes * kPlaneBytes + kUnitScaleBytes;
  static constexpr int kScales = C::kPieces * 32;  // where a stage has them

  // d and m - offset d.
  __device__ static float2 Affine(uint32_t dm) {
    const float2 scale = Scale(dm);
    return {scale.x, fmaf(-kOffset<4 * kPlanes>, scale.x, scale.y)};
  }

  const std::byte* units_[C::kTiles];  // the lane's pieces of the warp's first stage
  bool copies_scales_;
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    SkinnyKernel(const __grid_constant__ ProductPair pair) {
  using Weight = std::conditional_t<
      C::kPacked, PackedWeight<C>,
      std::conditional_t<C::kBits == Bits::kE4m3, ScaledWeight<C>, PlainWeight<C>>>;
  extern __shared__ uint4 ring[];
  const int first_tiles = Tiles<C::kFeatures>(pair.of[0]);
  const bool second = static_cast<int>(blockIdx.y) >= first_tiles;
  const ProductParams& p = pair.of[second];
  const int tile = second ? blockIdx.y - first_tiles : blockIdx.y;
  const int row0 = C::kManyRows ? blockIdx.x * C::kColumns * 8 : 0;
  int first_row = 0;
  if (p.first_row) {
    first_row = __ldcg(p.first_row);
    if (first_row >= p.T) {
      // Who waits for this grid also relies on what it would have waited for.
      if (blockIdx.y == 0) AwaitPrevious();
      return;
    }
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint4* const mine = ring + warp * C::kStages * C::kStage;
  const int first_k = C::kDepth * warp + 8 * t;
  const int stages =
      max(0, ((p.in + C::kDepth - 1) / C::kDepth - warp + C::kWarps - 1) / C::kWarps);

  const Weight weight(p, tile, warp, lane);
  const auto copy_w = [&](int stage, int slot) {
    weight.Copy(mine + slot * C::kStage, stage, lane);
  };
  const __nv_bfloat16* x[C::kColumns];
#pragma unroll
  for (int i = 0; i < C::kColumns; ++i) {
    const int row = row0 + i * 8 + g;
    x[i] = row < p.T ? p.x + row * p.x_stride + first_k : nullptr;
  }
  const auto copy_x = [&](int stage, int slot) {
    uint4* const to = mine + slot * C::kStage + C::kWeightPieces * 32 + lane;
#pragma unroll
    for (int h = 0; h < C::kGroups; ++h) {
      const int k = 32 * h + C::kDepth * C::kWarps * stage;
#pragma unroll
      for (int i = 0; i < C::kColumns; ++i)
        CopyAsync(to + (h * C::kColumns + i) * 32, x[i] ? x[i] + k : p.x,
                  x[i] && first_k + k < p.in);
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
      const int index = i * C::kThreads + threadIdx.x;
      const int row = index / C::kFeatures, m = index % C::kFeatures;
      const int result = tile * width + m;
      if (row0 + row < p.T && row < C::kColumns * 8 && m < width && result < p.results())
        f(i, row, m, result);
    }
  };
  // What is added to is on its way too.
  float before[C::kOwn] = {};
  if (p.add)
    own([&](int i, int row, int, int result) { before[i] = LoadOld(p, row0 + row, result); });

  float sums[C::kTiles][C::kColumns][4] = {};
  int slot = 0;
  for (int stage = 0; stage < stages; ++stage) {
    // W and x of a stage are complete when all but the kStages - 1 last groups are.
    WaitCopies<C::kStages - 1>();
    const uint4* const from = mine + slot * C::kStage;
    if constexpr (C::kPacked) __syncwarp();  // some scales are other lanes' copies
      // Of many columns one after the other: both at once would take too many registers.
#pragma unroll(C::kColumns < 4 ? C::kGroups : 1)
    for (int h = 0; h < C::kGroups; ++h)
      Weight::Multiply(from, h, lane, from + (C::kWeightPieces + h * C::kColumns) * 32 + lane,
                       sums);
    if constexpr (C::kPacked) __syncwarp();  // they have been read
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
    for (int k = 0; k < C::kWarps; ++k) total += all[(k * C::kColumns * 8 + row) * C::kRow + m];
    if constexpr (C::kBits == Bits::kE4m3) total *= p.scale[WeightRow<C::kFeatures>(p, tile, m)];
    return total;
  };
  own([&](int i, int row, int m, int result) {
    if (row0 + row < first_row) return;
    const float y = sum(row, m);
    StoreResult(p, row0 + row, result, p.gated ? SiluTimes(y, sum(row, width + m)) : y + before[i]);
  });
}

template <typename C>
int StartCut(const ProductPair& pair, Stream stream) {
  const cudaError_t status = AllowShared<SkinnyKernel<C>>(C::kBytes);
  if (status != cudaSuccess) return status;
  const dim3 grid(CeilDiv(pair.of[0].T, C::kColumns * 8), Tiles<C::kFeatures>(pair));
  StartEarly(SkinnyKernel<C>, grid, C::kThreads, pair, stream, C::kBytes);
  return cudaGetLastError();
}

template <Bits bits, int columns, int tiles, int stages, int warps = 8, int blocks = 2>
int StartColumns(const ProductPair& pair, Stream stream) {
  using Most = Cut<bits, warps, columns, tiles, stages, blocks, kMostShared>;
  if constexpr (Most::kBytes > kLeastShared) {
    if (CurrentDevice().most_shared < Most::kBytes)
      return StartCut<Cut<bits, warps, columns, tiles, stages, blocks, kLeastShared>>(pair, stream);
  }
  return StartCut<Most>(pair, stream);
}

// The fastest of those tried on an H200. What limits is how many instructions are under way: where
// features are few, 16 warps take a processor each; where they are many, a warp takes twice as many
// at a time, which need x once.
template <Bits bits>
int StartPacked(const ProductPair& pair, Stream stream) {
  const ProductParams& p = pair.of[0];
  const bool few = p.out <= 4224, many = p.out >= 12288;
  if (p.T > kFewPackedRows) {
    if (many) return StartColumns<bits, 4, 4, 3, 8, 1>(pair, stream);
    return StartColumns<bits, 4, 2, 3, 8, 1>(pair, stream);
  }
  if (p.T > 8) {
    if (few) return StartColumns<bits, 2, 2, 2, 16, 1>(pair, stream);
    return StartColumns<bits, 2, 2, 3, 8, 2>(pair, stream);
  }
  if (few) return StartColumns<bits, 1, 2, 2, 16, 1>(pair, stream);
  if constexpr (bits == Bits::k4)
    if (many) return StartColumns<bits, 1, 4, 3, 8, 2>(pair, stream);
  return StartColumns<bits, 1, 2, 3, 8, 3>(pair, stream);
}

template <int tiles, int stages>
int StartPlain(const ProductPair& pair, Stream stream) {
  const int T = pair.of[0].T;
  if (T <= 8) return StartColumns<Bits::k16, 1, tiles, stages>(pair, stream);
  if (T <= 16) return StartColumns<Bits::k16, 2, tiles, stages>(pair, stream);
  return StartColumns<Bits::k16, 4, tiles, stages>(pair, stream);
}

}  // namespace

int LaunchSkinny(const ProductPair& pair, Stream stream) {
  const ProductParams& p = pair.of[0];
  if (p.scale) return StartPacked<Bits::kE4m3>(pair, stream);
  if (p.bits == 8) return StartPacked<Bits::k8>(pair, stream);
  if (p.bits == 4) return StartPacked<Bits::k4>(pair, stream);
  // The fastest of those tried on an H200 with up to 8 rows. Two tiles per warp read x half as
  // often, one where so few features would leave too few blocks; a deep ring hides the memory's
  // latency where blocks are few, and would keep blocks waiting for a place where they are many and
  // short.
  if (p.out <= 128)
    return p.in > 1024 ? StartPlain<1, 12>(pair, stream) : StartPlain<1, 3>(pair, stream);
  if (p.out >= 16384)
    return p.in > 1024 ? StartPlain<2, 4>(pair, stream) : StartPlain<2, 3>(pair, stream);
  if (p.in <= 128 || (p.in <= 1024 && p.out > 2048)) return StartPlain<2, 4>(pair, stream);
  return StartPlain<2, 6>(pair, stream);
}

}  // namespace dsla::cuda
