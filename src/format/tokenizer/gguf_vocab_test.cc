#include <gtest/gtest.h>

#include <limits>

#include "format/tokenizer/testing.h"
#include "format/tokenizer/tokenizer.h"

namespace dsla {
namespace {

std::string Verdict(GgufVocab vocab) {
  auto data = FromGgufVocab(std::move(vocab));
  if (!data.ok()) return data.status().message();
  const auto tokenizer = Tokenizer::Create(std::move(data).value());
  return tokenizer.ok() ? "" : tokenizer.status().message();
}

GgufVocab Bytes(const std::string& pre) {
  GgufVocab v;
  v.source = "m.gguf";
  v.model = "gpt2";
  v.pre = pre;
  v.tokens = {"<|end|>", "pad"};
  v.types = {3, 5};
  for (int b = 0; b < 256; ++b) {
    v.tokens.push_back(byte_level::FromBytes(std::string(1, static_cast<char>(b))));
    v.types.push_back(1);
  }
  for (const char* token : {"12", "123", "pa", "\u0120a"}) {
    v.tokens.push_back(token);
    v.types.push_back(1);
  }
  v.tokens.push_back("<tool>");
  v.types.push_back(4);
  v.merges = {"1 2", "12 3", "p a", "pa d", "\u0120 a"};
  v.bos_id = v.eos_id = 0;
  v.unk_id = 0;
  return v;
}

std::vector<std::string> Encode(const GgufVocab& vocab, std::string_view text) {
  auto data = FromGgufVocab(vocab);
  EXPECT_TRUE(data.ok()) << data.status().message();
  auto t = Tokenizer::Create(std::move(data).value());
  EXPECT_TRUE(t.ok()) << t.status().message();
  std::vector<std::string> out;
  const auto ids = (*t)->Encode(text);
  for (const int32_t id : *ids) out.emplace_back((*t)->TokenBytes(id));
  return out;
}

using Strings = std::vector<std::string>;

TEST(GgufVocabTest, PreTokenizers) {
  EXPECT_EQ(Encode(Bytes("gpt-2"), "123 a"), (Strings{"123", " a"}));
  EXPECT_EQ(Encode(Bytes("smollm"), "123 a"), (Strings{"1", "2", "3", " a"}));
  EXPECT_EQ(Encode(Bytes("llama-bpe"), "12312 a"), (Strings{"<|end|>", "123", "12", " a"}));
  EXPECT_EQ(Encode(Bytes("qwen2"), "12 A\u030a<tool>"),
            (Strings{"1", "2", " ", "\xc3", "\x85", "<tool>"}));
  GgufVocab prefixed = Bytes("gpt-2");
  prefixed.add_space_prefix = true;
  EXPECT_EQ(Encode(prefixed, "a"), (Strings{" a"}));
}

TEST(GgufVocabTest, UnusedTokensAreNeverMade) {
  EXPECT_EQ(Encode(Bytes("gpt-2"), "pad"), (Strings{"pa", "d"}));
}

TEST(GgufVocabTest, MissingBytesGiveNothing) {
  GgufVocab v = Bytes("gpt-2");
  v.tokens[2 + '!'] = "other";
  EXPECT_EQ(Encode(v, "1!2"), (Strings{"1", "2"}));
}

TEST(GgufVocabTest, BosByDefaultAndByFlag) {
  GgufVocab v = testing::SentencePieceVocab();
  EXPECT_EQ(Encode(v, "hello"), (Strings{"<s>", " hello"}));
  v.add_bos = false;
  v.add_eos = true;
  EXPECT_EQ(Encode(v, "hello"), (Strings{" hello", "</s>"}));
  v.add_space_prefix = false;
  EXPECT_EQ(Encode(v, "hello"), (Strings{"hello", "</s>"}));
}

TEST(GgufVocabTest, UserDefinedPieces) {
  GgufVocab v = testing::SentencePieceVocab();
  v.tokens.push_back("<tool>");
  v.scores.push_back(0);
  v.types.push_back(4);
  EXPECT_EQ(Encode(v, "hello<tool>hello"), (Strings{"<s>", " hello", "<tool>", " hello"}));
}

TEST(GgufVocabTest, WithoutTypesTheNamedTokensAreControl) {
  GgufVocab v = Bytes("gpt-2");
  v.types.clear();
  auto t = Tokenizer::Create(std::move(FromGgufVocab(v)).value());
  ASSERT_TRUE(t.ok());
  EXPECT_TRUE((*t)->IsSpecial(0));
  EXPECT_FALSE((*t)->IsSpecial(1));
}

TEST(GgufVocabTest, Errors) {
  GgufVocab v = Bytes("gpt-2");
  v.model = "bert";
  EXPECT_EQ(Verdict(v), "m.gguf: tokenizer model 'bert' is not supported, only gpt2 and llama");
  EXPECT_EQ(Verdict(Bytes("falcon")),
            "m.gguf: pre-tokenizer 'falcon' is not supported (known: gpt-2, smollm, starcoder, "
            "llama-bpe, llama3, "
            "llama-v3, qwen2, deepseek-r1-qwen)");
  v = Bytes("gpt-2");
  v.merges.clear();
  EXPECT_EQ(Verdict(v), "m.gguf: a byte-level vocabulary without merges");
  v.merges = {"12"};
  EXPECT_EQ(Verdict(v), "m.gguf: merge 0 ('12') is not two tokens with a space between");
  v.merges = {"1 2", "1\n zz"};
  EXPECT_EQ(Verdict(v), "m.gguf: merge 1 ('1\\x0a' 'zz'): '1\\x0a' is not in the vocabulary");
  v = Bytes("gpt-2");
  v.types.pop_back();
  EXPECT_EQ(Verdict(v), "m.gguf: 262 token types for 263 tokens");
  v = Bytes("gpt-2");
  v.types[5] = 7;
  EXPECT_EQ(Verdict(v), "m.gguf: token 5 has type 7, not 1 to 6");
  v = Bytes("gpt-2");
  v.tokens[1] = "pa";
  EXPECT_EQ(Verdict(v), "m.gguf: tokens 1 and 260 are both 'pa'");
  v = Bytes("gpt-2");
  v.tokens[1] = "";
  EXPECT_EQ(Verdict(v), "m.gguf: token 1 is empty");
  v.tokens[1] = "\xff\n";
  EXPECT_EQ(Verdict(v), "m.gguf: token 1 ('\uFFFD\\x0a') is not UTF-8");
  v = Bytes("gpt-2");
  v.eos_id = 263;
  EXPECT_EQ(Verdict(v), "m.gguf: eos token id 263 is not in the vocabulary of 263 tokens");
  v.eos_id = 0;
  v.bos_id = -1;
  EXPECT_EQ(Verdict(v), "m.gguf: bos token id -1 is not in the vocabulary of 263 tokens");
  v = {};
  v.source = "m.gguf";
  v.model = "llama";
  EXPECT_EQ(Verdict(v), "m.gguf: the vocabulary is empty");
}

TEST(GgufVocabTest, SentencePieceErrors) {
  GgufVocab v = testing::SentencePieceVocab();
  v.scores.pop_back();
  EXPECT_EQ(Verdict(v), "tiny.gguf: 276 scores for 277 tokens");
  v = testing::SentencePieceVocab();
  v.scores[260] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(Verdict(v), "tiny.gguf: the score of token 260 is not a finite number");
  v = testing::SentencePieceVocab();
  v.tokens[3 + 0x41] = "<0x4>";
  EXPECT_EQ(Verdict(v), "tiny.gguf: byte token 68 is '<0x4>', not of the form <0x41>");
  v = testing::SentencePieceVocab();
  v.types[3 + 0x41] = 1;
  EXPECT_EQ(Verdict(v), "tiny.gguf: byte fallback is on, but the vocabulary has no <0x41>");
}

}  // namespace
}  // namespace dsla
