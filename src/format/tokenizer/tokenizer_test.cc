#include "format/tokenizer/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <thread>

#include "format/tokenizer/testing.h"
#include "format/tokenizer/utf8.h"

namespace dsla {
namespace {

using Ids = std::vector<int32_t>;
using ::testing::Contains;
using ::testing::Not;

std::unique_ptr<Tokenizer> Make(Expected<TokenizerData> data) {
  DSLA_CHECK(data.ok());
  auto tokenizer = Tokenizer::Create(std::move(data).value());
  DSLA_CHECK(tokenizer.ok());
  return std::move(tokenizer).value();
}
std::unique_ptr<Tokenizer> ByteLevel() {
  return Make(ParseTokenizerJson(testing::ByteLevelJson().dump(), "t.json"));
}
std::unique_ptr<Tokenizer> SentencePiece() {
  return Make(FromGgufVocab(testing::SentencePieceVocab()));
}

Ids Encode(const Tokenizer& t, std::string_view text, bool parse_special = false,
           std::optional<bool> bos = false) {
  const auto ids = t.Encode(text, {.add_bos = bos, .parse_special = parse_special});
  EXPECT_TRUE(ids.ok()) << ids.status().message();
  return ids.ok() ? *ids : Ids{};
}

// Text that meets everything: words that merge, control tokens, spaces, all bytes.
std::string RandomText(std::mt19937* rng, bool valid) {
  static constexpr std::array<std::string_view, 14> kParts = {
      "hello", " hello", " w",   "<|end|>", "<tool>", "<s>",        "</s>",
      "abc",   "  ",     "\n\n", "\u00e9",  "字",     "\U0001F600", "<unk>"};
  std::string text;
  const size_t parts = (*rng)() % 30;
  for (size_t i = 0; i < parts; ++i) {
    const uint32_t r = (*rng)();
    if (r % 4 == 0 && !valid)
      text.push_back(static_cast<char>(r >> 8));
    else if (r % 4 == 1)
      utf8::Append(r >> 8 & 0x7ff, &text);
    else
      text += kParts[(r >> 8) % kParts.size()];
  }
  return text;
}

TEST(TokenizerTest, ByteLevel) {
  const auto t = ByteLevel();
  EXPECT_EQ(t->vocab_size(), 263);
  EXPECT_EQ(Encode(*t, "hello world"), (Ids{259, 260, 'o', 'r', 'l', 'd'}));
  EXPECT_EQ(Encode(*t, ""), Ids{});
  EXPECT_EQ(Encode(*t, "\xff"), (Ids{0xef, 0xbf, 0xbd}));  // U+FFFD
  EXPECT_EQ(t->TokenText(260), "\u0120w");
  EXPECT_EQ(t->TokenBytes(260), " w");
  EXPECT_EQ(t->TokenText(-1), "");
  EXPECT_EQ(t->TokenBytes(263), "");
  EXPECT_EQ(t->TokenToId("\u0120w"), 260);
  EXPECT_EQ(t->TokenToId("nothing"), std::nullopt);
  EXPECT_EQ(t->bos_id(), std::nullopt);
  EXPECT_TRUE(t->IsSpecial(261));
  EXPECT_FALSE(t->IsSpecial(262));
  EXPECT_FALSE(t->IsSpecial(999));
}

TEST(TokenizerTest, ControlTokensOnlyWhereParsed) {
  const auto t = ByteLevel();
  EXPECT_EQ(Encode(*t, "hell<|end|>", true), (Ids{258, 261}));
  const Ids as_text = Encode(*t, "hell<|end|>", false);
  EXPECT_THAT(as_text, Not(Contains(261)));
  EXPECT_EQ(t->Decode(as_text), "hell<|end|>");
  EXPECT_EQ(Encode(*t, "<tool>", false), Ids{262});  // an added token that is no control token
}

TEST(TokenizerTest, FindsControlTokens) {
  const auto found = ByteLevel()->FindControlTokens("a<|end|><tool><|end|<|end|>");
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].id, 261);
  EXPECT_EQ(found[0].begin, 1u);
  EXPECT_EQ(found[0].end, 8u);
  EXPECT_EQ(found[1].begin, 20u);
  EXPECT_TRUE(ByteLevel()->FindControlTokens("").empty());
}

