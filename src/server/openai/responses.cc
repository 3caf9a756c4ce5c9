#include "server/openai/responses.h"

#include <utility>

#include "server/openai/generation.h"
#include "server/openai/handlers.h"

namespace dsla::openai {

void HandleResponses(const ServicePtr& service, PermitPtr permit, RequestPtr request,
                     ResponderPtr responder) {
  auto parsed = ParseResponses(request->body, service->limits());
  const auto refuse = [&](const HttpError& error) { responder->Respond(ErrorResponse(error)); };
  if (const auto* error = std::get_if<HttpError>(&parsed)) return refuse(*error);
  ResponsesRequest& asked = std::get<ResponsesRequest>(parsed);
  auto planned = PlanChat(*service, std::move(asked.chat));
  if (auto* error = std::get_if<HttpError>(&planned)) {
    if (error->param == "messages") error->param = "input";
    return refuse(*error);
  }
  GenerationPlan& plan = std::get<GenerationPlan>(planned);
  plan.logprobs_param = "include";
  plan.keeps_logprobs = true;
  StartGeneration(service, std::move(permit), std::move(plan), std::move(request),
                  ResponsesOver(std::move(responder), std::move(asked.echo)));
}

}  // namespace dsla::openai
