// Replies that follow a grammar. The small models' tokens are the bytes 0 to 95: capitals, digits
// and brackets, so arrays of numbers and strings.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>
#include <regex>
#include <thread>

#include "engine/session.h"
#include "engine/testing/test_engine.h"
#include "grammar/grammar.h"

namespace dsla {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using testing_engine::ByteTokenizer;
using testing_engine::FunctionPolicy;
using testing_engine::RandomPrompt;
using testing_engine::RecordingSink;
using testing_engine::SmallOptions;
using testing_engine::TargetPolicy;
using testing_engine::TestEngine;
using testing_models::SmallModel;
using Kind = GrammarSpec::Kind;

constexpr char kList[] =
    R"({"type":"array","minItems":1,"maxItems":3,"items":{"anyOf":[)"
    R"({"type":"integer","minimum":-50,"maximum":5000},{"type":"string","maxLength":6},)"
    R"({"type":"array","items":{"type":"integer","minimum":0,"maximum":9},"maxItems":2}]}})";

void ExpectList(const std::string& text) {
  const json list = json::parse(text, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(list.is_array()) << text;
  EXPECT_TRUE(list.size() >= 1 && list.size() <= 3) << text;
  for (const json& item : list)
    EXPECT_TRUE(item.is_number_integer() || item.is_string() || item.is_array()) << text;
}

class ConstrainedTest : public ::testing::Test {
 protected:
  std::shared_ptr<const Grammar> Compile(Kind kind, const std::string& text) {
    auto grammar = compiler_->Compile({kind, text});
    EXPECT_TRUE(grammar.ok()) << grammar.status().message();
    return grammar.ok() ? *grammar : nullptr;
  }
  Request Ask(std::shared_ptr<const Grammar> grammar, uint64_t seed, int max_tokens = 440) {
    Request request;
    request.id = fmt::format("r{}", ++count_);
    request.prompt = RandomPrompt(model(), 20 + static_cast<int>(seed % 30), 7);
    request.sampling.seed = seed;
    request.max_tokens = max_tokens;
    request.grammar = std::move(grammar);
    return request;
  }
  const HybridModel& model() { return small_.model(); }

  SmallModel small_{"smollm2", true};
  std::unique_ptr<Tokenizer> tokenizer_ = ByteTokenizer();
  std::unique_ptr<GrammarCompiler> compiler_ =
      GrammarCompiler::Create(*tokenizer_, small_.model().config().V);
  int count_ = 0;
};

TEST_F(ConstrainedTest, RepliesFollowTheirSchema) {
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  const auto grammar = Compile(Kind::kJsonSchema, kList);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Request request = Ask(grammar, seed);
    if (seed % 3 == 1) request.sampling.temperature = 0;
    if (seed % 3 == 2) request.top_logprobs = 3;
    if (seed % 4 == 2) request.sampling.frequency_penalty = 0.5f;
    if (seed % 5 == 3) request.ignore_eos = true;
    sinks.push_back(engine.Submit(std::move(request)));
  }
  for (const auto& sink : sinks) {
    const RequestResult& result = sink->Wait();
    ASSERT_TRUE(result.status.ok()) << result.status.message();
    EXPECT_EQ(result.finish, FinishReason::kStop) << sink->text();
    ExpectList(sink->text());
  }
}

// Pre-empted, recomputed and raised, a reply goes on where it was in its grammar.
TEST_F(ConstrainedTest, AcrossPreemptionAndRaises) {
  const auto grammar = Compile(Kind::kRegex, "([A-Z]{3}-[0-9]{2};){40}");
  const std::regex want("([A-Z]{3}-[0-9]{2};){40}");
  EngineOptions options = SmallOptions();
  options.memory_bytes = 1 << 20;
  options.max_preemptions = 2;
  auto raise = std::make_unique<FunctionPolicy>([](const LoadSnapshot& load) {
    LevelDecision decision;
    for (const SequenceLoad& sequence : load.running) {
      if (sequence.level < sequence.max_level && sequence.cached_tokens % 7 == 3)
        decision.raises.push_back({sequence.id, sequence.level + 1});
    }
    decision.reason = "a test";
    return decision;
  });
  TestEngine engine(model(), *tokenizer_, options, std::move(raise));
  std::vector<Request> requests;
  for (uint64_t seed = 0; seed < 24; ++seed) {
    requests.push_back(Ask(grammar, seed));
    if (seed % 2 == 0) requests.back().tier = Tier::kFull;
  }
  int preemptions = 0;
  size_t raises = 0;
  for (const auto& sink : engine.SubmitTogether(requests)) {
    const RequestResult& result = sink->Wait();
    ASSERT_TRUE(result.status.ok()) << result.status.message();
    EXPECT_EQ(result.finish, FinishReason::kStop);
    EXPECT_TRUE(std::regex_match(sink->text(), want)) << sink->text();
    preemptions += result.preemptions;
    raises += result.levels.size() - 1;
  }
  EXPECT_GT(preemptions, 0);
  EXPECT_GT(raises, 0u);
}

// The same tokens alone and beside others, of either kind.
TEST_F(ConstrainedTest, OthersDoNotMatter) {
  EngineOptions options = SmallOptions();
  options.deterministic = true;
  options.max_batch_tokens = 512;
  const auto grammar = Compile(Kind::kJsonSchema, kList);
  const auto request_of = [&](uint64_t i) {
    Request request = Ask(i % 2 == 0 ? grammar : nullptr, i, i % 2 == 0 ? 440 : 40);
    request.tier = Tier::kFull;
    request.ignore_eos = i % 2 == 1;
    return request;
  };
  std::vector<std::vector<int32_t>> alone;
  {
    TestEngine engine(model(), *tokenizer_, options);
    for (uint64_t i = 0; i < 8; ++i) {
      const auto sink = engine.Submit(request_of(i));
      EXPECT_TRUE(sink->Wait().status.ok());
      alone.push_back(sink->tokens());
    }
  }
  TestEngine engine(model(), *tokenizer_, options);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (uint64_t i = 0; i < 8; ++i) sinks.push_back(engine.Submit(request_of(i)));
  for (size_t i = 0; i < 8; ++i) {
    EXPECT_TRUE(sinks[i]->Wait().status.ok());
    EXPECT_EQ(sinks[i]->tokens(), alone[i]) << i;
  }
}

TEST_F(ConstrainedTest, WhereAReplyEnds) {
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  const auto letters = Compile(Kind::kRegex, "A{5,9}");
  // It goes on as long as anything may follow.
  Request request = Ask(letters, 1);
  request.ignore_eos = true;
  auto sink = engine.Submit(request);
  EXPECT_EQ(sink->Wait().finish, FinishReason::kStop);
  EXPECT_EQ(sink->text(), "AAAAAAAAA");
  EXPECT_EQ(sink->Wait().stop_token, -1);
  // An end token, which is a letter otherwise, comes where it may.
  request.id = "end";
  request.stop_ids = {'B'};
  request.sampling.logit_bias = {{'B', 100.f}};
  sink = engine.Submit(request);
  EXPECT_EQ(sink->Wait().finish, FinishReason::kStop);
  EXPECT_EQ(sink->Wait().stop_token, 'B');
  EXPECT_EQ(sink->text(), "AAAAA");
  request.id = "min";
  request.min_tokens = 7;
  sink = engine.Submit(request);
  EXPECT_EQ(sink->Wait().finish, FinishReason::kStop);
  EXPECT_EQ(sink->text(), "AAAAAAA");
  // Nothing may follow, whatever the least number of tokens.
  request.id = "most";
  request.min_tokens = 20;
  sink = engine.Submit(request);
  EXPECT_EQ(sink->Wait().finish, FinishReason::kStop);
  EXPECT_EQ(sink->text(), "AAAAAAAAA");
  // A stop string and max_tokens end it where it is.
  Request cut = Ask(letters, 2);
  cut.ignore_eos = true;
  cut.stop = {"AAA"};
  sink = engine.Submit(cut);
  EXPECT_EQ(sink->Wait().stop_string, "AAA");
  EXPECT_EQ(sink->text(), "");
  Request length = Ask(letters, 3, 4);
  sink = engine.Submit(length);
  EXPECT_EQ(sink->Wait().finish, FinishReason::kLength);
  EXPECT_EQ(sink->text(), "AAAA");
}

// Where the grammar allows no token at all, whatever else is asked for.
TEST_F(ConstrainedTest, AReplyMayHaveToBeEmpty) {
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  for (const bool ends : {false, true}) {
    Request request = Ask(Compile(Kind::kRegex, "()"), 1);
    request.ignore_eos = !ends;
    request.min_tokens = ends ? 3 : 0;
    const auto sink = engine.Submit(std::move(request));
    EXPECT_TRUE(sink->Wait().status.ok()) << sink->Wait().status.message();
    EXPECT_EQ(sink->Wait().finish, FinishReason::kStop);
    EXPECT_TRUE(sink->tokens().empty());
  }
  EXPECT_EQ(engine->state().numerical_errors, 0);

  Session session(&model(), &small_.pool(), small_.ctx(), {});
  ASSERT_TRUE(session.Prefill(RandomPrompt(model(), 20, 3)).ok());
  GenerateOptions options;
  options.grammar = Compile(Kind::kRegex, "()");
  const auto result = session.Generate(options);
  ASSERT_TRUE(result.ok()) << result.status().message();
  EXPECT_EQ(result->finish, FinishReason::kStop);
  EXPECT_TRUE(result->tokens.empty());
}

// One whose grammar turns out to take too long, or to ask for bytes that no token has, ends alone.
TEST_F(ConstrainedTest, WhatCannotBeMatchedEndsItsRequest) {
  compiler_ = GrammarCompiler::Create(*tokenizer_, model().config().V, {.match_seconds = 0.02});
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  Request other = Ask(Compile(Kind::kJsonSchema, kList), 5);
  const auto bystander = engine.Submit(std::move(other));
  const auto dead = engine.Submit(Ask(Compile(Kind::kRegex, "AB{2}c"), 1));
  EXPECT_EQ(dead->Wait().status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(dead->Wait().status.message(), HasSubstr("no token of the model"));
  EXPECT_EQ(dead->text(), "ABB");
  Request slow = Ask(Compile(Kind::kEbnf, "root ::= (a a a a a a)* \"#\"\na ::= [A-Z]*"), 1);
  slow.sampling.logit_bias = {{'#', -100.f}};
  slow.ignore_eos = true;
  const auto late = engine.Submit(std::move(slow));
  EXPECT_EQ(late->Wait().status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(late->Wait().status.message(), HasSubstr("to match"));
  EXPECT_TRUE(bystander->Wait().status.ok());
  ExpectList(bystander->text());

  const auto sink = std::make_shared<RecordingSink>();
  const auto rejection = engine->Submit(Ask(Compile(Kind::kRegex, "c"), 1), sink);
  ASSERT_TRUE(rejection.has_value());
  EXPECT_EQ(rejection->kind, Rejection::Kind::kInvalid);
  EXPECT_EQ(rejection->param, "grammar");
}

TEST_F(ConstrainedTest, OfASession) {
  for (uint64_t seed = 0; seed < 10; ++seed) {
    Session session(&model(), &small_.pool(), small_.ctx(), {.level = static_cast<int>(seed % 3)});
    ASSERT_TRUE(session.Prefill(RandomPrompt(model(), 20, 3)).ok());
    GenerateOptions options;
    options.sampling.seed = seed;
    options.max_tokens = 440;
    options.grammar = Compile(Kind::kJsonSchema, kList);
    const auto result = session.Generate(options);
    ASSERT_TRUE(result.ok()) << result.status().message();
    EXPECT_EQ(result->finish, FinishReason::kStop);
    ExpectList(tokenizer_->Decode(result->tokens));
  }
}

}  // namespace
}  // namespace dsla
