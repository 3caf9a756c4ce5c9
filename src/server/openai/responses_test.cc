#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "server/openai/tools_testing.h"

namespace dsla::openai {
namespace {

using nlohmann::json;
using testing::FakeCompiler;
using testing::FakeResponder;
using testing::Finished;
using testing::kCall;
using testing::Reply;
using testing::TestApi;
using testing::Token;
using testing::ToolApi;

constexpr const char* kStreamed = R"({"input":"hello","max_output_tokens":9,"stream":true})";

std::shared_ptr<FakeResponder> Respond(TestApi& api, std::string body) {
  return api.Call("POST", "/v1/responses", std::move(body));
}

// Of "event: NAME\ndata: {...}\n\n" each; the name is the type, and they are numbered.
std::vector<json> Events(const FakeResponder& responder) {
  std::vector<json> events;
  std::string body = responder.body();
  while (!body.empty()) {
    const size_t data = body.find("\ndata: "), end = body.find("\n\n");
    EXPECT_TRUE(body.starts_with("event: ") && data < end) << body;
    if (data >= end || end == std::string::npos) break;
    events.push_back(json::parse(body.substr(data + 7, end - data - 7)));
    EXPECT_EQ(events.back()["type"], body.substr(7, data - 7));
    EXPECT_EQ(events.back()["sequence_number"], events.size() - 1);
    body.erase(0, end + 2);
  }
  return events;
}

std::vector<std::string> TypesOf(const std::vector<json>& events) {
  std::vector<std::string> types;
  for (const json& event : events) types.push_back(event["type"]);
  return types;
}

TEST(Responses, TheWholeAnswer) {
  TestApi api;
  const auto responder =
      Respond(api, R"({"input":"hello","instructions":"i","max_output_tokens":3,"temperature":0,
               "metadata":{"a":"b"},"service_tier":"priority"})");
  ASSERT_EQ(api.engine.jobs(), 1u);
  const auto job = api.engine.job(0);
  EXPECT_EQ(job.request.max_tokens, 3);
  EXPECT_EQ(job.request.tier, Tier::kFull);
  // The prompt is chat's.
  api.Chat(R"({"messages":[{"role":"system","content":"i"},{"role":"user","content":"hello"}]})");
  EXPECT_EQ(job.request.prompt, api.engine.job(1).request.prompt);
  job.sink->OnToken(Token(97, "a\""));
  RequestResult result = Finished(FinishReason::kStop, 5, 1);
  result.tail_text = "b";
  result.cached_tokens = 2;
  job.sink->OnFinish(result);
  EXPECT_EQ(responder->head().status, 200);
  EXPECT_EQ(responder->head().headers.Get("Content-Type"), "application/json");
  EXPECT_EQ(responder->head().headers.Get("X-Dsla-Tier"), "full");
  EXPECT_EQ(responder->note("tokens"), "1");
  const json answer = json::parse(responder->body());
  EXPECT_THAT(answer["id"].get<std::string>(), ::testing::StartsWith("resp_"));
  EXPECT_EQ(answer["object"], "response");
  EXPECT_EQ(answer["created_at"], 1700000000);
  EXPECT_EQ(answer["status"], "completed");
  EXPECT_EQ(answer["model"], "small");
  EXPECT_EQ(answer["instructions"], "i");
  EXPECT_EQ(answer["max_output_tokens"], 3);
  EXPECT_EQ(answer["temperature"], 0);
  EXPECT_EQ(answer["top_p"], 1);
  EXPECT_EQ(answer["service_tier"], "priority");
  EXPECT_EQ(answer["metadata"], json({{"a", "b"}}));
  EXPECT_EQ(answer["store"], false);
  EXPECT_TRUE(answer["error"].is_null() && answer["incomplete_details"].is_null());
  ASSERT_EQ(answer["output"].size(), 1u);
  const json& message = answer["output"][0];
  EXPECT_THAT(message["id"].get<std::string>(), ::testing::StartsWith("msg_"));
  EXPECT_EQ(message["type"], "message");
  EXPECT_EQ(message["role"], "assistant");
  EXPECT_EQ(message["status"], "completed");
  EXPECT_EQ(message["content"], json::parse(R"([{"type":"output_text","text":"a\"b",
                                                 "annotations":[],"logprobs":[]}])"));
  const auto prompt = static_cast<int64_t>(job.request.prompt.size());
  EXPECT_EQ(answer["usage"]["input_tokens"], prompt);
  EXPECT_EQ(answer["usage"]["input_tokens_details"]["cached_tokens"], 2);
  EXPECT_EQ(answer["usage"]["output_tokens"], 1);
  EXPECT_EQ(answer["usage"]["output_tokens_details"]["reasoning_tokens"], 0);
  EXPECT_EQ(answer["usage"]["total_tokens"], prompt + 1);
  EXPECT_EQ(answer["usage"]["dsla"]["levels"], json::parse(R"([{"position":0,"level":0}])"));
}

