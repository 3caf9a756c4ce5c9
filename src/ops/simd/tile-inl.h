// GemmTile: a small fp32 matrix product on one thread, the building block of the CPU kernels.
//
// Compiled once per target: include it (after "hwy/highway.h") from a file that uses
// hwy/foreach_target.h, and call it inside that file's HWY_NAMESPACE. Meant for tiles of about
// 64..256 in every dimension, whose operands lie in the L1 and L2 caches; any size is correct.

// Per-target include guard: toggled so that foreach_target.h can include this file again.
#if defined(DSLA_OPS_SIMD_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_SIMD_TILE_INL_H_
#undef DSLA_OPS_SIMD_TILE_INL_H_
#else
#define DSLA_OPS_SIMD_TILE_INL_H_
#endif

#include <cstddef>
#include <cstring>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {

// The register block is kTileRows x 2 vectors: enough independent FMA chains to cover the latency
// (4 cycles x 2 units = 8) while accumulators, B's vectors and the broadcast of A fit the
// registers: 6 x 2 of 16 on AVX2 and SSE, 8 x 2 on AVX-512, where more rows would spill their
// addresses.
constexpr int kTileRows = HWY_TARGET <= HWY_AVX3 ? 8 : 6;
constexpr int kTileVecs = 2;
constexpr int kTileLanes = HWY_LANES(float);
constexpr int kTileCols = kTileVecs * kTileLanes;
// The sum over k is cut here: a block of B's panel (16 KiB on AVX2) stays in the L1 cache.
constexpr int kTileDepth = 256;

namespace tile_internal {

using Tag = hwy::HWY_NAMESPACE::ScalableTag<float>;
using Vec = hwy::HWY_NAMESPACE::Vec<Tag>;

// C[R, Vecs * lanes] (+)= A[R, K] B[K, Vecs * lanes]
template <int R, int Vecs>
HWY_INLINE void Block(const float* HWY_RESTRICT a, ptrdiff_t a_row, ptrdiff_t a_col,
                      const float* HWY_RESTRICT b, ptrdiff_t b_row, float* HWY_RESTRICT c,
                      ptrdiff_t c_row, int K, bool accumulate) {
  namespace hn = hwy::HWY_NAMESPACE;
  const Tag d;
  Vec sum[R][Vecs];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < Vecs; ++v) sum[r][v] = hn::Zero(d);
  for (int k = 0; k < K; ++k) {
    Vec bv[Vecs];
    for (int v = 0; v < Vecs; ++v) bv[v] = hn::LoadU(d, b + v * kTileLanes);
    for (int r = 0; r < R; ++r) {
      const Vec av = hn::Set(d, a[r * a_row]);
      for (int v = 0; v < Vecs; ++v) sum[r][v] = hn::MulAdd(av, bv[v], sum[r][v]);
    }
    a += a_col;
    b += b_row;
  }
  // Otherwise GCC puts the sums into memory before it stores them.
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      float* to = c + r * c_row + v * kTileLanes;
      hn::StoreU(accumulate ? hn::Add(hn::LoadU(d, to), sum[r][v]) : sum[r][v], d, to);
    }
  }
}

// The last R = rows < kTileRows rows; the same arithmetic per row as a full block.
template <int R, int Vecs>
HWY_INLINE void LastBlock(int rows, const float* a, ptrdiff_t a_row, ptrdiff_t a_col,
                          const float* b, ptrdiff_t b_row, float* c, ptrdiff_t c_row, int K,
                          bool accumulate) {
  if constexpr (R > 0) {
    if (rows == R)
      Block<R, Vecs>(a, a_row, a_col, b, b_row, c, c_row, K, accumulate);
    else
      LastBlock<R - 1, Vecs>(rows, a, a_row, a_col, b, b_row, c, c_row, K, accumulate);
  }
}

// One panel of Vecs * lanes columns, all rows.
template <int Vecs>
HWY_NOINLINE void Panel(const float* a, ptrdiff_t a_row, ptrdiff_t a_col, const float* b,
                        ptrdiff_t b_row, float* c, ptrdiff_t c_row, int M, int K, bool accumulate) {
  int m = 0;
  for (; m + kTileRows <= M; m += kTileRows)
    Block<kTileRows, Vecs>(a + m * a_row, a_row, a_col, b, b_row, c + m * c_row, c_row, K,
                           accumulate);
  LastBlock<kTileRows - 1, Vecs>(M - m, a + m * a_row, a_row, a_col, b, b_row, c + m * c_row, c_row,
                                 K, accumulate);
}

