#include <fmt/format.h>

#include <map>

#include "server/openai/parse_common.h"

namespace dsla::openai {
namespace {

namespace dom = simdjson::dom;

// A type of OpenAI's that is not here.
void SetUnsupportedType(const Fields& fields, const std::string& type, const char* known) {
  const std::string path = fields.Path("type");
  fields.error()->Set(InvalidRequestError(
      fmt::format("'{}' is '{}': this server reads {}", path, type.substr(0, 64), known), path,
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
  if (type != "input_text" && type != "output_text")
    return SetUnsupportedType(part, type, "text alone");
  std::string text;
  if (!part.String("text", kMaxTextBytes, &text)) return SetMissing(part, "text");
  if (!content->empty()) *content += '\n';  // as chat joins its parts
  *content += text;
}

// A text, or parts of one, in the field `name`.
void ParseText(const Fields& item, const char* name, std::string* content) {
  const auto value = item.Find(name);
  const std::string path = item.Path(name);
  if (!value) return SetMissing(item, name);
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

// Items become chat's messages: what the assistant says and the calls right behind it are one.
class InputParser {
 public:
  InputParser(const Limits& limits, std::vector<ChatMessage>* messages)
      : limits_(limits), messages_(*messages) {}

  void ParseItem(const Fields& item) {
    std::string type = "message";
    item.String("type", kMaxNameBytes, &type);
    const bool call = type == "function_call";
    if (call) {
      ParseCall(item);
    } else if (type == "function_call_output") {
      ParseOutput(item);
    } else if (type == "message") {
      ParseMessage(item);
    } else {
      SetUnsupportedType(item, type, "items of type message, function_call, function_call_output");
    }
    calls_may_follow_ = call || (type == "message" && messages_.back().role == "assistant");
  }

 private:
  // A message of the user's, or one that came as output.
  void ParseMessage(const Fields& item) {
    ChatMessage& message = messages_.emplace_back();
    const std::string path = item.Path("role");
    if (!item.String("role", kMaxNameBytes, &message.role)) return SetMissing(item, "role");
    if (message.role == "developer") message.role = "system";
    if (message.role != "system" && message.role != "user" && message.role != "assistant") {
      item.error()->Set(InvalidRequestError(
          fmt::format("'{}' must be one of 'system', 'developer', 'user', 'assistant', not '{}'",
                      path, message.role.substr(0, 64)),
          path));
    }
    ParseText(item, "content", &message.content);
  }

  void ParseCall(const Fields& item) {
    if (!calls_may_follow_) messages_.push_back({"assistant", ""});
    std::vector<ToolCall>& calls = messages_.back().tool_calls;
    if (calls.size() == static_cast<size_t>(limits_.max_tool_calls)) {
      item.error()->Set(InvalidRequestError(
          fmt::format("'input' has more than {} calls in a row", limits_.max_tool_calls), "input",
          "array_above_max_length"));
    }
    ToolCall& call = calls.emplace_back();
    if (!item.String("call_id", kMaxNameBytes, &call.id)) SetMissing(item, "call_id");
    ParseCalledFunction(item, &call);
    names_[call.id] = call.name;
  }

  void ParseOutput(const Fields& item) {
    ChatMessage& message = messages_.emplace_back();
    message.role = "tool";
    const std::string path = item.Path("call_id");
    if (!item.String("call_id", kMaxNameBytes, &message.tool_call_id)) SetMissing(item, "call_id");
    const auto name = names_.find(message.tool_call_id);
    if (name == names_.end()) {
      item.error()->Set(
          InvalidRequestError(fmt::format("'{}' is that of no call before it", path), path));
    } else {
      message.name = name->second;
    }
    ParseText(item, "output", &message.content);
  }

  const Limits& limits_;
  std::vector<ChatMessage>& messages_;
  std::map<std::string, std::string> names_;  // of what was called, by the ids of the calls
  bool calls_may_follow_ = false;             // as a part of the last message
};

}  // namespace

void ParseResponsesInput(const Fields& fields, const Limits& limits,
                         std::vector<ChatMessage>* messages) {
  const auto input = fields.Find("input");
  if (!input) return SetMissing(fields, "input");
  if (input->is_string()) {
    messages->push_back({"user", ""});
    ReadString(*input, "input", kMaxTextBytes, &messages->back().content, fields.error());
    return;
  }
  if (!input->is_array())
    return SetTypeError("input", "a string or an array of items", *input, fields.error());
  const dom::array list(*input);
  if (list.size() == 0)
    fields.error()->Set(InvalidRequestError("'input' is an empty array", "input"));
  if (list.size() > static_cast<size_t>(limits.max_messages)) {
    fields.error()->Set(
        InvalidRequestError(fmt::format("'input' has more than {} items", limits.max_messages),
                            "input", "array_above_max_length"));
  }
  InputParser parser(limits, messages);
  int index = 0;
  for (const Element value : list) {
    const auto item = ObjectAt(value, fmt::format("input[{}]", index++), fields.error());
    if (item) parser.ParseItem(*item);
    if (!fields.error()->ok()) return;
  }
}

}  // namespace dsla::openai
