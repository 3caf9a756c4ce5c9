#include "server/openai/json_doc.h"
#include "server/openai/parse_common.h"

namespace dsla::openai {

Parsed<TokenizeRequest> ParseTokenize(std::string_view body, const Limits& limits) {
  JsonDoc doc;
  if (auto error = doc.Parse(body)) return *error;
  FirstError error;
  const Fields fields(doc.object(), "", &error);
  TokenizeRequest request;
  fields.String("model", kMaxNameBytes, &request.model);
  // vLLM's name, llama.cpp's, or a conversation.
  int sources = 0;
  sources += fields.String("prompt", kMaxTextBytes, &request.text);
  sources += fields.String("content", kMaxTextBytes, &request.text);
  if (fields.Find("messages")) {
    ++sources;
    ParseMessages(fields, limits, &request.messages);
    ParseTools(fields, limits, Form::kNested, &request.tools);
  }
  if (sources != 1) {
    error.Set(InvalidRequestError("exactly one of 'prompt', 'content' and 'messages' is needed",
                                  "prompt", "missing_required_parameter"));
  }
  // llama.cpp's server adds them where it is told to alone.
  if (fields.Find("content")) request.add_special_tokens = false;
  fields.Bool("add_special", &request.add_special_tokens);
  fields.Bool("add_special_tokens", &request.add_special_tokens);
  ParsePromptOptions(fields, &request.prompt);
  fields.Bool("parse_special", &request.parse_special);
  fields.Bool("return_token_strs", &request.return_token_strs);
  fields.Bool("with_pieces", &request.with_pieces);
  if (auto first = error.Take()) return *first;
  return request;
}

Parsed<DetokenizeRequest> ParseDetokenize(std::string_view body, const Limits& limits) {
  JsonDoc doc;
  if (auto error = doc.Parse(body)) return *error;
  FirstError error;
  const Fields fields(doc.object(), "", &error);
  DetokenizeRequest request;
  fields.String("model", kMaxNameBytes, &request.model);
  if (const auto tokens = fields.Find("tokens")) {
    ReadTokens(*tokens, "tokens", limits.vocab_size, &request.tokens, &error);
  } else {
    error.Set(InvalidRequestError("'tokens' is missing", "tokens", "missing_required_parameter"));
  }
  if (auto first = error.Take()) return *first;
  return request;
}

}  // namespace dsla::openai
