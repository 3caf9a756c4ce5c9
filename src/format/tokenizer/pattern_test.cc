#include "format/tokenizer/pattern.h"

#include <gtest/gtest.h>

#include "format/tokenizer/known_patterns.h"

namespace dsla {
namespace {

std::vector<std::string> Matches(std::string_view expression, std::string_view text) {
  auto pattern = Pattern::Compile(expression);
  EXPECT_TRUE(pattern.ok()) << pattern.status().message();
  Pattern::Matcher matcher;
  std::vector<std::string> out;
  for (size_t pos = 0; pos < text.size(); pos = matcher.end()) {
    const auto found = matcher.Find(*pattern, text, pos);
    EXPECT_TRUE(found.ok());
    if (!*found) break;
    out.emplace_back(text.substr(matcher.begin(), matcher.end() - matcher.begin()));
  }
  return out;
}

std::string Refusal(std::string_view expression) {
  const auto pattern = Pattern::Compile(expression);
  return pattern.ok() ? "accepted" : pattern.status().message();
}

using Strings = std::vector<std::string>;

TEST(PatternTest, FamiliesCutAsTheyShould) {
  EXPECT_EQ(Matches(known_patterns::kGpt2, "It's  1234 é!?\n\n x"),
            (Strings{"It", "'s", " ", " 1234", " é", "!?", "\n\n", " x"}));
  EXPECT_EQ(Matches(known_patterns::kLlama3, "IT'S 1234 (é!\n\n x"),
            (Strings{"IT", "'S", " ", "123", "4", " (", "é", "!\n\n", " x"}));
  EXPECT_EQ(Matches(known_patterns::kQwen2, "12 a"), (Strings{"1", "2", " a"}));
}

TEST(PatternTest, WhiteSpaceIsUnicodes) {
  // PCRE2's own \s has U+180E too.
  EXPECT_EQ(Matches("\\s+", "a\u0085\u2028\u3000b\u180e\u200b"), (Strings{"\u0085\u2028\u3000"}));
  EXPECT_EQ(Matches("[^\\s]+", "a\u00a0b"), (Strings{"a", "b"}));
  EXPECT_EQ(Matches("\\S\\D", "a \u180eb"), (Strings{"a ", "\u180eb"}));
}

// U+3002 is of no script, though Han is among its script extensions.
TEST(PatternTest, ScriptsAreWithoutExtensions) {
  EXPECT_EQ(Matches("\\p{Han}+", "字。字"), (Strings{"字", "字"}));
  EXPECT_EQ(Matches("\\p{^Han}+", "字。字"), Strings{"。"});
}

TEST(PatternTest, Translates) {
  EXPECT_EQ(*Pattern::Translate("\\p{Han}\\P{^Greek}\\p{Any}"),
            "\\p{sc:Han}\\P{^sc:Greek}\\p{Any}");
  EXPECT_EQ(Pattern::Translate("\\d{1,3}?").ok(), false);
  EXPECT_EQ(*Pattern::Translate("\\d\\p{Lu}[^a\\]\\u00e9]{2,}\\x41"),
            "\\p{Nd}\\p{Lu}[^a\\]\\x{00e9}]{2,}\\x{41}");
  EXPECT_EQ(*Pattern::Translate("(?i:a)(?!b)(?>c)(d)"), "(?i:a)(?!b)(?>c)(d)");
  EXPECT_EQ(*Pattern::Translate("\\x{1F600}"), "\\x{1F600}");
}

TEST(PatternTest, RefusesWhatTheEnginesReadDifferently) {
  EXPECT_EQ(Refusal("a\\h"), "pattern has '\\h' at byte 1, which is not supported");
  EXPECT_EQ(Refusal("\\w+"), "pattern has '\\w' at byte 0, which is not supported");
  EXPECT_EQ(Refusal("\\b"), "pattern has '\\b' at byte 0, which is not supported");
  EXPECT_EQ(Refusal("(a)\\1"), "pattern has '\\1' at byte 3, which is not supported");
  EXPECT_EQ(Refusal("^a"), "pattern has '^' at byte 0, which is not supported");
  EXPECT_EQ(Refusal("a$"), "pattern has '$' at byte 1, which is not supported");
  EXPECT_EQ(Refusal("[a&&b]"), "pattern has '&&' at byte 2, which is not supported");
  EXPECT_EQ(Refusal("[[:alpha:]]"), "pattern has '[:' at byte 1, which is not supported");
  EXPECT_EQ(Refusal("[]a]"), "pattern has ']' at byte 1, which is not supported");
  EXPECT_EQ(Refusal("[\\S]"), "pattern has '\\S' at byte 1, which is not supported");
  EXPECT_EQ(Refusal("(?i)a"), "pattern has '(?i' at byte 0, which is not supported");
  EXPECT_EQ(Refusal("(*FAIL)"), "pattern has '(*F' at byte 0, which is not supported");
  EXPECT_EQ(Refusal("a{2}+"), "pattern has '{2}+' at byte 1, which is not supported");
  EXPECT_EQ(Refusal("a{,2}"), "pattern has '{' at byte 1, which is not supported");
  EXPECT_EQ(Refusal("\\p"), "pattern has '\\p' at byte 0, which is not supported");
  EXPECT_EQ(Refusal("\\p{sc:Han}"), "pattern has '\\p{sc:Han}' at byte 0, which is not supported");
  EXPECT_EQ(Refusal("\\xff"), "pattern has '\\x' at byte 0, which is not supported");
  EXPECT_EQ(Refusal("\\u12"), "pattern has '\\u' at byte 0, which is not supported");
  EXPECT_EQ(Refusal("a\\"), "pattern ends in a backslash");
  EXPECT_EQ(Refusal("[ab"), "pattern has a '[' that is not closed");
  EXPECT_EQ(Refusal("(a").substr(0, 27), "pattern does not compile: m");
  EXPECT_EQ(Refusal("\\p{Nonsense}").substr(0, 26), "pattern does not compile: ");
  EXPECT_EQ(Refusal(std::string(100, '(') + "a" + std::string(100, ')')).substr(0, 26),
            "pattern does not compile: ");
}

TEST(PatternTest, GivesUpInsteadOfHanging) {
  auto pattern = Pattern::Compile("(?:a|aa)+b");
  ASSERT_TRUE(pattern.ok());
  Pattern::Matcher matcher;
  const auto found = matcher.Find(*pattern, std::string(200, 'a') + "cb", 0);
  ASSERT_FALSE(found.ok());
  EXPECT_EQ(found.status().code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(found.status().message(),
            "a pre-tokenizer pattern gave up on 202 bytes of text: match limit exceeded");
}

}  // namespace
}  // namespace dsla
