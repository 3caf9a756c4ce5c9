#include "eval/documents.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace dsla {
namespace {

// Bytes as tokens: enough of a tokenizer to count with.
std::unique_ptr<Tokenizer> ByteTokenizer() {
  GgufVocab vocab;
  vocab.source = "test";
  vocab.model = "gpt2";
  vocab.pre = "gpt-2";
  for (char c = 'a'; c <= 'z'; ++c) vocab.tokens.push_back(std::string(1, c));
  vocab.tokens.push_back("yz");
  vocab.merges = {"y z"};
  vocab.types.assign(vocab.tokens.size(), 1);
  auto data = FromGgufVocab(std::move(vocab));
  EXPECT_TRUE(data.ok()) << data.status().message();
  auto tokenizer = Tokenizer::Create(std::move(data).value());
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  return std::move(tokenizer).value();
}

class DocumentsTest : public testing::Test {
 protected:
  std::string Write(const std::string& name, const std::string& text) {
    const auto path = std::filesystem::path(testing::TempDir()) / name;
    std::ofstream(path, std::ios::binary) << text;
    return path.string();
  }
  std::unique_ptr<Tokenizer> tokenizer_ = ByteTokenizer();
};

TEST_F(DocumentsTest, JsonLinesInOrderFilteredAndCut) {
  const std::string path =
      Write("documents.jsonl",
            "{\"text\": \"abcdefgh\", \"source\": \"x\"}\n\n{\"text\": \"ab\"}\n{\"text\": "
            "\"bcde\"}\n{\"text\": \"zzzzzz\"}\n");
  const auto documents =
      ReadDocuments(path, *tokenizer_, {.min_tokens = 4, .max_tokens = 5, .max_docs = 2});
  ASSERT_TRUE(documents.ok()) << documents.status().message();
  ASSERT_EQ(documents->size(), 2u);
  EXPECT_EQ((*documents)[0].size(), 5u);
  EXPECT_EQ((*documents)[1], (std::vector<int32_t>{1, 2, 3, 4}));
}

TEST_F(DocumentsTest, APlainFileIsOneDocument) {
  const auto documents = ReadDocuments(Write("plain.txt", "abc"), *tokenizer_, {});
  ASSERT_TRUE(documents.ok()) << documents.status().message();
  EXPECT_EQ(*documents, (std::vector<std::vector<int32_t>>{{0, 1, 2}}));
}

TEST_F(DocumentsTest, BadInputIsNamed) {
  const std::string path = Write("bad.jsonl", "{\"text\": \"abcd\"}\n{\"txt\": 1}\n");
  EXPECT_EQ(ReadDocuments(path, *tokenizer_, {}).status().message(),
            "'" + path + "' line 2: not a JSON object with a string \"text\"");
  const std::string empty = Write("empty.jsonl", "");
  EXPECT_EQ(ReadDocuments(empty, *tokenizer_, {.min_tokens = 9}).status().message(),
            "'" + empty + "' has no document of at least 9 tokens");
  EXPECT_EQ(ReadDocuments("/nonexistent.txt", *tokenizer_, {}).status().message(),
            "cannot open '/nonexistent.txt': No such file or directory");
}

}  // namespace
}  // namespace dsla
