#include "grammar/grammar.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <regex>
#include <set>
#include <thread>

#include "base/clock.h"
#include "format/tokenizer/testing.h"
#include "format/tokenizer/tokenizer.h"

namespace dsla {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;
using Kind = GrammarSpec::Kind;

constexpr char kPerson[] =
    R"({"type":"object","properties":{"name":{"type":"string","maxLength":8},)"
    R"("age":{"type":"integer","minimum":0,"maximum":150}},"required":["name","age"]})";

class GrammarTest : public ::testing::Test {
 protected:
  static constexpr int kBytes = 256;  // tokens 0 to 255 are the bytes
  GrammarTest() {
    auto data = ParseTokenizerJson(testing::ByteLevelJson().dump(), "tokenizer.json");
    EXPECT_TRUE(data.ok());
    auto tokenizer = Tokenizer::Create(std::move(data).value());
    EXPECT_TRUE(tokenizer.ok());
    tokenizer_ = std::move(tokenizer).value();
    Reset({});
  }

  void Reset(const GrammarOptions& options) {
    compiler_ = GrammarCompiler::Create(*tokenizer_, V(), options);
  }
  // One token more than the tokenizer has, as where a model's are padded.
  int64_t V() const { return tokenizer_->vocab_size() + 1; }

  std::shared_ptr<const Grammar> Compile(Kind kind, const std::string& text,
                                         bool control_tokens = false) {
    auto grammar = compiler_->Compile({kind, text, control_tokens});
    EXPECT_TRUE(grammar.ok()) << grammar.status().message();
    return grammar.ok() ? *grammar : nullptr;
  }
  std::unique_ptr<GrammarMatcher> Matcher(Kind kind, const std::string& text,
                                          bool control_tokens = false) {
    const auto grammar = Compile(kind, text, control_tokens);
    if (grammar == nullptr) return nullptr;
    auto matcher = grammar->NewMatcher();
    EXPECT_TRUE(matcher.ok()) << matcher.status().message();
    return std::move(matcher).value();
  }
  Status Refused(Kind kind, const std::string& text) {
    const auto grammar = compiler_->Compile({kind, text});
    EXPECT_FALSE(grammar.ok()) << text.substr(0, 80);
    return grammar.status();
  }

  std::vector<int32_t> Allowed(const GrammarMatcher& matcher) const {
    std::vector<int32_t> tokens;
    EXPECT_EQ(matcher.allowed().size(), static_cast<size_t>((V() + 31) / 32));
    for (size_t i = 0; i < 32 * matcher.allowed().size(); ++i) {
      if ((matcher.allowed()[i / 32] >> i % 32 & 1) != 0) tokens.push_back(static_cast<int32_t>(i));
    }
    return tokens;
  }
  bool IsAllowed(const GrammarMatcher& matcher, int32_t token) const {
    return (matcher.allowed()[static_cast<size_t>(token / 32)] >> token % 32 & 1) != 0;
  }

  // False where a byte is not allowed.
  bool Accept(GrammarMatcher& matcher, const std::string& text) const {
    for (const char c : text) {
      const auto token = static_cast<int32_t>(static_cast<uint8_t>(c));
      if (!IsAllowed(matcher, token)) return false;
      matcher.Accept(token);
      EXPECT_TRUE(matcher.Await().ok());
    }
    return true;
  }

