#include "server/openai/logprobs.h"

#include <fmt/format.h>

#include <algorithm>

#include "format/tokenizer/utf8.h"

namespace dsla::openai {
namespace {

// Stands for "never", as JSON has no infinity.
constexpr float kLowest = -9999.0f;

float Finite(float logprob) { return std::max(logprob, kLowest); }

std::string KeyOf(std::string_view bytes) {
  if (utf8::IsValid(bytes)) return std::string(bytes);
  std::string key = "bytes:";
  for (const char c : bytes) key += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
  return key;
}

}  // namespace

Logprobs::Logprobs(const Tokenizer* tokenizer, bool chat, int top)
    : tokenizer_(tokenizer), chat_(chat), top_(top) {
  Clear();
}

void Logprobs::Clear() {
  for (JsonWriter* array : {&tokens_, &logprobs_, &likeliest_, &offsets_}) {
    *array = JsonWriter("[");
  }
}

void Logprobs::WriteToken(int32_t token, float logprob, JsonWriter* out) const {
  const std::string_view bytes = tokenizer_->TokenBytes(token);
  out->Field("token", bytes).Key("logprob").Float(Finite(logprob)).Key("bytes").BeginArray();
  for (const char c : bytes) out->Int(static_cast<unsigned char>(c));
  out->EndArray();
}

void Logprobs::AddChat(int32_t token, float logprob, std::span<const TokenLogprob> likeliest) {
  tokens_.BeginObject();
  WriteToken(token, logprob, &tokens_);
  tokens_.Key("top_logprobs").BeginArray();
  for (const TokenLogprob& other : likeliest) {
    tokens_.BeginObject();
    WriteToken(other.token, other.logprob, &tokens_);
    tokens_.EndObject();
  }
  tokens_.EndArray().EndObject();
}

void Logprobs::Add(int32_t token, const float* logprob, std::span<const TokenLogprob> likeliest,
                   int64_t offset) {
  likeliest = likeliest.first(std::min(likeliest.size(), static_cast<size_t>(top_)));
  if (chat_) {
    AddChat(token, logprob ? *logprob : kLowest, likeliest);
    return;
  }
  tokens_.String(KeyOf(tokenizer_->TokenBytes(token)));
  offsets_.Int(offset);
  if (!logprob) {
    logprobs_.Null();
    likeliest_.Null();
    return;
  }
  logprobs_.Float(Finite(*logprob));
  std::vector<std::string> keys;
  likeliest_.BeginObject();
  const auto add = [&](int32_t id, float value) {
    std::string key = KeyOf(tokenizer_->TokenBytes(id));
    if (std::find(keys.begin(), keys.end(), key) != keys.end()) return;
    likeliest_.Key(key).Float(Finite(value));
    keys.push_back(std::move(key));
  };
  // Likeliest first, so the first of one text is the one to keep; the token itself may be likelier
  // than another of its text.
  for (const TokenLogprob& other : likeliest) {
    if (other.logprob < *logprob) add(token, *logprob);
    add(other.token, other.logprob);
  }
  add(token, *logprob);
  likeliest_.EndObject();
}

std::string Logprobs::Take() {
  JsonWriter out;
  out.BeginObject();
  if (chat_) {
    out.Key("content").Raw(tokens_.EndArray().str()).Key("refusal").Null();
  } else {
    out.Key("tokens").Raw(tokens_.EndArray().str());
    out.Key("token_logprobs").Raw(logprobs_.EndArray().str());
    out.Key("top_logprobs").Raw(likeliest_.EndArray().str());
    out.Key("text_offset").Raw(offsets_.EndArray().str());
  }
  Clear();
  return out.EndObject().Take();
}

int64_t TextOffsets::Next(int32_t token, bool in_text) {
  const int64_t before = code_points_;
  if (!in_text) return before;
  for (const char c : decoder_.Push(token)) {
    code_points_ += (static_cast<unsigned char>(c) & 0xc0) != 0x80;  // not a continuation byte
  }
  return before;
}

}  // namespace dsla::openai