TEST(Responses, TheStream) {
  TestApi api;
  const auto responder = Respond(api, kStreamed);
  const auto job = api.engine.job(0);
  job.sink->OnToken(Token(97, "a"));
  EXPECT_TRUE(responder->streaming());
  EXPECT_EQ(Events(*responder).back()["delta"], "a") << "at once";
  job.sink->OnToken(Token(98, ""));  // half a character
  job.sink->OnToken(Token(99, "\xc3\xa9"));
  RequestResult result = Finished(FinishReason::kStop, 5, 3);
  result.tail_text = "!";
  job.sink->OnFinish(result);
  EXPECT_TRUE(responder->gone());
  EXPECT_EQ(responder->head().headers.Get("Content-Type"), "text/event-stream; charset=utf-8");
  EXPECT_EQ(responder->head().headers.Get("X-Dsla-Level"), "0");
  const std::vector<json> events = Events(*responder);
  EXPECT_EQ(
      TypesOf(events),
      (std::vector<std::string>{
          "response.created", "response.in_progress", "response.output_item.added",
          "response.content_part.added", "response.output_text.delta", "response.output_text.delta",
          "response.output_text.delta", "response.output_text.done", "response.content_part.done",
          "response.output_item.done", "response.completed"}));
  EXPECT_EQ(events[0]["response"]["status"], "in_progress");
  EXPECT_TRUE(events[0]["response"]["output"].empty() && events[0]["response"]["usage"].is_null());
  EXPECT_TRUE(events[2]["item"]["content"].empty());
  EXPECT_EQ(events[2]["item"]["status"], "in_progress");
  EXPECT_EQ(events[3]["part"]["text"], "");
  EXPECT_EQ(events[4]["item_id"], events[2]["item"]["id"]);
  EXPECT_EQ(events[5]["delta"], "\xc3\xa9");
  EXPECT_EQ(events[6]["delta"], "!");
  EXPECT_EQ(events[7]["text"], "a\xc3\xa9!");
  EXPECT_EQ(events[8]["part"], events[9]["item"]["content"][0]);
  const json& whole = events[10]["response"];
  EXPECT_EQ(whole["output"][0], events[9]["item"]);
  EXPECT_EQ(whole["id"], events[0]["response"]["id"]);
  EXPECT_EQ(whole["status"], "completed");
  EXPECT_EQ(whole["usage"]["output_tokens"], 3);
}

TEST(Responses, ALimitLeavesThemIncomplete) {
  TestApi api;
  const auto whole = Respond(api, R"({"input":"hello","max_output_tokens":1})");
  const auto streamed = Respond(api, kStreamed);
  for (int i : {0, 1}) {
    api.engine.job(i).sink->OnToken(Token(97, "a"));
    api.engine.job(i).sink->OnFinish(Finished(FinishReason::kLength, 5, 1));
  }
  const json last = Events(*streamed).back();
  EXPECT_EQ(last["type"], "response.incomplete");
  for (const json& answer : {json::parse(whole->body()), last["response"]}) {
    EXPECT_EQ(answer["status"], "incomplete");
    EXPECT_EQ(answer["incomplete_details"]["reason"], "max_output_tokens");
    EXPECT_EQ(answer["output"][0]["status"], "incomplete");
  }
}

