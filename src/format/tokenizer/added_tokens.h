// Finds added tokens in a text. Immutable; safe to use from many threads.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "format/tokenizer/tokenizer_data.h"

namespace dsla {

class AddedTokenMatcher {
 public:
  struct Segment {
    int32_t id;  // of an added token, or -1: text
    size_t begin, end;
  };

  // Texts must not be empty; of two with the same text the first counts.
  explicit AddedTokenMatcher(std::vector<AddedToken> tokens);

  // Cuts `text` (valid UTF-8) into segments, in order. Of two tokens the leftmost wins, then the
  // longest. With parse_special false control tokens are found (and hide others inside them), but
  // count as text.
  void Cut(std::string_view text, bool parse_special, std::vector<Segment>* out) const;

 private:
  struct Match {
    const AddedToken* token = nullptr;
    size_t begin = 0, end = 0;
  };
  const AddedToken* LongestAt(std::string_view text) const;
  bool Next(std::string_view text, size_t from, Match* match) const;

  std::vector<AddedToken> tokens_;  // sorted by text
  std::array<uint32_t, 257>
      by_first_{};  // tokens that start with byte b: [by_first_[b], by_first_[b + 1])
};

}  // namespace dsla
