// Conversations with tools: what the model reads, and the calls in its replies.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "engine/text_stream.h"
#include "server/openai/tools_testing.h"

namespace dsla::openai {
namespace {

using nlohmann::json;
using testing::FakeCompiler;
using testing::FakeResponder;
using ::testing::HasSubstr;
using testing::kCall;
using ::testing::Not;
using testing::Reply;
using ::testing::StartsWith;
using testing::TestApi;

constexpr const char* kTools =
    R"("tools":[{"type":"function","function":{"name":"now","parameters":{"type":"object"}}},)"
    R"({"type":"function","function":{"name":"get"}}])";

struct ToolApi : testing::ToolApi {
  using testing::ToolApi::ToolApi;
  std::shared_ptr<FakeResponder> Ask(const std::string& more = "") {
    return Chat(
        fmt::format(R"({{"messages":[{{"role":"user","content":"x"}}],{}{}}})", kTools, more));
  }
};

std::vector<json> Events(const FakeResponder& responder) {
  std::vector<json> events;
  const std::string body = responder.body();
  for (size_t at = 0; (at = body.find("data: {", at)) != std::string::npos; ++at)
    events.push_back(json::parse(body.substr(at + 6, body.find("\n\n", at) - at - 6)));
  return events;
}

void ExpectError(const FakeResponder& responder, const std::string& code,
                 const std::string& param) {
  EXPECT_EQ(responder.head().status, 400) << responder.body();
  EXPECT_THAT(responder.body(), HasSubstr(fmt::format(R"("param":"{}","code":"{}")", param, code)));
}

TEST(Tools, ThePromptHasThemAndTheirResults) {
  ToolApi api;
  api.Ask();
  EXPECT_EQ(api.Prompt(0), "now;get;user:x<|end|>");
  EXPECT_EQ(api.engine.job(0).request.shown_ids, (std::vector<int32_t>{263, 264}));
  api.Chat(R"({"messages":[{"role":"user","content":"x"},{"role":"assistant","content":null,)"
           R"("tool_calls":[{"id":"a","function":{"name":"get","arguments":"{\"b\":1}"}}]},)"
           R"({"role":"tool","tool_call_id":"a","content":"y"}]})");
  EXPECT_EQ(api.Prompt(1),
            "user:x<|end|>assistant:<tool_call>{\"name\": \"get\", \"arguments\": {\"b\": "
            "1}}<|end|>tool:y<|end|>");
  EXPECT_TRUE(api.engine.job(1).request.shown_ids.empty());
}

TEST(Tools, NoneWantedAreNoneShown) {
  ToolApi api;
  const auto responder = api.Ask(R"(,"tool_choice":"none")");
  EXPECT_THAT(api.Prompt(0), Not(HasSubstr("get")));
  Reply(api.engine.job(0), kCall);
  EXPECT_THAT(responder->body(), HasSubstr(R"("content":"<tool_call>)"));
}

TEST(Tools, ControlTextOfClientsIsPlainText) {
  ToolApi api;
  api.Chat(R"({"messages":[{"role":"user","content":"<|end|>"},{"role":"assistant","tool_calls":)"
           R"([{"function":{"name":"<|end|>","arguments":"{\"<|end|>\":\"<|end|>\"}"}}]},)"
           R"({"role":"tool","tool_call_id":"<|end|>","content":"<|end|>"}]})");
  ASSERT_EQ(api.engine.jobs(), 1u);
  const auto& prompt = api.engine.job(0).request.prompt;
  EXPECT_EQ(std::count(prompt.begin(), prompt.end(), 261), 3) << "one behind each message";
  EXPECT_EQ(std::count(prompt.begin(), prompt.end(), 263), 1);
}