TEST(Responses, ErrorsAreThoseOfTheServer) {
  TestApi api;
  const auto code = [&](const char* body) {
    const auto responder = Respond(api, body);
    return fmt::format("{} {} {}", responder->head().status,
                       json::parse(responder->body())["error"]["code"].dump(),
                       json::parse(responder->body())["error"]["param"].dump());
  };
  EXPECT_EQ(code("{"), R"(400 "invalid_json" null)");
  EXPECT_EQ(code(R"({"input":"x","store":true})"), R"(400 "unsupported_parameter" "store")");
  EXPECT_EQ(code(R"({"input":"x","model":"gpt"})"), R"(404 "model_not_found" "model")");
  EXPECT_EQ(code(R"({"input":"x","max_output_tokens":100})"),
            R"(400 "context_length_exceeded" null)");
  EXPECT_EQ(api.engine.jobs(), 0u);
  api.context.chat_template.reset();
  api.router.reset();
  EXPECT_EQ(code(R"({"input":"x"})"), R"(400 "chat_template_error" "input")");
}

TEST(Responses, AFailureInAStreamIsAnEvent) {
  TestApi api;
  RequestResult failed = Finished(FinishReason::kCancelled, 5, 1);
  failed.status = Status(StatusCode::kDeadlineExceeded, "late");
  const auto before = Respond(api, kStreamed);
  api.engine.job(0).sink->OnFinish(failed);
  EXPECT_EQ(before->head().status, 504) << "before the first token it is the status";
  EXPECT_EQ(json::parse(before->body())["error"]["code"], "timeout");
  const auto after = Respond(api, kStreamed);
  api.engine.job(1).sink->OnToken(Token(97, "a"));
  api.engine.job(1).sink->OnFinish(failed);
  const json last = Events(*after).back();
  EXPECT_EQ(last["type"], "error");
  EXPECT_EQ(last["code"], "timeout");
  EXPECT_TRUE(last["param"].is_null());
  EXPECT_EQ(last["message"], last["error"]["message"]);
  EXPECT_TRUE(after->gone());
}

TEST(Responses, WhoLeavesIsCancelled) {
  TestApi api;
  const auto responder = Respond(api, kStreamed);
  const std::string id = api.engine.job(0).request.id;
  responder->Disconnect();
  EXPECT_EQ(api.engine.WaitForCancelled(1), std::vector<std::string>{id});
}

TEST(Responses, NothingAtAllIsAMessageWithoutText) {
  TestApi api;
  const auto whole = Respond(api, R"({"input":"hello"})");
  const auto streamed = Respond(api, kStreamed);
  for (int i : {0, 1}) api.engine.job(i).sink->OnFinish(Finished(FinishReason::kStop, 5, 0));
  for (const json& answer : {json::parse(whole->body()), Events(*streamed).back()["response"]}) {
    ASSERT_EQ(answer["output"].size(), 1u);
    EXPECT_EQ(answer["output"][0]["content"][0]["text"], "");
  }
}

TEST(Responses, WhatIsAskedForComesBack) {
  ToolApi api;
  FakeCompiler compiler;
  api.context.grammars = &compiler;
  const char* body =
      R"({"input":"x","tools":[{"type":"function","name":"get"}],"parallel_tool_calls":false,)"
      R"("tool_choice":{"type":"function","name":"get"},)"
      R"("text":{"format":{"type":"json_object"}}})";
  const auto responder = Respond(api, body);
  Reply(api.engine.job(0), kCall);
  const json answer = json::parse(responder->body());
  EXPECT_EQ(answer["tools"], json::parse(R"([{"type":"function","name":"get","strict":true}])"));
  EXPECT_EQ(answer["tool_choice"], json::parse(R"({"type":"function","name":"get"})"));
  EXPECT_EQ(answer["parallel_tool_calls"], false);
  EXPECT_EQ(answer["text"]["format"], json::parse(R"({"type":"json_object"})"));
  EXPECT_EQ(answer["text"]["verbosity"], "medium");
  EXPECT_EQ(answer["top_logprobs"], 0);
}

constexpr const char* kTools =
    R"("tools":[{"type":"function","name":"now","parameters":{"type":"object"},"strict":false},)"
    R"({"type":"function","name":"get","strict":false}])";

std::shared_ptr<FakeResponder> Ask(ToolApi& api, const std::string& more = "") {
  return Respond(api, fmt::format(R"({{"input":"x",{}{}}})", kTools, more));
}

