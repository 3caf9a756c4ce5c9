#include <fmt/format.h>

#include "server/openai/parse_common.h"

namespace dsla::openai {
namespace {

namespace dom = simdjson::dom;

// Of a grammar as it is sent; how large one may be is for the compiler to say.
constexpr size_t kMaxGrammarBytes = size_t{1} << 20;
constexpr size_t kMaxChoices = 1024;

void SetGrammar(const Fields& fields, GrammarSpec spec, const std::string& path, Common* common) {
  if (common->grammar) {
    fields.error()->Set(
        InvalidRequestError(fmt::format("'{}' and '{}' both say what the reply is to follow",
                                        common->grammar_param, path),
                            path));
    return;
  }
  common->grammar = std::move(spec);
  common->grammar_param = path;
}

// A schema is an object, or the text of one where `text_too`.
void ParseSchema(const Fields& fields, std::string_view name, bool text_too, Common* common) {
  const auto value = fields.Find(name);
  if (!value) return;
  const std::string path = fields.Path(name);
  std::string text;
  if (value->is_object()) {
    text = simdjson::minify(*value);
  } else if (text_too && value->is_string()) {
    if (!ReadString(*value, path, kMaxGrammarBytes, &text, fields.error())) return;
  } else {
    SetTypeError(path, text_too ? "an object or its text" : "an object", *value, fields.error());
    return;
  }
  SetGrammar(fields, {GrammarSpec::Kind::kJsonSchema, std::move(text)}, path, common);
}

void ParseText(const Fields& fields, std::string_view name, GrammarSpec::Kind kind,
               Common* common) {
  std::string text;
  if (!fields.String(name, kMaxGrammarBytes, &text)) return;
  SetGrammar(fields, {kind, std::move(text)}, fields.Path(name), common);
}

void ParseChoice(const Fields& fields, Common* common) {
  const auto list = fields.Array("choice");
  if (!list) return;
  const std::string path = fields.Path("choice");
  std::vector<std::string> choices;
  for (const Element value : *list) {
    std::string text;
    if (choices.size() == kMaxChoices) {
      fields.error()->Set(
          InvalidRequestError(fmt::format("'{}' has more than {} strings", path, kMaxChoices), path,
                              "array_above_max_length"));
    }
    if (!ReadString(value, fmt::format("{}[{}]", path, choices.size()), kMaxGrammarBytes, &text,
                    fields.error())) {
      return;
    }
    choices.push_back(std::move(text));
  }
  if (choices.empty()) {
    fields.error()->Set(InvalidRequestError(fmt::format("'{}' is an empty array", path), path));
    return;
  }
  SetGrammar(fields, {GrammarSpec::Kind::kRegex, RegexOfChoices(choices)}, path, common);
}

// `strict` changes nothing: a reply follows its schema in any case.
void ParseJsonSchema(const Fields& schema, Common* common) {
  std::string text;
  bool strict = false;
  if (!schema.String("name", kMaxNameBytes, &text)) SetMissing(schema, "name");
  schema.String("description", kMaxTextBytes, &text);
  schema.Bool("strict", &strict);
  if (!schema.Find("schema")) SetMissing(schema, "schema");
  ParseSchema(schema, "schema", /*text_too=*/false, common);
}

void ParseNestedSchema(const Fields& format, Common* common) {
  const auto object = format.Object("json_schema");
  if (!object) return SetMissing(format, "json_schema");
  ParseJsonSchema(Fields(*object, format.Path("json_schema."), format.error()), common);
}

// `name`: of the field that says the format.
void ParseFormat(const Fields& fields, std::string_view name, Form form, Common* common) {
  const auto object = fields.Object(name);
  if (!object) return;
  const std::string path = fields.Path(name);
  const Fields format(*object, path + ".", fields.error());
  const bool nested = form == Form::kNested;
  std::string type;
  if (!format.String("type", kMaxNameBytes, &type)) {
    SetMissing(format, "type");
  } else if (type == "json_object") {
    SetGrammar(fields, {GrammarSpec::Kind::kJsonObject}, path, common);
  } else if (type == "json_schema") {
    nested ? ParseNestedSchema(format, common) : ParseJsonSchema(format, common);
  } else if (type == "structural_tag" && nested) {
    SetGrammar(fields, {GrammarSpec::Kind::kStructuralTag, simdjson::minify(*object)}, path,
               common);
  } else if (type != "text") {
    format.error()->Set(InvalidRequestError(
        fmt::format("'{}' must be one of 'text', 'json_object', 'json_schema'{}, not '{}'",
                    format.Path("type"), nested ? ", 'structural_tag'" : "", type.substr(0, 64)),
        format.Path("type")));
  }
}

void ParseStructuredOutputs(const Fields& fields, Common* common) {
  const auto object = fields.Object("structured_outputs");
  if (!object) return;
  const Fields outputs(*object, "structured_outputs.", fields.error());
  outputs.RefuseOthers({"json", "json_object", "regex", "choice", "grammar", "structural_tag"},
                       "there are 'json', 'json_object', 'regex', 'choice', 'grammar' and "
                       "'structural_tag'");
  ParseSchema(outputs, "json", /*text_too=*/true, common);
  bool any_object = false;
  if (outputs.Bool("json_object", &any_object) && any_object) {
    SetGrammar(fields, {GrammarSpec::Kind::kJsonObject}, outputs.Path("json_object"), common);
  }
  ParseText(outputs, "regex", GrammarSpec::Kind::kRegex, common);
  ParseChoice(outputs, common);
  ParseText(outputs, "grammar", GrammarSpec::Kind::kEbnf, common);
  ParseText(outputs, "structural_tag", GrammarSpec::Kind::kStructuralTag, common);
}

}  // namespace

HttpError InvalidGrammarError(std::string message, const Common& common) {
  return InvalidRequestError(std::move(message), common.grammar_param, "invalid_grammar");
}

void ParseTextFormat(const Fields& text, Common* common) {
  ParseFormat(text, "format", Form::kFlat, common);
}

void ParseGrammar(const Fields& fields, Common* common) {
  ParseFormat(fields, "response_format", Form::kNested, common);
  ParseStructuredOutputs(fields, common);
  ParseSchema(fields, "json_schema", /*text_too=*/false, common);
  // llama.cpp's default, an empty one, asks for nothing.
  std::string_view text;
  const auto grammar = fields.Find("grammar");
  if (grammar && grammar->get(text) == simdjson::SUCCESS && text.empty()) return;
  ParseText(fields, "grammar", GrammarSpec::Kind::kEbnf, common);
}

}  // namespace dsla::openai
