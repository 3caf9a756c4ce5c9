#include "server/openai/service.h"

#include <algorithm>
#include <chrono>
#include <random>

namespace dsla::openai {

Service::Service(ApiContext context) : context_(std::move(context)), canceller_(context_.engine) {
  DSLA_CHECK(context_.engine && context_.tokenizer && !context_.model_names.empty());
  DSLA_CHECK(context_.limits.max_context > 0);
  Limits& limits = context_.limits;
  limits.vocab_size = tokenizer().vocab_size();
  limits.max_level = context_.ladder.max_level;
  limits.adapter = context_.ladder.max_level > 0;
  if (context_.tool_dialect) tool_markers_ = ToolMarkers(*context_.tool_dialect, tokenizer());
  started_ = Now();
  size_t longest = 1;
  for (int32_t id = 0; id < tokenizer().vocab_size(); ++id) {
    longest = std::max(longest, tokenizer().TokenBytes(id).size());
  }
  max_text_bytes_ = longest * limits.max_context;
  uint64_t seed = context_.random_seed;
  if (seed == 0) {
    std::random_device device;
    seed = uint64_t{device()} << 32 | device();
  }
  random_ = seed;
}

Parsed<std::string> Service::ModelName(std::string_view asked) const {
  const auto& names = context_.model_names;
  if (asked.empty()) return names.front();
  if (std::find(names.begin(), names.end(), asked) == names.end())
    return ModelNotFoundError(asked, names);
  return std::string(asked);
}

Parsed<std::unique_ptr<Service::Permit>> Service::Admit(bool for_engine) {
  auto permit = std::make_unique<Permit>(this);  // counts down again where it is refused
  if (in_flight_.fetch_add(1, std::memory_order_relaxed) >= context_.max_in_flight) {
    if (context_.metrics) context_.metrics->CountRejection(Rejection::Kind::kQueueFull);
    return QueueFullError(fmt::format("the server is working on {} requests, as many as it takes",
                                      context_.max_in_flight),
                          retry_after_.load(std::memory_order_relaxed));
  }
  if (for_engine) {
    if (const auto refusal = engine().RefusesAll()) return ErrorOf(*refusal, 0);
  }
  return permit;
}

HttpError Service::ErrorOf(const Rejection& rejection, int64_t prompt_tokens) {
  if (context_.metrics) context_.metrics->CountRejection(rejection.kind);
  switch (rejection.kind) {
    case Rejection::Kind::kInvalid:
      return InvalidRequestError(rejection.message, rejection.param);
    case Rejection::Kind::kContextLength:
      return ContextLengthError(rejection.message, prompt_tokens, limits().max_context);
    case Rejection::Kind::kTooLargeForCache:
      return TooLargeForCacheError(rejection.message);
    case Rejection::Kind::kQueueFull:
      if (rejection.retry_after_seconds > 0) {
        retry_after_.store(rejection.retry_after_seconds, std::memory_order_relaxed);
      }
      return QueueFullError(rejection.message, rejection.retry_after_seconds);
    case Rejection::Kind::kUnavailable:
      break;
  }
  return ShuttingDownError();
}

int64_t Service::Now() const {
  if (context_.unix_time) return context_.unix_time();
  return std::chrono::duration_cast<std::chrono::seconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014):
// a counter's steps, each mixed by a bijection.
uint64_t Service::Random() {
  uint64_t z = random_.fetch_add(0x9e3779b97f4a7c15, std::memory_order_relaxed);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

}  // namespace dsla::openai
