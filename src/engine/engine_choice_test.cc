// What the engine tells a device that chooses a step's tokens, and what it is told.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <tuple>

#include "engine/engine.h"
#include "engine/testing/stream_fixture.h"
#include "grammar/grammar.h"

namespace dsla {
namespace {

using ::testing::ElementsAre;
using testing_engine::kV;
using testing_engine::OneMore;
using testing_engine::OnStream;
using testing_engine::TestEngine;

class EngineChoiceTest : public testing_engine::StreamTest {};

// What a request does to its logits goes to the device, as it is at each step.
TEST_F(EngineChoiceTest, TheDeviceIsToldOfPenaltiesBiasesAndEnds) {
  using Edit = std::tuple<int32_t, int32_t, float>;
  std::vector<std::vector<Edit>> edits;
  std::vector<size_t> ruled_out;
  OnStream on({.choose = OneMore, .chooses = [&](const SequenceRows& rows) {
                 edits.emplace_back();
                 for (const LogitEdit& edit : rows.edits)
                   edits.back().emplace_back(edit.token, edit.outputs, edit.bias);
                 ruled_out.push_back(rows.ruled_out.size());
                 EXPECT_TRUE(rows.ruled_out.empty() || rows.ruled_out[0] == 20);
                 EXPECT_EQ(rows.top, 0);
               }});
  TestEngine engine(on.small.model(), *tokenizer_, Options());
  Request request = Ask(3);
  request.sampling.repetition_penalty = 2;
  request.sampling.logit_bias = {{10, 1.5f}, {50, -2.f}};
  request.stop_ids = {20};
  request.min_tokens = 2;
  request.top_logprobs = 0;
  const auto sink = engine.Submit(request);
  EXPECT_TRUE(sink->Wait().status.ok());
  EXPECT_THAT(sink->tokens(), ElementsAre(10, 11, 12));
  EXPECT_THAT(ruled_out, ElementsAre(1, 1, 0));
  ASSERT_EQ(edits.size(), 3u);
  std::vector<Edit> want = {{10, -1, 1.5f}, {50, -1, -2.f}, {7, 0, 0.f}, {8, 0, 0.f}, {9, 0, 0.f}};
  EXPECT_EQ(edits[0], want);
  std::get<1>(want[0]) = 1;
  EXPECT_EQ(edits[1], want);
  want.emplace_back(11, 1, 0.f);
  EXPECT_EQ(edits[2], want);
}

// What a grammar allows is known when the token before is: no step is begun ahead.
TEST_F(EngineChoiceTest, TheDeviceIsToldWhatAGrammarAllows) {
  std::vector<std::string> log;
  std::vector<std::vector<uint32_t>> allowed;
  OnStream on({.choose = OneMore,
               .note = [&](const char* what, int) { log.push_back(what); },
               .chooses =
                   [&](const SequenceRows& rows) {
                     allowed.emplace_back(rows.allowed.begin(), rows.allowed.end());
                   }});
  const auto compiler = GrammarCompiler::Create(*tokenizer_, kV);
  const auto grammar = compiler->Compile(
      {GrammarSpec::Kind::kEbnf, "root ::= [\\x0a-\\x0c] [\\x0b] [\\x0c] [\\x0d-\\x0f]"});
  ASSERT_TRUE(grammar.ok()) << grammar.status().message();
  TestEngine engine(on.small.model(), *tokenizer_, Options());
  Request request = Ask(9);
  request.grammar = *grammar;
  const auto sink = engine.Submit(request);
  EXPECT_EQ(sink->Wait().finish, FinishReason::kStop);
  EXPECT_THAT(sink->tokens(), ElementsAre(10, 11, 12, 13));
  ASSERT_EQ(allowed.size(), 4u);
  const auto words = static_cast<size_t>((kV + 31) / 32);
  const uint32_t masks[] = {7u << 10, 1u << 11, 1u << 12, 7u << 13};
  for (size_t i = 0; i < 4; ++i) {
    std::vector<uint32_t> want(words);
    want[0] = masks[i];
    EXPECT_EQ(allowed[i], want);
  }
  EXPECT_EQ(std::count(log.begin(), log.end(), "begin"), 0);
}

TEST_F(EngineChoiceTest, TheDeviceTellsTheLikeliest) {
  OnStream on({.choose = OneMore});
  TestEngine engine(on.small.model(), *tokenizer_, Options());
  Request request = Ask(2);
  request.top_logprobs = 2;
  const auto sink = engine.Submit(request);
  EXPECT_TRUE(sink->Wait().status.ok());
  const std::vector<TokenOutput> outputs = sink->outputs();
  ASSERT_EQ(outputs.size(), 2u);
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(outputs[i].logprob, -1);
    ASSERT_EQ(outputs[i].top.size(), 2u);
    for (int k = 0; k < 2; ++k) {
      EXPECT_EQ(outputs[i].top[k].token, 10 + i + k);
      EXPECT_EQ(outputs[i].top[k].logprob, -1.f - k);
    }
  }
}

}  // namespace
}  // namespace dsla
