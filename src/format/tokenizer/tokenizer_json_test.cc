#include <gtest/gtest.h>

#include "format/tokenizer/testing.h"
#include "format/tokenizer/tokenizer.h"

namespace dsla {
namespace {

using nlohmann::json;

// What reading and checking a tokenizer.json says; "" if it is accepted.
std::string Verdict(const std::string& text) {
  auto data = ParseTokenizerJson(text, "t.json");
  if (!data.ok()) return data.status().message();
  const auto tokenizer = Tokenizer::Create(std::move(data).value());
  return tokenizer.ok() ? "" : tokenizer.status().message();
}
std::string Verdict(const json& j) { return Verdict(j.dump()); }

// The tiny tokenizer with one place in it replaced.
json With(const char* pointer, json value) {
  json j = testing::ByteLevelJson();
  j[json::json_pointer(pointer)] = std::move(value);
  return j;
}

// A minimal SentencePiece-style file.
json Pieces() {
  json vocab = {{"<unk>", 0}, {"<s>", 1}, {"</s>", 2}, {"\u2581", 3},
                {"a", 4},     {"b", 5},   {"ab", 6},   {"\u2581a", 7}};
  for (int b = 0; b < 256; ++b) vocab[fmt::format("<0x{:02X}>", b)] = 8 + b;
  return {
      {"added_tokens",
       {{{"id", 0}, {"content", "<unk>"}, {"special", true}, {"normalized", false}},
        {{"id", 1}, {"content", "<s>"}, {"special", true}, {"normalized", false}},
        {{"id", 2}, {"content", "</s>"}, {"special", true}, {"normalized", false}}}},
      {"normalizer",
       {{"type", "Sequence"},
        {"normalizers",
         {{{"type", "Prepend"}, {"prepend", "\u2581"}},
          {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\u2581"}}}}}},
      {"pre_tokenizer", nullptr},
      {"post_processor",
       {{"type", "TemplateProcessing"},
        {"single",
         {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}},
          {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
        {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {1}}, {"tokens", {"<s>"}}}}}}}},
      {"decoder",
       {{"type", "Sequence"},
        {"decoders",
         {{{"type", "Replace"}, {"pattern", {{"String", "\u2581"}}}, {"content", " "}},
          {{"type", "ByteFallback"}},
          {{"type", "Fuse"}},
          {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}}}}},
      {"model",
       {{"type", "BPE"},
        {"unk_token", "<unk>"},
        {"fuse_unk", true},
        {"byte_fallback", true},
        {"vocab", vocab},
        {"merges", json::array({json::array({"a", "b"}), json::array({"\u2581", "a"})})}}},
  };
}

std::vector<int32_t> Encode(const json& j, std::string_view text) {
  auto data = ParseTokenizerJson(j.dump(), "t.json");
  EXPECT_TRUE(data.ok()) << data.status().message();
  auto tokenizer = Tokenizer::Create(std::move(data).value());
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  const auto ids = (*tokenizer)->Encode(text);
  EXPECT_EQ((*tokenizer)->Decode(*ids, {.skip_special = true}), text);
  return *ids;
}

using Ids = std::vector<int32_t>;

TEST(TokenizerJsonTest, AcceptsTheTinyFiles) {
  EXPECT_EQ(Verdict(testing::ByteLevelJson()), "");
  EXPECT_EQ(Verdict(Pieces()), "");
}

TEST(TokenizerJsonTest, SentencePieceConstructions) {
  json j = Pieces();
  EXPECT_EQ(Encode(j, "ab a"), (Ids{1, 3, 6, 7}));
  EXPECT_EQ(Encode(j, " a"), (Ids{1, 3, 7}));
  EXPECT_EQ(Encode(j, "\n"), (Ids{1, 3, 8 + '\n'}));

  j["normalizer"] = nullptr;
  j["pre_tokenizer"] = {{"type", "Metaspace"},
                        {"replacement", "\u2581"},
                        {"prepend_scheme", "always"},
                        {"split", false}};
  EXPECT_EQ(Encode(j, "ab a"), (Ids{1, 3, 6, 7}));
  j["pre_tokenizer"]["prepend_scheme"] = "first";
  EXPECT_EQ(Encode(j, "a a"), (Ids{1, 7, 7}));
  // How older files wrote it, splitting before each mark and with "always".
  j["pre_tokenizer"] = {
      {"type", "Metaspace"}, {"replacement", "\u2581"}, {"add_prefix_space", true}};
  j["decoder"] = {{"type", "Metaspace"}, {"replacement", "\u2581"}, {"add_prefix_space", true}};
  EXPECT_EQ(Encode(j, "a a"), (Ids{1, 7, 7}));
  j["pre_tokenizer"] = {
      {"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", "never"}};
  j["decoder"] = {{"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", "never"}};
  EXPECT_EQ(Encode(j, "a a"), (Ids{1, 4, 7}));
  EXPECT_EQ(Encode(j, " a"), (Ids{1, 7}));
}

TEST(TokenizerJsonTest, MergesAsPairsOrLines) {
  json lines = testing::ByteLevelJson(), pairs = lines;
  for (json& merge : pairs["model"]["merges"]) {
    const std::string line = merge;
    merge = {line.substr(0, line.find(' ')), line.substr(line.find(' ') + 1)};
  }
  EXPECT_EQ(Encode(lines, "hello we"), (Ids{259, 260, 'e'}));
  EXPECT_EQ(Encode(pairs, "hello we"), (Ids{259, 260, 'e'}));
}

TEST(TokenizerJsonTest, TemplateWithEos) {
  json j = Pieces();
  j["post_processor"]["single"].push_back({{"SpecialToken", {{"id", "</s>"}}}});
  EXPECT_EQ(Verdict(j), "t.json.post_processor.single[2]: special token '</s>' is not described");
  j["post_processor"]["special_tokens"]["</s>"] = {{"ids", {2}}};
  j["post_processor"] = {{"type", "Sequence"},
                         {"processors", {{{"type", "ByteLevel"}}, j["post_processor"]}}};
  EXPECT_EQ(Encode(j, "a"), (Ids{1, 7, 2}));
}

TEST(TokenizerJsonTest, MalformedFiles) {
  EXPECT_EQ(Verdict(std::string("{\"a\": [1,]}")), "t.json: malformed JSON at byte 10");
  EXPECT_EQ(Verdict(std::string("")), "t.json: malformed JSON at byte 1");
  EXPECT_EQ(Verdict(std::string("{\"a\": \"\xff\"}")), "t.json: malformed JSON at byte 8");
  EXPECT_EQ(Verdict(std::string("[1]")), "t.json: not a JSON object");
  EXPECT_EQ(Verdict(std::string("{\"a\":") + std::string(100000, '[')),
            "t.json: nested too deeply");
  EXPECT_EQ(Verdict(std::string("{}")), "t.json.model is not an object");
  EXPECT_EQ(Verdict(With("/added_tokens", 5)), "t.json.added_tokens is not an array");
  EXPECT_EQ(Verdict(With("/added_tokens/0/special", "yes")),
            "t.json.added_tokens[0].special is not true or false");
  EXPECT_EQ(Verdict(With("/model/byte_fallback", 1)),
            "t.json.model.byte_fallback is not true or false");
  EXPECT_EQ(Verdict(With("/model/type", 1)), "t.json.model.type is not a string");
  EXPECT_EQ(Verdict(With("/pre_tokenizer", "ByteLevel")), "t.json.pre_tokenizer is not an object");
}

TEST(TokenizerJsonTest, Vocabularies) {
  EXPECT_EQ(Verdict(With("/model/vocab", nullptr)), "t.json.model.vocab is not an object");
  EXPECT_EQ(Verdict(With("/model/vocab", json::object())),
            "t.json: the vocabulary has gaps: 2 tokens, but id 262");
  json empty = With("/model/vocab", json::object());
  empty["added_tokens"] = json::array();
  EXPECT_EQ(Verdict(empty), "t.json: the vocabulary is empty");
  EXPECT_EQ(Verdict(With("/model/vocab/hello", "x")),
            "t.json: model.vocab holds a value that is not a token id");
  EXPECT_EQ(Verdict(With("/model/vocab/hello", {1})),
            "t.json: model.vocab holds a value that is not a token id");
  EXPECT_EQ(Verdict(With("/model/vocab/hello", -1)), "t.json: token 'hello' has no valid id");
  EXPECT_EQ(Verdict(With("/model/vocab/hello", 1.5)),
            "t.json: model.vocab holds a value that is not a token id");
  EXPECT_EQ(Verdict(With("/model/vocab/hello", 4000000000u)),
            "t.json: the vocabulary has gaps: 263 tokens, but id 4000000000");
  EXPECT_EQ(Verdict(With("/model/vocab/hello", UINT64_MAX)),
            "t.json: the vocabulary has gaps: 263 tokens, but id 9223372036854775807");
  EXPECT_EQ(Verdict(With("/model/vocab/hello", 258)),
            "t.json: tokens 'hell' and 'hello' both have id 258");
  EXPECT_EQ(Verdict(With("/model/vocab/more", 264)),
            "t.json: the vocabulary has gaps: 264 tokens, but id 264");
  EXPECT_EQ(Verdict(With("/model/vocab/", 263)), "t.json: token 263 is empty");
  json moved = With("/added_tokens/1/id", 'a');
  EXPECT_EQ(Verdict(moved), "t.json: tokens 'a' and '<tool>' both have id 97");
  // A gap that a repeated entry hides from the count.
  json hidden = With("/added_tokens/1", {{"id", 261}, {"content", "<|end|>"}});
  hidden["added_tokens"].push_back({{"id", 263}, {"content", "last"}});
  EXPECT_EQ(Verdict(hidden), "t.json: the vocabulary has gaps: no token has id 262");
  hidden = With("/added_tokens/1", {{"id", 261}, {"content", "<|end|>"}});
  EXPECT_EQ(Verdict(hidden), "t.json: token 261 is added twice");
  EXPECT_EQ(Verdict(With("/added_tokens/1/content", "hello")),
            "t.json: tokens 259 and 262 are both 'hello'");
  EXPECT_EQ(Verdict(With("/added_tokens/1/content", std::string(20000, 'x'))),
            "t.json: token 262 has 20000 bytes, more than 16384");
  EXPECT_EQ(Verdict(With("/added_tokens/1/content", nullptr)),
            "t.json.added_tokens[1].content is not a string");
  json twice = testing::ByteLevelJson();
  std::string text = twice.dump();
  text.replace(text.find("\"hello\":259"), 11, "\"hello\":259,\"hello\":263");
  EXPECT_EQ(Verdict(text), "t.json: tokens 259 and 263 are both 'hello'");
}

TEST(TokenizerJsonTest, Merges) {
  EXPECT_EQ(Verdict(With("/model/merges/1", "l")),
            "t.json: model.merges[1] is not a pair of tokens");
  EXPECT_EQ(Verdict(With("/model/merges/1", "l l l")),
            "t.json: model.merges[1] is not a pair of tokens");
  EXPECT_EQ(Verdict(With("/model/merges/1", {"l"})),
            "t.json: model.merges[1] is not a pair of tokens");
  EXPECT_EQ(Verdict(With("/model/merges/1", {"l", "l", "l"})),
            "t.json: model.merges[1] is not a pair of tokens");
  EXPECT_EQ(Verdict(With("/model/merges/1", {"l", 5})),
            "t.json: model.merges[1] is not a pair of tokens");
  EXPECT_EQ(Verdict(With("/model/merges/1", 5)), "t.json: model.merges[1] is not a pair of tokens");
  EXPECT_EQ(Verdict(With("/model/merges/1", {{"l", "l"}})),
            "t.json: model.merges[1] is not a pair of tokens");
  EXPECT_EQ(Verdict(With("/model/merges/1", {"zz", "l"})),
            "t.json: merge 1 ('zz' 'l'): 'zz' is not in the vocabulary");
  EXPECT_EQ(Verdict(With("/model/merges/1", "l zz")),
            "t.json: merge 1 ('l' 'zz'): 'zz' is not in the vocabulary");
  EXPECT_EQ(Verdict(With("/model/merges/1", "l z")),
            "t.json: merge 1 ('l' 'z'): 'lz' is not in the vocabulary");
  EXPECT_EQ(Verdict(With("/model/merges/1", "h e")), "t.json: merge 1 ('h' 'e') is there twice");
  EXPECT_EQ(Verdict(With("/model/merges", json::object())), "t.json.model.merges is not an array");
  EXPECT_EQ(Verdict(With("/model/merges", nullptr)), "");
  // The one way in which a merge could go round in a circle.
  EXPECT_EQ(Verdict(With("/model/merges/1", {"", "l"})), "t.json: merge 1 has an empty half");
  EXPECT_EQ(Verdict(With("/model/merges/1", " l")), "t.json: merge 1 has an empty half");
}

TEST(TokenizerJsonTest, UnsupportedModels) {
  EXPECT_EQ(Verdict(With("/model",
                         {{"type", "Unigram"}, {"vocab", json::array({json::array({"a", 1.5})})}})),
            "t.json: model type 'Unigram' is not supported, only BPE");
  EXPECT_EQ(Verdict(With("/model/type", "WordPiece")),
            "t.json: model type 'WordPiece' is not supported, only BPE");
  EXPECT_EQ(Verdict(With("/model/dropout", 0.1)), "t.json: model.dropout is not supported");
  EXPECT_EQ(Verdict(With("/model/dropout", 0.0)), "");
  EXPECT_EQ(Verdict(With("/model/continuing_subword_prefix", "##")),
            "t.json: model.continuing_subword_prefix is not supported");
  EXPECT_EQ(Verdict(With("/model/end_of_word_suffix", "</w>")),
            "t.json: model.end_of_word_suffix is not supported");
  EXPECT_EQ(Verdict(With("/model/unk_token", "nope")),
            "t.json: unknown token 'nope' is not in the vocabulary");
  json fallback = Pieces();
  fallback["model"]["vocab"]["other"] = fallback["model"]["vocab"]["<0x41>"];
  fallback["model"]["vocab"].erase("<0x41>");
  EXPECT_EQ(Verdict(fallback), "t.json: byte fallback is on, but the vocabulary has no <0x41>");
}

TEST(TokenizerJsonTest, UnsupportedSteps) {
  EXPECT_EQ(Verdict(With("/normalizer", {{"type", "Lowercase"}})),
            "t.json.normalizer: normalizer 'Lowercase' is not supported");
  EXPECT_EQ(Verdict(With("/normalizer",
                         {{"type", "Sequence"}, {"normalizers", {{{"type", "Precompiled"}}}}})),
            "t.json.normalizer.normalizers[0]: normalizer 'Precompiled' is not supported");
  EXPECT_EQ(Verdict(With("/normalizer",
                         {{"type", "Replace"}, {"pattern", {{"Regex", "a+"}}}, {"content", ""}})),
            "t.json.normalizer.pattern.Regex is not supported, only String");
  EXPECT_EQ(Verdict(With("/normalizer",
                         {{"type", "Replace"}, {"pattern", {{"String", ""}}}, {"content", "x"}})),
            "t.json: a Replace normalizer has an empty pattern");
  EXPECT_EQ(Verdict(With("/pre_tokenizer", {{"type", "BertPreTokenizer"}})),
            "t.json.pre_tokenizer: pre-tokenizer 'BertPreTokenizer' is not supported");
  const json bytes = {{"type", "ByteLevel"}};
  EXPECT_EQ(Verdict(With("/pre_tokenizer",
                         {{"type", "Sequence"}, {"pretokenizers", {bytes, {{"type", "Digits"}}}}})),
            "t.json.pre_tokenizer.pretokenizers[1]: pre-tokenizer 'Digits' after ByteLevel is not "
            "supported");
  const auto split = [&](json pattern, const char* behavior) {
    return With("/pre_tokenizer",
                {{"type", "Sequence"},
                 {"pretokenizers",
                  {{{"type", "Split"}, {"pattern", pattern}, {"behavior", behavior}}, bytes}}});
  };
  EXPECT_EQ(Verdict(split({{"Regex", "a\\h"}}, "Isolated")),
            "t.json: pattern has '\\h' at byte 1, which is not supported");
  EXPECT_EQ(Verdict(split({{"Regex", "a"}}, "Sideways")),
            "t.json.pre_tokenizer.pretokenizers[0]: behavior 'Sideways' is not supported");
  EXPECT_EQ(Verdict(split({{"String", ""}}, "Removed")),
            "t.json: a Split pre-tokenizer has an empty pattern");
  EXPECT_EQ(Verdict(split("a", "Removed")),
            "t.json.pre_tokenizer.pretokenizers[0].pattern is not an object");
  EXPECT_EQ(Verdict(With("/post_processor", {{"type", "BertProcessing"}})),
            "t.json.post_processor: post-processor 'BertProcessing' is not supported");
  EXPECT_EQ(Verdict(With("/decoder", {{"type", "WordPiece"}})),
            "t.json.decoder: decoder 'WordPiece' is not supported");
  EXPECT_EQ(Verdict(With("/decoder", nullptr)),
            "t.json: a tokenizer without a decoder is not supported");
  EXPECT_EQ(Verdict(With("/decoder", {{"type", "Fuse"}})),
            "t.json: the decoder does not undo the pre-tokenizer: only one of them is ByteLevel");
}

TEST(TokenizerJsonTest, UnsupportedSentencePieceSteps) {
  json j = Pieces();
  j["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", "_"}};
  EXPECT_EQ(Verdict(j), "t.json.pre_tokenizer: replacement '_' is not supported, only U+2581");
  j["pre_tokenizer"] = {
      {"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", "last"}};
  EXPECT_EQ(Verdict(j), "t.json.pre_tokenizer: prepend_scheme 'last' is not supported");
  j = Pieces();
  j["decoder"]["decoders"][0]["content"] = "_";
  EXPECT_EQ(Verdict(j), "t.json.decoder.decoders[0]: only U+2581 to a space can be replaced");
  j = Pieces();
  j["decoder"]["decoders"][3]["start"] = 2;
  EXPECT_EQ(Verdict(j), "t.json.decoder.decoders[3]: only one space at the start can be stripped");
  j = Pieces();
  j["post_processor"]["single"] = json::array();
  EXPECT_EQ(Verdict(j), "t.json.post_processor.single is not a template with the text in it");
  j = Pieces();
  j["post_processor"]["single"].push_back(j["post_processor"]["single"][1]);
  EXPECT_EQ(Verdict(j), "t.json.post_processor.single[2]: the text is there twice");
  j = Pieces();
  j["post_processor"]["special_tokens"]["<s>"]["ids"] = {-1};
  EXPECT_EQ(Verdict(j),
            "t.json.post_processor.special_tokens.<s>.ids is not an array of token ids");
  j["post_processor"]["special_tokens"]["<s>"]["ids"] = {5000};
  EXPECT_EQ(Verdict(j), "t.json: leading token id 5000 is not in the vocabulary of 264 tokens");
}

TEST(TokenizerConfigTest, NamesTokens) {
  auto data = ParseTokenizerJson(Pieces().dump(), "t.json");
  ASSERT_TRUE(data.ok());
  const json config = {{"tokenizer_class", "LlamaTokenizerFast"},
                       {"bos_token", {{"content", "<s>"}, {"special", true}}},
                       {"eos_token", "</s>"},
                       {"pad_token", nullptr},
                       {"add_bos_token", false},
                       {"add_eos_token", true}};
  ASSERT_TRUE(ApplyTokenizerConfig(config.dump(), "c.json", &*data).ok());
  EXPECT_EQ(data->bos_id, 1);
  EXPECT_EQ(data->eos_id, 2);
  EXPECT_EQ(data->pad_id, std::nullopt);
  EXPECT_EQ(data->prefix, Ids{});
  EXPECT_EQ(data->suffix, Ids{2});
}

TEST(TokenizerConfigTest, OtherClassesKeepTheTemplate) {
  auto data = ParseTokenizerJson(Pieces().dump(), "t.json");
  ASSERT_TRUE(data.ok());
  const json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"bos_token", "<s>"},
                       {"add_bos_token", false}};
  ASSERT_TRUE(ApplyTokenizerConfig(config.dump(), "c.json", &*data).ok());
  EXPECT_EQ(data->prefix, Ids{1});
}

TEST(TokenizerConfigTest, Errors) {
  const auto verdict = [](const std::string& text) {
    auto data = ParseTokenizerJson(Pieces().dump(), "t.json");
    return ApplyTokenizerConfig(text, "c.json", &*data).message();
  };
  EXPECT_EQ(verdict("{"), "c.json: malformed JSON at byte 2");
  EXPECT_EQ(verdict(R"({"eos_token": "<nope>"})"),
            "c.json: eos_token '<nope>' is not in the vocabulary");
  EXPECT_EQ(verdict(R"({"eos_token": 5})"), "c.json.eos_token is not a string");
  EXPECT_EQ(verdict(R"({"eos_token": {"content": 5}})"),
            "c.json.eos_token.content is not a string");
  EXPECT_EQ(
      verdict(R"({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": "x"})"),
      "c.json.add_bos_token is not true or false");
}

}  // namespace
}  // namespace dsla
