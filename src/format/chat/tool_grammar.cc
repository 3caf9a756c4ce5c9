#include "format/chat/tool_grammar.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>
#include <vector>

#include "base/check.h"

namespace dsla {
namespace {

using nlohmann::ordered_json;

// How a dialect spells calls.
struct Form {
  const char* before_list = "";
  const char* maybe = "";  // may stand here
  const char* open_list = "";
  const char* begin;       // of a call, up to the name
  const char* after_name;  // up to the arguments
  const char* end;
  const char* separator;
  const char* close_list = "";
  const char* trigger;  // what in a text begins calls
  const char* style = "json";
};

bool Has(std::span<const ToolMarker> markers, std::string_view text) {
  return std::ranges::any_of(markers,
                             [&](const ToolMarker& marker) { return marker.text == text; });
}

Form FormOf(ToolDialect dialect, std::span<const ToolMarker> markers) {
  constexpr const char* kPythonTag = "<|python_tag|>";
  switch (dialect) {
    case ToolDialect::kHermes:
      return {.begin = "<tool_call>\n{\"name\": \"",
              .after_name = "\", \"arguments\": ",
              .end = "}\n</tool_call>",
              .separator = "\n",
              .trigger = "<tool_call>"};
    case ToolDialect::kLlama3:
      return {.maybe = Has(markers, kPythonTag) ? kPythonTag : "",
              .begin = "{\"name\": \"",
              .after_name = "\", \"parameters\": ",
              .end = "}",
              .separator = "; ",
              .trigger = "{\"name\""};
    case ToolDialect::kMistral:
      if (!Has(markers, "[ARGS]")) {  // a model from before there was one
        return {.before_list = "[TOOL_CALLS]",
                .maybe = " ",  // SentencePiece's
                .open_list = "[",
                .begin = "{\"name\": \"",
                .after_name = "\", \"arguments\": ",
                .end = "}",
                .separator = ", ",
                .close_list = "]",
                .trigger = "[TOOL_CALLS]"};
      }
      return {.begin = "[TOOL_CALLS]",
              .after_name = "[ARGS]",
              .end = "",
              .separator = "",
              .trigger = "[TOOL_CALLS]"};
    case ToolDialect::kQwen3Coder:
      return {.begin = "<tool_call>\n<function=",
              .after_name = ">\n",
              .end = "\n</function>\n</tool_call>",
              .separator = "\n",
              .trigger = "<tool_call>",
              .style = "qwen_xml"};
    case ToolDialect::kDeepSeek:
      return {.before_list = "<｜tool▁calls▁begin｜>",
              .begin = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
              .after_name = "\n```json\n",
              .end = "\n```<｜tool▁call▁end｜>",
              .separator = "\n",
              .close_list = "<｜tool▁calls▁end｜>",
              .trigger = "<｜tool▁call▁begin｜>"};
  }
  CheckFailed(__FILE__, __LINE__, "a known ToolDialect");
}

// Any object where the text is no schema.
ordered_json SchemaFormat(std::string_view text, const char* style) {
  ordered_json schema = ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (schema.is_discarded()) schema = {{"type", "object"}};
  return {{"type", "json_schema"}, {"json_schema", std::move(schema)}, {"style", style}};
}

ordered_json Sequence(ordered_json parts) {
  return {{"type", "sequence"}, {"elements", std::move(parts)}};
}

ordered_json Either(ordered_json formats) {
  if (formats.size() == 1) return formats[0];
  return {{"type", "or"}, {"elements", std::move(formats)}};
}

ordered_json Repeated(const char* type, ordered_json format) {
  return {{"type", type}, {"content", std::move(format)}};
}

// The formats of a dialect's calls.
class CallFormats {
 public:
  CallFormats(const Form& form, std::span<const ToolMarker> markers)
      : form_(form), markers_(markers) {}

