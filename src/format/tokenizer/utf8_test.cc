#include "format/tokenizer/utf8.h"

#include <gtest/gtest.h>

#include <random>

namespace dsla::utf8 {
namespace {

const std::string kR = "\xef\xbf\xbd";

std::string Replaced(std::string_view text) {
  std::string out;
  AppendReplaced(text, &out);
  return out;
}

// What Python's bytes.decode("utf-8", "replace") gives.
TEST(Utf8Test, ReplacesMaximalIllFormedParts) {
  EXPECT_EQ(Replaced("plain"), "plain");
  EXPECT_EQ(Replaced("a\xff"
                     "b"),
            "a" + kR + "b");
  EXPECT_EQ(Replaced("\xe2\x82"), kR);                         // cut off
  EXPECT_EQ(Replaced("\xe2\x82!"), kR + "!");                  // cut off, then text
  EXPECT_EQ(Replaced("\xc0\xaf"), kR + kR);                    // overlong
  EXPECT_EQ(Replaced("\xe0\x80\xaf"), kR + kR + kR);           // overlong
  EXPECT_EQ(Replaced("\xed\xa0\x80"), kR + kR + kR);           // surrogate
  EXPECT_EQ(Replaced("\xf4\x90\x80\x80"), kR + kR + kR + kR);  // beyond U+10FFFF
  EXPECT_EQ(Replaced("\xf0\x9f\x98"), kR);
  EXPECT_EQ(Replaced("\xf0\x9f\x98\x80"), "\U0001F600");
  EXPECT_EQ(Replaced("\xf1\x80\xe1\x80\xc3"), kR + kR + kR);
}

TEST(Utf8Test, EveryCodePointGoesThereAndBack) {
  for (char32_t c = 0; c <= 0x10ffff; ++c) {
    if (c >= 0xd800 && c < 0xe000) continue;
    std::string text;
    Append(c, &text);
    const Decoded d = Decode(text);
    ASSERT_TRUE(d.valid) << static_cast<uint32_t>(c);
    ASSERT_TRUE(d.code_point == c) << static_cast<uint32_t>(c);
    ASSERT_EQ(static_cast<size_t>(d.length), text.size());
    ASSERT_EQ(LengthOf(text[0]), d.length);
  }
}

TEST(Utf8Test, CompleteHoldsBackOnlyWhatMayBecomeACodePoint) {
  std::string out;
  EXPECT_EQ(AppendComplete("ab\xe2\x82", &out), 2u);
  EXPECT_EQ(out, "ab");
  out.clear();
  EXPECT_EQ(AppendComplete("\xed\xa0", &out), 0u);  // cannot become one
  EXPECT_EQ(out, kR + kR);
}

TEST(Utf8Test, PiecewiseEqualsWhole) {
  std::mt19937 rng(20240518);
  std::string bytes;
  for (int i = 0; i < 20000; ++i) {
    const uint32_t r = rng();
    if (r % 3 == 0)
      bytes.push_back(static_cast<char>(r >> 8));
    else
      Append(static_cast<char32_t>((r >> 8) % 0xd800), &bytes);
  }
  std::string pieces, held;
  for (size_t i = 0; i < bytes.size();) {
    const size_t n = 1 + rng() % 5;
    held += bytes.substr(i, n);
    i += n;
    held = held.substr(held.size() - AppendComplete(held, &pieces));
    ASSERT_LE(held.size(), 3u);
  }
  AppendReplaced(held, &pieces);
  EXPECT_EQ(pieces, Replaced(bytes));
  EXPECT_TRUE(IsValid(pieces));
  EXPECT_FALSE(IsValid(bytes));
}

TEST(Utf8Test, Properties) {
  for (const char32_t c : {0x9, 0x20, 0x85, 0xa0, 0x1680, 0x2003, 0x2028, 0x3000})
    EXPECT_TRUE(IsWhiteSpace(c)) << static_cast<uint32_t>(c);
  for (const char32_t c : {0x180e, 0x200b, 0xfeff, 0x61})
    EXPECT_FALSE(IsWhiteSpace(c)) << static_cast<uint32_t>(c);
  for (const char32_t c : {0x61, 0x5f, 0x301, 0x663, 0x200d, 0x4e00})
    EXPECT_TRUE(IsWordCharacter(c)) << static_cast<uint32_t>(c);
  for (const char32_t c : {0x20, 0x2d, 0xb2, 0x1f600})
    EXPECT_FALSE(IsWordCharacter(c)) << static_cast<uint32_t>(c);
  for (const char32_t c : {0x30, 0xb2, 0xbd, 0x2167, 0x966})
    EXPECT_TRUE(IsNumeric(c)) << static_cast<uint32_t>(c);
  for (const char32_t c : {0x61, 0x4e00})
    EXPECT_FALSE(IsNumeric(c)) << static_cast<uint32_t>(c);  // 一 is a letter
}

}  // namespace
}  // namespace dsla::utf8
