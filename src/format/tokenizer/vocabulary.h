// Vocabulary: the checked tokens of a tokenizer: ids by text, what each decodes to, and which are
// control tokens. Immutable, safe to use from many threads.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "format/tokenizer/tokenizer_data.h"

namespace dsla {

// SentencePiece's mark for a space, U+2581.
inline constexpr std::string_view kSpaceMark = "\xe2\x96\x81";

// A text as messages show it: in quotes, one line, at most 40 bytes.
std::string Quoted(std::string_view text);

class Vocabulary {
 public:
  // Takes tokens, types and added tokens out of `data`, after checking them and every id in it. A
  // control token that is a single byte or character is text: it loses its flag, as leaving it out
  // would lose text.
  static Expected<Vocabulary> Create(TokenizerData* data);

  int32_t size() const { return static_cast<int32_t>(tokens_.size()); }
  Vocabulary(Vocabulary&&) = default;  // not copied: ids_ holds views
  Vocabulary& operator=(Vocabulary&&) = default;

  const std::string& text(int32_t id) const { return tokens_[static_cast<size_t>(id)]; }
  const std::string& bytes(int32_t id) const { return bytes_[static_cast<size_t>(id)]; }
  TokenType type(int32_t id) const { return types_[static_cast<size_t>(id)]; }
  // Left out by skip_special.
  bool special(int32_t id) const { return special_[static_cast<size_t>(id)]; }
  // Never the outcome of merges: control tokens and whatever is not text.
  bool reserved(int32_t id) const { return reserved_[static_cast<size_t>(id)]; }
  bool is_added(int32_t id) const { return is_added_[static_cast<size_t>(id)]; }
  // Whether this may stand for text that has no token: not where that would end or start a text.
  bool UsableAsUnknown(int32_t id, const TokenizerData& data) const;
  std::optional<int32_t> Find(std::string_view text) const;
  // Added tokens, with `special` set for all that text from users must not become.
  const std::vector<AddedToken>& added() const { return added_; }

 private:
  Vocabulary() = default;
  bool IsSymbol(int32_t id, TokenizerKind kind) const;
  Status CheckTokens(const TokenizerData& data);
  Status CheckIds(const TokenizerData& data) const;
  Status CheckAdded(const TokenizerData& data);
  void MarkSpecial(const TokenizerData& data);
  void MakeBytes(TokenizerKind kind);

  std::vector<std::string> tokens_, bytes_;
  std::vector<TokenType> types_;
  std::vector<bool> special_, reserved_, is_added_;
  std::vector<AddedToken> added_;
  std::unordered_map<std::string_view, int32_t> ids_;  // views into tokens_
};

// The byte that "<0x41>" names.
std::optional<uint8_t> ByteOfToken(std::string_view text);

}  // namespace dsla