  // Calls and nothing else. arguments: of each tool.
  ordered_json Calls(bool one, std::span<const Tool> tools,
                     std::span<const ordered_json> arguments) const {
    ordered_json tag = {
        {"type", "tag"}, {"begin", ""}, {"content", Call(tools, arguments)}, {"end", ""}};
    ordered_json calls = {{"type", "tags_with_separator"},
                          {"tags", ordered_json::array({std::move(tag)})},
                          {"separator", form_.separator},
                          {"at_least_one", true},
                          {"stop_after_first", one}};
    ordered_json parts = ordered_json::array();
    Append(form_.before_list, parts);
    ordered_json maybe = ordered_json::array();
    Append(form_.maybe, maybe);
    if (!maybe.empty()) parts.push_back(Repeated("optional", maybe[0]));
    Append(form_.open_list, parts);
    parts.push_back(std::move(calls));
    Append(form_.close_list, parts);
    return Sequence(std::move(parts));
  }

  // Text in which no call begins.
  ordered_json FreeText() const {
    ordered_json excludes = ordered_json::array({form_.trigger});
    for (const ToolMarker& marker : markers_) {
      if (marker.text != form_.trigger) excludes.push_back(marker.text);
    }
    return {{"type", "any_text"}, {"excludes", std::move(excludes)}};
  }

 private:
  ordered_json Call(std::span<const Tool> tools, std::span<const ordered_json> arguments) const {
    ordered_json named = ordered_json::array();
    for (size_t i = 0; i < tools.size(); ++i) {
      ordered_json parts = ordered_json::array();
      Append(tools[i].name + form_.after_name, parts);
      parts.push_back(arguments[i]);
      named.push_back(Sequence(std::move(parts)));
    }
    ordered_json parts = ordered_json::array();
    Append(form_.begin, parts);
    parts.push_back(Either(std::move(named)));
    Append(form_.end, parts);
    return Sequence(std::move(parts));
  }

  // The text, cut at the markers in it.
  void Append(std::string_view text, ordered_json& parts) const {
    while (!text.empty()) {
      size_t at = text.size();
      const ToolMarker* next = nullptr;
      for (const ToolMarker& marker : markers_) {
        const size_t found = text.find(marker.text);
        if (found >= at) continue;
        at = found;
        next = &marker;
      }
      if (at > 0) parts.push_back({{"type", "const_string"}, {"value", text.substr(0, at)}});
      if (next == nullptr) return;
      parts.push_back({{"type", "token"}, {"token", next->id}});
      text.remove_prefix(at + next->text.size());
    }
  }

  const Form& form_;
  const std::span<const ToolMarker> markers_;
};

ordered_json FormatOf(const Form& form, const ToolGrammar& grammar, std::span<const Tool> tools,
                      std::span<const ToolMarker> markers) {
  const bool in_text = grammar.text == ToolGrammar::Text::kAny;
  const bool one = grammar.calls == ToolGrammar::Calls::kOne;
  std::vector<ordered_json> arguments;
  for (const Tool& tool : tools)
    arguments.push_back(SchemaFormat(in_text && !tool.strict ? "" : tool.parameters, form.style));
  const CallFormats formats(form, markers);
  if (in_text) {
    // Without a list each call is by itself: what separates it from the next is text.
    const bool list = *form.before_list != '\0';
    ordered_json calls = formats.Calls(one || !list, tools, arguments);
    ordered_json text = formats.FreeText();
    ordered_json rest =
        one ? Repeated("optional", std::move(calls))
            : Repeated("star", Sequence(ordered_json::array({std::move(calls), text})));
    return Sequence(ordered_json::array({std::move(text), std::move(rest)}));
  }
  ordered_json calls = formats.Calls(one, tools, arguments);
  if (grammar.text == ToolGrammar::Text::kNone) return calls;
  return Either(ordered_json::array({SchemaFormat(grammar.schema, "json"), std::move(calls)}));
}

}  // namespace

std::string StructuralTagOf(ToolDialect dialect, const ToolGrammar& grammar,
                            std::span<const Tool> tools, std::span<const ToolMarker> markers) {
  ordered_json format = FormatOf(FormOf(dialect, markers), grammar, tools, markers);
  return ordered_json{{"type", "structural_tag"}, {"format", std::move(format)}}.dump();
}

}  // namespace dsla
