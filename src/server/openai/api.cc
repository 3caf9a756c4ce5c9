#include "server/openai/api.h"

#include "server/openai/handlers.h"

namespace dsla::openai {
namespace {

using HandlerOfService = void (*)(const ServicePtr&, RequestPtr, ResponderPtr);

}  // namespace

void RegisterApi(Router& router, ApiContext context) {
  const auto service = std::make_shared<Service>(std::move(context));
  const auto add = [&](const char* method, std::string_view pattern, HandlerOfService handler,
                       RouteOptions options = {}) {
    router.Add(
        method, pattern,
        [service, handler](RequestPtr request, ResponderPtr responder) {
          handler(service, std::move(request), std::move(responder));
        },
        options);
  };
  const RouteOptions always = {.while_draining = true};
  add("POST", "/v1/completions", HandleCompletions);
  add("POST", "/v1/chat/completions", HandleChat);
  add("GET", "/v1/models", HandleModels, always);
  add("GET", "/v1/models/{id}", HandleModel, always);
  // Clients look for these at the root or under /v1.
  for (const char* prefix : {"", "/v1"}) {
    const std::string at = prefix;
    add("POST", at + "/tokenize", HandleTokenize);
    add("POST", at + "/detokenize", HandleDetokenize);
    add("GET", at + "/tokenizer_info", HandleTokenizerInfo, always);
  }
  if (service->context().metrics) add("GET", "/metrics", HandleMetrics, always);
  if (service->context().control) {
    add("GET", "/v1/dsla", HandleDslaState, always);
    add("POST", "/v1/dsla", HandleDslaCommand,
        {.access = Access::kAdmin, .json_body = true, .while_draining = true});
  }
}

}  // namespace dsla::openai
