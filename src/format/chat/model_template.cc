#include "format/chat/model_template.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "format/chat/json_value.h"
#include "format/chat/strip.h"

namespace dsla {
namespace {

using jinja::Value;

Value Foreign(const std::string& text) { return jinja::Text(text, true); }

// What a template says when it refuses, in one line that is not long and has nothing of the client.
std::string OwnWords(const jinja::Text& text) {
  std::string line;
  size_t begin = 0;
  for (const auto& foreign : text.foreign()) {
    line += text.bytes().substr(begin, foreign.begin - begin) + "...";
    begin = foreign.end;
  }
  line = (line + text.bytes().substr(begin)).substr(0, 200);
  for (char& c : line) {
    if (c >= 0 && c < ' ') c = ' ';
  }
  return line;
}

Expected<Value> CallValue(const ToolCall& call, bool arguments_as_text) {
  Value arguments = Foreign(call.arguments);
  if (!arguments_as_text) {
    DSLA_ASSIGN_OR_RETURN(arguments, ParseForeignJson(call.arguments));
  }
  return Value(jinja::Dict{{"id", Foreign(call.id)},
                           {"type", std::string("function")},
                           {"function", jinja::Dict{{"name", Foreign(call.name)},
                                                    {"arguments", std::move(arguments)}}}});
}

Expected<Value> MessageValue(const ChatMessage& message, bool arguments_as_text,
                             bool null_content) {
  jinja::Dict value = {{"role", Foreign(message.role)}, {"content", Foreign(message.content)}};
  if (!message.tool_calls.empty()) {
    if (null_content) value.back().second = jinja::None{};
    jinja::List calls;
    for (const ToolCall& call : message.tool_calls) {
      DSLA_ASSIGN_OR_RETURN(Value made, CallValue(call, arguments_as_text));
      calls.push_back(std::move(made));
    }
    value.emplace_back("tool_calls", std::move(calls));
  }
  if (!message.tool_call_id.empty())
    value.emplace_back("tool_call_id", Foreign(message.tool_call_id));
  if (!message.name.empty()) value.emplace_back("name", Foreign(message.name));
  return Value(std::move(value));
}

// As many as a conversation of this size needs of a sensible template.
jinja::Bounds BoundsFor(size_t bytes, size_t messages) {
  jinja::Bounds bounds;
  // Published templates take some forty steps a message. The most takes about a second.
  const size_t steps = 50000 + 400 * messages + 4 * bytes;
  bounds.steps = static_cast<int>(std::min<size_t>(steps, 1 << 21));
  bounds.bytes += 64 * bytes + (messages << 16);
  bounds.text += 8 * bytes + (messages << 10);
  bounds.items += 2 * messages;
  bounds.compared = static_cast<int>(std::min<size_t>(1000 + 100 * messages, 1 << 20));
  return bounds;
}

size_t SizeOf(const ChatMessage& message) {
  size_t size = message.content.size();
  for (const ToolCall& call : message.tool_calls) size += call.name.size() + call.arguments.size();
  return size;
}

// Messages stand in their order in all but a few templates, so the text is looked through once.
Status CheckShown(const std::string& text, std::span<const ChatMessage> messages) {
  size_t at = 0;
  for (size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role == "assistant") continue;
    const std::string_view said = Strip(messages[i].content);
    size_t found = text.find(said, at);
    if (found == text.npos) found = text.find(said);
    if (found == text.npos)
      return Unsupported("the chat template drops or changes the text of message {}", i + 1);
    at = found + said.size();
  }
  return Status::Ok();
}

Tool ProbeTool() {
  return {"probe_tool",
          R"({"type":"function","function":{"name":"probe_tool","description":"Probes.",)"
          R"("parameters":{"type":"object","properties":{"probe_key":{"type":"string",)"
          R"("description":"A key."}},"required":["probe_key"]}}})",
          ""};
}

}  // namespace

Expected<ModelTemplate> ModelTemplate::Parse(std::string_view jinja_source) {
  auto program = jinja::Parse(jinja_source);
  if (!program.ok())
    return Unsupported("the chat template cannot be read ({})", program.status().message());
  ModelTemplate made;
  made.program_ = std::make_shared<const jinja::Body>(std::move(program).value());
  made.dialect_ = DetectToolDialect(jinja_source);
  return made;
}

Expected<ModelTemplate> ModelTemplate::ForTools(std::string_view jinja_source) {
  DSLA_ASSIGN_OR_RETURN(ModelTemplate made, Parse(jinja_source));
  if (!made.TakesTools()) return Unsupported("the model's chat template has no place for tools");
  made.calls_ = made.FindCalls();
  return made;
}

