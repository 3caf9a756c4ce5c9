// TextStream: from the tokens of a reply to its text, piece by piece. Bytes are held back while
// they may be the start of a code point or of a stop string, so that what has gone out always
// stands; the reply ends before the first stop string. Control tokens give no text but
// where they are asked for. One per request, one thread; the tokenizer must outlive it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "format/tokenizer/tokenizer.h"

namespace dsla {

class TextStream {
 public:
  // stop: none empty, each valid UTF-8. continues: the reply goes on from other text, so that a
  // leading space is part of it (SentencePiece).
  // shown: control tokens that give their text all the same.
  TextStream(const Tokenizer& tokenizer, std::vector<std::string> stop, bool continues = false,
             std::vector<int32_t> shown = {});

  // The text that the token adds for certain. With may_stop, a stop string that the token completes
  // ends the reply: the text is what comes before it, and stop_string() names it; nothing may be
  // pushed afterwards. Which stop string comes first does not depend on how the text is cut into
  // tokens: the one whose last byte comes first; of those the longest. Without may_stop (fewer
  // than min_tokens tokens) a stop string that is completed is text like any other.
  std::string Push(int32_t token, bool may_stop);

  // The reply ended without a stop string: the text that was held back.
  std::string Finish();

  const std::optional<std::string>& stop_string() const { return stop_string_; }

 private:
  // A stop string with its failure function (Knuth, Morris, Pratt, "Fast Pattern Matching in
  // Strings", 1977): each byte of the reply is looked at once, whatever was held back.
  struct Stop {
    std::string text;
    std::vector<int> fallback;  // [i]: of the first i bytes, the longest border
    int matched = 0;            // bytes that the text so far ends with
    bool Next(char byte);       // true: the whole string has just been completed
  };
  std::string Scan(std::string_view text, bool may_stop);

  IncrementalDecoder decoder_;
  const std::vector<int32_t> shown_;
  std::vector<Stop> stops_;
  std::string held_;  // as long as the longest `matched`
  std::optional<std::string> stop_string_;
};

}  // namespace dsla
