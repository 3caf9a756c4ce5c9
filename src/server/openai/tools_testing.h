// The API of a model with tools, for the tests of it.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "server/openai/testing.h"

namespace dsla::openai::testing {

// Names of tools, then the messages, with their calls.
constexpr const char* kToolTemplate =
    "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
    "{% for m in messages %}{{ m.role ~ ':' ~ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}";

// The small tokenizer, with two more control tokens: 263 and 264.
inline std::unique_ptr<Tokenizer> TokenizerWithMarkers() {
  nlohmann::json description = dsla::testing::ByteLevelJson();
  int id = 263;
  for (const char* text : {"<tool_call>", "</tool_call>"}) {
    description["added_tokens"].push_back(
        {{"id", id++}, {"content", text}, {"special", true}, {"normalized", false}});
  }
  return NewTokenizer(ParseTokenizerJson(description.dump(), "t.json"));
}

struct ToolApi : TestApi {
  explicit ToolApi(const char* source = kToolTemplate) : TestApi(2000, TokenizerWithMarkers()) {
    auto made = ModelTemplate::ForTools(source);
    DSLA_CHECK(made.ok());
    context.tool_template = std::move(made).value();
    context.tool_dialect = ToolDialect::kHermes;
  }
  std::string Prompt(size_t job) { return tokenizer->Decode(engine.job(job).request.prompt); }
};

// A reply whose pieces of text these are.
inline void Reply(const Submission& job, const std::vector<std::string>& pieces,
                  FinishReason finish = FinishReason::kStop, const std::string& tail = "") {
  for (const std::string& piece : pieces) job.sink->OnToken(Token(97, piece));
  RequestResult result = Finished(finish, 1, static_cast<int>(pieces.size()));
  result.tail_text = tail;
  job.sink->OnFinish(result);
}

// A call, as pieces of a reply.
inline const std::vector<std::string> kCall = {
    "<tool_call>", "\n{\"name\": ", "\"get\", ",   "\"arguments\": {\"city\"",
    ": \"Ósló\"}", "}\n",           "</tool_call>"};

}  // namespace dsla::openai::testing
