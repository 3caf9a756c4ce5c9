#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <future>

#include "base/clock.h"
#include "engine/text_stream.h"
#include "server/openai/testing.h"

namespace dsla::openai {
namespace {

using testing::FakeResponder;
using testing::Finished;
using ::testing::HasSubstr;
using ::testing::StartsWith;
using testing::TestApi;
using testing::Token;

// What every chunk or answer of this server begins with.
std::string Head(const FakeResponder& responder, const std::string& object,
                 const std::string& tier = "default") {
  const std::string body = responder.body();
  const size_t begin = body.find("mpl-") + 4;
  const std::string prefix = object.starts_with("chat") ? "chatcmpl-" : "cmpl-";
  return fmt::format(
      R"({{"id":"{}{}","object":"{}","created":1700000000,"model":"small","service_tier":"{}","choices":[)",
      prefix, body.substr(begin, 16), object, tier);
}

std::string Error(const std::string& code, const std::string& param) {
  return fmt::format(R"("param":{},"code":"{}")", param.empty() ? "null" : '"' + param + '"', code);
}

void ExpectError(const FakeResponder& responder, int status, const std::string& code,
                 const std::string& param = "") {
  EXPECT_EQ(responder.head().status, status) << responder.body();
  EXPECT_THAT(responder.body(), StartsWith(R"({"error":{"message":")"));
  EXPECT_THAT(responder.body(), HasSubstr(Error(code, param)));
  EXPECT_TRUE(responder.gone());
}

TEST(Completions, TheWholeAnswer) {
  TestApi api;
  const auto responder = api.Completions(R"({"prompt":"hello","max_tokens":3,"stop":["X"]})");
  ASSERT_EQ(api.engine.jobs(), 1u);
  const auto job = api.engine.job(0);
  EXPECT_EQ(job.request.prompt, std::vector<int32_t>{259});
  EXPECT_EQ(job.request.max_tokens, 3);
  EXPECT_EQ(job.request.stop, std::vector<std::string>{"X"});
  EXPECT_EQ(job.request.top_logprobs, -1);
  EXPECT_EQ(job.request.tier, Tier::kAuto);
  EXPECT_THAT(job.request.id, StartsWith("req/"));
  job.sink->OnToken(Token(97, "a\""));
  job.sink->OnToken(Token(98, ""));
  RequestResult result = Finished(FinishReason::kStop, 1, 2);
  result.tail_text = "b";
  result.stop_string = "X";
  result.cached_tokens = 1;
  result.levels = {{0, 0}, {64, 2}};
  EXPECT_FALSE(responder->gone());
  job.sink->OnFinish(result);
  EXPECT_EQ(responder->head().status, 200);
  EXPECT_EQ(responder->head().headers.Get("Content-Type"), "application/json");
  EXPECT_EQ(responder->head().headers.Get("X-Dsla-Tier"), "auto");
  EXPECT_EQ(responder->head().headers.Get("X-Dsla-Level"), "2");
  EXPECT_EQ(
      responder->body(),
      Head(*responder, "text_completion") +
          R"({"index":0,"text":"a\"b","logprobs":null,"finish_reason":"stop","stop_reason":"X"}],)"
          R"("usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3,)"
          R"("prompt_tokens_details":{"cached_tokens":1},"dsla":{"tier":"auto","levels":)"
          R"([{"position":0,"level":0},{"position":64,"level":2}]}}})");
  EXPECT_EQ(responder->note("tokens"), "2");
  EXPECT_EQ(responder->note("dsla_level"), "2");
  EXPECT_EQ(responder->note("replica"), "") << "there is one engine";
}

TEST(Completions, EveryStreamedByte) {
  TestApi api;
  const auto responder =
      api.Completions(R"({"prompt":[1,2],"stream":true,"stream_options":{"include_usage":true}})");
  const auto job = api.engine.job(0);
  EXPECT_FALSE(responder->streaming());  // the status waits for the first token
  job.sink->OnToken(Token(97, "a"));
  EXPECT_TRUE(responder->streaming());
  job.sink->OnToken(Token(195, ""));
  job.sink->OnFinish(Finished(FinishReason::kLength, 2, 2));
  const std::string head = "data: " + Head(*responder, "text_completion");
  EXPECT_EQ(
      responder->body(),
      head + R"({"index":0,"text":"a","logprobs":null,"finish_reason":null}],"usage":null})" +
          "\n\n" + head +
          R"({"index":0,"text":"","logprobs":null,"finish_reason":null}],"usage":null})" + "\n\n" +
          head +
          R"({"index":0,"text":"","logprobs":null,"finish_reason":"length","stop_reason":null}],)"
          R"("usage":null})" +
          "\n\n" + head +
          R"(],"usage":{"prompt_tokens":2,"completion_tokens":2,"total_tokens":4,)"
          R"("prompt_tokens_details":{"cached_tokens":0},"dsla":{"tier":"auto","levels":)"
          R"([{"position":0,"level":0}]}}})" +
          "\n\ndata: [DONE]\n\n");
  EXPECT_THAT(std::string(responder->head().headers.Get("Content-Type")),
              StartsWith("text/event-stream"));
  EXPECT_TRUE(responder->gone());
}