TEST(Tools, AWholeAnswer) {
  ToolApi api;
  const auto responder = api.Ask();
  std::vector<std::string> pieces = {"I look", ".\n"};
  pieces.insert(pieces.end(), kCall.begin(), kCall.end());
  Reply(api.engine.job(0), pieces);
  const json choice = json::parse(responder->body())["choices"][0];
  EXPECT_EQ(choice["finish_reason"], "tool_calls");
  EXPECT_EQ(choice["message"]["content"], "I look.\n");
  const json& calls = choice["message"]["tool_calls"];
  ASSERT_EQ(calls.size(), 1u);
  EXPECT_EQ(calls[0]["type"], "function");
  EXPECT_THAT(calls[0]["id"].get<std::string>(), ::testing::MatchesRegex("call_[0-9a-f]+"));
  EXPECT_EQ(calls[0]["function"]["name"], "get");
  EXPECT_EQ(calls[0]["function"]["arguments"], "{\"city\": \"Ósló\"}");
}

TEST(Tools, TheEndIsSaidAsItIs) {
  ToolApi api;
  const auto finish = [&](const std::vector<std::string>& pieces, FinishReason reason,
                          const std::string& tail = "") {
    const auto responder = api.Ask();
    Reply(api.engine.job(api.engine.jobs() - 1), pieces, reason, tail);
    return json::parse(responder->body())["choices"][0];
  };
  EXPECT_EQ(finish({"Hi."}, FinishReason::kStop)["finish_reason"], "stop");
  EXPECT_FALSE(finish({"Hi."}, FinishReason::kStop)["message"].contains("tool_calls"));
  EXPECT_EQ(finish(kCall, FinishReason::kLength)["finish_reason"], "length");
  EXPECT_TRUE(finish(kCall, FinishReason::kStop)["message"]["content"].is_null());
  const json cut = finish({"<tool_call>{\"name\": \"get\", \"argu"}, FinishReason::kLength, "m");
  EXPECT_EQ(cut["message"]["content"], "<tool_call>{\"name\": \"get\", \"argum");
  EXPECT_EQ(cut["finish_reason"], "length");
  EXPECT_EQ(finish({"<tool_"}, FinishReason::kStop, "x")["message"]["content"], "<tool_x");
  EXPECT_EQ(finish({"<tool_"}, FinishReason::kStop, "")["message"]["content"], "<tool_");
}

TEST(Tools, Streamed) {
  ToolApi api;
  const auto responder = api.Ask(R"(,"stream":true)");
  std::vector<std::string> pieces = {"Ok. "};
  pieces.insert(pieces.end(), kCall.begin(), kCall.end());
  Reply(api.engine.job(0), pieces);
  const auto events = Events(*responder);
  ASSERT_EQ(events.size(), pieces.size() + 1) << "one for each token and the end";
  const auto delta = [&](size_t i) { return events[i]["choices"][0]["delta"]; };
  EXPECT_EQ(delta(0), (json{{"role", "assistant"}, {"content", "Ok. "}}));
  EXPECT_EQ(delta(1), json::object());
  EXPECT_EQ(delta(3), json::object());
  EXPECT_EQ(delta(4)["tool_calls"][0]["index"], 0);
  EXPECT_EQ(delta(4)["tool_calls"][0]["type"], "function");
  EXPECT_THAT(delta(4)["tool_calls"][0]["id"].get<std::string>(), HasSubstr("call_"));
  EXPECT_EQ(delta(4)["tool_calls"][0]["function"],
            (json{{"name", "get"}, {"arguments", "{\"city\""}}));
  EXPECT_EQ(delta(5),
            (json{{"tool_calls", {{{"index", 0}, {"function", {{"arguments", ": \"Ósló\"}"}}}}}}}));
  EXPECT_EQ(delta(8), json::object());
  EXPECT_EQ(events[8]["choices"][0]["finish_reason"], "tool_calls");
  EXPECT_EQ(events[7]["choices"][0]["finish_reason"], nullptr);
}

TEST(Tools, AStreamThatBeginsWithACall) {
  ToolApi api;
  const auto responder = api.Ask(R"(,"stream":true,"n":2)");
  Reply(api.engine.job(0), {"<tool"}, FinishReason::kLength);
  Reply(api.engine.job(1), {"<tool_call>{\"name\":\"now\"}"});
  const auto events = Events(*responder);
  ASSERT_EQ(events.size(), 4u);
  EXPECT_EQ(events[0]["choices"][0]["delta"], (json{{"role", "assistant"}, {"content", nullptr}}));
  EXPECT_EQ(events[1]["choices"][0]["delta"], (json{{"content", "<tool"}}));
  EXPECT_EQ(events[2]["choices"][0]["index"], 1);
  EXPECT_EQ(events[2]["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"], "{}");
}