Expected<ModelTemplate> ModelTemplate::ForChat(std::string_view jinja_source) {
  DSLA_ASSIGN_OR_RETURN(ModelTemplate made, Parse(jinja_source));
  made.shows_messages_ = true;
  const ChatMessage user{"user", "A probe."};
  DSLA_RETURN_IF_ERROR(made.Render({&user, 1}, {}, {}).status());
  return made;
}

bool ModelTemplate::always_thinks() const {
  ChatRenderOptions options;
  options.enable_thinking = false;
  const ChatMessage user{"user", "A probe."};
  const auto text = RenderWith({}, {&user, 1}, {}, options);
  return text.ok() && Strip(text->bytes()).ends_with("<think>");
}

bool ModelTemplate::TakesTools() const {
  const ChatMessage user{"user", "A probe."};
  const Tool tool = ProbeTool();
  const auto text = RenderWith({}, {&user, 1}, {&tool, 1}, {});
  return text.ok() && text->bytes().find(tool.name) != std::string::npos;
}

// The first way in which both a call and its result show, and no Python for JSON.
std::optional<ModelTemplate::Calls> ModelTemplate::FindCalls() const {
  const Tool tool = ProbeTool();
  ChatMessage call{"assistant", ""}, result{"tool", "probe result"};
  call.tool_calls = {{"probeid01", tool.name, R"({"probe_key": "probe_value"})"}};
  result.tool_call_id = "probeid01";
  result.name = tool.name;
  const std::vector<ChatMessage> messages = {{"user", "A probe."}, call, result};
  for (const bool as_text : {false, true}) {
    for (const bool null_content : {false, true}) {
      const Calls calls{as_text, null_content};
      const auto text = RenderWith(calls, messages, {&tool, 1}, {});
      if (!text.ok()) continue;
      const auto has = [&](std::string_view part) {
        return text->bytes().find(part) != std::string::npos;
      };
      if (has("probe_value") && has("probe result") && !has("'probe_key'")) return calls;
    }
  }
  return std::nullopt;
}

Expected<jinja::Text> ModelTemplate::Render(std::span<const ChatMessage> messages,
                                            std::span<const Tool> tools,
                                            const ChatRenderOptions& options) const {
  if (messages.empty()) return InvalidArgument("the conversation has no messages");
  for (const ChatMessage& message : messages) {
    const bool calls = !message.tool_calls.empty();
    if (!calls_ && (calls || message.role == "tool"))
      return Unsupported("the chat template has no place for calls of tools and their results");
    if (calls && calls_->null_content && !message.content.empty())
      return Unsupported("the chat template has no place for text beside calls of tools");
  }
  DSLA_ASSIGN_OR_RETURN(jinja::Text text,
                        RenderWith(calls_.value_or(Calls{}), messages, tools, options));
  if (shows_messages_) DSLA_RETURN_IF_ERROR(CheckShown(text.bytes(), messages));
  return text;
}

Expected<jinja::Text> ModelTemplate::RenderWith(const Calls& calls,
                                                std::span<const ChatMessage> messages,
                                                std::span<const Tool> tools,
                                                const ChatRenderOptions& options) const {
  size_t bytes = 0;
  jinja::List message_values, tool_values;
  for (const ChatMessage& message : messages) {
    bytes += SizeOf(message);
    DSLA_ASSIGN_OR_RETURN(Value value,
                          MessageValue(message, calls.arguments_as_text, calls.null_content));
    message_values.push_back(std::move(value));
  }
  for (const Tool& tool : tools) {
    bytes += tool.json.size();
    DSLA_ASSIGN_OR_RETURN(Value value, ParseForeignJson(tool.json));
    tool_values.push_back(std::move(value));
  }
  std::map<std::string, Value> globals;
  globals["messages"] = std::move(message_values);
  globals["tools"] = tools.empty() ? Value(jinja::None{}) : Value(std::move(tool_values));
  globals["documents"] = jinja::None{};
  globals["add_generation_prompt"] = options.add_generation_prompt;
  globals["bos_token"] = options.bos;
  globals["eos_token"] = options.eos;
  if (!options.enable_thinking) globals["enable_thinking"] = false;
  if (!options.date.empty()) globals["date_string"] = options.date;
  auto rendered = jinja::Render(*program_, std::move(globals), BoundsFor(bytes, messages.size()));
  if (!rendered.ok())
    return Unsupported("the chat template cannot be evaluated on this conversation ({})",
                       rendered.status().message());
  if (rendered->raised)
    return InvalidArgument("the chat template refuses the conversation: {}",
                           OwnWords(rendered->text));
  return std::move(rendered->text);
}

}  // namespace dsla
