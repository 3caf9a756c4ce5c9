#include "server/json_writer.h"
#include "server/openai/handlers.h"

namespace dsla::openai {
namespace {

void WriteModel(const Service& service, const std::string& name, JsonWriter& out) {
  const ApiContext& context = service.context();
  out.BeginObject().Field("id", name).Field("object", "model");
  out.Field("created", service.started()).Field("owned_by", "dsla");
  out.Field("root", context.model_root.empty() ? name : context.model_root).Key("parent").Null();
  out.Field("max_model_len", service.limits().max_context);
  out.Key("permission").BeginArray().EndArray().EndObject();
}

}  // namespace

void HandleModels(const ServicePtr& service, RequestPtr, ResponderPtr responder) {
  JsonWriter out;
  out.BeginObject().Field("object", "list").Key("data").BeginArray();
  for (const std::string& name : service->context().model_names) WriteModel(*service, name, out);
  responder->Respond(JsonResponse(200, out.EndArray().EndObject().Take()));
}

void HandleModel(const ServicePtr& service, RequestPtr request, ResponderPtr responder) {
  const auto name = service->ModelName(request->PathParam("id"));
  if (const auto* error = std::get_if<HttpError>(&name)) {
    responder->Respond(ErrorResponse(*error));
    return;
  }
  JsonWriter out;
  WriteModel(*service, std::get<std::string>(name), out);
  responder->Respond(JsonResponse(200, out.Take()));
}

}  // namespace dsla::openai