TEST(Tools, ControlTokensOfCallsKeepTheirText) {
  ToolApi api;
  api.Ask();
  const Request request = api.engine.job(0).request;
  TextStream text(*api.tokenizer, request.stop, request.continues, request.shown_ids);
  EXPECT_EQ(text.Push(263, true), "<tool_call>");
  EXPECT_EQ(text.Push(259, true), "hello");
  EXPECT_EQ(text.Push(261, true), "") << "the others stay hidden";
  EXPECT_EQ(TextStream(*api.tokenizer, {}).Push(263, true), "");
}

TEST(Tools, IdsAsMistralsTemplatesTakeThem) {
  ToolApi api;
  api.context.tool_dialect = ToolDialect::kMistral;
  const auto responder = api.Ask();
  Reply(api.engine.job(0), {"[TOOL_CALLS]now{}[TOOL_CALLS]get{}"});
  const json calls = json::parse(responder->body())["choices"][0]["message"]["tool_calls"];
  ASSERT_EQ(calls.size(), 2u);
  EXPECT_THAT(calls[0]["id"].get<std::string>(), ::testing::MatchesRegex("[0-9a-f]{9}"));
  EXPECT_NE(calls[0]["id"], calls[1]["id"]);
}

TEST(Tools, OneCallWhereNoMoreAreWanted) {
  ToolApi api;
  const auto responder = api.Ask(R"(,"parallel_tool_calls":false)");
  Reply(api.engine.job(0),
        {"<tool_call>{\"name\":\"now\"}</tool_call>", "<tool_call>{\"name\":\"get\"}</tool_call>"});
  EXPECT_EQ(json::parse(responder->body())["choices"][0]["message"]["tool_calls"].size(), 1u);
}

TEST(Tools, ForcedCallsFollowAGrammar) {
  ToolApi api;
  FakeCompiler compiler;
  api.context.grammars = &compiler;
  const auto asked = [&](const std::string& more) {
    const size_t before = compiler.specs.size();
    api.Ask(more);
    EXPECT_EQ(api.engine.job(api.engine.jobs() - 1).request.grammar != nullptr,
              compiler.specs.size() > before);
    if (compiler.specs.size() == before) return json();
    EXPECT_EQ(compiler.specs.back().kind, GrammarSpec::Kind::kStructuralTag);
    return json::parse(compiler.specs.back().text)["format"];
  };
  EXPECT_EQ(asked(""), json());
  EXPECT_EQ(asked(R"(,"tool_choice":"none")"), json());
  json format = asked(R"(,"tool_choice":"required")");
  const auto calls = [&] { return format["elements"][0]; };
  const auto call = [&] { return calls()["tags"][0]["content"]["elements"]; };
  EXPECT_EQ(calls()["type"], "tags_with_separator");
  EXPECT_EQ(calls()["stop_after_first"], false);
  EXPECT_EQ(call()[0], (json{{"type", "token"}, {"token", 263}})) << "<tool_call>";
  ASSERT_EQ(call()[2]["type"], "or");
  ASSERT_EQ(call()[2]["elements"].size(), 2u) << "one for each tool";
  EXPECT_EQ(call()[2]["elements"][0]["elements"][1]["json_schema"], (json{{"type", "object"}}));
  EXPECT_TRUE(compiler.specs.back().control_tokens);
  format = asked(R"(,"tool_choice":"required","parallel_tool_calls":false)");
  EXPECT_EQ(calls()["stop_after_first"], true);
  format = asked(R"(,"tool_choice":{"type":"function","function":{"name":"get"}})");
  EXPECT_EQ(calls()["stop_after_first"], true);
  ASSERT_EQ(call()[2]["type"], "sequence");
  EXPECT_THAT(call()[2]["elements"][0]["value"].get<std::string>(), StartsWith("get\""));
}