TEST(Completions, UsageInEveryChunkWhenAskedFor) {
  TestApi api;
  const auto responder =
      api.Completions(R"({"prompt":[1],"stream":true,"stream_options":)"
                      R"({"include_usage":true,"continuous_usage_stats":true}})");
  const auto job = api.engine.job(0);
  job.sink->OnToken(Token(97, "a"));
  EXPECT_THAT(responder->body(),
              HasSubstr(R"("usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}})"));
  job.sink->OnFinish(Finished(FinishReason::kStop, 1, 1));
  EXPECT_THAT(responder->body(), HasSubstr(R"("choices":[],"usage":{"prompt_tokens":1,)"));
}

TEST(Chat, EveryStreamedByte) {
  TestApi api;
  const auto responder =
      api.Chat(R"({"model":"small","messages":[{"role":"user","content":"hello"}],"stream":true,)"
               R"("service_tier":"priority"})");
  const auto job = api.engine.job(0);
  EXPECT_EQ(job.request.tier, Tier::kFull);
  EXPECT_EQ(job.request.max_tokens, 100 - static_cast<int>(job.request.prompt.size()));
  job.sink->OnToken(Token(97, "a"));
  job.sink->OnToken(Token(98, "b"));
  RequestResult result = Finished(FinishReason::kStop, 9, 2);
  result.tail_text = "!";
  job.sink->OnFinish(result);
  const std::string head = "data: " + Head(*responder, "chat.completion.chunk", "priority");
  EXPECT_EQ(
      responder->body(),
      head +
          R"({"index":0,"delta":{"role":"assistant","content":"a"},"logprobs":null,"finish_reason":null}]})" +
          "\n\n" + head +
          R"({"index":0,"delta":{"content":"b"},"logprobs":null,"finish_reason":null}]})" + "\n\n" +
          head +
          R"({"index":0,"delta":{"content":"!"},"logprobs":null,"finish_reason":"stop","stop_reason":null}]})" +
          "\n\ndata: [DONE]\n\n");
}

TEST(Chat, AnEmptyReplyStillHasARole) {
  TestApi api;
  const auto responder = api.Chat(R"({"messages":[{"role":"user","content":"x"}],"stream":true})");
  api.engine.job(0).sink->OnFinish(Finished(FinishReason::kStop, 3, 0));
  EXPECT_THAT(responder->body(),
              HasSubstr(R"("delta":{"role":"assistant","content":""},"logprobs":null,)"
                        R"("finish_reason":"stop")"));
}

TEST(Chat, TheWholeAnswerWithLogprobs) {
  TestApi api;
  const auto responder = api.Chat(
      R"({"messages":[{"role":"user","content":"x"}],"logprobs":true,"top_logprobs":1,"max_tokens":2})");
  const auto job = api.engine.job(0);
  EXPECT_EQ(job.request.top_logprobs, 1);
  EXPECT_FALSE(job.request.prompt_logprobs);
  job.sink->OnToken(Token(97, "a", -0.5, {{98, -0.25}}));
  job.sink->OnToken(Token(0xe2, "", -1e30f, {}));
  job.sink->OnFinish(Finished(FinishReason::kLength, 3, 2));
  EXPECT_THAT(
      responder->body(),
      HasSubstr(
          R"([{"index":0,"message":{"role":"assistant","content":"a","refusal":null},"logprobs":)"
          R"({"content":[{"token":"a","logprob":-0.5,"bytes":[97],"top_logprobs":)"
          R"([{"token":"b","logprob":-0.25,"bytes":[98]}]},)"
          "{\"token\":\"\ufffd\",\"logprob\":-9999,\"bytes\":[226],\"top_logprobs\":[]}],"
          R"("refusal":null},"finish_reason":"length","stop_reason":null}])"));
}

TEST(Chat, ControlTextOfUsersIsPlainText) {
  TestApi api;
  const std::string body = R"({"messages":[{"role":"user","content":"<|end|>"}]})";
  api.Chat(body);
  EXPECT_THAT(api.engine.job(0).request.prompt, ::testing::Not(::testing::Contains(261)));
}

// Who templates a conversation alone sends it as a prompt's text.
TEST(Completions, ControlTextOfAPromptIsParsedUnlessSwitchedOff) {
  TestApi api;
  api.Completions(R"({"prompt":"hello<|end|>"})");
  EXPECT_EQ(api.engine.job(0).request.prompt, (std::vector<int32_t>{259, 261}));
  api.Completions(R"({"prompt":["<|end|>hello"],"parse_special":false})");
  EXPECT_EQ(api.engine.job(1).request.prompt,
            (std::vector<int32_t>{60, 124, 101, 110, 100, 124, 62, 259}));
}

// SentencePiece writes a space before the first word of a text; a reply that goes on from a prompt
// is no such text.
TEST(Completions, KeepTheSpaceBeforeTheReply) {
  TestApi api(100, testing::SentencePieceTokenizer());
  const int32_t hello = *api.tokenizer->TokenToId("\u2581hello");
  const auto text_of = [&](const Request& request) {
    return TextStream(*api.tokenizer, request.stop, request.continues).Push(hello, true);
  };
  api.Chat(R"({"messages":[{"role":"user","content":"x"}]})");
  EXPECT_EQ(text_of(api.engine.job(0).request), "hello");
  // BOS, a space, the word.
  const auto offsets = [&](const char* fields, const char* text, const char* want) {
    const size_t job = api.engine.jobs();
    const auto responder =
        api.Completions(fmt::format(R"({{"prompt":"hello","logprobs":0{}}})", fields));
    const auto submitted = api.engine.job(job);
    EXPECT_EQ(submitted.request.prompt, (std::vector<int32_t>{1, hello}));
    if (submitted.request.prompt_logprobs) {
      submitted.sink->OnPromptLogprobs({{1, 0, {}}, {hello, -0.5f, {}}});
    }
    for (int i = 0; i < 2; ++i) {
      submitted.sink->OnToken(Token(hello, i == 0 ? text_of(submitted.request) : " hello"));
    }
    submitted.sink->OnFinish(Finished(FinishReason::kLength, 2, 2));
    EXPECT_THAT(responder->body(), HasSubstr(fmt::format(R"("text":"{}")", text)));
    EXPECT_THAT(responder->body(), HasSubstr(fmt::format(R"("text_offset":[{}])", want)));
  };
  offsets("", " hello hello", "0,6");
  offsets(R"(,"echo":true)", "hello hello hello", "0,0,5,11");
}

