#include <simdjson.h>

#include "server/json_writer.h"
#include "server/openai/handlers.h"

namespace dsla::openai {
namespace {

std::optional<HttpError> TokensOf(const Service& service, const TokenizeRequest& request,
                                  std::vector<int32_t>* tokens) {
  const auto model = service.ModelName(request.model);
  if (const auto* error = std::get_if<HttpError>(&model)) return *error;
  EncodeOptions options;
  options.parse_special = request.parse_special;
  if (!request.add_special_tokens) options.add_bos = false;
  auto encoded = request.messages.empty() ? EncodeText(service, request.text, options)
                                          : EncodeMessages(service, request.messages,
                                                           request.tools.tools, request.prompt);
  if (const auto* error = std::get_if<HttpError>(&encoded)) return *error;
  *tokens = std::move(std::get<std::vector<int32_t>>(encoded));
  return std::nullopt;
}

void WriteSpecial(const Tokenizer& tokenizer, const char* name, std::optional<int32_t> id,
                  JsonWriter& out) {
  out.Key(name);
  if (id) {
    out.String(tokenizer.TokenText(*id));
  } else {
    out.Null();
  }
}

// As llama.cpp's server writes them: bytes that are no text are a list of numbers.
void WritePiece(const Tokenizer& tokenizer, int32_t id, JsonWriter& out) {
  const std::string_view bytes = tokenizer.TokenBytes(id);
  out.BeginObject().Field("id", id).Key("piece");
  if (simdjson::validate_utf8(bytes)) {
    out.String(bytes);
  } else {
    out.BeginArray();
    for (const char byte : bytes) out.Int(static_cast<unsigned char>(byte));
    out.EndArray();
  }
  out.EndObject();
}

}  // namespace

void HandleTokenize(const ServicePtr& service, PermitPtr /*held to the end*/, RequestPtr request,
                    ResponderPtr responder) {
  const auto parsed = ParseTokenize(request->body, service->limits());
  std::vector<int32_t> tokens;
  std::optional<HttpError> error;
  if (const auto* parse_error = std::get_if<HttpError>(&parsed)) {
    error = *parse_error;
  } else {
    error = TokensOf(*service, std::get<TokenizeRequest>(parsed), &tokens);
  }
  if (error) {
    responder->Respond(ErrorResponse(*error));
    return;
  }
  JsonWriter out;
  out.BeginObject().Field("count", static_cast<int64_t>(tokens.size()));
  out.Field("max_model_len", service->limits().max_context).Key("tokens").BeginArray();
  const TokenizeRequest& asked = std::get<TokenizeRequest>(parsed);
  for (const int32_t id : tokens) {
    if (asked.with_pieces) {
      WritePiece(service->tokenizer(), id, out);
    } else {
      out.Int(id);
    }
  }
  out.EndArray().Key("token_strs");
  if (asked.return_token_strs) {
    out.BeginArray();
    for (const int32_t id : tokens) out.String(service->tokenizer().TokenText(id));
    out.EndArray();
  } else {
    out.Null();
  }
  responder->Respond(JsonResponse(200, out.EndObject().Take()));
}

void HandleDetokenize(const ServicePtr& service, RequestPtr request, ResponderPtr responder) {
  const auto parsed = ParseDetokenize(request->body, service->limits());
  std::optional<HttpError> error;
  if (const auto* parse_error = std::get_if<HttpError>(&parsed)) {
    error = *parse_error;
  } else if (const auto model = service->ModelName(std::get<DetokenizeRequest>(parsed).model);
             std::holds_alternative<HttpError>(model)) {
    error = std::get<HttpError>(model);
  }
  if (error) {
    responder->Respond(ErrorResponse(*error));
    return;
  }
  const std::string text = service->tokenizer().Decode(std::get<DetokenizeRequest>(parsed).tokens);
  JsonWriter out;  // vLLM's name and llama.cpp's
  out.BeginObject().Field("prompt", text).Field("content", text).EndObject();
  responder->Respond(JsonResponse(200, out.Take()));
}

void HandleTokenizerInfo(const ServicePtr& service, RequestPtr, ResponderPtr responder) {
  const Tokenizer& tokenizer = service->tokenizer();
  const ApiContext& context = service->context();
  JsonWriter out;
  out.BeginObject();
  WriteSpecial(tokenizer, "bos_token", tokenizer.bos_id(), out);
  WriteSpecial(tokenizer, "eos_token", tokenizer.eos_id(), out);
  WriteSpecial(tokenizer, "pad_token", tokenizer.pad_id(), out);
  WriteSpecial(tokenizer, "unk_token", tokenizer.unk_id(), out);
  out.Key("chat_template");
  if (context.chat_template_source.empty()) {
    out.Null();
  } else {
    out.String(context.chat_template_source);
  }
  out.Field("vocab_size", tokenizer.vocab_size());
  out.Field("model_max_length", service->limits().max_context).EndObject();
  responder->Respond(JsonResponse(200, out.Take()));
}

}  // namespace dsla::openai
