// Log-probabilities of tokens in the two forms of the API, built token by token as JSON.
//
// Completions: {"tokens","token_logprobs","top_logprobs","text_offset"}. top_logprobs holds the n
// likeliest and the token itself, by text; of tokens with one text the likelier stays. A token that
// is not whole UTF-8 is written as bytes:\xe2\x80. text_offset counts code points.
// Chat: {"content":[{"token","logprob","bytes","top_logprobs":[...]}],"refusal":null}.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "engine/request.h"
#include "format/tokenizer/tokenizer.h"
#include "server/json_writer.h"

namespace dsla::openai {

class Logprobs {
 public:
  // top: how many of the likeliest to show.
  Logprobs(const Tokenizer* tokenizer, bool chat, int top);

  // The first token of a prompt has no probability: logprob is null. offset: code points of text
  // before it.
  void Add(int32_t token, const float* logprob, std::span<const TokenLogprob> likeliest,
           int64_t offset);
  // What was added since the last call.
  std::string Take();

 private:
  void AddChat(int32_t token, float logprob, std::span<const TokenLogprob> likeliest);
  void WriteToken(int32_t token, float logprob, JsonWriter* out) const;
  void Clear();

  const Tokenizer* tokenizer_;
  bool chat_;
  int top_;
  JsonWriter tokens_, logprobs_, likeliest_, offsets_;  // arrays that are still open; chat has one
};

// Code points before each token of a text.
class TextOffsets {
 public:
  // continues: the first token follows others.
  TextOffsets(const Tokenizer& tokenizer, bool continues)
      : decoder_(tokenizer, {.continues = continues}) {}
  // in_text: the text holds what the token spells.
  int64_t Next(int32_t token, bool in_text);

 private:
  IncrementalDecoder decoder_;
  int64_t code_points_ = 0;
};

}  // namespace dsla::openai
