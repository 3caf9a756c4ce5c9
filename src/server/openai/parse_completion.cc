#include <fmt/format.h>

#include "server/openai/json_doc.h"
#include "server/openai/parse_common.h"

namespace dsla::openai {
namespace {

namespace dom = simdjson::dom;

HttpError PromptError(std::string message, std::string path) {
  return InvalidRequestError(std::move(message), std::move(path));
}

void AddPrompt(Element value, const std::string& path, const Fields& fields, const Limits& limits,
               std::vector<Prompt>* prompts) {
  if (value.is_string()) {
    std::string text;
    if (ReadString(value, path, kMaxTextBytes, &text, fields.error()) && text.empty()) {
      fields.error()->Set(PromptError(fmt::format("'{}' is an empty string", path), path));
    }
    prompts->emplace_back(std::move(text));
    return;
  }
  std::vector<int32_t> ids;
  if (!ReadTokens(value, path, limits.vocab_size, &ids, fields.error())) return;
  if (ids.empty()) {
    fields.error()->Set(PromptError(fmt::format("'{}' has no tokens", path), path));
  }
  prompts->emplace_back(std::move(ids));
}

// A string, token ids, or an array of one of the two.
void ParsePrompt(const Fields& fields, const Limits& limits, std::vector<Prompt>* prompts) {
  const auto value = fields.Find("prompt");
  if (!value) {
    fields.error()->Set(
        InvalidRequestError("'prompt' is missing", "prompt", "missing_required_parameter"));
    return;
  }
  dom::array list;
  if (value->get(list) != simdjson::SUCCESS) {
    if (!value->is_string()) {
      SetTypeError("prompt", "a string, an array of strings, token ids or an array of these",
                   *value, fields.error());
      return;
    }
    AddPrompt(*value, "prompt", fields, limits, prompts);
    return;
  }
  if (list.begin() == list.end()) {
    fields.error()->Set(PromptError("'prompt' is an empty array", "prompt"));
    return;
  }
  const Element first = *list.begin();
  if (first.is_number()) {
    AddPrompt(*value, "prompt", fields, limits, prompts);
    return;
  }
  for (const Element element : list) {
    const std::string path = fmt::format("prompt[{}]", prompts->size());
    if (prompts->size() == static_cast<size_t>(limits.max_prompts)) {
      fields.error()->Set(
          InvalidRequestError(fmt::format("'prompt' has more than {} prompts", limits.max_prompts),
                              "prompt", "array_above_max_length"));
    } else if ((!element.is_string() && !element.is_array()) ||
               element.is_string() != first.is_string()) {
      SetTypeError(path, first.is_string() ? "a string like the first" : "an array of token ids",
                   element, fields.error());
    } else {
      AddPrompt(element, path, fields, limits, prompts);
    }
    if (!fields.error()->ok()) return;
  }
}

}  // namespace

Parsed<CompletionRequest> ParseCompletion(std::string_view body, const Limits& limits) {
  JsonDoc doc;
  if (auto error = doc.Parse(body)) return *error;
  FirstError error;
  const Fields fields(doc.object(), "", &error);
  CompletionRequest request;
  Common& common = request.common;
  ParseCommon(fields, limits, &common);
  ParsePrompt(fields, limits, &request.prompts);
  fields.Int("logprobs", 0, limits.max_logprobs, &request.logprobs);
  fields.Bool("echo", &request.echo);
  fields.Bool("add_special_tokens", &request.add_special_tokens);
  fields.Bool("parse_special", &request.parse_special);
  // No token at all is of use only to score the prompt.
  int max_tokens = 16;
  fields.Int("max_tokens", request.echo ? 0 : 1, kMaxTokens, &max_tokens);
  common.max_tokens = max_tokens;
  if (std::string suffix; fields.String("suffix", kMaxTextBytes, &suffix)) {
    fields.RefuseUnless("suffix", suffix.empty());
  }
  CheckTotals(fields, limits, static_cast<int64_t>(request.prompts.size()) * common.n, "max_tokens",
              common);
  if (auto first = error.Take()) return *first;
  return request;
}

}  // namespace dsla::openai