TEST(Scoring, EchoWithLogprobsAsEvaluationHarnessesNeedIt) {
  TestApi api;
  const auto responder = api.Completions(
      R"({"prompt":[[104,259,195]],"echo":true,"logprobs":1,"max_tokens":1,"temperature":0,"seed":1234})");
  const auto job = api.engine.job(0);
  EXPECT_TRUE(job.request.prompt_logprobs);
  EXPECT_TRUE(job.request.ignore_eos);  // there is always one token behind the prompt
  EXPECT_EQ(job.request.sampling.seed, 1234u);
  job.sink->OnPromptLogprobs(
      {{104, 0, {}}, {259, -0.1f, {{259, -0.1f}}}, {195, -2.5f, {{97, -0.3f}}}});
  job.sink->OnToken(Token(169, "\u00e9", -0.7f, {{169, -0.7f}}));
  job.sink->OnFinish(Finished(FinishReason::kLength, 3, 1));
  EXPECT_THAT(responder->body(),
              HasSubstr("{\"index\":0,\"text\":\"hhello\ufffd\u00e9\",\"logprobs\":"
                        R"({"tokens":["h","hello","bytes:\\xc3","bytes:\\xa9"],)"
                        R"("token_logprobs":[null,-0.1,-2.5,-0.7],)"
                        R"("top_logprobs":[null,{"hello":-0.1},{"a":-0.3,"bytes:\\xc3":-2.5},)"
                        R"({"bytes:\\xa9":-0.7}],"text_offset":[0,1,6,6]})"));
}

TEST(Scoring, ThePromptAlone) {
  TestApi api;
  const auto responder = api.Completions(
      R"({"prompt":"hello","echo":true,"logprobs":0,"max_tokens":0,"stream":true})");
  const auto job = api.engine.job(0);
  EXPECT_EQ(job.request.max_tokens, 0);
  job.sink->OnPromptLogprobs({{259, 0, {}}});
  job.sink->OnFinish(Finished(FinishReason::kLength, 1, 0));
  EXPECT_THAT(responder->body(),
              HasSubstr(R"({"index":0,"text":"hello","logprobs":{"tokens":["hello"],)"
                        R"("token_logprobs":[null],"top_logprobs":[null],"text_offset":[0]},)"
                        R"("finish_reason":"length","stop_reason":null})"));
}

// What the prompt spells counts, what is put around it does not, nor do control tokens of a reply.
TEST(Scoring, OffsetsCountTheControlTextThatIsEchoed) {
  TestApi api;
  const auto responder =
      api.Completions(R"({"prompt":"<|end|>hello","echo":true,"logprobs":0,"max_tokens":2})");
  const auto job = api.engine.job(0);
  job.sink->OnPromptLogprobs({{261, 0, {}}, {259, -0.5f, {}}});
  job.sink->OnToken(Token(261, ""));
  job.sink->OnToken(Token(97, "a"));
  job.sink->OnFinish(Finished(FinishReason::kLength, 2, 2));
  EXPECT_THAT(responder->body(), HasSubstr(R"("text":"<|end|>helloa")"));
  EXPECT_THAT(responder->body(), HasSubstr(R"("text_offset":[0,7,12,12])"));
}

TEST(Scoring, AnEchoOfWhatTruncationLeaves) {
  TestApi api(100, testing::SentencePieceTokenizer());
  const auto responder =
      api.Completions(R"({"prompt":"hello</s>","echo":true,"logprobs":0,"max_tokens":1,)"
                      R"("truncate_prompt_tokens":1})");
  const auto job = api.engine.job(0);
  ASSERT_EQ(job.request.prompt, std::vector<int32_t>{2});
  job.sink->OnPromptLogprobs({{2, 0, {}}});
  job.sink->OnToken(Token(3 + 'a', "a"));
  job.sink->OnFinish(Finished(FinishReason::kLength, 1, 1));
  EXPECT_THAT(responder->body(), HasSubstr(R"("text":"</s>a")"));
  EXPECT_THAT(responder->body(), HasSubstr(R"("text_offset":[0,4])"));
}

