#include "engine/engine_checks.h"

#include <algorithm>
#include <utility>

#include "format/tokenizer/utf8.h"

namespace dsla {
namespace {

template <typename... Args>
Rejection Invalid(const char* param, fmt::format_string<Args...> format, Args&&... args) {
  return {.kind = Rejection::Kind::kInvalid,
          .message = fmt::format(format, std::forward<Args>(args)...),
          .param = param};
}

std::optional<Rejection> CheckPrompt(const Request& request, const RequestLimits& limits) {
  if (request.prompt.empty()) return Invalid("prompt", "the prompt has no tokens");
  for (const int32_t token : request.prompt) {
    if (token < 0 || token >= limits.V)
      return Invalid("prompt", "token id {}: the vocabulary has {}", token, limits.V);
  }
  if (request.max_tokens < 0)
    return Invalid("max_tokens", "max_tokens {}: must not be negative", request.max_tokens);
  if (request.max_tokens == 0 && !request.prompt_logprobs) {
    return Invalid("max_tokens",
                   "max_tokens 0: only with the log-probabilities of the prompt is there anything "
                   "to do");
  }
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  if (prompt + request.max_tokens > limits.max_positions) {
    return Rejection{.kind = Rejection::Kind::kContextLength,
                     .message = fmt::format("the prompt has {} tokens and max_tokens is {}, {} "
                                            "together; the context holds {}",
                                            prompt, request.max_tokens, prompt + request.max_tokens,
                                            limits.max_positions),
                     .param = prompt >= limits.max_positions ? "prompt" : "max_tokens"};
  }
  return std::nullopt;
}

std::optional<Rejection> CheckStop(const Request& request, const RequestLimits& limits) {
  if (request.min_tokens < 0 || request.min_tokens > request.max_tokens) {
    return Invalid("min_tokens", "min_tokens {}: must be from 0 to max_tokens, {}",
                   request.min_tokens, request.max_tokens);
  }
  for (const int32_t token : request.stop_ids) {
    if (token < 0 || token >= limits.V)
      return Invalid("stop_token_ids", "token id {}: the vocabulary has {}", token, limits.V);
  }
  size_t bytes = 0;
  for (const std::string& stop : request.stop) {
    if (stop.empty()) return Invalid("stop", "a stop string is empty");
    if (!utf8::IsValid(stop)) return Invalid("stop", "a stop string is not UTF-8");
    bytes += stop.size();
  }
  if (bytes > kMaxStopBytes) {
    return Invalid("stop", "the stop strings have {} bytes together, at most {} are allowed", bytes,
                   kMaxStopBytes);
  }
  return std::nullopt;
}

}  // namespace

std::optional<Rejection> CheckRequest(const Request& request, const RequestLimits& limits) {
  if (request.id.empty()) return Invalid("request_id", "the request has no id");
  if (auto wrong = CheckPrompt(request, limits)) return wrong;
  if (auto wrong = CheckStop(request, limits)) return wrong;
  const Status sampling = Validate(request.sampling, limits.V);
  if (!sampling.ok()) {
    const std::string& message = sampling.message();
    return Rejection{.kind = Rejection::Kind::kInvalid,
                     .message = message,
                     .param = message.substr(0, message.find_first_of(" :"))};
  }
  if (request.top_logprobs < -1 || request.top_logprobs > kMaxTopLogprobs) {
    return Invalid("top_logprobs", "top_logprobs {}: must be from 0 to {}, or -1 for none",
                   request.top_logprobs, kMaxTopLogprobs);
  }
  if (request.tier == Tier::kExact && (request.level < 0 || request.level > limits.max_level)) {
    return Invalid("level", "level {}: must be from 0 to {}", request.level, limits.max_level);
  }
  if (!(request.deadline >= 0))
    return Invalid("deadline", "deadline {}: must not be negative", request.deadline);
  return std::nullopt;
}

Status CheckOptions(const EngineOptions& options, int max_level, int page_size) {
  if (options.memory_bytes <= 0)
    return InvalidArgument("memory of {} bytes: must be positive", options.memory_bytes);
  if (options.max_batch_tokens < 2 * page_size) {
    return InvalidArgument("max_batch_tokens {}: must be at least two pages, {}",
                           options.max_batch_tokens, 2 * page_size);
  }
  const int chunk = DeterministicChunk(page_size);
  if (options.deterministic && options.max_batch_tokens < 2 * chunk) {
    return InvalidArgument("max_batch_tokens {}: must be at least {} in deterministic mode",
                           options.max_batch_tokens, 2 * chunk);
  }
  if (options.max_running < 1)
    return InvalidArgument("max_running {}: must be positive", options.max_running);
  if (options.max_queued < 1)
    return InvalidArgument("max_queued {}: must be positive", options.max_queued);
  if (options.max_queued_tokens < 0) {
    return InvalidArgument("max_queued_tokens {}: must not be negative", options.max_queued_tokens);
  }
  if (options.max_preemptions < 0)
    return InvalidArgument("max_preemptions {}: must not be negative", options.max_preemptions);
  if (options.snapshot_stride <= 0 || options.snapshot_stride % page_size != 0) {
    return InvalidArgument("snapshot_stride {}: must be a multiple of the page size, {}",
                           options.snapshot_stride, page_size);
  }
  if (options.default_max_level < 0 || options.default_max_level > max_level) {
    return InvalidArgument("default_max_level {}: must be from 0 to {}", options.default_max_level,
                           max_level);
  }
  return Status::Ok();
}

}  // namespace dsla
