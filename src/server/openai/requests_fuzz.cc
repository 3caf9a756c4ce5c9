// Requests of any bytes: the first chooses the route, the others are the body. Whatever is accepted
// must be within its limits, and an error must name no more than a name.
#include <cstdint>

#include "base/check.h"
#include "server/openai/requests.h"
#include "server/openai/responses.h"

namespace dsla::openai {
namespace {

Limits TestLimits() {
  Limits limits;
  limits.vocab_size = 1000;
  limits.max_context = 4096;
  limits.adapter = true;
  limits.max_level = 30;
  return limits;
}

void CheckCommon(const Common& common, const Limits& limits) {
  DSLA_CHECK(Validate(common.sampling, limits.vocab_size).ok());
  DSLA_CHECK(common.n >= 1 && common.n <= limits.max_n);
  DSLA_CHECK(common.min_tokens >= 0 && common.level >= 0 && common.level <= limits.max_level);
  DSLA_CHECK(common.stop.size() <= static_cast<size_t>(limits.max_stop));
  for (const std::string& stop : common.stop) {
    DSLA_CHECK(!stop.empty() && stop.size() <= limits.max_stop_bytes);
  }
  DSLA_CHECK(common.timeout >= 0 && common.timeout <= limits.max_timeout);
}

void CheckTokens(const std::vector<int32_t>& tokens, const Limits& limits) {
  for (const int32_t token : tokens) DSLA_CHECK(token >= 0 && token < limits.vocab_size);
}

void Check(const CompletionRequest& request, const Limits& limits) {
  CheckCommon(request.common, limits);
  DSLA_CHECK(!request.prompts.empty() && request.common.max_tokens);
  for (const Prompt& prompt : request.prompts) {
    if (const auto* tokens = std::get_if<std::vector<int32_t>>(&prompt)) {
      DSLA_CHECK(!tokens->empty());
      CheckTokens(*tokens, limits);
    }
  }
}

void Check(const ChatRequest& request, const Limits& limits) {
  CheckCommon(request.common, limits);
  DSLA_CHECK(!request.messages.empty());
}

void Check(const ResponsesRequest& request, const Limits& limits) {
  Check(request.chat, limits);
  DSLA_CHECK(request.chat.common.n == 1);
}

void Check(const TokenizeRequest&, const Limits&) {}
void Check(const DetokenizeRequest& request, const Limits& limits) {
  CheckTokens(request.tokens, limits);
}

template <typename T>
void CheckParsed(const Parsed<T>& parsed, const Limits& limits) {
  if (const auto* request = std::get_if<T>(&parsed)) {
    Check(*request, limits);
    return;
  }
  const auto& error = std::get<HttpError>(parsed);
  DSLA_CHECK(error.status == 400 && !error.message.empty() && !error.code.empty());
  DSLA_CHECK(error.message.size() < 2000);
  DSLA_CHECK(!ErrorJson(error).empty());
}

}  // namespace
}  // namespace dsla::openai

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsla::openai;
  if (size == 0) return 0;
  static const Limits limits = TestLimits();
  const std::string_view body(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch ((data[0] + 2) % 5) {  // '0' to '4'
    case 0:
      CheckParsed(ParseCompletion(body, limits), limits);
      break;
    case 1:
      CheckParsed(ParseChat(body, limits), limits);
      break;
    case 2:
      CheckParsed(ParseTokenize(body, limits), limits);
      break;
    case 3:
      CheckParsed(ParseDetokenize(body, limits), limits);
      break;
    case 4:
      CheckParsed(ParseResponses(body, limits), limits);
      break;
  }
  return 0;
}
