#include "grammar/schema_check.h"

#include <algorithm>
#include <array>

#include "format/json.h"

namespace dsla {
namespace {

using nlohmann::json;

constexpr int kMaxDepth = 64;

// Keywords that XGrammar does not know, or passes over.
constexpr std::array<std::string_view, 16> kUnsupported = {"contains",
                                                           "dependencies",
                                                           "dependentRequired",
                                                           "dependentSchemas",
                                                           "else",
                                                           "if",
                                                           "maxContains",
                                                           "minContains",
                                                           "multipleOf",
                                                           "not",
                                                           "then",
                                                           "uniqueItems",
                                                           "$dynamicRef",
                                                           "$recursiveRef",
                                                           "unevaluatedItems",
                                                           "unevaluatedProperties"};

// Those whose values are not schemas, and those whose values are schemas by names.
constexpr std::array<std::string_view, 4> kData = {"const", "default", "enum", "examples"};
constexpr std::array<std::string_view, 4> kNamed = {"$defs", "definitions", "patternProperties",
                                                    "properties"};

template <typename Names>
bool IsOneOf(std::string_view name, const Names& names) {
  return std::ranges::find(names, name) != names.end();
}

Status Check(const json& value) {
  if (value.is_array()) {
    for (const json& element : value) DSLA_RETURN_IF_ERROR(Check(element));
    return Status::Ok();
  }
  if (!value.is_object()) return Status::Ok();
  for (const auto& [name, part] : value.items()) {
    if (IsOneOf(name, kUnsupported) && part != json(false))
      return InvalidArgument("the schema's keyword '{}' is not supported", name);
    if (IsOneOf(name, kData)) continue;
    if (!IsOneOf(name, kNamed) || !part.is_object()) {
      DSLA_RETURN_IF_ERROR(Check(part));
      continue;
    }
    for (const auto& [key, schema] : part.items()) DSLA_RETURN_IF_ERROR(Check(schema));
  }
  return Status::Ok();
}

// Each is the value of one of two keys, by the form of the tag.
Status CheckSchemasIn(const json& tag) {
  if (!tag.is_structured()) return Status::Ok();
  for (const auto& [name, part] : tag.items()) {
    const bool schema = tag.is_object() && (name == "json_schema" || name == "schema");
    DSLA_RETURN_IF_ERROR(schema ? Check(part) : CheckSchemasIn(part));
  }
  return Status::Ok();
}

}  // namespace

Status CheckStructuralTag(std::string_view text) {
  const auto tag = ParseJson(text, "structural tag", kMaxDepth);
  if (!tag.ok()) return InvalidArgument("{}", tag.status().message());
  return CheckSchemasIn(*tag);
}

Status CheckSchema(std::string_view text) {
  const auto schema = ParseJson(text, "schema", kMaxDepth);
  if (!schema.ok()) return InvalidArgument("{}", schema.status().message());
  if (!schema->is_object()) return InvalidArgument("a schema is a JSON object");
  return Check(*schema);
}

}  // namespace dsla