TEST(Scoring, OneAnswerHoldsSoManyLogProbabilities) {
  TestApi api(8192);
  api.context.limits.max_total_logprobs = 1000;
  const auto refused = [&](const std::string& fields, const std::string& figures) {
    const auto responder = api.Completions(fmt::format(R"({{"prompt":[1,2,3,4,5],{}}})", fields));
    ExpectError(*responder, 400, "integer_above_max_value", "logprobs");
    EXPECT_THAT(responder->body(), HasSubstr(figures));
  };
  refused(R"("echo":true,"logprobs":19,"n":4,"max_tokens":8)",
          "1040 log-probabilities are asked for, 20 of each of 20 prompt tokens and 32 reply "
          "tokens; one answer may have 1000");
  refused(R"("logprobs":0,"max_tokens":1001)", "1 of each of 0 prompt tokens and 1001 reply");
  ExpectError(*api.Chat(R"({"messages":[{"role":"user","content":"x"}],"logprobs":true})"), 400,
              "integer_above_max_value", "logprobs");
  EXPECT_EQ(api.engine.jobs(), 0u);
  for (const char* fields : {R"("echo":true,"logprobs":19,"n":2,"max_tokens":20)",
                             R"("logprobs":0,"max_tokens":1000)", R"("max_tokens":8000)",
                             // A stream's reply leaves token by token.
                             R"("echo":true,"logprobs":19,"max_tokens":8000,"stream":true)"}) {
    const size_t before = api.engine.jobs();
    api.Completions(fmt::format(R"({{"prompt":[1,2,3,4,5],{}}})", fields));
    EXPECT_GT(api.engine.jobs(), before) << fields;
  }
  // Whole contexts as evaluation harnesses send them, by the limit as it is.
  TestApi roomy(8192);
  std::string prompts = "[1" + std::string(2 * 8190, ',') + "]";
  for (size_t i = 3; i < prompts.size(); i += 2) prompts[i] = '1';
  std::string batch = prompts;
  for (int i = 1; i < 16; ++i) batch += "," + prompts;
  roomy.Completions(
      fmt::format(R"({{"prompt":[{}],"echo":true,"logprobs":5,"max_tokens":1}})", batch));
  EXPECT_EQ(roomy.engine.groups(), std::vector<size_t>{16});
  EXPECT_EQ(roomy.engine.job(15).request.prompt.size(), 8191u);
}

TEST(Scoring, OfTokensWithOneTextTheLikelierStays) {
  TestApi api;
  const auto responder = api.Completions(R"({"prompt":"h","logprobs":2,"max_tokens":1})");
  const auto job = api.engine.job(0);
  // 97 is "a"; once as the likeliest, once as the token itself.
  job.sink->OnToken(Token(97, "a", -0.5, {{97, -0.5}, {98, -1}, {99, -2}}));
  job.sink->OnFinish(Finished(FinishReason::kLength, 1, 1));
  EXPECT_THAT(responder->body(), HasSubstr(R"("top_logprobs":[{"a":-0.5,"b":-1}])"));
}

TEST(Choices, PromptsTimesN) {
  TestApi api;
  const auto responder = api.Completions(R"({"prompt":["h","e"],"n":2,"max_tokens":1,"seed":7})");
  ASSERT_EQ(api.engine.jobs(), 4u);
  std::vector<uint64_t> seeds;
  for (int i = 3; i >= 0; --i) {  // the order of arrival does not matter
    const auto job = api.engine.job(i);
    seeds.push_back(job.request.sampling.seed);
    EXPECT_EQ(job.request.prompt[0], i < 2 ? 104 : 101);
    job.sink->OnToken(Token(97, std::to_string(i)));
    RequestResult result = Finished(FinishReason::kLength, 1, 1);
    result.levels = {{0, i}};
    job.sink->OnFinish(result);
  }
  EXPECT_EQ(seeds[3], 7u);
  EXPECT_NE(seeds[2], seeds[3]);
  EXPECT_EQ(seeds[1], seeds[3]);
  for (int i = 0; i < 4; ++i) {
    EXPECT_THAT(responder->body(), HasSubstr(fmt::format(R"("index":{},"text":"{}")", i, i)));
    EXPECT_THAT(responder->body(),
                HasSubstr(fmt::format(R"({{"choice":{},"position":0,"level":{}}})", i, i)));
  }
  EXPECT_THAT(responder->body(),
              HasSubstr(R"("prompt_tokens":2,"completion_tokens":4,"total_tokens":6)"));
}

TEST(Choices, AreSubmittedTogether) {
  TestApi api;
  api.Completions(R"({"prompt":["h","e"],"n":3})");
  EXPECT_EQ(api.engine.groups(), std::vector<size_t>{6});
}

TEST(Choices, SeedsThatAreNotGivenDiffer) {
  TestApi api;
  api.Completions(R"({"prompt":"h","n":2})");
  EXPECT_NE(api.engine.job(0).request.sampling.seed, api.engine.job(1).request.sampling.seed);
}

TEST(Errors, OfTheModelAndTheBody) {
  TestApi api;
  const auto other = api.Completions(R"({"model":"other","prompt":"x"})");
  ExpectError(*other, 404, "model_not_found", "model");
  EXPECT_THAT(other->body(),
              HasSubstr("the model 'other' is not served here; there is 'small', 'alias'"));
  ExpectError(*api.Completions("{"), 400, "invalid_json");
  ExpectError(*api.Chat(R"({"messages":[]})"), 400, "invalid_value", "messages");
  EXPECT_EQ(api.engine.jobs(), 0u);
  api.Completions(R"({"model":"alias","prompt":"x"})");
  EXPECT_EQ(api.engine.jobs(), 1u);
}

