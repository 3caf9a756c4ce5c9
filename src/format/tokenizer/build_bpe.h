// Turns the merges (or the scores) of a tokenizer into tables.
#pragma once

#include "base/status.h"
#include "format/tokenizer/bpe.h"
#include "format/tokenizer/tokenizer_data.h"
#include "format/tokenizer/vocabulary.h"

namespace dsla {

struct BuiltBpe {
  Bpe bpe;
  // SentencePiece: no token holds a space mark after something else, so that text may be cut before
  // each run of marks.
  bool cut_at_spaces = false;
};

// `data` has given its tokens to the vocabulary, which must outlive the result. A merge whose
// outcome is reserved is left out: no text becomes a control token. Errors (kDataLoss) name the
// merge or the token.
Expected<BuiltBpe> BuildBpe(const TokenizerData& data, const Vocabulary& vocabulary);

}  // namespace dsla
