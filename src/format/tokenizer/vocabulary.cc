#include "format/tokenizer/vocabulary.h"

#include <array>
#include <utility>

#include "format/tokenizer/byte_level.h"
#include "format/tokenizer/normalize.h"
#include "format/tokenizer/utf8.h"

namespace dsla {
namespace {

constexpr size_t kMaxTokens = size_t{1} << 22;  // 16 times the largest vocabulary in use
constexpr size_t kMaxTokenBytes = size_t{1} << 14;

// Text that only control tokens have, whatever their flags say: some files leave `special` out.
bool LooksLikeControl(std::string_view text) {
  return text.size() > 4 && text.starts_with("<|") && text.ends_with("|>");
}

}  // namespace

std::string Quoted(std::string_view text) {
  std::string out = "'";
  const bool cut = text.size() > 40;
  std::string valid;
  utf8::AppendReplaced(text.substr(0, 40), &valid);
  for (const char c : valid) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    } else {
      out += c;
    }
  }
  return out + (cut ? "...'" : "'");
}

std::optional<uint8_t> ByteOfToken(std::string_view text) {
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return std::nullopt;
  const auto digit = [](char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
  };
  const int high = digit(text[3]), low = digit(text[4]);
  if (high < 0 || low < 0) return std::nullopt;
  return static_cast<uint8_t>(high * 16 + low);
}

std::optional<int32_t> Vocabulary::Find(std::string_view text) const {
  const auto it = ids_.find(text);
  if (it == ids_.end()) return std::nullopt;
  return it->second;
}

Status Vocabulary::CheckTokens(const TokenizerData& data) {
  if (tokens_.empty()) return DataLoss("{}: the vocabulary is empty", data.source);
  if (tokens_.size() > kMaxTokens) {
    return DataLoss("{}: the vocabulary has {} tokens, more than {}", data.source, tokens_.size(),
                    kMaxTokens);
  }
  if (types_.empty()) types_.assign(tokens_.size(), TokenType::kNormal);
  if (types_.size() != tokens_.size()) {
    return DataLoss("{}: {} token types for {} tokens", data.source, types_.size(), tokens_.size());
  }
  ids_.reserve(tokens_.size());
  for (size_t id = 0; id < tokens_.size(); ++id) {
    const std::string& token = tokens_[id];
    if (token.empty()) return DataLoss("{}: token {} is empty", data.source, id);
    if (token.size() > kMaxTokenBytes) {
      return DataLoss("{}: token {} has {} bytes, more than {}", data.source, id, token.size(),
                      kMaxTokenBytes);
    }
    if (!utf8::IsValid(token))
      return DataLoss("{}: token {} ({}) is not UTF-8", data.source, id, Quoted(token));
    const auto [it, is_new] = ids_.emplace(token, static_cast<int32_t>(id));
    if (!is_new)
      return DataLoss("{}: tokens {} and {} are both {}", data.source, it->second, id,
                      Quoted(token));
  }
  return Status::Ok();
}

Status Vocabulary::CheckIds(const TokenizerData& data) const {
  const auto check = [&](const char* name, int32_t id) {
    if (id >= 0 && id < size()) return Status::Ok();
    return DataLoss("{}: {} token id {} is not in the vocabulary of {} tokens", data.source, name,
                    id, size());
  };
  const std::array<std::pair<const char*, std::optional<int32_t>>, 4> named = {
      {{"bos", data.bos_id}, {"eos", data.eos_id}, {"pad", data.pad_id}, {"unk", data.unk_id}}};
  for (const auto& [name, id] : named) {
    if (id) DSLA_RETURN_IF_ERROR(check(name, *id));
  }
  for (const int32_t id : data.prefix) DSLA_RETURN_IF_ERROR(check("leading", id));
  for (const int32_t id : data.suffix) DSLA_RETURN_IF_ERROR(check("trailing", id));
  for (const AddedToken& token : data.added) DSLA_RETURN_IF_ERROR(check("added", token.id));
  return Status::Ok();
}

Status Vocabulary::CheckAdded(const TokenizerData& data) {
  is_added_.assign(tokens_.size(), false);
  for (const AddedToken& token : added_) {
    const auto id = static_cast<size_t>(token.id);
    if (token.text != tokens_[id]) {
      return DataLoss("{}: added token {} is {}, but the vocabulary has {} there", data.source, id,
                      Quoted(token.text), Quoted(tokens_[id]));
    }
    if (is_added_[id]) return DataLoss("{}: token {} is added twice", data.source, id);
    is_added_[id] = true;
  }
  return Status::Ok();
}

bool Vocabulary::IsSymbol(int32_t id, TokenizerKind kind) const {
  if (type(id) != TokenType::kNormal) return false;
  if (kind == TokenizerKind::kSentencePieceBpe) {
    return text(id).size() == static_cast<size_t>(utf8::LengthOf(text(id)[0]));
  }
  const auto bytes = byte_level::ToBytes(text(id));
  return bytes && bytes->size() == 1;
}

bool Vocabulary::UsableAsUnknown(int32_t id, const TokenizerData& data) const {
  return data.bos_id != id && data.eos_id != id && !LooksLikeControl(text(id));
}

void Vocabulary::MarkSpecial(const TokenizerData& data) {
  special_.assign(tokens_.size(), false);
  reserved_.assign(tokens_.size(), false);
  for (size_t id = 0; id < tokens_.size(); ++id) {
    special_[id] = types_[id] == TokenType::kControl || types_[id] == TokenType::kUnknown;
    reserved_[id] = types_[id] != TokenType::kNormal && types_[id] != TokenType::kUserDefined;
  }
  for (AddedToken& token : added_) {
    const auto id = static_cast<size_t>(token.id);
    if (IsSymbol(token.id, data.kind)) {
      token.special = false;
      continue;
    }
    if (token.special) special_[id] = true;
    if (special_[id] || LooksLikeControl(token.text)) token.special = true;
    if (token.special) reserved_[id] = true;
  }
}

void Vocabulary::MakeBytes(TokenizerKind kind) {
  bytes_.resize(tokens_.size());
  for (size_t id = 0; id < tokens_.size(); ++id) {
    const std::string& token = tokens_[id];
    if (kind == TokenizerKind::kByteLevelBpe) {
      const auto bytes = byte_level::ToBytes(token);
      // Added tokens are found in the text as they are, so that is how they are written back.
      bytes_[id] = bytes && !is_added_[id] ? *bytes : token;
    } else if (types_[id] == TokenType::kByte) {
      bytes_[id] = std::string(1, static_cast<char>(*ByteOfToken(token)));
    } else {
      AppendWithReplaced(token, kSpaceMark, " ", &bytes_[id]);
    }
  }
}

Expected<Vocabulary> Vocabulary::Create(TokenizerData* data) {
  Vocabulary v;
  v.tokens_ = std::move(data->tokens);
  v.types_ = std::move(data->types);
  DSLA_RETURN_IF_ERROR(v.CheckTokens(*data));
  DSLA_RETURN_IF_ERROR(v.CheckIds(*data));
  v.added_ = std::move(data->added);
  DSLA_RETURN_IF_ERROR(v.CheckAdded(*data));
  if (data->kind == TokenizerKind::kSentencePieceBpe) {
    for (int32_t id = 0; id < v.size(); ++id) {
      if (v.type(id) == TokenType::kByte && !ByteOfToken(v.text(id))) {
        return DataLoss("{}: byte token {} is {}, not of the form <0x41>", data->source, id,
                        Quoted(v.text(id)));
      }
    }
  }
  v.MakeBytes(data->kind);
  v.MarkSpecial(*data);
  return v;
}

}  // namespace dsla
