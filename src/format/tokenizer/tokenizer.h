// Tokenizer: text to token ids and back.
//
// Equal, token for token, to the Hugging Face `tokenizers` library for the kinds in
// tokenizer_data.h, and to SentencePiece for its BPE models. Text is bytes; what is not UTF-8 is
// read as U+FFFD (one for each maximal ill-formed part, as Python's errors="replace" does). Byte
// pair encoding after Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with
// Subword Units", ACL 2016; byte fallback after Kudo, Richardson, "SentencePiece", EMNLP 2018. A
// text of n bytes takes O(n log n) time at most, whatever it holds, with the pre-tokenizers of
// known families.
//
// Immutable after Create: all const methods may be called from many threads at once.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "format/tokenizer/tokenizer_data.h"

namespace dsla {

struct EncodeOptions {
  // Unset: what the tokenizer's files say (BOS, EOS or neither around the text). true: BOS before
  // the text, even where the files do not say so; an error if there is none. false: the text's own
  // tokens only.
  std::optional<bool> add_bos;
  // Whether text that spells a control token becomes that token. Never for a chat's messages: with
  // false no input whatever gives a control token.
  bool parse_special = false;
  // The text goes on from other tokens (a piece of a chat prompt behind a control token): no space
  // is put before it where the tokenizer puts one before the start of a text only.
  bool continues = false;
};

struct DecodeOptions {
  bool skip_special = false;  // leave control tokens out
  bool continues =
      false;  // the tokens follow others, so a leading space is part of the text (SentencePiece)
};

class Tokenizer {
 public:
  // Checks the description. Errors (kDataLoss, kUnsupported) name data.source and the entry.
  static Expected<std::unique_ptr<Tokenizer>> Create(TokenizerData data);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Errors: kInvalidArgument if the text is over 64 MiB or BOS is wanted and there is none;
  // kResourceExhausted if a pre-tokenizer expression exceeds its match limit, which those of known
  // families cannot.
  Expected<std::vector<int32_t>> Encode(std::string_view text,
                                        const EncodeOptions& options = {}) const;

  // Valid UTF-8; bytes that are not become U+FFFD. Ids out of range give nothing.
  std::string Decode(std::span<const int32_t> ids, const DecodeOptions& options = {}) const;

  int32_t vocab_size() const;
  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;
  std::optional<int32_t> pad_id() const;
  std::optional<int32_t> unk_id() const;
  // What Encode puts around a text where add_bos is unset.
  const std::vector<int32_t>& prefix() const;
  const std::vector<int32_t>& suffix() const;

  // The token as the vocabulary writes it ("\u0120the", "<0x0A>"); empty if the id is out of range.
  std::string_view TokenText(int32_t id) const;
  // The bytes that the token adds to decoded text; for control tokens, their name.
  std::string_view TokenBytes(int32_t id) const;
  // A control token: left out by skip_special, never made from text without parse_special.
  bool IsSpecial(int32_t id) const;
  std::optional<int32_t> TokenToId(std::string_view text) const;
  // The control tokens that valid UTF-8 spells, in order: of overlapping ones the leftmost counts,
  // then the longest.
  struct Spelling {
    int32_t id;
    size_t begin, end;  // bytes
  };
  std::vector<Spelling> FindControlTokens(std::string_view text) const;

 private:
  friend class IncrementalDecoder;
  struct Impl;
  explicit Tokenizer(std::unique_ptr<const Impl> impl);
  std::unique_ptr<const Impl> impl_;
};

// Decodes token by token for streaming: what Push and Finish return, put together, equals Decode of
// all the tokens. Each result is whole code points; bytes that may still become one are held back.
// The tokenizer must outlive it.
class IncrementalDecoder {
 public:
  explicit IncrementalDecoder(const Tokenizer& tokenizer, const DecodeOptions& options = {});

  // shown: the token gives its text even if it is a control token and these are left out.
  std::string Push(int32_t id, bool shown = false);
  // What was held back, as U+FFFD; afterwards the decoder is as new.
  std::string Finish();

 private:
  void Append(int32_t id, bool shown, std::string* out);

  const Tokenizer& tokenizer_;
  DecodeOptions options_;
  bool at_start_ = true;  // nothing has come out yet
  std::string held_;      // at most 3 bytes: the start of a code point
  friend class Tokenizer;
};

}  // namespace dsla
