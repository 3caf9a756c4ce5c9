// Plain views that operators take: they do not own, hold no logic beyond addressing, and can be
// passed to a kernel by value. Dimensions: T rows (new tokens of all sequences), N sequences, H
// query heads, Hkv KV heads, G = H / Hkv, D head dim.
#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace dsla {

// The page pool as one layer sees it. A page holds `page_size` tokens of K and of V of one layer of
// one sequence. Element (head h, token s, channel d) of page p lies at p * page_stride + (h *
// page_size + s) * D + d, in k and in v.
struct PagedKvView {
  void* k = nullptr;
  void* v = nullptr;
  int64_t page_stride = 0;  // elements of `dtype` between consecutive pages, the same in k and v
  int page_size = 0;        // tokens
  int Hkv = 0;
  int D = 0;
  DType dtype = DType::kBF16;
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
