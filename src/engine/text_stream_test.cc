#include "engine/text_stream.h"

#include <gtest/gtest.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "format/tokenizer/testing.h"

namespace dsla {
namespace {

// Ids 0-255 are bytes; 259 "hello", 261 the control token "<|end|>".
std::unique_ptr<Tokenizer> ByteTokenizer() {
  auto data = ParseTokenizerJson(testing::ByteLevelJson().dump(), "tokenizer.json");
  EXPECT_TRUE(data.ok()) << data.status().message();
  auto tokenizer = Tokenizer::Create(std::move(data).value());
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  return std::move(tokenizer).value();
}

class TextStreamTest : public ::testing::Test {
 protected:
  // Each byte of `text` as a token; the pieces that come out, joined by '|'.
  std::string Bytes(TextStream& stream, std::string_view text, bool may_stop = true) {
    std::string pieces;
    for (const char c : text) {
      pieces += stream.Push(static_cast<unsigned char>(c), may_stop) + "|";
      if (stream.stop_string().has_value()) break;
    }
    return pieces;
  }

  std::unique_ptr<Tokenizer> tokenizer_ = ByteTokenizer();
};

TEST_F(TextStreamTest, ControlTokensGiveTheirTextWhereAskedFor) {
  TextStream hidden(*tokenizer_, {}), shown(*tokenizer_, {"nd|>h"}, false, {261});
  EXPECT_EQ(hidden.Push(261, true), "");
  EXPECT_EQ(shown.Push(261, true), "<|e") << "a stop string may begin in it";
  EXPECT_EQ(shown.Push(259, true), "");
  EXPECT_EQ(shown.stop_string(), "nd|>h");
}

TEST_F(TextStreamTest, WholeCodePointsOnly) {
  TextStream stream(*tokenizer_, {});
  EXPECT_EQ(Bytes(stream, "a\xc3\xa9"), "a||\u00e9|");
  EXPECT_EQ(Bytes(stream, "\xe2\x82"), "||");
  EXPECT_EQ(stream.Finish(), "\ufffd");
}

TEST_F(TextStreamTest, ControlTokensGiveNoText) {
  TextStream stream(*tokenizer_, {"<|end|>"});
  EXPECT_EQ(stream.Push(261, true), "");
  EXPECT_EQ(stream.Push(259, true), "hello");
  EXPECT_EQ(stream.Finish(), "");
  EXPECT_FALSE(stream.stop_string().has_value());
}

TEST_F(TextStreamTest, HoldsBackWhatMayBecomeAStopString) {
  TextStream stream(*tokenizer_, {"###", "stop"});
  EXPECT_EQ(Bytes(stream, "a#b##c"), "a||#b|||##c|");
  EXPECT_EQ(Bytes(stream, "x##"), "x|||");
  EXPECT_EQ(stream.Finish(), "##");
  EXPECT_FALSE(stream.stop_string().has_value());
}

TEST_F(TextStreamTest, TheStopStringIsNotPartOfTheReply) {
  TextStream stream(*tokenizer_, {"###"});
  EXPECT_EQ(Bytes(stream, "a###b"), "a||||");
  EXPECT_EQ(stream.stop_string(), "###");
}

TEST_F(TextStreamTest, AStopStringInTheMiddleOfAToken) {
  TextStream stream(*tokenizer_, {"ell"});
  EXPECT_EQ(stream.Push(259, true), "h");
  EXPECT_EQ(stream.stop_string(), "ell");
}

TEST_F(TextStreamTest, TheOneThatEndsFirstWins) {
  TextStream inner(*tokenizer_, {"hello", "ell", "l"});
  EXPECT_EQ(inner.Push(259, true), "he");
  EXPECT_EQ(inner.stop_string(), "l");
  TextStream longest(*tokenizer_, {"l", "hel"});
  EXPECT_EQ(longest.Push(259, true), "");
  EXPECT_EQ(longest.stop_string(), "hel");
}

TEST_F(TextStreamTest, ABorderIsANewBeginning) {
  TextStream stream(*tokenizer_, {"aab"});
  EXPECT_EQ(Bytes(stream, "aaab"), "||a||");
  EXPECT_EQ(stream.stop_string(), "aab");
}

TEST_F(TextStreamTest, BeforeMinTokensAStopStringIsText) {
  TextStream stream(*tokenizer_, {"aa", "b"});
  EXPECT_EQ(Bytes(stream, "aab", false), "|a|ab|");
  // The second "a" was still a possible beginning; the third completes it.
  TextStream late(*tokenizer_, {"aa"});
  EXPECT_EQ(Bytes(late, "aa", false), "|a|");
  EXPECT_EQ(Bytes(late, "a"), "|");
  EXPECT_EQ(late.stop_string(), "aa");
}

TEST_F(TextStreamTest, OfSeveralBytesInAStopString) {
  TextStream stream(*tokenizer_, {"\u20ac\u20ac"});
  EXPECT_EQ(Bytes(stream, "x\u20acy"), "x||||\u20acy|");
  EXPECT_EQ(Bytes(stream, "\u20ac\u20ac"), "||||||");
  EXPECT_EQ(stream.stop_string(), "\u20ac\u20ac");
}

// Against a search of the whole text, on random texts over two letters cut into random tokens.
TEST_F(TextStreamTest, EqualsASearchOfTheWholeText) {
  constexpr uint32_t kSeed = 20250301;
  std::mt19937 random(kSeed);
  const auto text_of = [&](size_t length) {
    std::string text(length, 'a');
    for (char& c : text) c = "ab"[random() % 2];
    return text;
  };
  int stopped = 0;
  for (int round = 0; round < 3000; ++round) {
    SCOPED_TRACE(::testing::Message() << "seed " << kSeed << ", round " << round);
    std::vector<std::string> stops;
    for (size_t n = 1 + random() % 3; n > 0; --n) stops.push_back(text_of(2 + random() % 6));
    const std::string text = text_of(random() % 24);
    const size_t min_tokens = random() % 6;

    size_t want_end = std::string::npos;  // of the stop string whose last byte comes first
    std::string want_stop;
    for (size_t end = 1; end <= text.size() && want_stop.empty(); ++end) {
      for (const std::string& stop : stops) {
        if (end >= min_tokens && text.substr(0, end).ends_with(stop) &&
            stop.size() > want_stop.size()) {
          want_stop = stop;
          want_end = end;
        }
      }
    }
    TextStream stream(*tokenizer_, stops);
    std::string got;
    for (size_t i = 0; i < text.size() && !stream.stop_string().has_value(); ++i)
      got += stream.Push(text[i], i + 1 >= min_tokens);
    if (stream.stop_string().has_value()) {
      ++stopped;
      ASSERT_EQ(*stream.stop_string(), want_stop);
    } else {
      got += stream.Finish();
    }
    // What had already gone out before min_tokens stands.
    ASSERT_EQ(got, want_stop.empty() ? text : text.substr(0, want_end - want_stop.size()));
  }
  EXPECT_GT(stopped, 500);
}

}  // namespace
}  // namespace dsla
