// The normalizer steps of a tokenizer, applied to one piece of text.
#pragma once

#include <span>
#include <string>

#include "base/status.h"
#include "format/tokenizer/tokenizer_data.h"

namespace dsla {

// `text` must be valid UTF-8 and stays so.
void Normalize(std::span<const NormalizerStep> steps, std::string* text);

// Appends `text` with every `from` (left to right, not overlapping, not empty) replaced by `to`.
void AppendWithReplaced(std::string_view text, std::string_view from, std::string_view to,
                        std::string* out);

}  // namespace dsla
