// Requests whose replies follow a grammar.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>

#include "server/openai/testing.h"

namespace dsla::openai {
namespace {

using testing::FakeCompiler;
using testing::FakeResponder;
using ::testing::HasSubstr;
using testing::TestApi;

void ExpectError(const FakeResponder& responder, int status, const std::string& code,
                 const std::string& param) {
  EXPECT_EQ(responder.head().status, status) << responder.body();
  const std::string name = param.empty() ? "null" : '"' + param + '"';
  EXPECT_THAT(responder.body(), HasSubstr(fmt::format(R"("param":{},"code":"{}")", name, code)));
}

constexpr char kObject[] = R"({"prompt":"x","n":2,"response_format":{"type":"json_object"}})";

TEST(Grammars, AreCompiledOnceForAllReplies) {
  TestApi api;
  FakeCompiler compiler;
  api.context.grammars = &compiler;
  api.Completions(kObject);
  ASSERT_EQ(api.engine.jobs(), 2u);
  EXPECT_EQ(compiler.specs, (std::vector<GrammarSpec>{{GrammarSpec::Kind::kJsonObject}}));
  EXPECT_EQ(api.engine.job(0).request.grammar, compiler.grammar);
  EXPECT_EQ(api.engine.job(1).request.grammar, compiler.grammar);
  api.Chat(R"({"messages":[{"role":"user","content":"x"}],"grammar":"root ::= \"a\""})");
  EXPECT_EQ(api.engine.job(2).request.grammar, compiler.grammar);
  api.Completions(R"({"prompt":"x"})");
  EXPECT_EQ(api.engine.job(3).request.grammar, nullptr);
  EXPECT_EQ(compiler.specs.size(), 2u);
}

TEST(Grammars, ThatCannotBeCompiledAreRefused) {
  FakeCompiler compiler;
  for (const auto& [status, http, code] : std::vector<std::tuple<Status, int, std::string>>{
           {InvalidArgument("it is wrong"), 400, "invalid_grammar"},
           {Status(StatusCode::kResourceExhausted, "others"), 429, "queue_full"},
           {Status(StatusCode::kUnavailable, "not installed"), 503, "grammars_unavailable"}}) {
    TestApi api;
    api.context.grammars = &compiler;
    compiler.status = status;
    const auto responder = api.Completions(kObject);
    ExpectError(*responder, http, code, code == "queue_full" ? "" : "response_format");
    EXPECT_THAT(responder->body(), HasSubstr(status.message()));
    EXPECT_EQ(api.engine.jobs(), 0u);
  }
  TestApi api;
  ExpectError(*api.Completions(kObject), 400, "unsupported_parameter", "response_format");
}

// As the engine finds out later.
TEST(Grammars, ThatCannotBeMatchedAreNamed) {
  FakeCompiler compiler;
  TestApi api;
  api.context.grammars = &compiler;
  const auto running = api.Completions(kObject);
  RequestResult result;
  result.status = InvalidArgument("it takes too long");
  result.finish = FinishReason::kCancelled;
  for (size_t i = 0; i < 2; ++i) api.engine.job(i).sink->OnFinish(result);
  ExpectError(*running, 400, "invalid_grammar", "response_format");
  api.engine.rejection = Rejection{.message = "no beginning", .param = "grammar"};
  ExpectError(*api.Completions(kObject), 400, "invalid_grammar", "response_format");
}

// One that takes long holds up nobody else.
TEST(Grammars, AreCompiledOnOtherThreads) {
  TestApi api;
  FakeCompiler compiler;
  TaskPool pool(1);
  api.context.grammars = &compiler;
  api.context.grammar_pool = &pool;
  std::promise<void> go;
  std::promise<void> done;
  pool.Post([free = go.get_future().share()] { free.wait(); });
  api.Completions(kObject);
  EXPECT_EQ(api.engine.jobs(), 0u);
  api.Completions(R"({"prompt":"x"})");
  EXPECT_EQ(api.engine.jobs(), 1u);
  pool.Post([&] { done.set_value(); });
  go.set_value();
  done.get_future().wait();
  EXPECT_EQ(api.engine.jobs(), 3u);
}

}  // namespace
}  // namespace dsla::openai