TEST(ResponsesTools, ThePromptIsChats) {
  ToolApi api;
  Respond(api, fmt::format(R"({{{},"input":[{{"role":"user","content":"x"}},
      {{"role":"assistant","content":"t"}},
      {{"type":"function_call","call_id":"a","name":"get","arguments":"{{\"b\":1}}"}},
      {{"type":"function_call","call_id":"b","name":"now","arguments":"{{}}"}},
      {{"type":"function_call_output","call_id":"a","output":"y"}},
      {{"type":"function_call_output","call_id":"b","output":"z"}}]}})",
                           kTools));
  EXPECT_EQ(api.Prompt(0),
            "now;get;user:x<|end|>"
            "assistant:t<tool_call>{\"name\": \"get\", \"arguments\": {\"b\": 1}}"
            "<tool_call>{\"name\": \"now\", \"arguments\": {}}<|end|>"
            "tool:y<|end|>tool:z<|end|>");
  EXPECT_EQ(api.engine.job(0).request.shown_ids, (std::vector<int32_t>{263, 264}));
}

TEST(ResponsesTools, CallsAloneAreNoMessage) {
  ToolApi api;
  const auto responder = Ask(api);
  std::vector<std::string> pieces = kCall;
  pieces.push_back("\n<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>");
  Reply(api.engine.job(0), pieces);
  const json answer = json::parse(responder->body());
  EXPECT_EQ(answer["status"], "completed");
  ASSERT_EQ(answer["output"].size(), 2u);
  const json& call = answer["output"][0];
  EXPECT_EQ(call["type"], "function_call");
  EXPECT_EQ(call["status"], "completed");
  EXPECT_EQ(call["name"], "get");
  EXPECT_EQ(call["arguments"], "{\"city\": \"Ósló\"}");
  EXPECT_THAT(call["id"].get<std::string>(), ::testing::StartsWith("fc_"));
  EXPECT_THAT(call["call_id"].get<std::string>(), ::testing::StartsWith("call_"));
  EXPECT_EQ(answer["output"][1]["name"], "now");
  EXPECT_NE(answer["output"][1]["id"], call["id"]);
  EXPECT_NE(answer["output"][1]["call_id"], call["call_id"]);
}

TEST(ResponsesTools, TextComesBeforeCalls) {
  ToolApi api;
  const auto responder = Ask(api);
  std::vector<std::string> pieces = {"I look", ".\n"};
  pieces.insert(pieces.end(), kCall.begin(), kCall.end());
  Reply(api.engine.job(0), pieces);
  const json output = json::parse(responder->body())["output"];
  ASSERT_EQ(output.size(), 2u);
  EXPECT_EQ(output[0]["content"][0]["text"], "I look.\n");
  EXPECT_EQ(output[1]["name"], "get");
}

TEST(ResponsesTools, Streamed) {
  ToolApi api;
  const auto responder = Ask(api, R"(,"stream":true)");
  std::vector<std::string> pieces = {"Ok. "};
  pieces.insert(pieces.end(), kCall.begin(), kCall.end());
  pieces.push_back("\n<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>");
  Reply(api.engine.job(0), pieces);
  const std::vector<json> events = Events(*responder);
  EXPECT_EQ(
      TypesOf(events),
      (std::vector<std::string>{
          "response.created", "response.in_progress", "response.output_item.added",
          "response.content_part.added", "response.output_text.delta", "response.output_text.done",
          "response.content_part.done", "response.output_item.done", "response.output_item.added",
          "response.function_call_arguments.delta", "response.function_call_arguments.delta",
          "response.function_call_arguments.done", "response.output_item.done",
          "response.output_item.added", "response.function_call_arguments.delta",
          "response.function_call_arguments.done", "response.output_item.done",
          "response.completed"}));
  EXPECT_EQ(events[0]["response"]["tools"].size(), 2u);
  const json& added = events[8]["item"];
  EXPECT_EQ(events[8]["output_index"], 1);
  EXPECT_EQ(added["status"], "in_progress");
  EXPECT_EQ(added["name"], "get");
  EXPECT_EQ(added["arguments"], "");
  EXPECT_EQ(events[9]["delta"], "{\"city\"");
  EXPECT_EQ(events[10]["delta"], ": \"Ósló\"}");
  EXPECT_EQ(events[11]["arguments"], "{\"city\": \"Ósló\"}");
  EXPECT_EQ(events[11]["name"], "get");
  for (int i : {9, 10, 11}) {
    EXPECT_EQ(events[i]["item_id"], added["id"]);
    EXPECT_EQ(events[i]["output_index"], 1);
  }
  EXPECT_EQ(events[12]["item"]["status"], "completed");
  EXPECT_EQ(events[12]["item"]["call_id"], added["call_id"]);
  EXPECT_EQ(events[13]["output_index"], 2);
  EXPECT_EQ(events[17]["response"]["output"],
            (json{events[7]["item"], events[12]["item"], events[16]["item"]}));
}