  // A reply of tokens drawn at random, up to an end.
  std::string Walk(GrammarMatcher& matcher, uint32_t seed, int most = 2000) const {
    std::mt19937 random(seed);
    std::vector<int32_t> reply;
    for (int i = 0; i < most && !matcher.complete(); ++i) {
      const std::vector<int32_t> tokens = Allowed(matcher);
      if (matcher.may_end() && random() % 4 == 0) break;
      EXPECT_FALSE(tokens.empty());
      if (tokens.empty()) break;
      const int32_t token = tokens[random() % tokens.size()];
      EXPECT_LT(token, tokenizer_->vocab_size());
      EXPECT_FALSE(tokenizer_->IsSpecial(token));
      reply.push_back(token);
      matcher.Accept(token);
      EXPECT_TRUE(matcher.Await().ok());
    }
    return tokenizer_->Decode(reply);
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<GrammarCompiler> compiler_;
};

TEST_F(GrammarTest, RandomRepliesFollowTheSchema) {
  for (uint32_t seed = 0; seed < 50; ++seed) {
    const auto matcher = Matcher(Kind::kJsonSchema, kPerson);
    ASSERT_NE(matcher, nullptr);
    EXPECT_FALSE(matcher->may_end());
    const std::string text = Walk(*matcher, seed);
    const json value = json::parse(text, nullptr, /*allow_exceptions=*/false);
    ASSERT_TRUE(value.is_object()) << text;
    EXPECT_EQ(value.size(), 2u) << text;
    EXPECT_TRUE(value["name"].is_string());
    EXPECT_TRUE(value["age"].is_number_integer());
    EXPECT_LE(value["age"], 150);
  }
}

TEST_F(GrammarTest, AnObjectIsAnyObject) {
  for (const char* text : {"{}", R"({"a":[1,{"b":null}],"c":"d"})", R"({ "x" : -1.5e3 })"}) {
    const auto matcher = Matcher(Kind::kJsonObject, "");
    EXPECT_TRUE(Accept(*matcher, text)) << text;
    EXPECT_TRUE(matcher->may_end() && matcher->complete()) << text;
  }
  EXPECT_FALSE(Accept(*Matcher(Kind::kJsonObject, ""), "[1]"));
  EXPECT_FALSE(Accept(*Matcher(Kind::kJsonObject, ""), "{,"));
}

TEST_F(GrammarTest, RegularExpressions) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    const std::string text = Walk(*Matcher(Kind::kRegex, "[0-9]{3}-(ab|cd)+"), seed);
    EXPECT_TRUE(std::regex_match(text, std::regex("[0-9]{3}-(ab|cd)+"))) << text;
  }
}

TEST_F(GrammarTest, Ebnf) {
  const std::string grammar = "root ::= \"yes\" | \"no\" [a-c]*";
  const auto matcher = Matcher(Kind::kEbnf, grammar);
  EXPECT_THAT(Allowed(*matcher), UnorderedElementsAre('y', 'n'));
  EXPECT_TRUE(Accept(*matcher, "no"));
  EXPECT_TRUE(matcher->may_end());
  EXPECT_FALSE(matcher->complete());
  EXPECT_THAT(Allowed(*matcher), UnorderedElementsAre('a', 'b', 'c'));
  const auto other = Matcher(Kind::kEbnf, grammar);
  EXPECT_TRUE(Accept(*other, "yes"));
  EXPECT_TRUE(other->complete());
  EXPECT_TRUE(Allowed(*other).empty());
}

TEST_F(GrammarTest, ATokenOfSeveralBytesIsTakenWhole) {
  const auto matcher = Matcher(Kind::kRegex, "hello w");
  EXPECT_THAT(Allowed(*matcher), UnorderedElementsAre('h', 256, 258, 259));  // he, hell, hello
  matcher->Accept(259);
  ASSERT_TRUE(matcher->Await().ok());
  EXPECT_THAT(Allowed(*matcher), UnorderedElementsAre(' ', 260));
}

TEST_F(GrammarTest, Choices) {
  const std::vector<std::string> choices = {"a+b", "(c|d)", "a", "[x]{2}.^$\\", "zw\u00f6lf"};
  for (const std::string& choice : choices) {
    const auto matcher = Matcher(Kind::kRegex, RegexOfChoices(choices));
    EXPECT_TRUE(Accept(*matcher, choice)) << choice;
    EXPECT_TRUE(matcher->may_end()) << choice;
  }
  EXPECT_FALSE(Accept(*Matcher(Kind::kRegex, RegexOfChoices(choices)), "c"));
}

TEST_F(GrammarTest, StructuralTags) {
  const auto matcher = Matcher(
      Kind::kStructuralTag,
      R"({"type":"structural_tag","format":{"type":"tag","begin":"<a>","content":)"
      R"({"type":"json_schema","json_schema":{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"]}},)"
      R"("end":"</a>"}})");
  ASSERT_NE(matcher, nullptr);
  EXPECT_TRUE(Accept(*matcher, R"(<a>{"n":1}</a>)"));
  EXPECT_TRUE(matcher->may_end());
}

