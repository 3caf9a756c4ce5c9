// OpenAI's Responses API over chat completions: a request becomes chat's, and what chat answers is
// rewritten, whole or event by event. Text in, text out, and nothing is stored.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/http/http.h"
#include "server/openai/requests.h"

namespace dsla::openai {

struct ResponsesRequest {
  Common common;                      // one reply, with its usage where it is streamed
  std::vector<ChatMessage> messages;  // the instructions first
  PromptOptions prompt;
  std::optional<std::string> instructions;
  std::string metadata = "{}";  // a JSON object
};

Parsed<ResponsesRequest> ParseResponses(std::string_view body, const Limits& limits);

// What chat is to answer to: hands on to `responder` in this API's form. The usage must be asked
// for in a stream. Calls come one at a time, as a generation's do.
std::shared_ptr<Responder> ResponsesOver(std::shared_ptr<Responder> responder,
                                         const ResponsesRequest& request);

}  // namespace dsla::openai
