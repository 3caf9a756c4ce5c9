#include "server/openai/handlers.h"
#include "server/openai/json_doc.h"
#include "server/openai/parse_common.h"

namespace dsla::openai {
namespace {

Parsed<DslaCommand> ParseDslaCommand(std::string_view body, const Limits& limits) {
  JsonDoc doc;
  if (auto error = doc.Parse(body)) return *error;
  FirstError error;
  const Fields fields(doc.object(), "", &error);
  fields.RefuseOthers({"policy", "level", "max_level"},
                      "there are 'policy', 'level' and 'max_level'");
  DslaCommand command;
  if (std::string policy; fields.String("policy", kMaxNameBytes, &policy)) {
    if (policy != "slo" && policy != "paper" && policy != "fixed") {
      error.Set(InvalidRequestError("'policy' must be one of 'slo', 'paper', 'fixed'", "policy"));
    }
    command.policy = std::move(policy);
  }
  if (int level = 0; fields.Int("level", 0, limits.max_level, &level)) command.level = level;
  if (int level = 0; fields.Int("max_level", 0, limits.max_level, &level)) {
    command.max_level = level;
  }
  if (!command.policy && !command.level && !command.max_level) {
    error.Set(InvalidRequestError("nothing to change: name 'policy', 'level' or 'max_level'", "",
                                  "missing_required_parameter"));
  }
  if (command.level && command.policy && *command.policy != "fixed") {
    error.Set(InvalidRequestError(
        fmt::format("'level' goes with the policy 'fixed', not '{}'", *command.policy), "level"));
  }
  if (auto first = error.Take()) return *first;
  return command;
}

}  // namespace

void HandleMetrics(const ServicePtr& service, RequestPtr, ResponderPtr responder) {
  responder->Respond(TextResponse(200,
                                  service->context().metrics->Render(service->engine().state()),
                                  ServerMetrics::kContentType));
}

void HandleDslaState(const ServicePtr& service, RequestPtr, ResponderPtr responder) {
  responder->Respond(JsonResponse(200, service->context().control->StateJson()));
}

void HandleDslaCommand(const ServicePtr& service, RequestPtr request, ResponderPtr responder) {
  const auto command = ParseDslaCommand(request->body, service->limits());
  if (const auto* error = std::get_if<HttpError>(&command)) {
    responder->Respond(ErrorResponse(*error));
    return;
  }
  DslaControl& control = *service->context().control;
  const Status status = control.Apply(std::get<DslaCommand>(command));
  responder->Respond(status.ok() ? JsonResponse(200, control.StateJson())
                                 : ErrorResponse(InvalidRequestError(status.message())));
}

}  // namespace dsla::openai
