// Plain views that operators take: they do not own, hold no logic beyond addressing, and can be
// passed to a kernel by value. Dimensions: T rows (new tokens of all sequences), N sequences, H
// query heads, Hkv KV heads, G = H / Hkv, D head dim.
#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace dsla {

inline constexpr int kMaxHeadDim = 256;

// What K or V of one token and head takes in a cache: kI8 has an fp32 scale beside the integers.
constexpr int64_t KvRowBytes(DType dtype, int D) {
  return D * SizeOf(dtype) + (dtype == DType::kI8 ? 4 : 0);
}

// The page pool as one layer sees it. A page holds `page_size` tokens of K and of V of one layer of
// one sequence. Channel d of head h and token s of page p lies at Row(p, h, s) + d, in k and in v:
// [Hkv][page_size][D]. With kI8 it is the integer there times the scale of the row, and the scales
// follow each head's rows: [Hkv]([page_size][D] int8, [page_size] fp32).
struct PagedKvView {
  void* k = nullptr;
  void* v = nullptr;
  int64_t page_stride = 0;  // elements of `dtype` between consecutive pages, the same in k and v
  int page_size = 0;        // tokens
  int Hkv = 0;
  int D = 0;
  DType dtype = DType::kBF16;

  int64_t HeadStride() const { return page_size * KvRowBytes(dtype, D) / SizeOf(dtype); }
  int64_t Row(int64_t page, int64_t h, int64_t s) const {
    return page * page_stride + h * HeadStride() + s * D;
  }
  // kI8: where the row's scale lies, in bytes.
  int64_t Scale(int64_t page, int64_t h, int64_t s) const {
    return Row(page, h, page_size) + 4 * s;
  }
};

// N sequences whose new rows lie one after another. Sequence n has rows [row_start[n],
// row_start[n+1]) at absolute positions pos[n], pos[n] + 1, ...; what came before pos[n] is in its
// cache or state.
struct RaggedRows {
  int N = 0;
  const int32_t* row_start = nullptr;  // [N + 1]
  const int32_t* pos = nullptr;        // [N] position of the first new row = tokens already cached

  int count(int n) const { return row_start[n + 1] - row_start[n]; }
};

// Page tables of N sequences for one layer: token t of sequence n lies in page pages[page_start[n]
// + t / page_size].
struct PageTables {
  const int32_t* page_start = nullptr;  // [N + 1]
  const int32_t* pages = nullptr;       // [page_start[N]]
};

}  // namespace dsla
