// The normalizer steps of a tokenizer, applied to one piece of text.
//
// The four normal forms are those of Unicode 9, which the tables of the Hugging Face library have,
// and with which the models were trained: characters that came later are left alone and count as
// starters.
#pragma once

#include <unicode/normalizer2.h>
#include <unicode/uniset.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "format/tokenizer/tokenizer_data.h"

namespace dsla {

// Immutable, safe to use from many threads.
class Normalizer {
 public:
  // A kReplace step's pattern must not be empty.
  explicit Normalizer(std::vector<NormalizerStep> steps);

  // `text` must be valid UTF-8, of less than 2 GiB, and stays so.
  void Apply(std::string* text) const;

 private:
  std::vector<NormalizerStep> steps_;
  std::unique_ptr<const icu::UnicodeSet>
      known_;  // the characters of Unicode 9; null if no step is a normal form
  std::vector<std::unique_ptr<const icu::FilteredNormalizer2>>
      forms_;  // one per step, null where it is none
};

// Appends `text` with every `from` (left to right, not overlapping, not empty) replaced by `to`.
void AppendWithReplaced(std::string_view text, std::string_view from, std::string_view to,
                        std::string* out);

}  // namespace dsla
