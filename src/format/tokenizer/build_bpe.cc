#include "format/tokenizer/build_bpe.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "format/tokenizer/byte_level.h"
#include "format/tokenizer/utf8.h"

namespace dsla {
namespace {

struct Merge {
  int32_t left, right, rank, id;
};

Status CheckByteTokens(const TokenizerData& data, const Bpe::Symbols& symbols) {
  for (size_t b = 0; b < 256; ++b) {
    if (symbols.byte_ids[b] < 0) {
      return DataLoss("{}: byte fallback is on, but the vocabulary has no <0x{:02X}>", data.source,
                      b);
    }
  }
  return Status::Ok();
}

Expected<Bpe::Symbols> FindSymbols(const TokenizerData& data, const Vocabulary& vocabulary) {
  Bpe::Symbols symbols;
  symbols.bytes = data.kind == TokenizerKind::kByteLevelBpe;
  symbols.byte_fallback = data.byte_fallback;
  symbols.fuse_unk = data.fuse_unk;
  if (data.unk_id && vocabulary.UsableAsUnknown(*data.unk_id, data)) symbols.unk_id = *data.unk_id;
  symbols.byte_ids.fill(-1);
  for (int32_t id = 0; id < vocabulary.size(); ++id) {
    const std::string& text = vocabulary.text(id);
    if (vocabulary.type(id) == TokenType::kByte) {
      symbols.byte_ids[*ByteOfToken(text)] = id;
    } else if (vocabulary.type(id) != TokenType::kNormal || vocabulary.reserved(id)) {
      continue;
    } else if (symbols.bytes) {
      const auto bytes = text.size() <= 2 ? byte_level::ToBytes(text) : std::nullopt;
      if (bytes && bytes->size() == 1)
        symbols.byte_ids[static_cast<unsigned char>((*bytes)[0])] = id;
    } else if (text.size() == static_cast<size_t>(utf8::LengthOf(text[0]))) {
      symbols.char_ids[utf8::Decode(text).code_point] = id;
    }
  }
  if (data.byte_fallback) DSLA_RETURN_IF_ERROR(CheckByteTokens(data, symbols));
  return symbols;
}

Expected<std::vector<Merge>> NamedMerges(const TokenizerData& data, const Vocabulary& vocabulary) {
  std::vector<Merge> merges;
  merges.reserve(data.merges.size());
  for (size_t i = 0; i < data.merges.size(); ++i) {
    const auto& [left, right] = data.merges[i];
    // An empty half would make a token out of itself, for ever.
    if (left.empty() || right.empty())
      return DataLoss("{}: merge {} has an empty half", data.source, i);
    const auto l = vocabulary.Find(left), r = vocabulary.Find(right),
               whole = vocabulary.Find(left + right);
    if (!l || !r || !whole) {
      const std::string& missing = !l ? left : !r ? right : left + right;
      return DataLoss("{}: merge {} ({} {}): {} is not in the vocabulary", data.source, i,
                      Quoted(left), Quoted(right), Quoted(missing));
    }
    merges.push_back({*l, *r, static_cast<int32_t>(i), *whole});
  }
  return merges;
}

// SentencePiece joins whatever two neighbours make a token, the token of the highest score first.
Expected<std::vector<Merge>> ScoredMerges(const TokenizerData& data, const Vocabulary& vocabulary) {
  std::vector<float> order = data.scores;
  for (size_t id = 0; id < order.size(); ++id) {
    if (!std::isfinite(order[id]))
      return DataLoss("{}: the score of token {} is not a finite number", data.source, id);
  }
  std::sort(order.begin(), order.end(), std::greater<>());
  order.erase(std::unique(order.begin(), order.end()), order.end());
  const auto usable = [&](std::optional<int32_t> id) { return id && !vocabulary.reserved(*id); };
  std::vector<Merge> merges;
  for (int32_t id = 0; id < vocabulary.size(); ++id) {
    if (vocabulary.reserved(id)) continue;
    const std::string_view text = vocabulary.text(id);
    const float score = data.scores[static_cast<size_t>(id)];
    const auto rank =
        std::lower_bound(order.begin(), order.end(), score, std::greater<>()) - order.begin();
    for (size_t cut = static_cast<size_t>(utf8::LengthOf(text[0])); cut < text.size();
         cut += static_cast<size_t>(utf8::LengthOf(text[cut]))) {
      const auto left = vocabulary.Find(text.substr(0, cut));
      if (!usable(left)) continue;
      const auto right = vocabulary.Find(text.substr(cut));
      if (usable(right)) merges.push_back({*left, *right, static_cast<int32_t>(rank), id});
    }
  }
  return merges;
}

}  // namespace

Expected<BuiltBpe> BuildBpe(const TokenizerData& data, const Vocabulary& vocabulary) {
  if (!data.scores.empty() && data.scores.size() != static_cast<size_t>(vocabulary.size())) {
    return DataLoss("{}: {} scores for {} tokens", data.source, data.scores.size(),
                    vocabulary.size());
  }
  DSLA_ASSIGN_OR_RETURN(Bpe::Symbols symbols, FindSymbols(data, vocabulary));
  DSLA_ASSIGN_OR_RETURN(const std::vector<Merge> merges, data.scores.empty()
                                                             ? NamedMerges(data, vocabulary)
                                                             : ScoredMerges(data, vocabulary));
  MergeTable table(merges.size());
  bool crosses = false;
  for (const Merge& m : merges) {
    if (vocabulary.reserved(m.id)) continue;
    if (!table.Insert(m.left, m.right, m.rank, m.id)) {
      return DataLoss("{}: merge {} ({} {}) is there twice", data.source, m.rank,
                      Quoted(vocabulary.text(m.left)), Quoted(vocabulary.text(m.right)));
    }
    crosses |= vocabulary.text(m.right).starts_with(kSpaceMark) &&
               !vocabulary.text(m.left).ends_with(kSpaceMark);
  }
  std::unordered_map<std::string_view, int32_t> whole_words;
  for (int32_t id = 0; data.ignore_merges && id < vocabulary.size(); ++id) {
    if (vocabulary.type(id) != TokenType::kNormal || vocabulary.reserved(id) ||
        vocabulary.is_added(id))
      continue;
    whole_words.emplace(symbols.bytes ? vocabulary.bytes(id) : vocabulary.text(id), id);
  }
  BuiltBpe built;
  built.cut_at_spaces =
      data.kind == TokenizerKind::kSentencePieceBpe && !data.ignore_merges && !crosses;
  built.bpe = Bpe(std::move(symbols), std::move(table), std::move(whole_words));
  return built;
}

}  // namespace dsla
