#include "model/placed_rows.h"

#include <algorithm>
#include <numeric>

namespace dsla {

PlacedRows PlaceRows(std::span<const SequenceRows> batch) {
  PlacedRows placed;
  std::vector<int>& order = placed.batch_index;
  order.resize(batch.size());
  std::iota(order.begin(), order.end(), 0);
  const auto key = [&](int i) {
    return std::pair(batch[i].cache->level(), batch[i].tokens.size() > 1);
  };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key(a) < key(b); });
  placed.row_start.push_back(0);
  std::vector<int64_t> first_row(batch.size());
  for (const int index : order) {
    const SequenceRows& rows = batch[index];
    DSLA_CHECK(!rows.tokens.empty());
    const int32_t length = rows.cache->length();
    first_row[index] = placed.row_start.back();
    placed.sequences.push_back(&rows);
    placed.pos.push_back(length);
    for (size_t i = 0; i < rows.tokens.size(); ++i)
      placed.positions.push_back(length + static_cast<int32_t>(i));
    placed.row_start.push_back(static_cast<int32_t>(placed.positions.size()));
  }
  for (size_t n = 0; n < batch.size(); ++n) {
    const int count = static_cast<int>(batch[n].tokens.size());
    DSLA_CHECK(batch[n].logits_rows >= 0 && batch[n].logits_rows <= count);
    for (int row = count - batch[n].logits_rows; row < count; ++row) {
      placed.wanted.push_back({static_cast<int>(n), row});
      placed.wanted_rows.push_back(first_row[n] + row);
    }
  }
  return placed;
}

}  // namespace dsla
