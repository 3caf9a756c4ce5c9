// Addressing of K and V rows in a paged cache (see ops/views.h for the layout).
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/views.h"

namespace dsla {

// The first key that the query at position t sees; window 0 = all.
inline int FirstVisibleKey(int t, int window) {
  return window > 0 ? std::max(0, t - window + 1) : 0;
}

// Offset in elements of the row of `head` and token s of sequence n, in k and in v.
inline int64_t RowOffset(const PagedKvView& kv, const PageTables& tables, int n, int head, int s) {
  return kv.Row(tables.pages[tables.page_start[n] + s / kv.page_size], head, s % kv.page_size);
}
// kI8: the row's scale in `base`, which is kv.k or kv.v.
inline float* RowScale(const PagedKvView& kv, void* base, const PageTables& tables, int n, int head,
                       int s) {
  const int64_t page = tables.pages[tables.page_start[n] + s / kv.page_size];
  return reinterpret_cast<float*>(static_cast<char*>(base) +
                                  kv.Scale(page, head, s % kv.page_size));
}

template <typename T>
T* KeyRow(const PagedKvView& kv, const PageTables& tables, int n, int head, int s) {
  return static_cast<T*>(kv.k) + RowOffset(kv, tables, n, head, s);
}
template <typename T>
T* ValueRow(const PagedKvView& kv, const PageTables& tables, int n, int head, int s) {
  return static_cast<T*>(kv.v) + RowOffset(kv, tables, n, head, s);
}

// Calls run(s, count, offset) for the longest runs of tokens in [begin, end) whose rows of `head`
// follow one another: token s + j lies at offset + j * D; so do their scales.
template <typename Run>
void ForEachRun(const PagedKvView& kv, const PageTables& tables, int n, int head, int begin,
                int end, Run&& run) {
  for (int s = begin; s < end;) {
    const int count = std::min(end - s, kv.page_size - s % kv.page_size);
    run(s, count, RowOffset(kv, tables, n, head, s));
    s += count;
  }
}

}  // namespace dsla
