// Cuts normalized text into words by the steps of a tokenizer. Immutable; each thread brings its
// own Scratch.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "format/tokenizer/pattern.h"
#include "format/tokenizer/tokenizer_data.h"

namespace dsla {

class PreTokenizer {
 public:
  struct Span {
    size_t begin, end;
  };
  // A text and the words in it, in order; parts of the text may belong to none.
  struct Words {
    std::string text;
    std::vector<Span> spans;
  };
  struct Scratch {
    Words now, next;
    Pattern::Matcher matcher;
  };

  // Errors: those of Pattern::Compile.
  static Expected<PreTokenizer> Create(std::vector<PreTokenizerStep> steps);

  // Takes scratch->now.text and leaves the words in scratch->now. `at_start`: it begins the whole
  // input.
  Status Run(bool at_start, Scratch* scratch) const;

 private:
  Status Split(size_t step, Scratch* scratch) const;
  static Status MatchRegex(const Pattern& pattern, std::string_view text, Scratch* scratch,
                           std::vector<Span>* matches);

  std::vector<PreTokenizerStep> steps_;
  std::vector<Pattern> patterns_;  // one per step, empty where the step has none
};

}  // namespace dsla
