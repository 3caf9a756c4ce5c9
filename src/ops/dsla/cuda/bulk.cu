// Tensor maps of the tiles that `chunks`, its summary, `queries` and `fold` copy.
#include <algorithm>

#include "base/check.h"
#include "ops/dsla/cuda/bulk.cuh"

namespace dsla::cuda {
namespace {

// The driver's, found at run time, so that nothing of it is needed to link against.
decltype(&cuTensorMapEncodeTiled) FindEncode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             12000, cudaEnableDefault, &result);
  DSLA_CHECK(error == cudaSuccess && result == cudaDriverEntryPointSuccess);
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

template <size_t kRank>
CUtensorMap Encode(CUtensorMapDataType type, CUtensorMapSwizzle swizzle, const void* base,
                   const cuuint64_t (&extents)[kRank], const cuuint64_t (&bytes)[kRank - 1],
                   const cuuint32_t (&tile)[kRank]) {
  static const auto encode = FindEncode();
  cuuint32_t steps[kRank];
  std::fill(steps, steps + kRank, 1);
  CUtensorMap map;
  DSLA_CHECK(encode(&map, type, kRank, const_cast<void*>(base), extents, bytes, tile, steps,
                    CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS);
  return map;
}

// Of `rows` rows of `panels` panels, `stride` elements apart; a tile has `of_tile` panels.
CUtensorMap MapOf(const __nv_bfloat16* base, int64_t rows, int64_t stride, int64_t panels,
                  int of_tile) {
  constexpr cuuint32_t kColumns = 64;
  const cuuint64_t extents[3] = {kColumns, static_cast<cuuint64_t>(rows),
                                 static_cast<cuuint64_t>(panels)};
  const cuuint64_t bytes[2] = {static_cast<cuuint64_t>(2 * stride), 2 * kColumns};
  const cuuint32_t tile[3] = {kColumns, kChunk, static_cast<cuuint32_t>(of_tile)};
  return Encode(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_128B, base, extents, bytes,
                tile);
}

// Of e^{G-R}, as 8-byte words.
CUtensorMap GrowthMapOf(const uint32_t* base, int64_t blocks, int of_tile) {
  constexpr cuuint32_t kHalf = kWidth / 2 * 16 * 2 / 8;  // of a block's channels, in 16 rows
  const cuuint64_t extents[4] = {kHalf, kChunk / 16, 2, static_cast<cuuint64_t>(blocks)};
  const cuuint64_t bytes[3] = {16 * kHalf, 8 * kHalf, kChunk * kWidth * 2};
  const cuuint32_t tile[4] = {kHalf, kChunk / 16, 2, static_cast<cuuint32_t>(of_tile)};
  return Encode(CU_TENSOR_MAP_DATA_TYPE_FLOAT64, CU_TENSOR_MAP_SWIZZLE_NONE, base, extents, bytes,
                tile);
}

}  // namespace

CUtensorMap ChunkMapOf(const void* rows, int D) {
  const auto width = static_cast<cuuint64_t>(D), panels = width / 64;
  // Token 8 t + 2 j + i has row 8 j + 2 t + i.
  const cuuint64_t extents[5] = {64, cuuint64_t{1} << 31, 4, 4, panels};
  const cuuint64_t bytes[4] = {2 * width, 8 * 2 * width, 2 * 2 * width, 2 * 64};
  const cuuint32_t tile[5] = {64, 2, 4, 4, 1};
  return Encode(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_128B, rows, extents, bytes,
                tile);
}

ChunksParams WithMaps(const PrefillParams& p) {
  const Layer& l = p.layer;
  const int64_t width = kWidth, of_part = l.SF / width;  // blocks
  const int64_t blocks = int64_t{p.wave_chunks} * l.Hkv * of_part;
  return {p,
          {.q = MapOf(p.q, p.total_rows, p.q_stride, l.H * (width / 64), kWidth / 64),
           .key = MapOf(p.key, blocks * kChunk, width, width / 64, 1),
           .v = MapOf(p.rows.v, p.total_rows, p.rows.v_stride, l.Hkv * (width / 64), 1),
           .window = MapOf(p.out, p.total_rows, l.H * width, l.H * (width / 64), 1),
           .growth = GrowthMapOf(p.growth, blocks, static_cast<int>(of_part))}};
}

QueriesParams WithHeadMaps(const PrefillParams& p) {
  const Layer& l = p.layer;
  const int64_t channels = int64_t{p.wave_chunks} * l.Hkv * l.SF;
  return {p,
          MapOf(p.q, p.total_rows, p.q_stride, l.H, 1),
          MapOf(p.rows.k, p.total_rows, p.rows.k_stride, l.Hkv, 1),
          MapOf(p.rows.v, p.total_rows, p.rows.v_stride, l.Hkv, 1),
          MapOf(p.key, channels, kChunk, 1, 1),
          MapOf(p.state, channels, kChunk, 1, 1)};
}

}  // namespace dsla::cuda
