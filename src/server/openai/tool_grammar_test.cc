// The grammars of replies that call tools, as XGrammar reads them: whatever they allow is read as
// calls again.
#include "format/chat/tool_grammar.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "format/chat/tool_parser.h"
#include "grammar/grammar.h"
#include "server/openai/testing.h"

namespace dsla::openai {
namespace {

using nlohmann::json;

std::vector<Tool> Tools() {
  return {{"get", "",
           R"({"type":"object","properties":{"unit":{"enum":["C","F"]},"days":{"type":"integer",)"
           R"("minimum":0,"maximum":9}},"required":["unit","days"]})",
           true},
          {"now", "", R"({"type":"object","properties":{},"additionalProperties":false})", true}};
}

class ToolGrammarTest : public ::testing::TestWithParam<std::string_view> {
 protected:
  ToolDialect dialect() const { return *ToolDialectByName(GetParam()); }

  std::unique_ptr<GrammarMatcher> Matcher(const ToolGrammar& grammar) {
    auto compiled = compiler_->Compile({.kind = GrammarSpec::Kind::kStructuralTag,
                                        .text = StructuralTagOf(dialect(), grammar, Tools())});
    EXPECT_TRUE(compiled.ok()) << compiled.status().message();
    return compiled.ok() ? std::move((*compiled)->NewMatcher()).value() : nullptr;
  }

  // The first of the tokenizer's ids are the bytes.
  static bool Allows(const GrammarMatcher& matcher, int byte) {
    return (matcher.allowed()[static_cast<size_t>(byte / 32)] >> byte % 32 & 1) != 0;
  }
  static void Accept(GrammarMatcher& matcher, int byte) {
    matcher.Accept(byte);
    EXPECT_TRUE(matcher.Await().ok());
  }

  // A reply of bytes drawn at random, up to an end.
  static std::string Walk(GrammarMatcher& matcher, uint32_t seed) {
    std::mt19937 random(seed);
    std::string reply;
    while (!matcher.complete() && reply.size() < 4000) {
      if (matcher.may_end() && random() % 2 == 0) break;
      std::vector<int> bytes;
      for (int byte = 0; byte < 256; ++byte) {
        if (Allows(matcher, byte)) bytes.push_back(byte);
      }
      if (bytes.empty()) break;
      const int byte = bytes[random() % bytes.size()];
      reply += static_cast<char>(byte);
      Accept(matcher, byte);
    }
    EXPECT_TRUE(matcher.may_end()) << reply;
    return reply;
  }

  // False where a byte is not allowed.
  static bool Accepts(GrammarMatcher& matcher, std::string_view text) {
    for (const char c : text) {
      if (!Allows(matcher, static_cast<unsigned char>(c))) return false;
      Accept(matcher, static_cast<unsigned char>(c));
    }
    return true;
  }

  ToolReply Parse(const std::string& text) const {
    ToolParser::Options options;
    options.dialect = dialect();
    options.tools = std::make_shared<const std::vector<Tool>>(Tools());
    ToolParser parser(std::move(options));
    parser.Push(text);
    parser.Finish();
    return parser.reply();
  }

  std::unique_ptr<Tokenizer> tokenizer_ = testing::SmallTokenizer();
  std::unique_ptr<GrammarCompiler> compiler_ =
      GrammarCompiler::Create(*tokenizer_, tokenizer_->vocab_size());
};

void ExpectGood(const ToolCall& call) {
  const json arguments = json::parse(call.arguments);
  if (call.name == "now") {
    EXPECT_EQ(arguments, json::object());
    return;
  }
  EXPECT_EQ(call.name, "get");
  EXPECT_EQ(arguments.size(), 2u) << call.arguments;
  EXPECT_TRUE(arguments["unit"] == "C" || arguments["unit"] == "F") << call.arguments;
  EXPECT_TRUE(arguments["days"] >= 0 && arguments["days"] <= 9) << call.arguments;
}

TEST_P(ToolGrammarTest, ForcedRepliesAreCallsAndNothingElse) {
  size_t most = 0;
  for (uint32_t seed = 0; seed < 8; ++seed) {
    const auto matcher = Matcher({.calls = ToolGrammar::Calls::kSome});
    ASSERT_NE(matcher, nullptr);
    EXPECT_FALSE(matcher->may_end());
    const std::string reply = Walk(*matcher, seed);
    const ToolReply parsed = Parse(reply);
    EXPECT_EQ(parsed.content, "") << reply;
    EXPECT_GE(parsed.calls.size(), 1u) << reply;
    for (const ToolCall& call : parsed.calls) ExpectGood(call);
    most = std::max(most, parsed.calls.size());
  }
  EXPECT_GT(most, 1u) << "more than one may be made";
}

TEST_P(ToolGrammarTest, OneCallIsTheEnd) {
  const auto matcher = Matcher({.calls = ToolGrammar::Calls::kOne});
  ASSERT_NE(matcher, nullptr);
  const ToolReply parsed = Parse(Walk(*matcher, 3));
  ASSERT_EQ(parsed.calls.size(), 1u);
  ExpectGood(parsed.calls[0]);
  EXPECT_TRUE(matcher->complete());
}

TEST_P(ToolGrammarTest, InTextOnlyCallsAreBound) {
  const ToolGrammar freely{.text = ToolGrammar::Text::kAny};
  const auto once = Matcher({.calls = ToolGrammar::Calls::kOne});
  ASSERT_NE(once, nullptr);
  const std::string call = Walk(*once, 5);
  const auto matcher = Matcher(freely);
  ASSERT_NE(matcher, nullptr);
  EXPECT_TRUE(matcher->may_end());
  EXPECT_TRUE(Accepts(*matcher, "Well, [1] {2} <3>: " + call)) << call;
  EXPECT_TRUE(matcher->may_end());
  const auto bad = Matcher(freely);
  std::string wrong = call;
  const size_t name = wrong.find(wrong.find("get") == std::string::npos ? "now" : "get");
  EXPECT_FALSE(Accepts(*bad, wrong.replace(name, 3, "hmm")));
}

TEST_P(ToolGrammarTest, JsonOrCalls) {
  const ToolGrammar grammar{
      .text = ToolGrammar::Text::kJson,
      .schema = R"({"type":"object","properties":{"x":{"type":"null"}},"required":["x"]})"};
  const auto matcher = Matcher(grammar), other = Matcher(grammar);
  const auto once = Matcher({.calls = ToolGrammar::Calls::kOne});
  ASSERT_TRUE(matcher && other && once);
  EXPECT_TRUE(Accepts(*matcher, R"({"x":null})"));
  EXPECT_TRUE(matcher->may_end());
  EXPECT_TRUE(Accepts(*other, Walk(*once, 1)));
  EXPECT_TRUE(other->may_end());
}

INSTANTIATE_TEST_SUITE_P(Dialects, ToolGrammarTest, ::testing::ValuesIn(ToolDialectNames()),
                         [](const auto& info) {
                           std::string name(info.param);
                           std::erase(name, '-');
                           return name;
                         });

}  // namespace
}  // namespace dsla::openai