// Calls among other text.
TEST_F(GrammarTest, StructuralTagsBehindATrigger) {
  const std::string tag =
      R"({"type":"structural_tag","format":{"type":"triggered_tags","triggers":["<f="],"tags":[)"
      R"({"type":"tag","begin":"<f=a>","content":{"type":"json_schema","json_schema":)"
      R"({"type":"object","properties":{"s":{"type":"string","maxLength":3}},"required":["s"]}},"end":"</f>"}]}})";
  const auto matcher = Matcher(Kind::kStructuralTag, tag);
  ASSERT_NE(matcher, nullptr);
  EXPECT_TRUE(Accept(*matcher, R"(some text <f=a>{"s":"x)"));
  EXPECT_FALSE(IsAllowed(*matcher, '\t'));
  EXPECT_FALSE(matcher->may_end());
  EXPECT_TRUE(Accept(*matcher, R"("}</f> and more)"));
  EXPECT_TRUE(matcher->may_end());
}

// Token 261 is <|end|>, a control token.
constexpr char kEnds[] =
    R"({"type":"structural_tag","format":{"type":"sequence","elements":[{"type":"token","token":261},)"
    R"({"type":"json_schema","json_schema":{"type":"string"}},{"type":"token","token":261}]}})";

TEST_F(GrammarTest, AControlTokenIsOnlyWhereTheGrammarNamesIt) {
  Reset({.control_tokens = {261}});
  const auto matcher = Matcher(Kind::kStructuralTag, kEnds, /*control_tokens=*/true);
  ASSERT_NE(matcher, nullptr);
  EXPECT_THAT(Allowed(*matcher), ElementsAre(261)) << "and not its bytes";
  matcher->Accept(261);
  ASSERT_TRUE(matcher->Await().ok());
  EXPECT_THAT(Allowed(*matcher), ElementsAre('"'));
  ASSERT_TRUE(Accept(*matcher, "\"a <|end|> "));
  EXPECT_FALSE(IsAllowed(*matcher, 261)) << "its bytes are text";
  ASSERT_TRUE(Accept(*matcher, "\""));
  EXPECT_THAT(Allowed(*matcher), ElementsAre(261));
  EXPECT_FALSE(matcher->may_end());
  matcher->Accept(261);
  ASSERT_TRUE(matcher->Await().ok());
  EXPECT_TRUE(matcher->may_end() && matcher->complete());
}

// Of text that is anything but so many bytes, too.
TEST_F(GrammarTest, AControlTokenIsNoneOfTheBytesOfText) {
  Reset({.control_tokens = {261}});
  const std::string any =
      R"({"type":"structural_tag","format":{"type":"any_text","excludes":["x"]}})";
  const auto matcher = Matcher(Kind::kStructuralTag, any, /*control_tokens=*/true);
  ASSERT_NE(matcher, nullptr);
  EXPECT_TRUE(Accept(*matcher, "<|end|> "));
  EXPECT_FALSE(IsAllowed(*matcher, 261));
}

TEST_F(GrammarTest, ClientsGrammarsHaveNoControlTokens) {
  Reset({.control_tokens = {261}});
  for (const auto& [kind, text] : std::vector<std::pair<Kind, std::string>>{
           {Kind::kStructuralTag, kEnds}, {Kind::kEbnf, "root ::= Token(261)"}}) {
    const auto matcher = Matcher(kind, text);
    ASSERT_NE(matcher, nullptr);
    EXPECT_TRUE(Allowed(*matcher).empty()) << "ReplyMask refuses it";
    EXPECT_FALSE(matcher->may_end());
  }
  for (const auto& [kind, text] : std::vector<std::pair<Kind, std::string>>{
           {Kind::kEbnf, "root ::= ExcludeToken(1)"},
           {Kind::kEbnf, "root ::= [a-z<>|]*"},
           {Kind::kStructuralTag, R"({"type":"structural_tag","format":{"type":"any_tokens"}})"}}) {
    const auto matcher = Matcher(kind, text);
    ASSERT_NE(matcher, nullptr);
    EXPECT_TRUE(IsAllowed(*matcher, '<')) << text;
    EXPECT_FALSE(IsAllowed(*matcher, 261)) << text;
  }
}

TEST_F(GrammarTest, WhatIsWrongIsSaidInOneLine) {
  const auto expect = [&](Kind kind, const std::string& text, const std::string& part) {
    const Status status = Refused(kind, text);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr(part));
    EXPECT_EQ(status.message().find('\n'), std::string::npos);
    EXPECT_EQ(status.message().find(".cc"), std::string::npos);
    EXPECT_LT(status.message().size(), 300u);
  };
  expect(Kind::kRegex, "[a", "Unclosed '['");
  expect(Kind::kEbnf, "start ::= \"a\"", "root");
  expect(Kind::kEbnf, "root ::= (", "EBNF");
  expect(Kind::kJsonSchema, "{", "malformed JSON");
  expect(Kind::kJsonSchema, "[]", "a schema is a JSON object");
  expect(Kind::kJsonSchema, R"({"type":"foo"})", "foo");
  expect(Kind::kJsonSchema, R"({"$ref":"#"})", "Circular");
  expect(Kind::kJsonSchema, R"({"type":"array","uniqueItems":true})", "'uniqueItems'");
  expect(Kind::kJsonSchema, R"({"type":"string","pattern":"(?=a)b"})", "Lookahead");
  expect(Kind::kJsonSchema, std::string(70000, ' '), "70000 bytes");
  expect(Kind::kStructuralTag, "{}", "");
}

// Each of these computes for long, or needs more than there is, in its process alone.
TEST_F(GrammarTest, BombsAreRefused) {
  Reset({.compile_seconds = 0.1});
  const auto expect = [&](Kind kind, const std::string& text, const std::string& part) {
    SCOPED_TRACE(text.substr(0, 80));
    const Status status = Refused(kind, text);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr(part));
    // That is known now, in less than compiling takes unless this thread has to wait.
    double least = 1;
    for (int i = 0; i < 5; ++i) {
      const double begin = NowSeconds();
      EXPECT_FALSE(Refused(kind, text).ok());
      least = std::min(least, NowSeconds() - begin);
    }
    EXPECT_LT(least, 0.1);
  };
  json properties;
  for (int i = 0; i < 1500; ++i) properties["p" + std::to_string(i)] = {{"type", "string"}};
  expect(Kind::kJsonSchema, json{{"type", "object"}, {"properties", properties}}.dump(),
         "the grammar takes more than 0.1 s or 1024 MiB to compile");
  expect(Kind::kRegex, std::string(20000, '(') + "a" + std::string(20000, ')'), "");
  expect(Kind::kEbnf, "root ::= " + std::string(20000, '(') + "\"a\"" + std::string(20000, ')'),
         "");
  expect(Kind::kJsonSchema, std::string(30000, '['), "nested deeper");
  // The processes of others are as they were.
  EXPECT_TRUE(Accept(*Matcher(Kind::kRegex, "[0-9]+"), "12"));
}

