// TokenizerData: a plain description of a tokenizer, as a model's files give it, and its two
// readers (tokenizer.json and the vocabulary of a GGUF file). Nothing here is checked against
// itself yet: Tokenizer::Create does that. Plain values, no ownership rules; the readers are pure
// functions and may run on any thread.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"

namespace dsla {

enum class TokenizerKind {
  kByteLevelBpe,      // GPT-2, Llama 3, Qwen2, SmolLM: symbols are bytes, written in a printable
                      // alphabet
  kSentencePieceBpe,  // Llama 2, TinyLlama, Mistral: symbols are characters, a space is U+2581,
                      // bytes are a last resort
};

// What a vocabulary entry is for; the numbers are those of GGUF and SentencePiece.
enum class TokenType : uint8_t {
  kNormal = 1,
  kUnknown = 2,      // stands for text that has no token
  kControl = 3,      // never made from text unless EncodeOptions::parse_special says so
  kUserDefined = 4,  // always cut out of the text as a whole
  kUnused = 5,       // never made from text
  kByte = 6,         // "<0x41>"
};

// A token that is cut out of the text before anything else looks at it; of several the leftmost,
// then the longest.
struct AddedToken {
  int32_t id = -1;
  std::string text;
  bool special =
      false;  // a control token: made from text only with parse_special, left out by skip_special
  bool lstrip = false;       // takes the white space to its left along
  bool rstrip = false;       // takes the white space to its right along
  bool single_word = false;  // only where no letter, digit or underscore touches it
  bool normalized = false;   // looked for in the normalized text, by its own normalized form
};

// One step of the normalization of a piece of text between added tokens.
struct NormalizerStep {
  enum class Kind { kNfc, kNfd, kNfkc, kNfkd, kPrepend, kReplace };
  Kind kind = Kind::kNfc;
  std::string pattern = {};  // kReplace: the literal text that is replaced
  std::string content = {};  // kPrepend, kReplace
};

// One step of the cutting of normalized text into words; no merge crosses the border of a word.
struct PreTokenizerStep {
  enum class Kind {
    kDigits,       // cuts numbers out: every digit by itself if `individual`
    kSplit,        // cuts at the matches of `pattern`
    kMetaspace,    // writes `replacement` for each space, and cuts before each if `split`
    kPrefixSpace,  // puts a space before each piece that has none
  };
  enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };
  enum class Prepend { kAlways, kFirst, kNever };
  Kind kind = Kind::kSplit;
  bool individual = false;                  // kDigits
  std::string pattern = {};                 // kSplit
  bool literal = false;                     // kSplit: the pattern is text, not an expression
  Behavior behavior = Behavior::kIsolated;  // kSplit
  bool invert = false;  // kSplit: matches are the pieces, what lies between is the delimiter
  std::string replacement = "\xe2\x96\x81";  // kMetaspace: one character
  Prepend prepend = Prepend::kAlways;        // kMetaspace
  bool split = true;                         // kMetaspace
};

struct TokenizerData {
  std::string source;  // what error messages name: usually a path
  TokenizerKind kind = TokenizerKind::kByteLevelBpe;
  std::vector<std::string> tokens;  // by id, as the vocabulary writes them
  std::vector<TokenType> types;     // empty, or one per token
  std::vector<float>
      scores;  // SentencePiece without merges: the higher score merges first; else empty
  std::vector<std::pair<std::string, std::string>> merges;  // the earlier merges first
  std::vector<AddedToken> added;                            // their ids are ids of `tokens`
  std::vector<NormalizerStep> normalizer;
  std::vector<PreTokenizerStep> pre_tokenizer;
  bool ignore_merges =
      false;  // a word that is itself a token becomes that token, merges or not (Llama 3)
  bool byte_fallback = false;  // a character without a token becomes byte tokens
  bool fuse_unk = false;       // neighbouring unknown characters become one unknown token
  bool strip_leading_space =
      false;  // decoding drops one space at the start, the one that encoding put there
  std::optional<int32_t> bos_id, eos_id, pad_id, unk_id;
  std::vector<int32_t> prefix, suffix;  // put around the tokens of a text by default (BOS, EOS)
};

// Reads a `tokenizer.json` as the Hugging Face tokenizers library writes it. bos_id, eos_id and
// pad_id are not in that file: see ApplyTokenizerConfig. Errors: kDataLoss where the file is
// malformed, kUnsupported (naming the step) where it asks for something that TokenizerData cannot
// express.
Expected<TokenizerData> ParseTokenizerJson(std::string_view json,
                                           const std::string& path_for_messages);

// Takes bos, eos, pad and unk tokens, and whether BOS and EOS are added, from a
// `tokenizer_config.json`. A name that is not in the vocabulary is an error.
Status ApplyTokenizerConfig(std::string_view json, const std::string& path_for_messages,
                            TokenizerData* data);

// The tokenizer.ggml.* values of a GGUF file.
struct GgufVocab {
  std::string source;  // for messages: the file's path
  std::string model;   // tokenizer.ggml.model: gpt2 or llama
  std::string pre;     // tokenizer.ggml.pre: see kPreTokenizers in gguf_vocab.cc
  std::vector<std::string> tokens;
  std::vector<float> scores;   // llama: one per token
  std::vector<int32_t> types;  // empty, or one per token (tokenizer.ggml.token_type)
  std::vector<std::string> merges;
  std::optional<int32_t> bos_id, eos_id, pad_id, unk_id;
  std::optional<bool> add_bos, add_eos, add_space_prefix;
};

// Errors: kUnsupported for a model or pre-tokenizer that is not known, kDataLoss for values that do
// not fit together.
Expected<TokenizerData> FromGgufVocab(GgufVocab vocab);

}  // namespace dsla