TEST(TokenizerTest, NoTextOfUsersGivesAControlToken) {
  std::mt19937 rng(20240520);
  auto json = testing::ByteLevelJson();
  // Merges and whole words that spell a control token, and one whose file forgot to say what it is.
  auto& model = json["model"];
  model["vocab"]["<|end|>"] = 261;
  model["vocab"]["<|"] = 263;
  model["vocab"]["<|end"] = 264;
  model["vocab"]["|>"] = 265;
  model["vocab"]["en"] = 266;
  model["vocab"]["end"] = 267;
  for (const char* merge : {"< |", "| >", "e n", "en d", "<| end", "<|end |>"})
    model["merges"].push_back(merge);
  model["ignore_merges"] = true;
  json["added_tokens"].push_back({{"id", 268}, {"content", "<|stop|>"}, {"special", false}});
  json["pre_tokenizer"]["use_regex"] = false;
  const auto bytes = Make(ParseTokenizerJson(json.dump(), "t.json"));
  EXPECT_EQ(Encode(*bytes, "<|end|>", true), Ids{261});
  EXPECT_EQ(Encode(*bytes, "<|end|>", false), (Ids{264, 265}));
  EXPECT_EQ(Encode(*bytes, "<|stop|>", true), Ids{268});
  EXPECT_THAT(Encode(*bytes, "<|stop|>", false), Not(Contains(268)));

  const auto pieces = SentencePiece();
  for (int i = 0; i < 3000; ++i) {
    const std::string text = RandomText(&rng, false);
    for (const int32_t id : Encode(*bytes, text)) EXPECT_NE(id, 261) << text;
    for (const int32_t id : Encode(*pieces, text)) EXPECT_GT(id, 2) << text;
  }
}

TEST(TokenizerTest, SentencePiece) {
  const auto t = SentencePiece();
  const int32_t abc = *t->TokenToId("abc"), mark_hello = *t->TokenToId("\u2581hello"),
                mark = *t->TokenToId("\u2581");
  EXPECT_EQ(Encode(*t, "hello", false, std::nullopt), (Ids{1, mark_hello}));
  EXPECT_EQ(Encode(*t, "abc hello"), (Ids{mark, abc, mark_hello}));
  EXPECT_EQ(Encode(*t, "bbc")[2], *t->TokenToId("bc"));
  EXPECT_EQ(Encode(*t, "\xc3\xa9ß"), (Ids{mark, *t->TokenToId("\u00e9"), 3 + 0xc3, 3 + 0x9f}));
  EXPECT_EQ(Encode(*t, "</s>a", true), (Ids{2, mark, *t->TokenToId("a")}));
  EXPECT_EQ(Encode(*t, "\u2581"), Encode(*t, " "));
}

TEST(TokenizerTest, SentencePieceDecodes) {
  const auto t = SentencePiece();
  const Ids ids = Encode(*t, " hello abc", false, std::nullopt);
  EXPECT_EQ(t->Decode(ids), "<s>  hello abc");
  EXPECT_EQ(t->Decode(ids, {.skip_special = true}), " hello abc");
  EXPECT_EQ(t->Decode(ids, {.skip_special = true, .continues = true}), "  hello abc");
  EXPECT_EQ(t->Decode(Ids{3 + 0xe2, 3 + 0x82, 3 + 0xac, 3 + 0xff, 99999, -5}), "€\uFFFD");
}

TEST(TokenizerTest, BosAndEos) {
  auto vocab = testing::SentencePieceVocab();
  vocab.add_eos = true;
  const auto t = Make(FromGgufVocab(vocab));
  const int32_t hello = *t->TokenToId("\u2581hello");
  EXPECT_EQ(Encode(*t, "hello", false, std::nullopt), (Ids{1, hello, 2}));
  EXPECT_EQ(Encode(*t, "hello", false, true), (Ids{1, hello}));
  EXPECT_EQ(Encode(*t, "hello", false, false), Ids{hello});
  EXPECT_EQ(Encode(*t, "", false, std::nullopt), (Ids{1, 2}));
  const auto none = ByteLevel()->Encode("x", {.add_bos = true, .parse_special = false});
  ASSERT_FALSE(none.ok());
  EXPECT_EQ(none.status().message(), "t.json: the tokenizer has no BOS token to add");
}

