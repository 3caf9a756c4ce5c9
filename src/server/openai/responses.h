// OpenAI's Responses API over chat completions: a request becomes chat's, and what chat answers is
// rewritten, whole or event by event. Text and calls of functions go in and come out, and nothing
// is stored.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "server/http/http.h"
#include "server/openai/requests.h"

namespace dsla::openai {

// What of a request its response repeats.
struct ResponsesEcho {
  std::optional<std::string> instructions;
  std::optional<int> max_tokens;
  float temperature = 1, top_p = 1;
  int top_logprobs = 0;
  bool parallel = true;
  // As JSON.
  std::string metadata = "{}";
  std::string format = R"({"type":"text"})";
  std::string tools = "[]";
  std::string tool_choice = R"("auto")";
};

struct ResponsesRequest {
  ChatRequest chat;  // one reply, with its usage where it is streamed; the instructions come first
  ResponsesEcho echo;
};

Parsed<ResponsesRequest> ParseResponses(std::string_view body, const Limits& limits);

// What chat is to answer to: hands on to `responder` in this API's form. The usage must be asked
// for in a stream. Calls come one at a time, as a generation's do.
std::shared_ptr<Responder> ResponsesOver(std::shared_ptr<Responder> responder, ResponsesEcho echo);

}  // namespace dsla::openai
