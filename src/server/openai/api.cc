#include "server/openai/api.h"

#include "server/openai/handlers.h"

namespace dsla::openai {
namespace {

using HandlerOfService = void (*)(const ServicePtr&, RequestPtr, ResponderPtr);
using HandlerOfText = void (*)(const ServicePtr&, PermitPtr, RequestPtr, ResponderPtr);

// Of a body with a large text.
constexpr size_t kLargeBytes = 64 << 10;

void RunOnText(HandlerOfText handler, bool for_engine, const ServicePtr& service,
               RequestPtr request, ResponderPtr responder) {
  auto admitted = service->Admit(for_engine);
  if (const auto* error = std::get_if<HttpError>(&admitted)) {
    responder->Respond(ErrorResponse(*error));
    return;
  }
  PermitPtr permit = std::get<PermitPtr>(std::move(admitted));
  TaskPool* const pool = service->context().text_pool;
  if (pool != nullptr && request->body.size() > kLargeBytes) {
    // Tasks can be copied, a permit cannot.
    const auto held = std::make_shared<PermitPtr>(std::move(permit));
    RunInPool(*pool, responder, [=] { handler(service, std::move(*held), request, responder); });
  } else {
    handler(service, std::move(permit), std::move(request), std::move(responder));
  }
}

}  // namespace

void RunInPool(TaskPool& pool, const ResponderPtr& responder, std::function<void()> task) {
  pool.Post([responder, task = std::move(task)] {
    if (responder->gone()) return;
    try {
      task();
    } catch (const std::bad_alloc&) {
      responder->Note("cause", "out of memory in the request's handler");
      responder->Respond(ErrorResponse(OutOfMemoryError()));
    } catch (const std::exception& error) {
      responder->Note("cause", error.what());
      responder->Respond(ErrorResponse(InternalError()));
    }
  });
}

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
  const auto add_text = [&](std::string_view pattern, HandlerOfText handler, bool for_engine) {
    router.Add("POST", pattern,
               [service, handler, for_engine](RequestPtr request, ResponderPtr responder) {
                 RunOnText(handler, for_engine, service, std::move(request), std::move(responder));
               });
  };
  const RouteOptions always = {.while_draining = true};
  add_text("/v1/completions", HandleCompletions, /*for_engine=*/true);
  add_text("/v1/chat/completions", HandleChat, /*for_engine=*/true);
  add_text("/v1/responses", HandleResponses, /*for_engine=*/true);
  add("GET", "/v1/models", HandleModels, always);
  add("GET", "/v1/models/{id}", HandleModel, always);
  // Clients look for these at the root or under /v1.
  for (const char* prefix : {"", "/v1"}) {
    const std::string at = prefix;
    add_text(at + "/tokenize", HandleTokenize, /*for_engine=*/false);
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