TEST(Errors, ContextLengthGivesBothCounts) {
  TestApi api(5);
  const auto responder = api.Completions(R"({"prompt":[1,2,3,4,5],"max_tokens":1})");
  ExpectError(*responder, 400, "context_length_exceeded");
  EXPECT_THAT(responder->body(), HasSubstr(R"("n_prompt_tokens":5,"n_ctx":5)"));
  ExpectError(*api.Completions(R"({"prompt":[1],"max_tokens":5})"), 400, "context_length_exceeded");
  ExpectError(*api.Chat(R"({"messages":[{"role":"user","content":"x"}]})"), 400,
              "context_length_exceeded");
  // Long before it is tokenised.
  ExpectError(*api.Completions(fmt::format(R"({{"prompt":"{}"}})", std::string(1 << 20, 'a'))), 400,
              "context_length_exceeded");
  EXPECT_EQ(api.engine.jobs(), 0u);
  api.Completions(R"({"prompt":[1,2,3,4],"max_tokens":1})");
  api.Completions(R"({"prompt":[1,2,3,4,5],"max_tokens":0,"echo":true})");
  api.Completions(R"({"prompt":[9,8,1,2,3,4,5],"max_tokens":1,"truncate_prompt_tokens":4})");
  ASSERT_EQ(api.engine.jobs(), 3u);
  EXPECT_EQ(api.engine.job(2).request.prompt, (std::vector<int32_t>{2, 3, 4, 5}));
}

// Without max_tokens a chat goes on for as long as context and cache allow.
TEST(Chat, WithoutALimitTheReplyIsAsLongAsFits) {
  TestApi api;
  const auto max_tokens = [&](const char* fields) {
    const size_t job = api.engine.jobs();
    api.Chat(fmt::format(R"({{"messages":[{{"role":"user","content":"x"}}]{}}})", fields));
    return api.engine.job(job).request.max_tokens;
  };
  const int whole = max_tokens("");
  EXPECT_EQ(whole, 100 - static_cast<int>(api.engine.job(0).request.prompt.size()));
  api.engine.longest_reply = 7;
  EXPECT_EQ(max_tokens(""), 7);
  EXPECT_EQ(max_tokens(R"(,"max_tokens":20)"), 20) << "what was asked for is the engine's to judge";
  ExpectError(*api.Chat(R"({"messages":[{"role":"user","content":"x"}],"min_tokens":8})"), 400,
              "integer_above_max_value", "min_tokens");
  api.engine.longest_reply = 0;
  EXPECT_EQ(max_tokens(""), 1) << "for the engine to refuse";
}

TEST(Errors, RejectionsHaveTheirStatus) {
  using Kind = Rejection::Kind;
  for (const auto& [kind, status, code] : std::vector<std::tuple<Kind, int, std::string>>{
           {Kind::kInvalid, 400, "invalid_value"},
           {Kind::kContextLength, 400, "context_length_exceeded"},
           {Kind::kTooLargeForCache, 400, "request_too_large_for_cache"},
           {Kind::kQueueFull, 429, "queue_full"},
           {Kind::kUnavailable, 503, "shutting_down"}}) {
    TestApi api;
    api.engine.rejection = Rejection{kind, "no", kind == Kind::kInvalid ? "n" : "", 2.5};
    const auto responder = api.Completions(R"({"prompt":"x","stream":true})");
    ExpectError(*responder, status, code, kind == Kind::kInvalid ? "n" : "");
    EXPECT_EQ(responder->head().headers.Get("retry-after-ms"), status == 429   ? "2500"
                                                               : status == 503 ? "5000"
                                                                               : "");
    EXPECT_EQ(responder->head().headers.Get("Retry-After"), status == 429   ? "3"
                                                            : status == 503 ? "5"
                                                                            : "");
  }
}

TEST(Errors, ARefusalHasTheFiguresOfThePromptThatIsMeant) {
  TestApi api;
  api.engine.rejection = Rejection{.kind = Rejection::Kind::kContextLength, .index = 3};
  const auto responder = api.Completions(R"({"prompt":[[1],[2,3]],"n":2})");
  ExpectError(*responder, 400, "context_length_exceeded");
  EXPECT_THAT(responder->body(), HasSubstr(R"("n_prompt_tokens":2)"));
}

TEST(Errors, TooManyRequestsAtOnce) {
  TestApi api;
  api.context.max_in_flight = 1;
  const auto first = api.Completions(R"({"prompt":"x"})");
  const auto second = api.Completions("not even JSON");
  ExpectError(*second, 429, "queue_full");
  EXPECT_FALSE(second->head().headers.Get("retry-after-ms").empty());
  api.engine.job(0).sink->OnFinish(Finished(FinishReason::kStop, 1, 0));
  api.engine.Forget();
  api.Completions(R"({"prompt":"x"})");
  EXPECT_EQ(api.engine.jobs(), 1u);
}

TEST(Errors, AFullQueueIsSaidBeforeAnyWork) {
  TestApi api;
  api.engine.full = true;
  api.engine.rejection = Rejection{.kind = Rejection::Kind::kQueueFull,
                                   .message = "the queue is full",
                                   .retry_after_seconds = 2.5};
  for (const auto& responder : {api.Completions("not even JSON"), api.Chat(R"({"messages":[]})")}) {
    ExpectError(*responder, 429, "queue_full");
    EXPECT_EQ(responder->head().headers.Get("retry-after-ms"), "2500");
  }
  EXPECT_EQ(api.Call("POST", "/tokenize", R"({"prompt":"x"})")->head().status, 200);
  api.engine.full = false;
  api.engine.rejection.reset();
  api.Completions(R"({"prompt":"x"})");
  EXPECT_EQ(api.engine.jobs(), 1u);
}

