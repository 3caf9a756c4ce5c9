#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "server/openai/testing.h"

namespace dsla::openai {
namespace {

using nlohmann::json;
using testing::FakeResponder;
using testing::Finished;
using testing::TestApi;
using testing::Token;

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

}  // namespace
}  // namespace dsla::openai