TEST(ResponsesTools, AStreamedCallThatBreaksIsIncompleteAndTheRestIsText) {
  ToolApi api;
  const auto responder = Ask(api, R"(,"stream":true)");
  // The last piece goes on with the arguments and breaks them.
  Reply(api.engine.job(0), {"<tool_call>{\"name\": \"get\", \"arguments\": {\"a\"", ": [}never"});
  const std::vector<json> events = Events(*responder);
  const json output = events.back()["response"]["output"];
  ASSERT_EQ(output.size(), 2u);
  EXPECT_EQ(output[0]["type"], "function_call");
  EXPECT_EQ(output[0]["status"], "incomplete");
  EXPECT_EQ(output[0]["arguments"].get<std::string>() +
                output[1]["content"][0]["text"].get<std::string>(),
            "{\"a\": [}never");
  EXPECT_EQ(output[1]["status"], "completed");
}

TEST(ResponsesTools, ALimitCutsOffACall) {
  ToolApi api;
  const auto responder = Ask(api, R"(,"stream":true)");
  Reply(api.engine.job(0), {"<tool_call>{\"name\": \"get\", \"arguments\": {\"a\""},
        FinishReason::kLength);
  const json last = Events(*responder).back();
  EXPECT_EQ(last["type"], "response.incomplete");
  ASSERT_EQ(last["response"]["output"].size(), 1u);
  EXPECT_EQ(last["response"]["output"][0]["status"], "incomplete");
  EXPECT_EQ(last["response"]["output"][0]["arguments"], "{\"a\"");
}

// The grammar that such a request's reply follows; empty: none.
std::string GrammarOf(const char* path, const std::string& body) {
  ToolApi api;
  FakeCompiler compiler;
  api.context.grammars = &compiler;
  const auto responder = api.Call("POST", path, body);
  EXPECT_EQ(api.engine.jobs(), 1u) << responder->body();
  if (compiler.specs.empty()) return {};
  EXPECT_NE(api.engine.job(0).request.grammar, nullptr);
  return compiler.specs.back().text;
}

std::string ResponseGrammar(const std::string& fields) {
  return GrammarOf("/v1/responses", fmt::format(R"({{"input":"x",{}}})", fields));
}

std::string ChatGrammar(const std::string& fields) {
  return GrammarOf("/v1/chat/completions",
                   fmt::format(R"({{"messages":[{{"role":"user","content":"x"}}],{}}})", fields));
}

TEST(ResponsesTools, ForcedAndStrictCallsFollowChatsGrammars) {
  const std::string tools = kTools;
  const std::string now =
      R"({"type":"function","function":{"name":"now","parameters":{"type":"object"}}})";
  const std::string get = R"({"type":"function","function":{"name":"get"}})";
  const std::string chats = fmt::format(R"("tools":[{},{}])", now, get);
  EXPECT_EQ(ResponseGrammar(tools), "");
  const char* required = R"(,"tool_choice":"required")";
  EXPECT_NE(ChatGrammar(chats + required), "");
  EXPECT_EQ(ResponseGrammar(tools + required), ChatGrammar(chats + required));
  EXPECT_EQ(ResponseGrammar(tools + R"(,"tool_choice":{"type":"function","name":"get"})"),
            ChatGrammar(chats + R"(,"tool_choice":{"type":"function","function":{"name":"get"}})"));
  EXPECT_EQ(ResponseGrammar(R"("tools":[{"type":"function","name":"get"}])"),
            ChatGrammar(R"("tools":[{"type":"function","function":{"name":"get","strict":true}}])"))
      << "strict where it does not say otherwise";
  EXPECT_EQ(ResponseGrammar(tools + R"(,"text":{"format":{"type":"json_object"}})"),
            ChatGrammar(chats + R"(,"response_format":{"type":"json_object"})"));
}