TEST(Tools, StrictOnesAndJsonFollowAGrammar) {
  ToolApi api;
  FakeCompiler compiler;
  api.context.grammars = &compiler;
  const auto chat = [&](const std::string& fields) {
    return api.Chat(fmt::format(R"({{"messages":[{{"role":"user","content":"x"}}],{}}})", fields));
  };
  chat(R"("tools":[{"type":"function","function":{"name":"a","parameters":{"type":"object",)"
       R"("required":[]}}},{"type":"function","function":{"name":"b","strict":true,)"
       R"("parameters":{"type":"object","properties":{}}}}])");
  ASSERT_EQ(compiler.specs.size(), 1u);
  json format = json::parse(compiler.specs[0].text)["format"];
  EXPECT_EQ(format["elements"][0]["type"], "any_text");
  const json calls = format["elements"][1]["content"]["elements"][0];
  const json named = calls["elements"][0]["tags"][0]["content"]["elements"][2]["elements"];
  EXPECT_EQ(named[0]["elements"][1]["json_schema"], (json{{"type", "object"}}));
  EXPECT_TRUE(named[1]["elements"][1]["json_schema"].contains("properties"));
  chat(std::string(kTools) + R"(,"response_format":{"type":"json_object"})");
  ASSERT_EQ(compiler.specs.size(), 2u);
  format = json::parse(compiler.specs[1].text)["format"];
  EXPECT_EQ(format["type"], "or");
  EXPECT_EQ(format["elements"][0]["json_schema"], (json{{"type", "object"}}));
  ExpectError(*chat(std::string(kTools) + R"(,"grammar":"root ::= \"a\"")"), "invalid_value",
              "tools");
  chat(std::string(kTools) + R"(,"grammar":"root ::= \"a\"","tool_choice":"none")");
  EXPECT_EQ(compiler.specs.back().kind, GrammarSpec::Kind::kEbnf) << "there are no tools";
  EXPECT_FALSE(compiler.specs.back().control_tokens) << "a client's has none";
  api.router.reset();
  api.context.grammars = nullptr;
  ExpectError(*chat(std::string(kTools) + R"(,"tool_choice":"required")"), "unsupported_parameter",
              "tool_choice");
}

TEST(Tools, RefusedWhereTheModelHasNone) {
  TestApi api;
  api.context.no_tools = "the model's chat template has no place for tools";
  const std::string user = R"({"role":"user","content":"x"})";
  auto responder = api.Chat(fmt::format(R"({{"messages":[{}],{}}})", user, kTools));
  ExpectError(*responder, "unsupported_parameter", "tools");
  EXPECT_THAT(responder->body(), HasSubstr("has no place for tools"));
  responder = api.Chat(fmt::format(
      R"({{"messages":[{},{{"role":"tool","tool_call_id":"a","content":"y"}}]}})", user));
  ExpectError(*responder, "unsupported_parameter", "messages");
  api.Chat(fmt::format(R"({{"messages":[{}],{},"tool_choice":"none"}})", user, kTools));
  EXPECT_EQ(api.engine.jobs(), 1u) << "no tools are no trouble";

  ToolApi unknown;
  unknown.context.tool_dialect.reset();
  unknown.context.no_tools = "name it with --tool-parser";
  ExpectError(*unknown.Ask(), "unsupported_parameter", "tools");
}

TEST(Tools, ATemplateThatRefuses) {
  ToolApi api("{{ tools }}{% if messages | length > 1 %}{{ raise_exception('alone') }}{% endif %}");
  const auto responder = api.Chat(fmt::format(R"({{"messages":[{{"role":"user","content":"x"}},)"
                                              R"({{"role":"user","content":"y"}}],{}}})",
                                              kTools));
  ExpectError(*responder, "chat_template_error", "messages");
  EXPECT_THAT(responder->body(), HasSubstr("refuses the conversation: alone"));
}

TEST(Tools, TokenizeCountsThem) {
  ToolApi api;
  const auto responder =
      api.Call("POST", "/tokenize",
               fmt::format(R"({{"messages":[{{"role":"user","content":"x"}}],{}}})", kTools));
  const auto tokens = json::parse(responder->body())["tokens"].get<std::vector<int32_t>>();
  EXPECT_EQ(api.tokenizer->Decode(tokens), "now;get;user:x<|end|>");
}

}  // namespace
}  // namespace dsla::openai
