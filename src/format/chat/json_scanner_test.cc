#include "format/chat/json_scanner.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

namespace dsla {
namespace {

using Result = JsonScanner::Result;

// The text's bytes up to the value's end; -1: no JSON.
int Scanned(std::string_view text) {
  JsonScanner scanner;
  for (size_t i = 0; i < text.size(); ++i) {
    const Result result = scanner.Next(text[i]);
    if (result == Result::kDone) return static_cast<int>(i) + 1;
    if (result == Result::kDoneBefore) return static_cast<int>(i);
    if (result == Result::kBad) return -1;
  }
  return -1;
}

TEST(JsonScanner, FindsTheEnd) {
  EXPECT_EQ(Scanned(R"({"a": [1, -2.5e+3, true], "b": {}} rest)"), 34);
  EXPECT_EQ(Scanned(R"( "a\"\u00e9\\" x)"), 14);
  EXPECT_EQ(Scanned("12,"), 2);
  EXPECT_EQ(Scanned("null}"), 4);
  EXPECT_EQ(Scanned("[]"), 2);
  EXPECT_EQ(Scanned("[[ ], { }]"), 10);
}

TEST(JsonScanner, RefusesWhatIsNoJson) {
  for (const char* text :
       {"{a}", "{\"a\" 1}", "{\"a\":1,}", "[1,]",  "[,]",    "{\"a\":}", "01 ",         "1. ",
        "-",   "- ",        "1e ",        "nul ",  "\"\n\"", "\"\\x\"",  "\"\\u12g4\"", "]",
        "[1}", "{\"a\":1]", "'a'",        "True ", ",",      ""})
    EXPECT_EQ(Scanned(text), -1) << text;
  EXPECT_EQ(Scanned(std::string(64, '[') + std::string(64, ']')), 128);
  EXPECT_EQ(Scanned(std::string(65, '[') + std::string(65, ']')), -1);
}

TEST(JsonScanner, AWholeText) {
  for (const char* text : {"12", " true\n", "\"x\"", "[]", " {} "})
    EXPECT_TRUE(IsJson(text)) << text;
  for (const char* text : {"", " ", "1 2", "tru", "\"x", "{} x", "-"})
    EXPECT_FALSE(IsJson(text)) << text;
  EXPECT_FALSE(IsJson(std::string_view("12\0 3", 5))) << "a zero byte ends nothing";
}

TEST(JsonScanner, AgreesWithAnotherParser) {
  std::mt19937 random(1);
  const std::string alphabet = "{}[]\",:\\u01.-e+ tfn1truefalsnl\n";
  int good = 0;
  for (int i = 0; i < 300000; ++i) {
    std::string text = i % 3 == 2 ? "" : i % 3 ? "{\"" : "[";
    const auto length = random() % 12;
    for (unsigned k = 0; k < length; ++k) text += alphabet[random() % alphabet.size()];
    const bool object = nlohmann::json::accept(text) && text[0] == '{';
    EXPECT_EQ(IsJsonObject(text), object) << text;
    EXPECT_EQ(IsJson(text), nlohmann::json::accept(text)) << text;
    const bool list = nlohmann::json::accept(text) && text[0] == '[';
    if (list) {
      EXPECT_EQ(Scanned(text), static_cast<int>(text.find_last_of(']')) + 1) << text;
    }
    good += object || list;
  }
  EXPECT_GT(good, 300);
}

}  // namespace
}  // namespace dsla