// The last `cols` < Vecs * lanes columns: B is copied to `panel`, zero-padded, so that no load goes
// past a row's end, and C goes through a buffer.
template <int Vecs>
HWY_NOINLINE void LastPanel(const float* a, ptrdiff_t a_row, ptrdiff_t a_col, const float* b,
                            ptrdiff_t b_row, float* c, ptrdiff_t c_row, int M, int cols, int K,
                            bool accumulate, float* panel) {
  constexpr int kCols = Vecs * kTileLanes;
  const size_t bytes = static_cast<size_t>(cols) * sizeof(float);
  std::memset(panel, 0, sizeof(float) * static_cast<size_t>(K) * kCols);
  for (int k = 0; k < K; ++k) std::memcpy(panel + k * kCols, b + k * b_row, bytes);
  HWY_ALIGN float tile[kTileRows * kCols];
  for (int m = 0; m < M; m += kTileRows) {
    const int rows = M - m < kTileRows ? M - m : kTileRows;
    if (accumulate) {
      std::memset(tile, 0, sizeof(tile));
      for (int r = 0; r < rows; ++r) std::memcpy(tile + r * kCols, c + (m + r) * c_row, bytes);
    }
    Panel<Vecs>(a + m * a_row, a_row, a_col, panel, kCols, tile, kCols, rows, K, accumulate);
    for (int r = 0; r < rows; ++r) std::memcpy(c + (m + r) * c_row, tile + r * kCols, bytes);
  }
}

}  // namespace tile_internal

// C[M, N] = A B, or C + A B if `accumulate`. A's element (i, k) is a[i * a_row + k * a_col], so a
// transposed A is fine; B [K, N] and C [M, N] are row-major with rows b_row and c_row floats apart;
// no alignment is needed. C must not overlap A or B.
//
// Each element is sum_k in ascending order, from zero, in blocks of kTileDepth that are added to C
// one after another: the result of a row depends on neither M nor the other rows, and an element's
// on neither N nor its column.
inline void GemmTile(const float* a, ptrdiff_t a_row, ptrdiff_t a_col, const float* b,
                     ptrdiff_t b_row, float* c, ptrdiff_t c_row, int M, int N, int K,
                     bool accumulate) {
  if (K <= 0 && !accumulate) {
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) c[m * c_row + n] = 0;
    return;
  }
  HWY_ALIGN float panel[kTileDepth * kTileCols];
  for (int k = 0; k < K; k += kTileDepth) {
    const int depth = K - k < kTileDepth ? K - k : kTileDepth;
    const float* ak = a + k * a_col;
    const float* bk = b + k * b_row;
    const bool add = accumulate || k > 0;
    int n = 0;
    for (; n + kTileCols <= N; n += kTileCols) {
      // Rows of B a multiple of 256 bytes apart share few sets of the L1 cache; once the copy is
      // paid for by enough rows, a dense panel is faster.
      if (M >= 8 * kTileRows && b_row != kTileCols) {
        for (int i = 0; i < depth; ++i)
          std::memcpy(panel + i * kTileCols, bk + i * b_row + n, sizeof(float) * kTileCols);
        tile_internal::Panel<kTileVecs>(ak, a_row, a_col, panel, kTileCols, c + n, c_row, M, depth,
                                        add);
      } else {
        tile_internal::Panel<kTileVecs>(ak, a_row, a_col, bk + n, b_row, c + n, c_row, M, depth,
                                        add);
      }
    }
    if (n + kTileLanes <= N) {
      tile_internal::Panel<1>(ak, a_row, a_col, bk + n, b_row, c + n, c_row, M, depth, add);
      n += kTileLanes;
    }
    if (n < N)
      tile_internal::LastPanel<1>(ak, a_row, a_col, bk + n, b_row, c + n, c_row, M, N - n, depth,
                                  add, panel);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_SIMD_TILE_INL_H_