// The processes whose parent this is.
std::vector<pid_t> ChildrenOf(pid_t parent) {
  std::vector<pid_t> children;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const int pid = std::atoi(entry.path().filename().c_str());
    std::ifstream file(entry.path() / "stat");
    std::string stat;  // "pid (name) state parent ..."
    if (pid == 0 || !std::getline(file, stat)) continue;
    int of = 0;
    std::sscanf(stat.c_str() + stat.rfind(')'), ") %*c %d", &of);
    if (of == parent) children.push_back(pid);
  }
  return children;
}

// The time of a token is what its process computes: on a busy machine it may have to wait.
TEST_F(GrammarTest, AProcessThatIsHeldUpIsNoBomb) {
  Reset({.match_seconds = 0.02});
  const auto matcher = Matcher(Kind::kRegex, "ab");
  ASSERT_TRUE(matcher->Await().ok());
  std::vector<pid_t> grammars;
  for (const pid_t first : ChildrenOf(getpid())) {
    for (const pid_t grammar : ChildrenOf(first)) grammars.push_back(grammar);
  }
  ASSERT_FALSE(grammars.empty());
  for (const pid_t grammar : grammars) kill(grammar, SIGSTOP);
  matcher->Accept('a');
  std::thread later([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    for (const pid_t grammar : grammars) kill(grammar, SIGCONT);
  });
  const Status status = matcher->Await();
  later.join();
  EXPECT_TRUE(status.ok()) << status.message();
}

