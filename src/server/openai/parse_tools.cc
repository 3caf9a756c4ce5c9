#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "format/chat/json_scanner.h"
#include "format/chat/json_value.h"
#include "server/openai/parse_common.h"

namespace dsla::openai {
namespace {

namespace dom = simdjson::dom;

constexpr size_t kMaxToolName = 64;  // bytes

HttpError Missing(const std::string& path) {
  return InvalidRequestError(fmt::format("'{}' is missing", path), path,
                             "missing_required_parameter");
}

bool IsToolName(std::string_view name) {
  return !name.empty() && std::ranges::all_of(name, [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '-' || c == '.';
  });
}

// A function's name, as it is or as it is called.
void ParseName(const Fields& function, std::string* name) {
  const std::string path = function.Path("name");
  if (!function.String("name", kMaxToolName, name)) {
    function.error()->Set(Missing(path));
  } else if (!IsToolName(*name)) {
    function.error()->Set(InvalidRequestError(
        fmt::format("'{}' must be letters, digits, '_', '-' and '.'", path), path));
  }
}

// {"type":"function","function":{...}} of a tool, a call or a choice.
std::optional<dom::object> ParseFunction(const Fields& fields, bool type_needed) {
  std::string type;
  const std::string path = fields.Path("type");
  const bool typed = fields.String("type", kMaxNameBytes, &type);
  if (!typed && type_needed) fields.error()->Set(Missing(path));
  if (typed && type != "function") {
    fields.error()->Set(
        InvalidRequestError(fmt::format("'{}' is '{}': the tools here are of type 'function'", path,
                                        type.substr(0, 64)),
                            path, "unsupported_feature"));
  }
  const auto function = fields.Object("function");
  if (!function) fields.error()->Set(Missing(fields.Path("function")));
  return function;
}

void ParseTool(Element element, const Fields& fields, Tool* tool) {
  const auto object = ParseFunction(fields, /*type_needed=*/true);
  if (!object) return;
  const Fields function(*object, fields.Path("function."), fields.error());
  ParseName(function, &tool->name);
  std::string description;
  function.String("description", kMaxTextBytes, &description);
  if (const auto parameters = function.Object("parameters"))
    tool->parameters = simdjson::to_string(*parameters);
  function.Bool("strict", &tool->strict);
  tool->json = simdjson::to_string(element);
}

void ParseList(const Fields& fields, const Limits& limits, std::vector<Tool>* tools) {
  const auto list = fields.Array("tools");
  if (!list) return;
  size_t bytes = 0;
  for (const Element element : *list) {
    const std::string path = fmt::format("tools[{}]", tools->size());
    if (tools->size() == static_cast<size_t>(limits.max_tools)) {
      fields.error()->Set(
          InvalidRequestError(fmt::format("'tools' has more than {} tools", limits.max_tools),
                              "tools", "array_above_max_length"));
    } else if (!element.is_object()) {
      SetTypeError(path, "an object", element, fields.error());
    }
    if (!fields.error()->ok()) return;
    Tool& tool = tools->emplace_back();
    ParseTool(element, Fields(dom::object(element), path + ".", fields.error()), &tool);
    bytes += tool.json.size();
    if (bytes > limits.max_tools_bytes) {
      fields.error()->Set(
          InvalidRequestError(fmt::format("'tools' has more than {} bytes", limits.max_tools_bytes),
                              "tools", "string_above_max_length"));
    } else if (fields.error()->ok() && !ParseForeignJson(tool.json).ok()) {
      fields.error()->Set(InvalidRequestError(
          fmt::format("'{}' is nested over {} deep", path, kMaxToolJsonDepth), path));
    }
  }
}

void CheckNames(const Fields& fields, const std::vector<Tool>& tools) {
  std::set<std::string_view> names;
  for (size_t i = 0; i < tools.size(); ++i) {
    if (names.insert(tools[i].name).second) continue;
    const std::string path = fmt::format("tools[{}].function.name", i);
    fields.error()->Set(
        InvalidRequestError(fmt::format("'{}' is the name of another tool, too", path), path));
  }
}

void ParseNamedChoice(const Fields& fields, dom::object object, ToolsRequest* tools) {
  const Fields choice(object, "tool_choice.", fields.error());
  const auto function = ParseFunction(choice, /*type_needed=*/true);
  if (!function) return;
  ParseName(Fields(*function, "tool_choice.function.", fields.error()), &tools->named);
  tools->choice = ToolsRequest::Choice::kNamed;
  const auto is_named = [&](const Tool& tool) { return tool.name == tools->named; };
  if (std::ranges::any_of(tools->tools, is_named)) return;
  fields.error()->Set(InvalidRequestError("'tool_choice.function.name' is no name of a tool",
                                          "tool_choice.function.name"));
}

void ParseChoice(const Fields& fields, ToolsRequest* tools) {
  const auto choice = fields.Find("tool_choice");
  if (!choice) return;
  if (choice->is_object()) return ParseNamedChoice(fields, dom::object(*choice), tools);
  std::string value;
  if (!ReadString(*choice, "tool_choice", kMaxNameBytes, &value, fields.error())) return;
  if (value == "none") {
    tools->tools.clear();
  } else if (tools->tools.empty() && (value == "auto" || value == "required")) {
    fields.error()->Set(InvalidRequestError("'tool_choice' needs 'tools'", "tool_choice"));
  } else if (value == "required") {
    tools->choice = ToolsRequest::Choice::kRequired;
  } else if (value != "auto") {
    fields.error()->Set(InvalidRequestError(
        fmt::format("'tool_choice' must be 'none', 'auto', 'required' or an object, not '{}'",
                    value.substr(0, 64)),
        "tool_choice"));
  }
}

// Clients send the text that they got; an object is taken as well.
void ParseArguments(const Fields& function, std::string* arguments) {
  const std::string path = function.Path("arguments");
  const auto value = function.Find("arguments");
  if (!value) {
    function.error()->Set(Missing(path));
  } else if (value->is_object()) {
    *arguments = simdjson::to_string(*value);
  } else if (!ReadString(*value, path, kMaxTextBytes, arguments, function.error())) {
    return;
  }
  if (arguments->empty()) *arguments = "{}";
  if (IsJsonObject(*arguments) && ParseForeignJson(*arguments).ok()) return;
  function.error()->Set(InvalidRequestError(
      fmt::format("'{}' is no JSON object of at most {} levels", path, kMaxToolJsonDepth), path));
}

void ParseCall(const Fields& fields, ToolCall* call) {
  fields.String("id", kMaxNameBytes, &call->id);
  const auto object = ParseFunction(fields, /*type_needed=*/false);
  if (!object) return;
  const Fields function(*object, fields.Path("function."), fields.error());
  if (!function.String("name", kMaxNameBytes, &call->name) || call->name.empty())
    function.error()->Set(Missing(function.Path("name")));
  ParseArguments(function, &call->arguments);
}

}  // namespace

void ParseTools(const Fields& fields, const Limits& limits, ToolsRequest* tools) {
  ParseList(fields, limits, &tools->tools);
  CheckNames(fields, tools->tools);
  ParseChoice(fields, tools);
  fields.Bool("parallel_tool_calls", &tools->parallel);
}

void ParseToolCalls(const Fields& message, const Limits& limits, std::vector<ToolCall>* calls) {
  const auto list = message.Array("tool_calls");
  if (!list) return;
  const std::string path = message.Path("tool_calls");
  if (list->size() > static_cast<size_t>(limits.max_tool_calls)) {
    message.error()->Set(
        InvalidRequestError(fmt::format("'{}' has more than {} calls", path, limits.max_tool_calls),
                            path, "array_above_max_length"));
  }
  for (const Element element : *list) {
    const std::string call = fmt::format("{}[{}]", path, calls->size());
    if (!element.is_object()) SetTypeError(call, "an object", element, message.error());
    if (!message.error()->ok()) return;
    ParseCall(Fields(dom::object(element), call + ".", message.error()), &calls->emplace_back());
  }
}

}  // namespace dsla::openai