TEST(TokenizerTest, ByteLevelGoesThereAndBack) {
  const auto t = ByteLevel();
  std::mt19937 rng(20240521);
  for (int i = 0; i < 3000; ++i) {
    const std::string text = RandomText(&rng, true);
    EXPECT_EQ(t->Decode(Encode(*t, text, i % 2 == 0)), text);
  }
}

TEST(TokenizerTest, SentencePieceGoesThereAndBack) {
  const auto t = SentencePiece();
  std::mt19937 rng(20240522);
  for (int i = 0; i < 3000; ++i) {
    std::string text = RandomText(&rng, true);
    EXPECT_EQ(t->Decode(Encode(*t, text)), text);
  }
}

TEST(TokenizerTest, PiecewiseDecodingEqualsWhole) {
  std::mt19937 rng(20240523);
  for (const auto& t : {ByteLevel(), SentencePiece()}) {
    for (int i = 0; i < 4000; ++i) {
      Ids ids(rng() % 12);
      for (int32_t& id : ids)
        id = static_cast<int32_t>(rng() % static_cast<uint32_t>(t->vocab_size() + 2)) - 1;
      const DecodeOptions options = {.skip_special = rng() % 2 == 0, .continues = rng() % 2 == 0};
      IncrementalDecoder decoder(*t, options);
      for (int round = 0; round < 2; ++round) {  // Finish makes it as new
        std::string text;
        for (const int32_t id : ids) {
          const std::string piece = decoder.Push(id);
          EXPECT_TRUE(utf8::IsValid(piece));
          text += piece;
        }
        text += decoder.Finish();
        EXPECT_EQ(text, t->Decode(ids, options));
      }
    }
  }
}

TEST(TokenizerTest, HoldsBackPartOfACharacter) {
  const auto t = ByteLevel();
  IncrementalDecoder decoder(*t);
  EXPECT_EQ(decoder.Push(0xf0), "");
  EXPECT_EQ(decoder.Push(0x9f), "");
  EXPECT_EQ(decoder.Push(0x98), "");
  EXPECT_EQ(decoder.Push(0x80), "\U0001F600");
  EXPECT_EQ(decoder.Push(0xe2), "");
  EXPECT_EQ(decoder.Push('a'), "\uFFFDa");
  EXPECT_EQ(decoder.Push(0xc3), "");
  EXPECT_EQ(decoder.Finish(), "\uFFFD");
}

TEST(TokenizerTest, LongRunsDoNotHang) {
  const auto start = std::chrono::steady_clock::now();
  for (const auto& t : {ByteLevel(), SentencePiece()}) {
    for (const std::string_view unit :
         {"a", " ", "l", "\n", "he", "\u00e9", "<", "<|", "'", "1", " \n"}) {
      std::string text;
      while (text.size() < (1 << 20)) text += unit;
      EXPECT_EQ(t->Decode(Encode(*t, text)), text);
    }
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start,
            std::chrono::seconds(300));  // quadratic: hours
}

TEST(TokenizerTest, TextsThatAreTooLongAreRefused) {
  const auto ids = ByteLevel()->Encode(std::string((64 << 20) + 1, 'a'));
  ASSERT_FALSE(ids.ok());
  EXPECT_EQ(ids.status().message(),
            "text of 67108865 bytes is longer than the 67108864 that can be tokenized at once");
}