// One that shows only in mid-reply ends that reply, and nobody begins another with it.
TEST_F(GrammarTest, ABombInMidReplyEndsIt) {
  Reset({.match_seconds = 0.02});
  const std::string text = "root ::= \"x\" (a a a a a a)* \"x\"\na ::= [a-z ]*";
  const auto grammar = Compile(Kind::kEbnf, text);
  ASSERT_NE(grammar, nullptr);
  auto matcher = std::move(grammar->NewMatcher()).value();
  Status status;
  const double begin = NowSeconds();
  matcher->Accept('x');
  for (int i = 0; i < 3000 && (status = matcher->Await()).ok(); ++i) matcher->Accept('a');
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("to match"));
  EXPECT_LT(NowSeconds() - begin, 60);
  EXPECT_FALSE(grammar->NewMatcher().ok());
  EXPECT_EQ(Refused(Kind::kEbnf, text).message(), status.message());
}

TEST_F(GrammarTest, EqualGrammarsAreCompiledOnce) {
  const auto first = Compile(Kind::kRegex, "[ab]+");
  EXPECT_EQ(Compile(Kind::kRegex, "[ab]+"), first);
  EXPECT_NE(Compile(Kind::kEbnf, "root ::= [ab]+"), first);
  EXPECT_GT(first->bytes(), 0);
}

TEST_F(GrammarTest, TheLeastRecentlyUsedGoes) {
  Reset({.cache_entries = 2});
  const std::weak_ptr<const Grammar> first = Compile(Kind::kRegex, "a"),
                                     second = Compile(Kind::kRegex, "b");
  Compile(Kind::kRegex, "a");
  auto held = Compile(Kind::kRegex, "c");
  EXPECT_FALSE(first.expired());
  EXPECT_TRUE(second.expired());
  // Who has one goes on with it.
  auto matcher = std::move(held->NewMatcher()).value();
  const std::weak_ptr<const Grammar> third = std::exchange(held, nullptr);
  Compile(Kind::kRegex, "d");
  Compile(Kind::kRegex, "e");
  EXPECT_TRUE(Accept(*matcher, "c"));
  matcher.reset();
  EXPECT_TRUE(third.expired());
}

TEST_F(GrammarTest, ManyThreadsAtOnce) {
  std::vector<std::thread> threads;
  std::atomic<int> ended = 0;
  for (uint32_t t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      for (uint32_t i = 0; i < 4; ++i) {
        const std::string bound = std::to_string(2 + i % 2);
        const auto matcher = Matcher(Kind::kRegex, "(x|yz){" + bound + "}");
        if (matcher == nullptr) return;
        Walk(*matcher, 10 * t + i);
        ended += matcher->complete() ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(ended, 24);
}

// Many at once share a process, and a place is used again.
TEST_F(GrammarTest, ManyMatchersOfOneGrammar) {
  const auto grammar = Compile(Kind::kRegex, "[a-d]{8}");
  ASSERT_NE(grammar, nullptr);
  for (int round = 0; round < 3; ++round) {
    std::vector<std::unique_ptr<GrammarMatcher>> matchers;
    for (int i = 0; i < 300; ++i) matchers.push_back(std::move(grammar->NewMatcher()).value());
    for (int step = 0; step < 8; ++step) {
      for (size_t i = 0; i < matchers.size(); ++i)
        matchers[i]->Accept('a' + static_cast<int32_t>(i) % 4);
      for (const auto& matcher : matchers) ASSERT_TRUE(matcher->Await().ok());
    }
    for (const auto& matcher : matchers) EXPECT_TRUE(matcher->complete());
  }
}

}  // namespace
}  // namespace dsla
