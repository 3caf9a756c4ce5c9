// What clients may ask, as plain values: JSON is checked against these types and limits here, and
// nothing behind this file sees JSON. Fields of the API that this server does not know are ignored;
// those that it knows and cannot do are refused by name.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "engine/prompt.h"
#include "engine/request.h"
#include "grammar/grammar.h"
#include "server/http/errors.h"

namespace dsla::openai {

struct Limits {
  int64_t vocab_size = 0;
  int max_context = 0;     // tokens of prompt and reply
  bool adapter = false;    // whether there are levels besides 0
  int max_level = 0;       // of an exact level
  int max_n = 16;          // replies per prompt
  int max_prompts = 256;   // of one completions request
  int max_choices = 1024;  // prompts * n: as many as may wait
  int max_messages = 4096;
  int max_tools = 128;
  size_t max_tools_bytes = size_t{1} << 20;  // of their JSON together
  int max_tool_calls = 128;                  // of one message
  int max_stop = 16;                         // strings
  size_t max_stop_bytes = 1024;              // of one
  int max_stop_ids = 64;
  int max_logit_bias = 1024;
  int max_logprobs = 20;
  int64_t max_total_tokens = 1 << 20;    // prompts * n * max_tokens
  int64_t max_total_logprobs = 1 << 22;  // that one answer holds, tens of bytes each
  double max_timeout = 3600;             // seconds
  // Of requests that say nothing of theirs.
  Tier default_tier = Tier::kAuto;
  SamplingParams sampling;
};

// What completions and chat have in common.
struct Common {
  std::string model;        // empty: the server's
  SamplingParams sampling;  // its seed is `seed`, or to be drawn
  std::optional<uint64_t> seed;
  int n = 1;
  std::optional<int> max_tokens;
  int min_tokens = 0;
  bool ignore_eos = false;
  std::vector<std::string> stop;
  std::vector<int32_t> stop_ids;
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage = false;
  Tier tier = Tier::kAuto;
  int level = 0;  // with Tier::kExact
  std::string cache_salt;
  double timeout = 0;       // seconds; 0 = the server's
  int truncate_prompt = 0;  // keep so many of the last prompt tokens; 0 = all
  bool return_token_ids = false;
  std::optional<GrammarSpec> grammar;  // that every reply follows
  std::string grammar_param;           // the field that it was given by
};

using Prompt = std::variant<std::string, std::vector<int32_t>>;

struct CompletionRequest {
  Common common;
  std::vector<Prompt> prompts;
  int logprobs = -1;  // -1: none; else the chosen token's and so many of the likeliest
  bool echo = false;
  bool add_special_tokens = true;
  bool parse_special = true;  // of prompts given as text
};

// What the model may call. `none` asks for no calls: then there are no tools at all.
struct ToolsRequest {
  enum class Choice { kAuto, kRequired, kNamed };
  std::vector<Tool> tools;
  Choice choice = Choice::kAuto;
  std::vector<std::string> allowed;  // names of tools: kNamed's, or what alone may be called
  bool parallel = true;              // more than one call in a reply
};

struct ChatRequest {
  Common common;
  std::vector<ChatMessage> messages;
  ToolsRequest tools;
  int logprobs = -1;
  PromptOptions prompt;
};

struct TokenizeRequest {
  std::string model;
  std::string text;
  std::vector<ChatMessage> messages;  // instead of text
  ToolsRequest tools;                 // beside messages
  bool add_special_tokens = true;
  PromptOptions prompt;       // of messages
  bool parse_special = true;  // as clients that tokenise for themselves expect
  bool return_token_strs = false;
  bool with_pieces = false;  // each token with its text
};

struct DetokenizeRequest {
  std::string model;
  std::vector<int32_t> tokens;
};

template <typename T>
using Parsed = std::variant<T, HttpError>;

Parsed<CompletionRequest> ParseCompletion(std::string_view body, const Limits& limits);
Parsed<ChatRequest> ParseChat(std::string_view body, const Limits& limits);
Parsed<TokenizeRequest> ParseTokenize(std::string_view body, const Limits& limits);
Parsed<DetokenizeRequest> ParseDetokenize(std::string_view body, const Limits& limits);

// 400 of a grammar that was given by common.grammar_param.
HttpError InvalidGrammarError(std::string message, const Common& common);

// Seconds that the client will wait, in a header.
constexpr const char* kTimeoutHeader = "X-Request-Timeout";
// Of a value such as "2.5". Error: naming the header.
Parsed<double> ParseTimeoutHeader(std::string_view value, const Limits& limits);

}  // namespace dsla::openai
