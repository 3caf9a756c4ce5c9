#include <fmt/format.h>

#include "server/json_writer.h"
#include "server/openai/json_doc.h"
#include "server/openai/parse_common.h"
#include "server/openai/responses.h"

namespace dsla::openai {
namespace {

namespace dom = simdjson::dom;

constexpr size_t kMaxMetadata = 16;  // pairs, and bytes of each: OpenAI's limits
constexpr size_t kMaxMetadataBytes = 512;
constexpr size_t kMaxInclude = 32;

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
  std::string truncation;
  if (fields.String("truncation", kMaxNameBytes, &truncation))
    fields.RefuseUnless("truncation", truncation == "disabled");
  if (const auto object = fields.Object("reasoning")) {
    const Fields reasoning(*object, "reasoning.", fields.error());
    for (const dom::key_value_pair entry : *object) reasoning.Refuse({entry.key});
  }
}

// `echo`: the format as it was given.
void ParseText(const Fields& fields, Common* common, std::string* echo) {
  const auto object = fields.Object("text");
  if (!object) return;
  const Fields text(*object, "text.", fields.error());
  if (std::string verbosity; text.String("verbosity", kMaxNameBytes, &verbosity))
    text.RefuseUnless("verbosity", verbosity == "medium");
  ParseTextFormat(text, common);
  if (const auto format = text.Object("format")) *echo = simdjson::minify(*format);
}

// Whether log-probabilities are wanted. Reasoning is no item here, so that none of it is left out.
bool ParseInclude(const Fields& fields, bool tools) {
  const auto list = fields.Array("include");
  if (!list) return false;
  if (list->size() > kMaxInclude) {
    fields.error()->Set(
        InvalidRequestError(fmt::format("'include' has more than {} strings", kMaxInclude),
                            "include", "array_above_max_length"));
  }
  bool logprobs = false;
  int index = 0;
  for (const Element value : *list) {
    const std::string path = fmt::format("include[{}]", index++);
    std::string name;
    if (!fields.error()->ok() || !ReadString(value, path, kMaxNameBytes, &name, fields.error()))
      return false;
    if (name == "reasoning.encrypted_content") continue;
    if (name != "message.output_text.logprobs") {
      fields.error()->Set(InvalidRequestError(
          fmt::format("'{}' is '{}', which this server has not", path, name.substr(0, 64)), path,
          "unsupported_parameter"));
    } else if (tools) {
      // Which of a reply's tokens are its text is not known.
      fields.error()->Set(
          InvalidRequestError(fmt::format("'{}' is '{}', which goes with no 'tools'", path, name),
                              path, "unsupported_parameter"));
    }
    logprobs = true;
  }
  return logprobs;
}

void ParseLogprobs(const Fields& fields, const Limits& limits, ChatRequest* chat) {
  const bool wanted = ParseInclude(fields, !chat->tools.tools.empty());
  int top = 0;
  fields.Int("top_logprobs", 0, limits.max_logprobs, &top);
  if (wanted) {
    chat->logprobs = top;
  } else if (top > 0) {
    fields.error()->Set(InvalidRequestError(
        "'top_logprobs' needs 'include': [\"message.output_text.logprobs\"]", "top_logprobs"));
  }
}

// The tools as they were given, and whether they are strict.
std::string ToolsEcho(const dom::array& tools) {
  JsonWriter out;
  out.BeginArray();
  for (const Element element : tools) {
    out.BeginObject();
    bool strict = true;
    for (const dom::key_value_pair field : dom::object(element)) {
      if (field.key != "strict") {
        out.Key(field.key).Raw(simdjson::to_string(field.value));
      } else if (field.value.is_bool()) {
        strict = bool(field.value);
      }
    }
    out.Field("strict", strict).EndObject();
  }
  return out.EndArray().Take();
}

void ParseResponseTools(const Fields& fields, const Limits& limits, ToolsRequest* tools,
                        ResponsesEcho* echo) {
  ParseTools(fields, limits, Form::kFlat, tools);
  echo->parallel = tools->parallel;
  if (const auto list = fields.Array("tools")) echo->tools = ToolsEcho(*list);
  if (const auto choice = fields.Find("tool_choice")) echo->tool_choice = simdjson::minify(*choice);
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
  ChatRequest& chat = request.chat;
  Common& common = chat.common;
  ResponsesEcho& echo = request.echo;
  RefuseUnsupported(fields);
  ParseCommon(fields, limits, &common);
  fields.RefuseUnless("n", common.n == 1);
  common.include_usage = common.stream;
  common.continuous_usage = false;
  std::string instructions;
  if (fields.String("instructions", kMaxTextBytes, &instructions)) {
    chat.messages.push_back({"system", instructions});
    echo.instructions = std::move(instructions);
  }
  ParseResponsesInput(fields, limits, &chat.messages);
  ParsePromptOptions(fields, &chat.prompt);
  ParseResponseTools(fields, limits, &chat.tools, &echo);
  ParseText(fields, &common, &echo.format);
  ParseLogprobs(fields, limits, &chat);
  ParseMetadata(fields, &echo.metadata);
  int max_tokens = 0;
  if (fields.Int("max_output_tokens", 1, kMaxTokens, &max_tokens)) common.max_tokens = max_tokens;
  CheckTotals(fields, limits, common.n, "max_output_tokens", common);
  if (auto first = error.Take()) return *first;
  echo.max_tokens = common.max_tokens;
  echo.temperature = common.sampling.temperature;
  echo.top_p = common.sampling.top_p;
  echo.top_logprobs = std::max(chat.logprobs, 0);
  return request;
}

}  // namespace dsla::openai
