// Small tokenizers for tests and fuzz targets.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "format/tokenizer/byte_level.h"
#include "format/tokenizer/tokenizer.h"
#include "format/tokenizer/vocabulary.h"

namespace dsla::testing {

// A byte-level tokenizer.json with all 256 bytes, a few merges and three added tokens:
// 0-255 bytes, 256 "he", 257 "ll", 258 "hell", 259 "hello", 260 " w", 261 "<|end|>" (control), 262
// "<tool>" (not).
inline nlohmann::json ByteLevelJson() {
  nlohmann::json vocab;
  for (int b = 0; b < 256; ++b)
    vocab[byte_level::FromBytes(std::string(1, static_cast<char>(b)))] = b;
  const std::vector<std::string> more = {"he", "ll", "hell", "hello", "\u0120w"};
  for (size_t i = 0; i < more.size(); ++i) vocab[more[i]] = 256 + i;
  return {
      {"added_tokens",
       {{{"id", 261}, {"content", "<|end|>"}, {"special", true}, {"normalized", false}},
        {{"id", 262}, {"content", "<tool>"}, {"special", false}, {"normalized", false}}}},
      {"normalizer", nullptr},
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
      {"post_processor", nullptr},
      {"decoder", {{"type", "ByteLevel"}}},
      {"model",
       {{"type", "BPE"},
        {"unk_token", nullptr},
        {"vocab", vocab},
        {"merges", {"h e", "l l", "he ll", "hell o", "\u0120 w"}}}},
  };
}

// A SentencePiece vocabulary: 0 <unk>, 1 <s>, 2 </s>, 3-258 bytes, then pieces, the earlier of the
// higher score.
inline GgufVocab SentencePieceVocab() {
  GgufVocab v;
  v.source = "tiny.gguf";
  v.model = "llama";
  const auto add = [&](const std::string& text, float score, TokenType type) {
    v.tokens.push_back(text);
    v.scores.push_back(score);
    v.types.push_back(static_cast<int32_t>(type));
  };
  add("<unk>", 0, TokenType::kUnknown);
  add("<s>", 0, TokenType::kControl);
  add("</s>", 0, TokenType::kControl);
  for (int b = 0; b < 256; ++b) add(fmt::format("<0x{:02X}>", b), 0, TokenType::kByte);
  const std::string mark(kSpaceMark);
  float score = 0;
  for (const char* piece : {"ab", "bc", "abc", "he", "ll", "hell", "hello"})
    add(piece, score--, TokenType::kNormal);
  for (const std::string& piece : {mark + mark, mark + "hello"})
    add(piece, score--, TokenType::kNormal);
  for (const std::string& piece :
       {mark, std::string("a"), std::string("b"), std::string("c"), std::string("e"),
        std::string("h"), std::string("l"), std::string("o"), std::string("\u00e9")}) {
    add(piece, score--, TokenType::kNormal);
  }
  v.bos_id = 1;
  v.eos_id = 2;
  v.unk_id = 0;
  return v;
}

}  // namespace dsla::testing
