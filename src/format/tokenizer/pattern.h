// Pattern: a pre-tokenizer's regular expression. tokenizer.json files are written for Oniguruma
// (Ruby syntax); the part of it that both engines read alike is translated to PCRE2, the rest is
// refused. Immutable and usable from many threads, each with a Matcher of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/status.h"

struct pcre2_real_code_8;
struct pcre2_real_match_data_8;
struct pcre2_real_match_context_8;

namespace dsla {

class Pattern {
 public:
  // Errors: kUnsupported with the construct that is not understood; kDataLoss where the expression
  // is malformed.
  static Expected<Pattern> Compile(std::string_view expression);

  // What PCRE2 is given; an error as for Compile. For tests.
  static Expected<std::string> Translate(std::string_view expression);

  // Scratch memory for matching. Not for two threads at once.
  class Matcher {
   public:
    Matcher();
    // Finds the first match at or after `start`. Returns false if there is none. `text` must be
    // valid UTF-8 and `start` at a code point. Errors: kResourceExhausted if the match limit (a
    // multiple of the text's length) is exceeded.
    Expected<bool> Find(const Pattern& pattern, std::string_view text, size_t start);
    size_t begin() const { return begin_; }
    size_t end() const { return end_; }

   private:
    struct Free {
      void operator()(pcre2_real_match_data_8* p) const;
      void operator()(pcre2_real_match_context_8* p) const;
    };
    std::unique_ptr<pcre2_real_match_data_8, Free> data_;
    std::unique_ptr<pcre2_real_match_context_8, Free> context_;
    size_t begin_ = 0, end_ = 0;
  };

 private:
  struct Free {
    void operator()(pcre2_real_code_8* p) const;
  };
  std::unique_ptr<pcre2_real_code_8, Free> code_;
};

}  // namespace dsla
