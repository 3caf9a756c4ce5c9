#include "server/openai/handlers.h"

namespace dsla::openai {

void HandleMetrics(const ServicePtr& service, RequestPtr, ResponderPtr responder) {
  responder->Respond(TextResponse(200,
                                  service->context().metrics->Render(service->engine().state()),
                                  ServerMetrics::kContentType));
}

void HandleDslaState(const ServicePtr& service, RequestPtr, ResponderPtr responder) {
  responder->Respond(JsonResponse(200, service->context().control->StateJson()));
}

void HandleDslaCommand(const ServicePtr& service, RequestPtr request, ResponderPtr responder) {
  DslaControl& control = *service->context().control;
  const auto command = ParseDslaCommand(request->body, control.ladder());
  const Status status = command.ok() ? control.Apply(*command) : command.status();
  responder->Respond(status.ok() ? JsonResponse(200, control.StateJson())
                                 : ErrorResponse(InvalidRequestError(status.message())));
}

}  // namespace dsla::openai
