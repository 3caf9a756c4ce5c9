#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "format/chat/json_scanner.h"
#include "format/chat/json_value.h"
#include "server/json_writer.h"
#include "server/openai/parse_common.h"

namespace dsla::openai {
namespace {

namespace dom = simdjson::dom;

constexpr size_t kMaxToolName = 64;  // bytes

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
    SetMissing(function, "name");
  } else if (!IsToolName(*name)) {
    function.error()->Set(InvalidRequestError(
        fmt::format("'{}' must be letters, digits, '_', '-' and '.'", path), path));
  }
}

// The fields of the function of a tool, a call or a choice.
std::optional<Fields> ParseFunction(const Fields& fields, Form form, bool type_needed) {
  std::string type;
  const std::string path = fields.Path("type");
  const bool typed = fields.String("type", kMaxNameBytes, &type);
  if (!typed && type_needed) SetMissing(fields, "type");
  if (typed && type != "function") {
    fields.error()->Set(
        InvalidRequestError(fmt::format("'{}' is '{}': the tools here are of type 'function'", path,
                                        type.substr(0, 64)),
                            path,
                            // The Responses API has tools of other types.
                            form == Form::kFlat ? "unsupported_parameter" : "unsupported_feature"));
  }
  if (form == Form::kFlat) return fields;
  const auto function = fields.Object("function");
  if (function) return Fields(*function, fields.Path("function."), fields.error());
  SetMissing(fields, "function");
  return std::nullopt;
}

// A flat tool in the form that templates know.
std::string NestedJson(dom::object tool) {
  JsonWriter out;
  out.BeginObject().Field("type", "function").Key("function").BeginObject();
  for (const dom::key_value_pair field : tool) {
    if (field.key != "type") out.Key(field.key).Raw(simdjson::to_string(field.value));
  }
  return out.EndObject().EndObject().Take();
}

// What flat tools alone have: calls that come later, by other means or from elsewhere.
void RefuseUnsupportedFlat(const Fields& function) {
  function.Refuse({"allowed_callers"});
  for (const char* name : {"async", "defer_loading"}) {
    bool on = false;
    if (function.Bool(name, &on)) function.RefuseUnless(name, !on);
  }
}

void ParseTool(dom::object object, const Fields& fields, Form form, Tool* tool) {
  const auto function = ParseFunction(fields, form, /*type_needed=*/true);
  if (!function) return;
  ParseName(*function, &tool->name);
  std::string description;
  function->String("description", kMaxTextBytes, &description);
  if (const auto parameters = function->Object("parameters"))
    tool->parameters = simdjson::to_string(*parameters);
  tool->strict = form == Form::kFlat;
  function->Bool("strict", &tool->strict);
  if (form == Form::kFlat) RefuseUnsupportedFlat(*function);
  tool->json = form == Form::kFlat ? NestedJson(object) : simdjson::to_string(object);
}

void ParseList(const Fields& fields, const Limits& limits, Form form, std::vector<Tool>* tools) {
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
    const dom::object object(element);
    ParseTool(object, Fields(object, path + ".", fields.error()), form, &tool);
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

void CheckNames(const Fields& fields, Form form, const std::vector<Tool>& tools) {
  std::set<std::string_view> names;
  for (size_t i = 0; i < tools.size(); ++i) {
    if (names.insert(tools[i].name).second) continue;
    const std::string path =
        fmt::format("tools[{}].{}name", i, form == Form::kNested ? "function." : "");
    fields.error()->Set(
        InvalidRequestError(fmt::format("'{}' is the name of another tool, too", path), path));
  }
}

// A choice's function, by its name.
void ParseAllowed(const Fields& function, ToolsRequest* tools) {
  const std::string path = function.Path("name");
  std::string name;
  ParseName(function, &name);
  if (std::ranges::find(tools->tools, name, &Tool::name) == tools->tools.end()) {
    function.error()->Set(
        InvalidRequestError(fmt::format("'{}' is no name of a tool", path), path));
  }
  tools->allowed.push_back(std::move(name));
}

void ParseAllowedTools(const Fields& choice, const Limits& limits, ToolsRequest* tools) {
  std::string mode;
  if (!choice.String("mode", kMaxNameBytes, &mode)) {
    SetMissing(choice, "mode");
  } else if (mode != "auto" && mode != "required") {
    const std::string path = choice.Path("mode");
    choice.error()->Set(InvalidRequestError(
        fmt::format("'{}' must be one of 'auto', 'required', not '{}'", path, mode.substr(0, 64)),
        path));
  }
  if (mode == "required") tools->choice = ToolsRequest::Choice::kRequired;
  const std::string path = choice.Path("tools");
  const auto list = choice.Array("tools");
  if (!list) return SetMissing(choice, "tools");
  if (list->size() == 0) {
    choice.error()->Set(InvalidRequestError(fmt::format("'{}' is an empty array", path), path));
  } else if (list->size() > static_cast<size_t>(limits.max_tools)) {
    choice.error()->Set(
        InvalidRequestError(fmt::format("'{}' has more than {} tools", path, limits.max_tools),
                            path, "array_above_max_length"));
  }
  for (const Element element : *list) {
    const std::string tool = fmt::format("{}[{}]", path, tools->allowed.size());
    if (!element.is_object()) SetTypeError(tool, "an object", element, choice.error());
    if (!choice.error()->ok()) return;
    const Fields fields(dom::object(element), tool + ".", choice.error());
    const auto function = ParseFunction(fields, Form::kFlat, /*type_needed=*/true);
    if (function) ParseAllowed(*function, tools);
  }
}

void ParseChoiceObject(const Fields& choice, const Limits& limits, Form form, ToolsRequest* tools) {
  std::string type;
  choice.String("type", kMaxNameBytes, &type);
  if (form == Form::kFlat && type == "allowed_tools")
    return ParseAllowedTools(choice, limits, tools);
  const auto function = ParseFunction(choice, form, /*type_needed=*/true);
  if (!function) return;
  ParseAllowed(*function, tools);
  tools->choice = ToolsRequest::Choice::kNamed;
}

void ParseChoice(const Fields& fields, const Limits& limits, Form form, ToolsRequest* tools) {
  const auto choice = fields.Find("tool_choice");
  if (!choice) return;
  if (choice->is_object()) {
    const Fields object(dom::object(*choice), "tool_choice.", fields.error());
    return ParseChoiceObject(object, limits, form, tools);
  }
  std::string value;
  if (!ReadString(*choice, "tool_choice", kMaxNameBytes, &value, fields.error())) return;
  // Responses say "auto" where there are no tools, too, and so do who sends it back.
  const bool needs_tools = value == "required" || (value == "auto" && form == Form::kNested);
  if (value == "none") {
    tools->tools.clear();
  } else if (tools->tools.empty() && needs_tools) {
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
    SetMissing(function, "arguments");
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
  const auto function = ParseFunction(fields, Form::kNested, /*type_needed=*/false);
  if (function) ParseCalledFunction(*function, call);
}

}  // namespace

void ParseTools(const Fields& fields, const Limits& limits, Form form, ToolsRequest* tools) {
  ParseList(fields, limits, form, &tools->tools);
  CheckNames(fields, form, tools->tools);
  ParseChoice(fields, limits, form, tools);
  fields.Bool("parallel_tool_calls", &tools->parallel);
}

void ParseCalledFunction(const Fields& function, ToolCall* call) {
  if (!function.String("name", kMaxNameBytes, &call->name) || call->name.empty())
    SetMissing(function, "name");
  ParseArguments(function, &call->arguments);
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
