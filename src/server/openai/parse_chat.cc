#include <fmt/format.h>

#include <map>

#include "server/openai/json_doc.h"
#include "server/openai/parse_common.h"

namespace dsla::openai {
namespace {

namespace dom = simdjson::dom;

HttpError UnsupportedFeature(std::string message, std::string path) {
  return InvalidRequestError(std::move(message), std::move(path), "unsupported_feature");
}

void ParsePart(Element value, const std::string& path, bool first, FirstError* error,
               std::string* content) {
  dom::object object;
  if (value.get(object) != simdjson::SUCCESS) {
    SetTypeError(path, "an object", value, error);
    return;
  }
  const Fields part(object, path + ".", error);
  std::string type, text;
  if (!part.String("type", kMaxNameBytes, &type)) {
    SetMissing(part, "type");
    return;
  }
  if (type != "text") {
    error->Set(UnsupportedFeature(fmt::format("'{}' is '{}': this server reads text alone",
                                              part.Path("type"), type.substr(0, 64)),
                                  part.Path("type")));
    return;
  }
  if (!part.String("text", kMaxTextBytes, &text)) {
    SetMissing(part, "text");
    return;
  }
  if (!first) *content += '\n';
  *content += text;
}

void ParseContent(const Fields& message, std::string* content) {
  const auto value = message.Find("content");
  const std::string path = message.Path("content");
  if (!value) {
    SetMissing(message, "content");
  } else if (value->is_string()) {
    ReadString(*value, path, kMaxTextBytes, content, message.error());
  } else if (value->is_array()) {
    int index = 0;
    for (const Element part : dom::array(*value)) {
      ParsePart(part, fmt::format("{}[{}]", path, index), index == 0, message.error(), content);
      if (!message.error()->ok()) return;
      ++index;
    }
    if (index == 0) {
      message.error()->Set(InvalidRequestError(fmt::format("'{}' is an empty array", path), path));
    }
  } else {
    SetTypeError(path, "a string or an array of text parts", *value, message.error());
  }
}

// What a message of a conversation with tools has beside its content.
void ParseToolFields(const Fields& message, const Limits& limits, ChatMessage* out) {
  if (out->role == "assistant") {
    ParseToolCalls(message, limits, &out->tool_calls);
  } else if (const auto calls = message.Find("tool_calls")) {
    message.RefuseUnless("tool_calls", calls->is_array() && dom::array(*calls).size() == 0);
  }
  if (out->role != "tool") return;
  message.String("name", kMaxNameBytes, &out->name);
  if (!message.String("tool_call_id", kMaxNameBytes, &out->tool_call_id))
    SetMissing(message, "tool_call_id");
}

void ParseMessage(const Fields& message, const Limits& limits, ChatMessage* out) {
  const std::string path = message.Path("role");
  if (!message.String("role", kMaxNameBytes, &out->role)) {
    SetMissing(message, "role");
    return;
  }
  // OpenAI's newer name of the same role.
  if (out->role == "developer") out->role = "system";
  if (out->role == "function") {
    message.error()->Set(UnsupportedFeature(
        fmt::format("'{}' is 'function': results of tools have the role 'tool'", path), path));
  } else if (out->role != "system" && out->role != "user" && out->role != "assistant" &&
             out->role != "tool") {
    message.error()->Set(InvalidRequestError(
        fmt::format(
            "'{}' must be one of 'system', 'developer', 'user', 'assistant', 'tool', not '{}'",
            path, out->role.substr(0, 64)),
        path));
  }
  message.Refuse({"function_call", "audio"});
  ParseToolFields(message, limits, out);
  const bool may_be_absent = !out->tool_calls.empty() && !message.Find("content");
  if (!may_be_absent) ParseContent(message, &out->content);
}

void RefuseUnsupportedChat(const Fields& fields) {
  fields.Refuse({"audio", "prediction", "web_search_options", "chat_template", "documents",
                 "reasoning_effort", "mm_processor_kwargs", "media_io_kwargs"});
  fields.RefuseUnless("functions", IsEmptyArray(fields, "functions"));
  const auto call = fields.Find("function_call");
  fields.RefuseUnless("function_call",
                      call && call->is_string() && std::string_view(*call) == "none");
  if (const auto modalities = fields.Array("modalities")) {
    bool text_alone = modalities->size() == 1;
    for (const Element name : *modalities) {
      text_alone = text_alone && name.is_string() && std::string_view(name) == "text";
    }
    fields.RefuseUnless("modalities", text_alone);
  }
}

// logprobs is a boolean here, with top_logprobs beside it.
void ParseLogprobs(const Fields& fields, const Limits& limits, int* out) {
  bool logprobs = false;
  fields.Bool("logprobs", &logprobs);
  int top = 0;
  const bool has_top = fields.Int("top_logprobs", 0, limits.max_logprobs, &top);
  if (has_top && !logprobs) {
    fields.error()->Set(
        InvalidRequestError("'top_logprobs' needs 'logprobs': true", "top_logprobs"));
  }
  *out = logprobs ? top : -1;
}

// A result has the name of the tool whose call it answers, which some templates show.
void NameResults(std::vector<ChatMessage>* messages) {
  std::map<std::string_view, std::string_view> names;  // by the ids of calls
  for (ChatMessage& message : *messages) {
    for (const ToolCall& call : message.tool_calls) names[call.id] = call.name;
    const auto found = names.find(message.tool_call_id);
    if (message.role == "tool" && message.name.empty() && found != names.end())
      message.name = found->second;
  }
}

}  // namespace

void ParseMessages(const Fields& fields, const Limits& limits, std::vector<ChatMessage>* messages) {
  const auto list = fields.Array("messages");
  if (!list) {
    SetMissing(fields, "messages");
    return;
  }
  if (list->size() == 0) {
    fields.error()->Set(InvalidRequestError("'messages' is an empty array", "messages"));
  }
  for (const Element value : *list) {
    const std::string path = fmt::format("messages[{}]", messages->size());
    dom::object object;
    if (messages->size() == static_cast<size_t>(limits.max_messages)) {
      fields.error()->Set(InvalidRequestError(
          fmt::format("'messages' has more than {} messages", limits.max_messages), "messages",
          "array_above_max_length"));
    } else if (value.get(object) != simdjson::SUCCESS) {
      SetTypeError(path, "an object", value, fields.error());
    }
    if (!fields.error()->ok()) return;
    ParseMessage(Fields(object, path + ".", fields.error()), limits, &messages->emplace_back());
  }
  NameResults(messages);
}

void ParsePromptOptions(const Fields& fields, PromptOptions* prompt) {
  const bool given = fields.Bool("add_generation_prompt", &prompt->add_generation_prompt);
  fields.Bool("continue_final_message", &prompt->continue_last);
  if (prompt->continue_last && given && prompt->add_generation_prompt) {
    fields.error()->Set(InvalidRequestError(
        "'add_generation_prompt' and 'continue_final_message' contradict each other",
        "continue_final_message"));
  }
  const auto object = fields.Object("chat_template_kwargs");
  if (!object) return;
  const Fields kwargs(*object, "chat_template_kwargs.", fields.error());
  for (const dom::key_value_pair entry : *object) {
    if (entry.key != "enable_thinking") kwargs.Refuse({entry.key});
  }
  kwargs.Bool("enable_thinking", &prompt->enable_thinking);
}

Parsed<ChatRequest> ParseChat(std::string_view body, const Limits& limits) {
  JsonDoc doc;
  if (auto error = doc.Parse(body)) return *error;
  FirstError error;
  const Fields fields(doc.object(), "", &error);
  ChatRequest request;
  Common& common = request.common;
  RefuseUnsupportedChat(fields);
  ParseCommon(fields, limits, &common);
  ParseMessages(fields, limits, &request.messages);
  ParseTools(fields, limits, Form::kNested, &request.tools);
  ParseLogprobs(fields, limits, &request.logprobs);
  ParsePromptOptions(fields, &request.prompt);
  // The newer name wins where both are there.
  int max_tokens = 0;
  const char* param = "max_completion_tokens";
  bool limited = fields.Int("max_tokens", 1, kMaxTokens, &max_tokens);
  if (fields.Int(param, 1, kMaxTokens, &max_tokens)) {
    limited = true;
  } else {
    param = "max_tokens";
  }
  if (limited) common.max_tokens = max_tokens;
  CheckTotals(fields, limits, common.n, param, common);
  if (auto first = error.Take()) return *first;
  return request;
}

}  // namespace dsla::openai
