#include "model/placed_rows.h"

#include <algorithm>
#include <numeric>
#include <tuple>

namespace dsla {

PlacedRows PlaceRows(std::span<const SequenceRows> batch, Workspace& workspace) {
  size_t rows = 0, wanted = 0;
  for (const SequenceRows& of : batch) {
    DSLA_CHECK(!of.tokens.empty());
    DSLA_CHECK(of.logits_rows >= 0 && of.logits_rows <= static_cast<int>(of.tokens.size()));
    rows += of.tokens.size();
    wanted += static_cast<size_t>(of.logits_rows);
  }
  const auto take = [&]<typename T>(std::span<T>& to, size_t count) {
    to = {workspace.Take<T>(static_cast<int64_t>(count)), count};
  };
  PlacedRows placed;
  take(placed.sequences, batch.size());
  take(placed.batch_index, batch.size());
  take(placed.row_start, batch.size() + 1);
  take(placed.pos, batch.size());
  take(placed.positions, rows);
  take(placed.wanted, wanted);
  take(placed.wanted_rows, wanted);

  const std::span<int> order = placed.batch_index;
  std::iota(order.begin(), order.end(), 0);
  const auto key = [&](int i) {
    return std::tuple(batch[i].cache->level(), batch[i].tokens.size() > 1, i);
  };
  std::sort(order.begin(), order.end(), [&](int a, int b) { return key(a) < key(b); });
  auto* const first_row = workspace.Take<int32_t>(static_cast<int64_t>(batch.size()));
  int32_t row = 0;
  for (size_t n = 0; n < order.size(); ++n) {
    const SequenceRows& of = batch[order[n]];
    const auto count = static_cast<int32_t>(of.tokens.size());
    placed.sequences[n] = &of;
    placed.pos[n] = of.cache->length();
    placed.row_start[n] = first_row[order[n]] = row;
    std::iota(placed.positions.begin() + row, placed.positions.begin() + row + count,
              placed.pos[n]);
    row += count;
  }
  placed.row_start[batch.size()] = row;
  size_t next = 0;
  for (size_t n = 0; n < batch.size(); ++n) {
    const int count = static_cast<int>(batch[n].tokens.size());
    for (int i = count - batch[n].logits_rows; i < count; ++i, ++next) {
      placed.wanted[next] = {static_cast<int>(n), i};
      placed.wanted_rows[next] = first_row[n] + i;
    }
  }
  return placed;
}

}  // namespace dsla