TEST(Errors, TokenizeNeedsAPermitToo) {
  TestApi api;
  api.context.max_in_flight = 1;
  EXPECT_EQ(api.Call("POST", "/tokenize", R"({"prompt":"x"})")->head().status, 200);
  EXPECT_EQ(api.Call("POST", "/tokenize", R"({"prompt":"x"})")->head().status, 200);
  const auto running = api.Completions(R"({"prompt":"x"})");
  ExpectError(*api.Call("POST", "/v1/tokenize", R"({"prompt":"x"})"), 429, "queue_full");
}

// Small requests pass a large one whose text is still to be read, in a pool that is busy.
TEST(LargeTexts, DoNotHoldUpTheCaller) {
  TestApi api(1 << 20);
  TaskPool pool(1);
  api.context.text_pool = &pool;
  std::promise<void> go;
  pool.Post([free = go.get_future().share()] { free.wait(); });
  const auto body = [](const std::string& text) {
    return fmt::format(R"({{"prompt":"{}","max_tokens":1}})", text);
  };
  const std::string large = body(std::string(100 << 10, 'h'));
  const auto first = api.Completions(large), left = api.Completions(large);
  const auto count = api.Call("POST", "/tokenize", large);
  EXPECT_EQ(api.engine.jobs(), 0u);
  api.Completions(body("e"));
  EXPECT_EQ(api.engine.jobs(), 1u);
  left->Disconnect();
  EXPECT_FALSE(first->gone() || count->gone());
  go.set_value();
  count->WaitForEnd();
  EXPECT_THAT(count->body(), StartsWith(R"({"count":102400,)"));
  ASSERT_EQ(api.engine.jobs(), 2u) << "nothing is done for who has left";
  EXPECT_EQ(api.engine.job(1).request.prompt.size(), 102400u);
}

TEST(LargeTexts, AreDroppedWithThePool) {
  TestApi api(1 << 20);
  auto pool = std::make_unique<TaskPool>(0);
  api.context.text_pool = pool.get();
  const auto responder =
      api.Completions(fmt::format(R"({{"prompt":"{}"}})", std::string(100 << 10, 'h')));
  EXPECT_GT(responder.use_count(), 1);
  pool.reset();
  EXPECT_EQ(responder.use_count(), 1) << "the server answers for it";
  EXPECT_EQ(api.engine.jobs(), 0u);
}

RequestResult Failed(Status status) {
  RequestResult result;
  result.status = std::move(status);
  result.finish = FinishReason::kCancelled;
  return result;
}

TEST(Errors, BeforeTheFirstByteHaveAStatus) {
  for (const auto& [status, http, code] : std::vector<std::tuple<Status, int, std::string>>{
           {Status(StatusCode::kDeadlineExceeded, "late"), 504, "timeout"},
           {Status(StatusCode::kCancelled, "the end"), 503, "shutting_down"},
           {Status(StatusCode::kResourceExhausted, "secret"), 503, "out_of_memory"},
           {Status(StatusCode::kInternal, "numerical_error: NaN"), 500, "numerical_error"},
           {Status(StatusCode::kInternal, "secret"), 500, "internal_error"}}) {
    for (const char* stream : {"true", "false"}) {
      TestApi api;
      const auto responder =
          api.Completions(fmt::format(R"({{"prompt":"x","stream":{}}})", stream));
      api.engine.job(0).sink->OnFinish(Failed(status));
      ExpectError(*responder, http, code);
      EXPECT_EQ(responder->body().find("secret"), std::string::npos);
      EXPECT_EQ(responder->head().headers.Get("x-should-retry"), http == 500 ? "false" : "");
    }
  }
}

TEST(Errors, AfterTheFirstByteAreAnEvent) {
  for (const auto& [status, code] : std::vector<std::pair<StatusCode, std::string>>{
           {StatusCode::kDeadlineExceeded, "timeout"},
           {StatusCode::kResourceExhausted, "out_of_memory"}}) {
    TestApi api;
    const auto responder =
        api.Chat(R"({"messages":[{"role":"user","content":"x"}],"stream":true,"n":2})");
    api.engine.job(0).sink->OnToken(Token(97, "a"));
    api.engine.job(1).sink->OnFinish(Failed(Status(status, "why")));
    EXPECT_EQ(responder->head().status, 200);
    EXPECT_THAT(responder->body(), HasSubstr("]}\n\ndata: {\"error\":{\"message\":\""));
    EXPECT_THAT(responder->body(), HasSubstr(fmt::format("\"code\":\"{}\"", code)));
    EXPECT_THAT(responder->body(), ::testing::EndsWith("}}\n\n"));
    EXPECT_EQ(responder->body().find("[DONE]"), std::string::npos);
    EXPECT_TRUE(responder->gone());
    // The log's line says what there was, though the status is 200.
    EXPECT_EQ(responder->note("error"), code);
    EXPECT_EQ(responder->note("tokens"), "1");
    EXPECT_EQ(responder->note("tier"), "auto");
    EXPECT_EQ(responder->note("dsla_level"), "0");
    // The other reply is ended, and what it still says does no harm.
    EXPECT_EQ(api.engine.WaitForCancelled(1)[0], api.engine.job(0).request.id);
    api.engine.job(0).sink->OnToken(Token(98, "b"));
    api.engine.job(0).sink->OnFinish(Failed(Status(StatusCode::kCancelled, "cancelled")));
  }
}

