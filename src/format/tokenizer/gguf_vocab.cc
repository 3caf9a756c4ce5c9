#include <algorithm>
#include <array>
#include <utility>

#include "format/tokenizer/known_patterns.h"
#include "format/tokenizer/tokenizer_data.h"
#include "format/tokenizer/vocabulary.h"

namespace dsla {
namespace {

using Step = PreTokenizerStep;

// What a name in tokenizer.ggml.pre stands for; the same as in the families' tokenizer.json files.
struct Known {
  std::string_view pre;
  std::string_view pattern;
  bool digits = false;  // every digit by itself, before the pattern
  bool nfc = false;
  bool ignore_merges = false;
};
constexpr std::array<Known, 8> kPreTokenizers = {{
    {.pre = "gpt-2", .pattern = known_patterns::kGpt2},
    {.pre = "smollm", .pattern = known_patterns::kGpt2, .digits = true},
    {.pre = "starcoder", .pattern = known_patterns::kGpt2, .digits = true},
    {.pre = "llama-bpe", .pattern = known_patterns::kLlama3, .ignore_merges = true},
    {.pre = "llama3", .pattern = known_patterns::kLlama3, .ignore_merges = true},
    {.pre = "llama-v3", .pattern = known_patterns::kLlama3, .ignore_merges = true},
    {.pre = "qwen2", .pattern = known_patterns::kQwen2, .nfc = true},
    {.pre = "deepseek-r1-qwen", .pattern = known_patterns::kQwen2, .nfc = true},
}};

Status ByteLevel(GgufVocab* vocab, TokenizerData* data) {
  const auto known = std::find_if(kPreTokenizers.begin(), kPreTokenizers.end(),
                                  [&](const Known& k) { return k.pre == vocab->pre; });
  if (known == kPreTokenizers.end()) {
    std::string names;
    for (const Known& k : kPreTokenizers)
      names += fmt::format("{}{}", names.empty() ? "" : ", ", k.pre);
    return Unsupported("{}: pre-tokenizer '{}' is not supported (known: {})", vocab->source,
                       vocab->pre, names);
  }
  data->kind = TokenizerKind::kByteLevelBpe;
  data->ignore_merges = known->ignore_merges;
  if (known->nfc)
    data->normalizer.push_back({.kind = NormalizerStep::Kind::kNfc, .pattern = {}, .content = {}});
  if (known->digits) {
    Step step{.kind = Step::Kind::kDigits};
    step.individual = true;
    data->pre_tokenizer.push_back(step);
  }
  if (vocab->add_space_prefix.value_or(false))
    data->pre_tokenizer.push_back({.kind = Step::Kind::kPrefixSpace});
  Step step{.kind = Step::Kind::kSplit};
  step.pattern = known->pattern;
  data->pre_tokenizer.push_back(step);
  data->merges.reserve(vocab->merges.size());
  for (size_t i = 0; i < vocab->merges.size(); ++i) {
    const std::string& line = vocab->merges[i];
    const size_t space = line.find(' ');
    if (space == line.npos || line.find(' ', space + 1) != line.npos) {
      return DataLoss("{}: merge {} ({}) is not two tokens with a space between", vocab->source, i,
                      Quoted(line));
    }
    data->merges.emplace_back(line.substr(0, space), line.substr(space + 1));
  }
  if (data->merges.empty())
    return DataLoss("{}: a byte-level vocabulary without merges", vocab->source);
  return Status::Ok();
}

Status SentencePiece(GgufVocab* vocab, TokenizerData* data) {
  if (vocab->scores.size() != vocab->tokens.size()) {
    return DataLoss("{}: {} scores for {} tokens", vocab->source, vocab->scores.size(),
                    vocab->tokens.size());
  }
  data->kind = TokenizerKind::kSentencePieceBpe;
  data->scores = std::move(vocab->scores);
  data->unk_id = vocab->unk_id;
  data->fuse_unk = true;
  data->byte_fallback =
      std::find(data->types.begin(), data->types.end(), TokenType::kByte) != data->types.end();
  const bool prefix = vocab->add_space_prefix.value_or(true);
  data->strip_leading_space = prefix;
  const std::string mark(kSpaceMark);
  data->normalizer.push_back(
      {.kind = NormalizerStep::Kind::kReplace, .pattern = " ", .content = mark});
  if (prefix)
    data->normalizer.push_back(
        {.kind = NormalizerStep::Kind::kPrepend, .pattern = {}, .content = mark});
  return Status::Ok();
}

// Where the file has no types: the tokens that the ids name are control tokens.
void MarkNamed(const GgufVocab& vocab, TokenizerData* data) {
  const auto mark = [&](const std::optional<int32_t>& id, TokenType type) {
    if (id && *id >= 0 && static_cast<size_t>(*id) < data->types.size())
      data->types[static_cast<size_t>(*id)] = type;
  };
  mark(vocab.unk_id, TokenType::kUnknown);
  mark(vocab.pad_id, TokenType::kControl);
  mark(vocab.bos_id, TokenType::kControl);
  mark(vocab.eos_id, TokenType::kControl);
}

Status ReadTypes(const GgufVocab& vocab, TokenizerData* data) {
  data->types.assign(data->tokens.size(), TokenType::kNormal);
  if (vocab.types.empty()) {
    MarkNamed(vocab, data);
    return Status::Ok();
  }
  if (vocab.types.size() != data->tokens.size()) {
    return DataLoss("{}: {} token types for {} tokens", vocab.source, vocab.types.size(),
                    data->tokens.size());
  }
  for (size_t id = 0; id < vocab.types.size(); ++id) {
    const int32_t type = vocab.types[id];
    if (type < 1 || type > 6)
      return DataLoss("{}: token {} has type {}, not 1 to 6", vocab.source, id, type);
    data->types[id] = static_cast<TokenType>(type);
  }
  return Status::Ok();
}

// Control tokens and those that users defined are cut out of the text as a whole.
void CollectAdded(TokenizerData* data) {
  for (size_t id = 0; id < data->tokens.size(); ++id) {
    const TokenType type = data->types[id];
    if (type != TokenType::kControl && type != TokenType::kUnknown &&
        type != TokenType::kUserDefined)
      continue;
    AddedToken token;
    token.id = static_cast<int32_t>(id);
    token.text = data->tokens[id];
    token.special = type != TokenType::kUserDefined;
    data->added.push_back(std::move(token));
  }
}

}  // namespace

Expected<TokenizerData> FromGgufVocab(GgufVocab vocab) {
  TokenizerData data;
  data.source = vocab.source;
  data.tokens = std::move(vocab.tokens);
  DSLA_RETURN_IF_ERROR(ReadTypes(vocab, &data));
  CollectAdded(&data);
  vocab.tokens.resize(data.tokens.size());  // for its length alone
  if (vocab.model == "gpt2") {
    DSLA_RETURN_IF_ERROR(ByteLevel(&vocab, &data));
  } else if (vocab.model == "llama") {
    DSLA_RETURN_IF_ERROR(SentencePiece(&vocab, &data));
  } else {
    return Unsupported("{}: tokenizer model '{}' is not supported, only gpt2 and llama",
                       vocab.source, vocab.model);
  }
  data.bos_id = vocab.bos_id;
  data.eos_id = vocab.eos_id;
  data.pad_id = vocab.pad_id;
  // SentencePiece models begin with BOS unless the file says otherwise, and so does Llama 3.
  const bool bos = vocab.add_bos.value_or(vocab.model == "llama" || data.ignore_merges);
  if (bos && vocab.bos_id) data.prefix.push_back(*vocab.bos_id);
  if (vocab.add_eos.value_or(false) && vocab.eos_id) data.suffix.push_back(*vocab.eos_id);
  return data;
}

}  // namespace dsla