TEST(ResponsesTools, AllowedOnesAloneAreCalled) {
  const auto allowed = [](const char* mode) {
    return ResponseGrammar(fmt::format(R"({},"tool_choice":{{"type":"allowed_tools","mode":"{}",)"
                                       R"("tools":[{{"type":"function","name":"get"}}]}})",
                                       kTools, mode));
  };
  const std::string alone =
      R"("tools":[{"type":"function","function":{"name":"get","strict":true}}])";
  EXPECT_EQ(allowed("required"), ChatGrammar(alone + R"(,"tool_choice":"required")"));
  EXPECT_EQ(allowed("auto"), ChatGrammar(alone));
  ToolApi api;
  FakeCompiler compiler;
  api.context.grammars = &compiler;
  Ask(api, R"(,"tool_choice":{"type":"allowed_tools","mode":"auto",)"
           R"("tools":[{"type":"function","name":"get"}]})");
  EXPECT_EQ(api.Prompt(0), "now;get;user:x<|end|>") << "all are shown";
}

TEST(ResponsesFormat, IsAGrammarsWhoseErrorsNameIt) {
  ToolApi api;
  FakeCompiler compiler;
  api.context.grammars = &compiler;
  const char* body =
      R"({"input":"x","text":{"format":{"type":"json_schema","name":"n","schema":{"type":"object"}}}})";
  Respond(api, body);
  ASSERT_EQ(compiler.specs.size(), 1u);
  EXPECT_EQ(compiler.specs[0].kind, GrammarSpec::Kind::kJsonSchema);
  EXPECT_EQ(compiler.specs[0].text, R"({"type":"object"})");
  EXPECT_NE(api.engine.job(0).request.grammar, nullptr);
  compiler.status = InvalidArgument("bad schema");
  const auto responder = Respond(api, body);
  EXPECT_EQ(responder->head().status, 400);
  const json error = json::parse(responder->body())["error"];
  EXPECT_EQ(error["code"], "invalid_grammar");
  EXPECT_EQ(error["param"], "text.format.schema");
}

constexpr const char* kLogprobs = R"("include":["message.output_text.logprobs"],"top_logprobs":1)";

TEST(ResponsesLogprobs, AreOfEveryToken) {
  TestApi api;
  for (const bool stream : {false, true}) {
    const auto responder = Respond(
        api,
        fmt::format(R"({{"input":"x","max_output_tokens":9,"stream":{},{}}})", stream, kLogprobs));
    const auto job = api.engine.job(api.engine.jobs() - 1);
    EXPECT_EQ(job.request.top_logprobs, 1);
    job.sink->OnToken(Token(97, "", -0.5F, {{97, -0.5F}}));  // its text comes with the next
    job.sink->OnToken(Token(98, "ab", -0.25F, {{97, -0.125F}}));
    job.sink->OnToken(Token(99, "", -1, {{99, -1}}));  // gives no text
    job.sink->OnFinish(Finished(FinishReason::kStop, 5, 3));
    json answer;
    if (stream) {
      const std::vector<json> events = Events(*responder);
      answer = events.back()["response"];
      ASSERT_EQ(events[4]["type"], "response.output_text.delta");
      EXPECT_EQ(events[4]["logprobs"].size(), 2u);
      EXPECT_EQ(events[5]["logprobs"].size(), 3u);
    } else {
      answer = json::parse(responder->body());
    }
    EXPECT_EQ(answer["top_logprobs"], 1);
    const json logprobs = answer["output"][0]["content"][0]["logprobs"];
    ASSERT_EQ(logprobs.size(), 3u);
    EXPECT_EQ(logprobs[1], json::parse(R"({"token":"b","logprob":-0.25,"bytes":[98],
        "top_logprobs":[{"token":"a","logprob":-0.125,"bytes":[97]}]})"));
  }
}

TEST(ResponsesLogprobs, AreLimitedInAStreamToo) {
  TestApi api;
  api.context.limits.max_total_logprobs = 10;
  for (const bool stream : {false, true}) {
    const auto responder = Respond(
        api,
        fmt::format(R"({{"input":"x","max_output_tokens":6,"stream":{},{}}})", stream, kLogprobs));
    EXPECT_EQ(responder->head().status, 400);
    const json error = json::parse(responder->body())["error"];
    EXPECT_EQ(error["code"], "integer_above_max_value");
    EXPECT_EQ(error["param"], "include");
  }
}

}  // namespace
}  // namespace dsla::openai