TEST(Errors, AfterACommentAreAnEvent) {
  for (const bool chat : {false, true}) {
    TestApi api;
    const auto responder =
        chat ? api.Chat(R"({"messages":[{"role":"user","content":"x"}],"stream":true})")
             : api.Completions(R"({"prompt":"x","stream":true})");
    responder->Comment();
    EXPECT_EQ(responder->head().status, 200);
    EXPECT_EQ(responder->head().headers.Get("X-Dsla-Tier"), "auto");
    EXPECT_EQ(responder->head().headers.Find("X-Dsla-Level"), nullptr);
    api.engine.job(0).sink->OnFinish(Failed(Status(StatusCode::kDeadlineExceeded, "late")));
    EXPECT_THAT(responder->body(),
                ::testing::StartsWith(std::string(kSseComment) + "data: {\"error\":{"));
    EXPECT_THAT(responder->body(), HasSubstr("\"code\":\"timeout\""));
    EXPECT_TRUE(responder->gone());
  }
}

TEST(Errors, AnswersAfterACommentAreStreamed) {
  TestApi api;
  const auto responder = api.Completions(R"({"prompt":"x","stream":true})");
  responder->Comment();
  api.engine.job(0).sink->OnToken(Token(97, "a"));
  api.engine.job(0).sink->OnFinish(Finished(FinishReason::kLength, 1, 1));
  EXPECT_THAT(responder->body(), HasSubstr("\"text\":\"a\""));
  EXPECT_THAT(responder->body(), ::testing::EndsWith("data: [DONE]\n\n"));
}

TEST(Deadline, ComesFromFieldHeaderOrServer) {
  const auto seconds = [](double default_timeout, const std::string& field, HttpHeaders headers) {
    TestApi api;
    api.context.default_timeout = default_timeout;
    const double now = NowSeconds();
    api.Call("POST", "/v1/completions", R"({"prompt":"x")" + field + "}", std::move(headers));
    const double deadline = api.engine.job(0).request.deadline;
    return deadline == 0 ? 0 : deadline - now;
  };
  EXPECT_EQ(seconds(0, "", {}), 0);
  EXPECT_NEAR(seconds(100, "", {}), 100, 5);
  EXPECT_NEAR(seconds(100, ",\"timeout\":50", {}), 50, 5);
  EXPECT_NEAR(seconds(100, ",\"timeout\":150", {}), 100, 5);
  EXPECT_NEAR(seconds(0, "", {{"x-request-timeout", "200"}}), 200, 5);
  EXPECT_NEAR(seconds(0, ",\"timeout\":50", {{"X-Request-Timeout", "200"}}), 50, 5);
  TestApi api;
  ExpectError(
      *api.Call("POST", "/v1/completions", R"({"prompt":"x"})", {{"X-Request-Timeout", "soon"}}),
      400, "invalid_value", "X-Request-Timeout");
}

TEST(Disconnect, CancelsEveryReply) {
  TestApi api;
  const auto responder = api.Completions(R"({"prompt":"x","n":2})");
  responder->Disconnect();
  EXPECT_EQ(api.engine.WaitForCancelled(2).size(), 2u);
  for (int i = 0; i < 2; ++i) {
    api.engine.job(i).sink->OnFinish(Failed(Status(StatusCode::kCancelled, "cancelled")));
  }
  EXPECT_EQ(responder->head().status, 0);
}

TEST(Disconnect, TheLogHasWhatThereWas) {
  TestApi api;
  const auto responder = api.Completions(R"({"prompt":[1,2,3],"stream":true,"n":2})");
  TokenOutput token = Token(97, "a");
  token.level = 2;
  api.engine.job(0).sink->OnToken(token);
  api.engine.job(1).sink->OnToken(Token(98, "b"));
  for (int i = 0; i < 2; ++i) api.engine.job(i).sink->OnPlaced(3 - i);
  responder->Disconnect();
  EXPECT_EQ(responder->note("replica"), "2,3");
  EXPECT_EQ(responder->note("prompt_tokens"), "6");
  EXPECT_EQ(responder->note("tokens"), "2");
  EXPECT_EQ(responder->note("tier"), "auto");
  EXPECT_EQ(responder->note("dsla_level"), "2");
  // The end that the cancelling brings is not the server's doing.
  api.engine.job(0).sink->OnFinish(Failed(Status(StatusCode::kCancelled, "cancelled")));
  EXPECT_EQ(responder->note("error"), "");
}

TEST(Models, ListAndOne) {
  TestApi api;
  EXPECT_EQ(
      api.Call("GET", "/v1/models")->body(),
      R"({"object":"list","data":[{"id":"small","object":"model","created":1700000000,)"
      R"("owned_by":"dsla","root":"small.gguf","parent":null,"max_model_len":100,"permission":[]},)"
      R"({"id":"alias","object":"model","created":1700000000,)"
      R"("owned_by":"dsla","root":"small.gguf","parent":null,"max_model_len":100,"permission":[]}]})");
  EXPECT_THAT(api.Call("GET", "/v1/models/alias")->body(), StartsWith(R"({"id":"alias",)"));
  ExpectError(*api.Call("GET", "/v1/models/a/b"), 404, "model_not_found", "model");
}

// The API with an operator's side.
struct OperatorApi : TestApi {
  OperatorApi() {
    LadderInfo ladder{.model = "m", .adapter = "a", .ladder = {2, 0, 3, 1}, .top_level = 3};
    ladder.max_level = 4;
    PolicyOptions options;
    options.policy = "paper";
    options.layers = 4;
    options.max_level = 3;
    control = std::make_unique<DslaControl>(&engine, ladder, options);
    context.control = control.get();
    context.ladder = ladder;
  }
  std::unique_ptr<DslaControl> control;
};

