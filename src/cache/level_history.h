// The levels that a sequence's tokens were computed at. A raise happens between two tokens, so the
// history is a list of (position, level) and tells everything about what a cache holds besides the
// tokens themselves: a sequence folded at p differs from one that ran at that level from the start.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace dsla {

// A level from a position of the sequence on.
struct LevelSpan {
  int position = 0;  // tokens cached at the switch; 0 at the start
  int level = 0;

  bool operator==(const LevelSpan&) const = default;
};

// Positions do not fall, levels rise; the first entry is at position 0.
using LevelHistory = std::vector<LevelSpan>;

// The entries that say what the first `tokens` were computed at.
inline std::span<const LevelSpan> HistoryOf(std::span<const LevelSpan> history, int tokens) {
  size_t count = 0;
  while (count < history.size() && history[count].position < tokens) ++count;
  return history.first(count);
}

// The level of the last token of the first `tokens`, of which there must be one.
inline int LevelBefore(std::span<const LevelSpan> history, int tokens) {
  int level = history.front().level;
  for (const LevelSpan& span : history) {
    if (span.position < tokens) level = span.level;
  }
  return level;
}

}  // namespace dsla
