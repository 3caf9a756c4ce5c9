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

struct Case {
  std::string_view dialect;
  std::vector<std::string> markers;  // that are control tokens
};

// Each dialect with markers that are text, and with control tokens.
std::vector<Case> Cases() {
  return {{"hermes", {}},
          {"hermes", {"<tool_call>", "</tool_call>"}},
          {"llama3", {}},
          {"llama3", {"<|python_tag|>"}},
          {"mistral", {}},
          {"mistral", {"[TOOL_CALLS]"}},
          {"mistral", {"[TOOL_CALLS]", "[ARGS]"}},
          {"qwen3-coder", {}},
          {"qwen3-coder", {"<tool_call>", "</tool_call>"}},
          {"deepseek", {}},
          {"deepseek",
           {"<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"}}};
}

std::unique_ptr<Tokenizer> TokenizerOf(const std::vector<std::string>& markers) {
  json description = dsla::testing::ByteLevelJson();
  int id = 263;
  for (const std::string& text : markers) {
    description["added_tokens"].push_back(
        {{"id", id++}, {"content", text}, {"special", true}, {"normalized", false}});
  }
  return testing::NewTokenizer(ParseTokenizerJson(description.dump(), "t.json"));
}

class ToolGrammarTest : public ::testing::TestWithParam<Case> {
 protected:
  ToolGrammarTest() {
    GrammarOptions options;
    for (const ToolMarker& marker : markers_) options.control_tokens.push_back(marker.id);
    compiler_ = GrammarCompiler::Create(*tokenizer_, tokenizer_->vocab_size(), options);
  }
  ToolDialect dialect() const { return *ToolDialectByName(GetParam().dialect); }

  std::unique_ptr<GrammarMatcher> Matcher(const ToolGrammar& grammar) {
    auto compiled =
        compiler_->Compile({.kind = GrammarSpec::Kind::kStructuralTag,
                            .text = StructuralTagOf(dialect(), grammar, Tools(), markers_),
                            .control_tokens = true});
    EXPECT_TRUE(compiled.ok()) << compiled.status().message();
    return compiled.ok() ? std::move((*compiled)->NewMatcher()).value() : nullptr;
  }

  // The first of the tokenizer's ids are the bytes.
  static bool Allows(const GrammarMatcher& matcher, int32_t token) {
    return (matcher.allowed()[static_cast<size_t>(token / 32)] >> token % 32 & 1) != 0;
  }
  static void Accept(GrammarMatcher& matcher, int32_t token) {
    matcher.Accept(token);
    EXPECT_TRUE(matcher.Await().ok());
  }
  std::vector<int32_t> Markers(const GrammarMatcher& matcher) const {
    std::vector<int32_t> allowed;
    for (const ToolMarker& marker : markers_) {
      if (Allows(matcher, marker.id)) allowed.push_back(marker.id);
    }
    return allowed;
  }

  // A reply of bytes and markers drawn at random, up to an end.
  std::string Walk(GrammarMatcher& matcher, uint32_t seed) const {
    std::mt19937 random(seed);
    std::vector<int32_t> reply;
    while (!matcher.complete() && reply.size() < 4000) {
      if (matcher.may_end() && random() % 2 == 0) break;
      std::vector<int32_t> tokens = Markers(matcher);
      for (int byte = 0; byte < 256; ++byte) {
        if (Allows(matcher, byte)) tokens.push_back(byte);
      }
      if (tokens.empty()) break;
      reply.push_back(tokens[random() % tokens.size()]);
      Accept(matcher, reply.back());
    }
    EXPECT_TRUE(matcher.may_end()) << tokenizer_->Decode(reply);
    EXPECT_FALSE(SpellsAMarker(tokenizer_->Decode(reply, {.skip_special = true})));
    return tokenizer_->Decode(reply);
  }
  bool SpellsAMarker(const std::string& text) const {
    return std::ranges::any_of(markers_, [&](const ToolMarker& marker) {
      return text.find(marker.text) != std::string::npos;
    });
  }

  // Of its bytes, and with `markers` of these where they are control tokens. False where one is not
  // allowed.
  bool Accepts(GrammarMatcher& matcher, std::string_view text, bool markers = true) const {
    while (!text.empty()) {
      const auto marker = std::ranges::find_if(
          markers_, [&](const ToolMarker& m) { return markers && text.starts_with(m.text); });
      const bool found = marker != markers_.end();
      const int32_t token = found ? marker->id : static_cast<unsigned char>(text[0]);
      text.remove_prefix(found ? marker->text.size() : 1);
      if (!Allows(matcher, token)) return false;
      Accept(matcher, token);
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

  std::unique_ptr<Tokenizer> tokenizer_ = TokenizerOf(GetParam().markers);
  std::vector<ToolMarker> markers_ = ToolMarkers(dialect(), *tokenizer_);
  std::unique_ptr<GrammarCompiler> compiler_;
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

TEST_P(ToolGrammarTest, AMarkerIsWrittenAsItsControlTokenAlone) {
  ASSERT_EQ(markers_.size(), GetParam().markers.size());
  const auto once = Matcher({.calls = ToolGrammar::Calls::kOne});
  ASSERT_NE(once, nullptr);
  const std::string call = Walk(*once, 5);
  // llama3's may be left out.
  EXPECT_TRUE(markers_.empty() || SpellsAMarker(call) || dialect() == ToolDialect::kLlama3) << call;
  const auto spelt = Matcher({});
  ASSERT_NE(spelt, nullptr);
  EXPECT_EQ(Accepts(*spelt, call, /*markers=*/false), !SpellsAMarker(call));
  for (const auto& matcher : {Matcher({}), Matcher({.text = ToolGrammar::Text::kAny})}) {
    EXPECT_LE(Markers(*matcher).size(), 1u) << "the first that a call has";
    if (markers_.empty()) continue;
    ASSERT_EQ(Markers(*matcher), std::vector<int32_t>{markers_[0].id});
    Accept(*matcher, markers_[0].id);
    EXPECT_THAT(Markers(*matcher), ::testing::Not(::testing::Contains(markers_[0].id)));
    EXPECT_FALSE(matcher->may_end());
  }
  for (const ToolMarker& marker : markers_) {
    const auto text = Matcher({.text = ToolGrammar::Text::kAny});
    EXPECT_FALSE(Accepts(*text, marker.text, /*markers=*/false)) << marker.text;
  }
}

INSTANTIATE_TEST_SUITE_P(Dialects, ToolGrammarTest, ::testing::ValuesIn(Cases()),
                         [](const auto& info) {
                           std::string name(info.param.dialect);
                           std::erase(name, '-');
                           return name + std::to_string(info.param.markers.size());
                         });

}  // namespace
}  // namespace dsla::openai