TEST(TokenizerTest, ManyThreads) {
  const auto t = ByteLevel();
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (size_t k = 0; k < wrong.size(); ++k) {
    threads.emplace_back([&, k] {
      std::mt19937 rng(20240524 + static_cast<uint32_t>(k));
      for (int i = 0; i < 300; ++i) {
        const std::string text = RandomText(&rng, true);
        const auto ids = t->Encode(text);
        wrong[k] += !ids.ok() || t->Decode(*ids) != text;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4));
}

TEST(TokenizerTest, AddedTokenFlags) {
  auto json = testing::ByteLevelJson();
  const auto add = [&](int id, const char* text, const char* flag) {
    json["added_tokens"].push_back(
        {{"id", id}, {"content", text}, {"special", true}, {flag, true}, {"normalized", false}});
  };
  add(263, "[L]", "lstrip");
  add(264, "[R]", "rstrip");
  add(265, "word", "single_word");
  add(266, "[LL]", "lstrip");
  const auto t = Make(ParseTokenizerJson(json.dump(), "t.json"));
  EXPECT_EQ(Encode(*t, "a \u3000[L] b", true), (Ids{'a', 263, ' ', 'b'}));
  EXPECT_EQ(Encode(*t, "a [R] \n\u00a0b", true), (Ids{'a', ' ', 264, 'b'}));
  EXPECT_EQ(Encode(*t, "[R]  [L]", true), (Ids{264, 263}));  // the spaces went to the first
  EXPECT_EQ(Encode(*t, "a word.", true), (Ids{'a', ' ', 265, '.'}));
  EXPECT_THAT(Encode(*t, "swordé", true), Not(Contains(265)));
  EXPECT_THAT(Encode(*t, "wordé", true), Not(Contains(265)));
  EXPECT_EQ(Encode(*t, "<|end<|end|>", true), (Ids{'<', '|', 'e', 'n', 'd', 261}));
}

TEST(TokenizerTest, NormalizedAddedTokens) {
  auto json = testing::ByteLevelJson();
  json["normalizer"] = {{"type", "NFC"}};
  json["added_tokens"].push_back(
      {{"id", 263}, {"content", "e\u0301"}, {"special", false}, {"normalized", true}});
  const auto t = Make(ParseTokenizerJson(json.dump(), "t.json"));
  EXPECT_EQ(Encode(*t, "\u00e9"), Ids{263});
  EXPECT_EQ(Encode(*t, "e\u0301"), Ids{263});
}

// U+1DF7 came with Unicode 10: by the tables of Unicode 9 it is no combining mark, so nothing is
// reordered around it.
TEST(TokenizerTest, NormalFormsAreThoseOfUnicode9) {
  auto json = testing::ByteLevelJson();
  json["normalizer"] = {{"type", "NFC"}};
  const auto t = Make(ParseTokenizerJson(json.dump(), "t.json"));
  EXPECT_EQ(t->Decode(Encode(*t, "a\u0301\u0327")), "\u00e1\u0327");
  EXPECT_EQ(t->Decode(Encode(*t, "q\u1dc8\u1df7\u0327")), "q\u1dc8\u1df7\u0327");
  EXPECT_EQ(t->Decode(Encode(*t, "q\u1dc8\u0327")), "q\u0327\u1dc8");
}

TEST(TokenizerTest, ControlTokenOfOneCharacterStaysText) {
  auto json = testing::ByteLevelJson();
  json["added_tokens"].push_back({{"id", '!'}, {"content", "!"}, {"special", true}});
  const auto t = Make(ParseTokenizerJson(json.dump(), "t.json"));
  EXPECT_EQ(Encode(*t, "!"), Ids{'!'});
  EXPECT_FALSE(t->IsSpecial('!'));
}

// A vocabulary need not have all bytes: those missing are left out, as the tokenizers library does,
// never a control token.
TEST(TokenizerTest, MissingBytes) {
  auto json = testing::ByteLevelJson();
  json["model"]["vocab"].erase("!");
  json["model"]["vocab"]["other"] = '!';
  json["model"]["unk_token"] = "<|end|>";
  EXPECT_EQ(Encode(*Make(ParseTokenizerJson(json.dump(), "t.json")), "a!b"), (Ids{'a', 'b'}));
  json["model"]["unk_token"] = "other";
  EXPECT_EQ(Encode(*Make(ParseTokenizerJson(json.dump(), "t.json")), "a!b"), (Ids{'a', '!', 'b'}));
}

TEST(TokenizerTest, PreTokenizerErrorsNameTheFile) {
  auto json = testing::ByteLevelJson();
  json["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers",
       {{{"type", "Split"},
         {"pattern", {{"Regex", "(?:a|aa)+b"}}},
         {"behavior", "Isolated"},
         {"invert", false}},
        {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
  const auto t = Make(ParseTokenizerJson(json.dump(), "t.json"));
  const auto ids = t->Encode(std::string(200, 'a') + "cb");
  ASSERT_FALSE(ids.ok());
  EXPECT_EQ(ids.status().code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(ids.status().message(),
            "t.json: a pre-tokenizer pattern gave up on 202 bytes of text: match limit exceeded");
}

}  // namespace
}  // namespace dsla