TEST(DslaCommand, Reads) {
  OperatorApi api;
  const auto change = [&](const char* body) {
    const auto responder = api.Call("POST", "/v1/dsla", body);
    EXPECT_EQ(responder->head().status, 200) << responder->body();
    return api.control->options();
  };
  PolicyOptions options = change(R"({"policy":"fixed","level":2,"max_level":4})");
  EXPECT_EQ(options.policy, "fixed");
  EXPECT_EQ(options.fixed_level, 2);
  EXPECT_EQ(options.max_level, 4);
  options = change(R"({"max_level":3})");
  EXPECT_EQ(options.policy, "fixed");
  EXPECT_EQ(options.max_level, 3);
}

TEST(DslaCommand, RefusesWithTheFieldsName) {
  const std::array<const char*, 3> cases[] = {
      {"", "invalid_json", ""},
      {R"({"policy":"slo")", "invalid_json", ""},
      {R"({"level":1,"level":2})", "invalid_json", ""},
      {"[1]", "invalid_type", ""},
      {"{}", "missing_required_parameter", ""},
      {R"({"policy":"best"})", "invalid_value", "policy"},
      {R"({"policy":1})", "invalid_type", "policy"},
      {R"({"level":5})", "integer_above_max_value", "level"},
      {R"({"level":-1})", "integer_below_min_value", "level"},
      {R"({"level":1.5})", "invalid_type", "level"},
      {R"({"level":"2"})", "invalid_type", "level"},
      {R"({"level":18446744073709551615})", "integer_out_of_range", "level"},
      {R"({"max_level":99999999999})", "integer_above_max_value", "max_level"},
      {R"({"level":1,"policy":"slo"})", "invalid_value", "level"},
      {R"({"levle":1})", "unknown_parameter", "levle"},
  };
  OperatorApi api;
  for (const auto& [body, code, param] : cases) {
    SCOPED_TRACE(body);
    ExpectError(*api.Call("POST", "/v1/dsla", body), 400, code, param);
  }
  EXPECT_EQ(api.control->options().policy, "paper");
}

TEST(Tokens, ThereAndBack) {
  TestApi api;
  for (const std::string prefix : {"", "/v1"}) {
    EXPECT_EQ(
        api.Call("POST", prefix + "/tokenize", R"({"prompt":"hello<|end|>","parse_special":false})")
            ->body(),
        R"({"count":8,"max_model_len":100,"tokens":[259,60,124,101,110,100,124,62],)"
        R"("token_strs":null})");
    EXPECT_EQ(api.Call("POST", prefix + "/detokenize", R"({"tokens":[259,195]})")->body(),
              "{\"prompt\":\"hello\ufffd\",\"content\":\"hello\ufffd\"}");
    EXPECT_THAT(api.Call("GET", prefix + "/tokenizer_info")->body(),
                HasSubstr(R"("chat_template":null)"));
  }
  EXPECT_EQ(
      api.Call("POST", "/tokenize", R"({"content":"hello<|end|>","return_token_strs":true})")
          ->body(),
      R"({"count":2,"max_model_len":100,"tokens":[259,261],"token_strs":["hello","<|end|>"]})");
  ExpectError(*api.Call("POST", "/detokenize", R"({"tokens":[100000]})"), 400,
              "integer_above_max_value", "tokens[0]");
  ExpectError(*api.Call("POST", "/tokenize", R"({"prompt":"x","model":"y"})"), 404,
              "model_not_found", "model");
}

TEST(Tokens, AsClientsOfLlamaCppAskForThem) {
  TestApi api(100, testing::SentencePieceTokenizer());
  const auto tokens = [&](const char* body) {
    const std::string answer = api.Call("POST", "/tokenize", body)->body();
    const size_t begin = answer.find("\"tokens\":") + 9;
    return answer.substr(begin, answer.find(",\"token_strs\"") - begin);
  };
  const int32_t hello = *api.tokenizer->TokenToId("\u2581hello");
  const std::string alone = fmt::format("[{}]", hello), with_first = fmt::format("[1,{}]", hello);
  EXPECT_EQ(tokens(R"({"prompt":"hello"})"), with_first);
  EXPECT_EQ(tokens(R"({"content":"hello"})"), alone) << "what it does not ask for it does not get";
  EXPECT_EQ(tokens(R"({"content":"hello","add_special":true})"), with_first);
  EXPECT_EQ(tokens(R"({"content":"hello\u0001","with_pieces":true})"),
            fmt::format(R"([{{"id":{},"piece":" hello"}},{{"id":4,"piece":"\u0001"}}])", hello));
  EXPECT_EQ(tokens(R"({"content":"\u00ff","with_pieces":true})"),
            fmt::format(R"([{{"id":{},"piece":" "}},{{"id":198,"piece":[195]}},)"
                        R"({{"id":194,"piece":[191]}}])",
                        *api.tokenizer->TokenToId("\u2581")));
}

TEST(Fields, TokenIdsWhenAskedFor) {
  TestApi api;
  const auto responder =
      api.Completions(R"({"prompt":[1,2],"max_tokens":2,"return_token_ids":true})");
  const auto job = api.engine.job(0);
  job.sink->OnToken(Token(97, "a"));
  job.sink->OnToken(Token(98, "b"));
  job.sink->OnFinish(Finished(FinishReason::kLength, 2, 2));
  EXPECT_THAT(responder->body(), HasSubstr(R"("token_ids":[97,98],"prompt_token_ids":[1,2])"));
}

}  // namespace
}  // namespace dsla::openai
