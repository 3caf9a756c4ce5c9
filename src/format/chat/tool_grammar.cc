#include "format/chat/tool_grammar.h"

#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "base/check.h"

namespace dsla {
namespace {

using nlohmann::ordered_json;

// How a dialect spells one call, and several.
struct Form {
  const char* before_list = "";
  const char* begin;       // up to the name
  const char* after_name;  // up to the arguments
  const char* end;
  const char* separator;
  const char* after_list = "";
  const char* trigger;  // what in a text begins a call
  const char* style = "json";
};

Form FormOf(ToolDialect dialect) {
  switch (dialect) {
    case ToolDialect::kHermes:
      return {.begin = "<tool_call>\n{\"name\": \"",
              .after_name = "\", \"arguments\": ",
              .end = "}\n</tool_call>",
              .separator = "\n",
              .trigger = "<tool_call>"};
    case ToolDialect::kLlama3:
      return {.begin = "{\"name\": \"",
              .after_name = "\", \"parameters\": ",
              .end = "}",
              .separator = "; ",
              .trigger = "{\"name\""};
    case ToolDialect::kMistral:
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
              .after_list = "<｜tool▁calls▁end｜>",
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

ordered_json TagsOf(const Form& form, const ToolGrammar& grammar, std::span<const Tool> tools) {
  ordered_json tags = ordered_json::array();
  for (const Tool& tool : tools) {
    const bool free = grammar.text == ToolGrammar::Text::kAny && !tool.strict;
    ordered_json tag = {{"type", "tag"},
                        {"begin", form.begin + tool.name + form.after_name},
                        {"content", SchemaFormat(free ? "" : tool.parameters, form.style)},
                        {"end", form.end}};
    tags.push_back(std::move(tag));
  }
  return tags;
}

ordered_json Constant(const char* text) { return {{"type", "const_string"}, {"value", text}}; }

// Calls and nothing else.
ordered_json CallsOf(const Form& form, bool one, ordered_json tags) {
  ordered_json calls = {{"type", "tags_with_separator"},
                        {"tags", std::move(tags)},
                        {"separator", form.separator},
                        {"at_least_one", true},
                        {"stop_after_first", one}};
  if (*form.before_list == '\0') return calls;
  ordered_json parts = ordered_json::array(
      {Constant(form.before_list), std::move(calls), Constant(form.after_list)});
  return {{"type", "sequence"}, {"elements", std::move(parts)}};
}

ordered_json FormatOf(const Form& form, const ToolGrammar& grammar, ordered_json tags) {
  const bool one = grammar.calls == ToolGrammar::Calls::kOne;
  if (grammar.text == ToolGrammar::Text::kAny) {
    return {{"type", "triggered_tags"},
            {"triggers", ordered_json::array({form.trigger})},
            {"tags", std::move(tags)},
            {"stop_after_first", one}};
  }
  ordered_json calls = CallsOf(form, one, std::move(tags));
  if (grammar.text == ToolGrammar::Text::kNone) return calls;
  ordered_json either =
      ordered_json::array({SchemaFormat(grammar.schema, "json"), std::move(calls)});
  return {{"type", "or"}, {"elements", std::move(either)}};
}

}  // namespace

std::string StructuralTagOf(ToolDialect dialect, const ToolGrammar& grammar,
                            std::span<const Tool> tools) {
  const Form form = FormOf(dialect);
  ordered_json format = FormatOf(form, grammar, TagsOf(form, grammar, tools));
  return ordered_json{{"type", "structural_tag"}, {"format", std::move(format)}}.dump();
}

}  // namespace dsla
