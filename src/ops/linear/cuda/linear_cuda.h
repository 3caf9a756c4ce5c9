// Products of few rows with a weight on an NVIDIA GPU (compute capability 8.0 and later), as decode
// steps need them; conventions in ops/cuda/stream.h.
//
// A row's result depends on that row and the weight alone: for every T up to kMostSkinnyRows it has
// the same bits, wherever the row stands, and for every T above too; with a packed weight the same
// holds up to and above kFewPackedRows.
//
// Programmatic dependent launch: the weight and *first_row are read before the kernels launched
// just before have ended, so they must come from a copy, or from a kernel that has ended by then.
// The kernel launched next may start as early, before those have ended: until it has waited it must
// read only what is as constant.
//
// Measured on an H200 (docs/gpu.md), it beats cuBLAS or equals it with up to 64 rows where weights
// are small, up to some 8 MB, with up to 256 where they are a megabyte, and up to 4 rows where out
// is at most 4096; for a large out and for many rows cuBLAS is better.
#pragma once

#include <cstdint>

#include "ops/cuda/stream.h"
#include "ops/linear/packed_weight.h"

namespace dsla::cuda {

// Up to so many rows the weight is read once for all; above, once for every tile of rows.
inline constexpr int kMostSkinnyRows = 32;
inline constexpr int kFewPackedRows = 16;

// Whether T rows are multiplied faster by a packed weight than by the same in bf16.
inline bool PrefersPacked(int64_t T, int bits) { return T <= (bits == 4 ? 32 : 16); }

// Whether SmallProduct rather than cuBLAS is to do a product of T rows with a weight [out, in]: for
// small weights as long as T rows leave cuBLAS's tiles too few to fill the card.
// A packed one cuBLAS would need unpacked.
inline bool PrefersSmallProduct(int64_t out, int64_t in, int64_t T, int bits = 16) {
  if (bits < 16) return in % 8 == 0 && T <= 64;
  const int64_t bytes = 2 * out * in;
  const int64_t small = T <= 64 ? int64_t{8} << 20 : T <= 256 ? int64_t{5} << 18 : 0;
  return in % 8 == 0 && (bytes <= small || (T <= 4 && out <= 4096));
}

// y[t] = W x[t], or y[t] += W x[t], or, gated, y[t, j] = silu(W x[t])[j] * (W x[t])[out / 2 + j].
struct ProductArgs {
  // [out, in], 16-byte aligned: bf16, dense, or of 8 or 4 bits, a PackedShape's, or of 8 bits with
  // a scale, what RoundRows makes of a weight.
  const void* weight = nullptr;
  int bits = 16;
  const float* scale = nullptr;  // [out], of e4m3
  int out = 0, in = 0;           // in a multiple of 8
  const void* x = nullptr;       // [T, in] bf16, 16-byte aligned
  int64_t x_stride = 0;          // elements between rows, a multiple of 8
  int T = 0;
  void* y = nullptr;  // [T, out] bf16, or fp32; [T, out / 2] if gated; not x
  int64_t y_stride = 0;
  bool y_f32 = false;
  bool add = false;    // not with gated
  bool gated = false;  // out is then even, of a packed weight a multiple of 32
  // [1] or null: rows below *first_row are left alone, and if that is all of them nothing is read.
  const int32_t* first_row = nullptr;
};
DSLA_CUDA_EXPORT int SmallProduct(const ProductArgs& args, Stream stream);

// The features [begin, begin + rows) of a packed weight in bf16, for products of many rows: begin
// is a multiple of 16. It starts when all before it has ended.
struct UnpackArgs {
  const void* weight = nullptr;  // of a PackedShape
  int bits = 4, out = 0, in = 0;
  int begin = 0, rows = 0;
  void* to = nullptr;  // [rows, in], 16-byte aligned
};
DSLA_CUDA_EXPORT int UnpackWeight(const UnpackArgs& args, Stream stream);

// Rows in e4m3 with a scale each, the largest magnitude over 448: x[t] = scale[t] to[t] up to
// rounding. A row without a number above 1e-30 becomes zeros. Numbers change places, in all rows
// alike, so that products of rows are what they are and SmallProduct reads 16 bytes at a time:
// RoundedPlace says where one goes.
inline constexpr int kRoundedInputs = 64;  // change places among themselves
inline constexpr int RoundedPlace(int i) {
  const int block = i / 64, half = i / 32 % 2, eight = i / 8 % 4, four = i / 4 % 2;
  constexpr int kOrder[] = {0, 2, 1, 3};
  return 64 * block + 16 * eight + 8 * half + 4 * four + kOrder[i % 4];
}
struct RoundRowsArgs {
  const void* x = nullptr;  // [T, in] bf16, 16-byte aligned
  int64_t x_stride = 0;     // elements between rows, a multiple of 8
  int T = 0, in = 0;        // in a multiple of kRoundedInputs
  void* to = nullptr;       // [T, in] e4m3, 16-byte aligned
  float* scale = nullptr;   // [T]
};
DSLA_CUDA_EXPORT int RoundRows(const RoundRowsArgs& args, Stream stream);

// An adapter's first product and its split, of the rows from *first_row on: low_rank[t] = the first
// r of W x[t], rounded to bf16; claim[t] = the other H + bias.
// If *first_row is T or more nothing is read.
struct AdapterInArgs {
  const void* weight = nullptr;  // [r + H, in] bf16, dense, 16-byte aligned
  int in = 0, r = 0, H = 0;      // in a multiple of 8
  const void* x = nullptr;       // [T, in] bf16, 16-byte aligned
  int64_t x_stride = 0;          // elements between rows, a multiple of 8
  int T = 0;
  const int32_t* first_row = nullptr;  // [1]
  void* low_rank = nullptr;            // [T, r] bf16; null if r = 0
  float* claim = nullptr;              // [T, H]; null if H = 0
  const float* claim_bias = nullptr;   // [H]
};
DSLA_CUDA_EXPORT int AdapterIn(const AdapterInArgs& args, Stream stream);

// SmallProduct (of all rows, not gated) and AdapterIn in one launch, the same bits: of as many rows
// and the same `in`.
DSLA_CUDA_EXPORT int JointProduct(const ProductArgs& product, const AdapterInArgs& adapter,
                                  Stream stream);

// Whether JointProduct rather than cuBLAS and AdapterIn is to do a product with a weight [out, in].
inline bool PrefersJointProduct(int64_t out, int64_t in, int64_t T) {
  const int few = out <= 4096 ? kMostSkinnyRows : 16;
  return in % 8 == 0 && (T <= few || PrefersSmallProduct(out, in, T));
}

}  // namespace dsla::cuda
