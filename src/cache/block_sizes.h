// What cache blocks hold and take, and with them one sequence's cache.
#pragma once

#include <cstdint>

namespace dsla {

struct BlockSizes {
  int layers = 0;
  int page_size = 64;      // tokens
  int64_t page_bytes = 0;  // of one layer
  int64_t slot_bytes = 0;  // likewise
};

// Pages that `tokens` tokens take in one softmax layer.
inline int64_t PagesFor(int64_t tokens, int page_size) {
  return (tokens + page_size - 1) / page_size;
}

// Cache bytes of `tokens` tokens at `level`: pages in the softmax layers, a slot in each other.
inline int64_t SequenceBytes(const BlockSizes& sizes, int level, int64_t tokens) {
  return (sizes.layers - level) * PagesFor(tokens, sizes.page_size) * sizes.page_bytes +
         level * sizes.slot_bytes;
}

}  // namespace dsla
