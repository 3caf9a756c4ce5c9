#include "model/cuda/step_tables.h"

#include <algorithm>
#include <numeric>

namespace dsla::cuda {
namespace {

constexpr int64_t kElement = sizeof(LogitEdit) / sizeof(int32_t);
static_assert(8 % kElement == 0, "arrays begin at multiples of 8");

}  // namespace

StepTables::StepTables(const PlacedRows& rows, const std::vector<int>& rank, int padded) {
  padding_ = padded > 0;
  L = static_cast<int>(rank.size());
  N = std::max(padded, rows.N());
  T = padding_ ? N : rows.T();
  DSLA_CHECK(!padding_ || rows.T() == rows.N());
  const auto take = [&](int64_t count) {
    const int64_t at = size;
    size += (count + 7) / 8 * 8;
    return at;
  };
  tokens = take(T);
  feed = take(T);
  positions = take(T);
  sequence = take(T);
  pos = take(N);
  softmax_rows = take(L);
  slots = take(int64_t{L} * N);
  page_start = take(int64_t{L} * (N + 1));
  static_assert(sizeof(RowSampling) % 4 == 0);
  sampling = take((padding_ ? N : static_cast<int64_t>(rows.wanted_rows.size())) *
                  static_cast<int64_t>(sizeof(RowSampling) / 4));
  if (!padding_) {  // a graph's arrays must lie where they lay when it was captured
    wanted = take(static_cast<int64_t>(rows.wanted_rows.size()));
    for (int n = 0; n < rows.N(); ++n) {
      const int64_t count = rows.row_start[n + 1] - rows.row_start[n];
      const int level = rows.sequences[n]->cache->level();
      const bool same = !groups.empty() && groups.back().single == (count == 1) &&
                        rows.sequences[groups.back().first]->cache->level() == level;
      if (!same)
        groups.push_back({.first = n, .first_row = rows.row_start[n], .single = count == 1});
      ++groups.back().count;
      groups.back().rows += count;
    }
    for (RowGroup& group : groups) group.row_start = take(group.count + 1);
  }
  pages = size;
  for (const SequenceRows* of : rows.sequences) {
    for (int layer = 0; layer < L; ++layer)
      if (!of->cache->is_dsla(layer)) size += static_cast<int64_t>(of->cache->pages(layer).size());
  }
  size = (size + 7) / 8 * 8;
  int64_t elements = 0;
  for (const SequenceRows* of : rows.sequences)
    if (of->sampling != nullptr)
      elements += of->logits_rows * EditElements(of->edits, of->ruled_out, of->allowed);
  edits = take(elements * kElement);
}

void StepTables::Pack(const PlacedRows& rows, const std::vector<int>& rank,
                      std::span<const int32_t> choice_before, int32_t* to) const {
  const int real = rows.N();
  std::fill_n(to + feed, T, -1);
  for (int n = 0; n < real; ++n) {
    const SequenceRows& of = *rows.sequences[n];
    std::copy(of.tokens.begin(), of.tokens.end(), to + tokens + rows.row_start[n]);
    std::fill_n(to + sequence + rows.row_start[n], of.tokens.size(), n);
    if (of.feed < 0) continue;
    DSLA_CHECK(of.feed < static_cast<int>(choice_before.size()));
    const int32_t choice = choice_before[static_cast<size_t>(of.feed)];
    DSLA_CHECK(choice >= 0);
    to[feed + rows.row_start[n]] = choice;
  }
  std::copy(rows.positions.begin(), rows.positions.end(), to + positions);
  std::copy(rows.pos.begin(), rows.pos.end(), to + pos);
  for (int n = real; n < N; ++n) {
    to[tokens + n] = 0;
    to[sequence + n] = n;
    to[positions + n] = to[pos + n] = -1;
  }
  if (!padding_) {
    std::copy(rows.wanted_rows.begin(), rows.wanted_rows.end(), to + wanted);
    for (const RowGroup& group : groups) {
      for (int n = 0; n <= group.count; ++n)
        to[group.row_start + n] =
            rows.row_start[group.first + n] - static_cast<int32_t>(group.first_row);
    }
  }
  PackSampling(rows, to);
  int64_t next_page = 0;
  for (int layer = 0; layer < L; ++layer) {
    const int softmax = rows.SoftmaxSequences(rank[layer]);
    to[softmax_rows + layer] = rows.row_start[softmax];
    int32_t* const starts = to + page_start + int64_t{layer} * (N + 1);
    int32_t* const slot = to + slots + int64_t{layer} * N;
    for (int n = 0; n < N; ++n) {
      starts[n] = static_cast<int32_t>(next_page);
      slot[n] = n < softmax || n >= real ? -1 : rows.sequences[n]->cache->slot(layer);
      if (n >= softmax) continue;
      const auto table = rows.sequences[n]->cache->pages(layer);
      std::copy(table.begin(), table.end(), to + pages + next_page);
      next_page += static_cast<int64_t>(table.size());
    }
    starts[N] = static_cast<int32_t>(next_page);
  }
  DSLA_CHECK(pages + next_page <= edits);
}

void StepTables::PackSampling(const PlacedRows& rows, int32_t* to) const {
  auto* const each = reinterpret_cast<RowSampling*>(to + sampling);
  auto* const all_edits = reinterpret_cast<LogitEdit*>(to);
  int64_t next_edit = edits / kElement;
  const auto of_row = [&](int64_t row) {
    const SequenceRows& of = *rows.sequences[to[sequence + row]];
    if (of.sampling == nullptr) return RowSampling{};
    RowSampling sampling = RowSamplingOf(*of.sampling, rows.positions[row] + 1);
    PackEdits(of.edits, of.ruled_out, of.allowed, all_edits, next_edit, sampling);
    next_edit += EditElements(of.edits, of.ruled_out, of.allowed);
    DSLA_CHECK(of.top >= 0 && of.top <= kMostTop);
    sampling.top = of.top;
    return sampling;
  };
  if (padding_) {
    for (int n = 0; n < N; ++n) each[n] = n < rows.N() ? of_row(n) : RowSampling{};
  } else {
    for (size_t i = 0; i < rows.wanted_rows.size(); ++i) each[i] = of_row(rows.wanted_rows[i]);
  }
}

}  // namespace dsla::cuda
