#include <fmt/format.h>

#include "server/openai/json_doc.h"
#include "server/openai/parse_common.h"
#include "server/openai/responses.h"

namespace dsla::openai {
namespace {

namespace dom = simdjson::dom;

constexpr size_t kMaxMetadata = 16;  // pairs, and bytes of each: OpenAI's limits
constexpr size_t kMaxMetadataBytes = 512;

void SetMissing(const Fields& fields, const char* name) {
  const std::string path = fields.Path(name);
  fields.error()->Set(InvalidRequestError(fmt::format("'{}' is missing", path), path,
                                          "missing_required_parameter"));
}

// A type of OpenAI's that is not text.
void SetUnsupportedType(const Fields& fields, const std::string& type) {
  const std::string path = fields.Path("type");
  fields.error()->Set(InvalidRequestError(
      fmt::format("'{}' is '{}': this server reads text alone", path, type.substr(0, 64)), path,
      "unsupported_feature"));
}

std::optional<Fields> ObjectAt(Element value, const std::string& path, FirstError* error) {
  dom::object object;
  if (value.get(object) == simdjson::SUCCESS) return Fields(object, path + ".", error);
  SetTypeError(path, "an object", value, error);
  return std::nullopt;
}

void ParsePart(const Fields& part, std::string* content) {
  std::string type;
  if (!part.String("type", kMaxNameBytes, &type)) return SetMissing(part, "type");
  if (type != "input_text" && type != "output_text") return SetUnsupportedType(part, type);
  std::string text;
  if (!part.String("text", kMaxTextBytes, &text)) return SetMissing(part, "text");
  if (!content->empty()) *content += '\n';  // as chat joins its parts
  *content += text;
}

void ParseContent(const Fields& item, std::string* content) {
  const auto value = item.Find("content");
  const std::string path = item.Path("content");
  if (!value) return SetMissing(item, "content");
  if (value->is_string()) {
    ReadString(*value, path, kMaxTextBytes, content, item.error());
    return;
  }
  if (!value->is_array())
    return SetTypeError(path, "a string or an array of text parts", *value, item.error());
  int index = 0;
  for (const Element part : dom::array(*value)) {
    const auto fields = ObjectAt(part, fmt::format("{}[{}]", path, index++), item.error());
    if (fields) ParsePart(*fields, content);
    if (!item.error()->ok()) return;
  }
  if (index == 0)
    item.error()->Set(InvalidRequestError(fmt::format("'{}' is an empty array", path), path));
}

// A message, be it of the user's or one that came as output.
void ParseItem(const Fields& item, ChatMessage* message) {
  std::string type = "message";
  item.String("type", kMaxNameBytes, &type);
  if (type != "message") return SetUnsupportedType(item, type);
  const std::string path = item.Path("role");
  if (!item.String("role", kMaxNameBytes, &message->role)) return SetMissing(item, "role");
  if (message->role == "developer") message->role = "system";
  if (message->role != "system" && message->role != "user" && message->role != "assistant") {
    item.error()->Set(InvalidRequestError(
        fmt::format("'{}' must be one of 'system', 'developer', 'user', 'assistant', not '{}'",
                    path, message->role.substr(0, 64)),
        path));
  }
  ParseContent(item, &message->content);
}

void ParseInput(const Fields& fields, const Limits& limits, std::vector<ChatMessage>* messages) {
  const auto input = fields.Find("input");
  if (!input) return SetMissing(fields, "input");
  if (input->is_string()) {
    messages->push_back({"user", ""});
    ReadString(*input, "input", kMaxTextBytes, &messages->back().content, fields.error());
    return;
  }
  if (!input->is_array())
    return SetTypeError("input", "a string or an array of messages", *input, fields.error());
  const dom::array list(*input);
  if (list.size() == 0)
    fields.error()->Set(InvalidRequestError("'input' is an empty array", "input"));
  if (list.size() > static_cast<size_t>(limits.max_messages)) {
    fields.error()->Set(
        InvalidRequestError(fmt::format("'input' has more than {} messages", limits.max_messages),
                            "input", "array_above_max_length"));
  }
  int index = 0;
  for (const Element value : list) {
    const auto item = ObjectAt(value, fmt::format("input[{}]", index++), fields.error());
    if (item) ParseItem(*item, &messages->emplace_back());
    if (!fields.error()->ok()) return;
  }
}

// What this API has and this server has not, unless it says what holds anyway.
void RefuseUnsupported(const Fields& fields) {
  fields.Refuse(
      {"previous_response_id", "conversation", "prompt", "max_tool_calls", "context_management"});
  // Of chat: they would be dropped in silence.
  fields.Refuse({"messages", "max_tokens", "max_completion_tokens", "response_format", "logprobs",
                 "truncate_prompt_tokens", "return_token_ids"});
  for (const char* name : {"store", "background"}) {
    bool on = false;
    if (fields.Bool(name, &on)) fields.RefuseUnless(name, !on);
  }
  for (const char* name : {"tools", "include"})
    fields.RefuseUnless(name, IsEmptyArray(fields, name));
  if (const auto choice = fields.Find("tool_choice")) {
    const std::string_view word = choice->is_string() ? std::string_view(*choice) : "";
    fields.RefuseUnless("tool_choice", word == "auto" || word == "none");
  }
  std::string truncation;
  if (fields.String("truncation", kMaxNameBytes, &truncation))
    fields.RefuseUnless("truncation", truncation == "disabled");
  int top_logprobs = 0;
  if (fields.Int("top_logprobs", 0, 20, &top_logprobs))
    fields.RefuseUnless("top_logprobs", top_logprobs == 0);
  if (const auto object = fields.Object("reasoning")) {
    const Fields reasoning(*object, "reasoning.", fields.error());
    for (const dom::key_value_pair entry : *object) reasoning.Refuse({entry.key});
  }
  const auto object = fields.Object("text");
  if (!object) return;
  const Fields text(*object, "text.", fields.error());
  if (std::string verbosity; text.String("verbosity", kMaxNameBytes, &verbosity))
    text.RefuseUnless("verbosity", verbosity == "medium");
  if (const auto format = text.Object("format")) {
    std::string type;
    Fields(*format, "text.format.", fields.error()).String("type", kMaxNameBytes, &type);
    text.RefuseUnless("format", type == "text");
  }
}

void ParseMetadata(const Fields& fields, std::string* metadata) {
  const auto object = fields.Object("metadata");
  if (!object) return;
  if (object->size() > kMaxMetadata) {
    fields.error()->Set(InvalidRequestError(
        fmt::format("'metadata' has {} entries, more than {}", object->size(), kMaxMetadata),
        "metadata", "object_above_max_properties"));
  }
  for (const dom::key_value_pair entry : *object) {
    std::string text;
    ReadString(entry.value, "metadata", kMaxMetadataBytes, &text, fields.error());
    if (entry.key.size() > kMaxMetadataBytes) {
      fields.error()->Set(InvalidRequestError(
          fmt::format("'metadata' has a key of more than {} bytes", kMaxMetadataBytes), "metadata",
          "string_above_max_length"));
    }
  }
  *metadata = simdjson::minify(*object);
}

}  // namespace

Parsed<ResponsesRequest> ParseResponses(std::string_view body, const Limits& limits) {
  JsonDoc doc;
  if (auto error = doc.Parse(body)) return *error;
  FirstError error;
  const Fields fields(doc.object(), "", &error);
  ResponsesRequest request;
  Common& common = request.common;
  RefuseUnsupported(fields);
  ParseCommon(fields, limits, &common);
  fields.RefuseUnless("n", common.n == 1);
  common.include_usage = common.stream;
  common.continuous_usage = false;
  std::string instructions;
  if (fields.String("instructions", kMaxTextBytes, &instructions)) {
    request.messages.push_back({"system", instructions});
    request.instructions = std::move(instructions);
  }
  ParseInput(fields, limits, &request.messages);
  ParsePromptOptions(fields, &request.prompt);
  ParseMetadata(fields, &request.metadata);
  int max_tokens = 0;
  if (fields.Int("max_output_tokens", 1, kMaxTokens, &max_tokens)) common.max_tokens = max_tokens;
  CheckTotals(fields, limits, common.n, "max_output_tokens", common);
  if (auto first = error.Take()) return *first;
  return request;
}

}  // namespace dsla::openai
