// Token files, preparation and batches.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <numeric>

#include "distill/prepare.h"
#include "distill/sampler.h"
#include "distill/token_file.h"
#include "format/model_file.h"
#include "format/testing/file_writers.h"

namespace dsla {
namespace {

using ::testing::HasSubstr;
using testing::TempDir;

// A document of n tokens, each telling its place: document * 100 + position.
TokenFile WriteTokens(const std::string& path, const std::vector<int>& lengths, int64_t V) {
  auto writer = TokenFileWriter::Create(path, V);
  EXPECT_TRUE(writer.ok());
  for (size_t d = 0; d < lengths.size(); ++d) {
    std::vector<int32_t> ids(lengths[d]);
    for (int i = 0; i < lengths[d]; ++i)
      ids[i] = static_cast<int32_t>((d * 100 + static_cast<size_t>(i) % 100) % V);
    EXPECT_TRUE(writer->Add(ids).ok());
  }
  EXPECT_TRUE(writer->Finish().ok());
  auto file = TokenFile::Open(path);
  EXPECT_TRUE(file.ok()) << file.status().message();
  return std::move(file).value();
}

TEST(TokenFileTest, RoundTripInBothWidths) {
  TempDir folder;
  for (const int64_t V : {1000, 100000}) {
    const TokenFile file = WriteTokens(folder.path() + "/t", {5, 0, 3}, V);
    EXPECT_EQ(file.vocabulary(), V);
    EXPECT_EQ(file.documents(), 2);  // empty ones are left out
    EXPECT_EQ(file.tokens(), 8);
    EXPECT_EQ(file.length(1), 3);
    std::vector<int32_t> ids(3);
    file.Read(file.begin(1), ids);
    EXPECT_EQ(ids, (std::vector<int32_t>{200, 201, 202}));
  }
}

TEST(TokenFileTest, DamagedFilesAreRefused) {
  TempDir folder;
  const std::string path = folder.path() + "/t";
  WriteTokens(path, {5, 3}, 1000);
  const std::string good = testing::ReadFile(path);
  const auto message = [&](const std::string& bytes) {
    return TokenFile::Open(folder.Write("bad", bytes)).status().message();
  };
  EXPECT_THAT(message(good.substr(0, good.size() - 8)), HasSubstr("its header says"));
  EXPECT_THAT(message(good.substr(0, 10)), HasSubstr("is no token file"));
  EXPECT_THAT(message("{\"text\": \"a document\"}" + good), HasSubstr("is no token file"));
  std::string ends = good;
  ends[ends.size() - 16] = 8;  // the first document ends where the last does
  EXPECT_THAT(message(ends), HasSubstr("document 1 ends at token 8, after 8 of 8"));
  std::string counts = good;
  counts[23] = '\x7f';  // documents: near 2^63
  EXPECT_THAT(message(counts), HasSubstr("damaged header"));
}

class PrepareTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const ModelConfig config = testing::TinyConfig("llama");  // its tokens are a, b and ab
    const std::string path = folder_.Write(
        "tiny.gguf", testing::TinyGguf(config, testing::RandomWeights(config, 1)).Build());
    auto file = ModelFile::Open(path);
    ASSERT_TRUE(file.ok()) << file.status().message();
    auto data = (*file)->ReadTokenizer();
    ASSERT_TRUE(data.ok()) << data.status().message();
    auto tokenizer = Tokenizer::Create(std::move(data).value());
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
    tokenizer_ = std::move(tokenizer).value();
  }
  std::string Message(const std::vector<std::string>& inputs) {
    const auto result = PrepareTokens(ctx_, inputs, *tokenizer_, out_);
    EXPECT_FALSE(std::filesystem::exists(out_)) << "nothing may be left of a failed run";
    return result.status().message();
  }

  TempDir folder_;
  std::string out_ = folder_.path() + "/out.tokens";
  ExecContext ctx_{.threads = 2};
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(PrepareTest, DocumentsKeepTheirOrderAndBounds) {
  const std::string lines = folder_.Write(
      "a.jsonl", "{\"text\": \"abb\"}\n\n{\"text\": \"\", \"n\": 1}\n{\"text\": \"ba\"}\n");
  const std::string plain = folder_.Write("b.txt", "bbaa");
  const auto result = PrepareTokens(ctx_, {lines, plain}, *tokenizer_, out_);
  ASSERT_TRUE(result.ok()) << result.status().message();
  EXPECT_EQ(result->documents, 3);
  const auto file = TokenFile::Open(out_);
  ASSERT_TRUE(file.ok());
  std::string text;
  for (int64_t d = 0; d < file->documents(); ++d) {
    std::vector<int32_t> ids(file->length(d));
    file->Read(file->begin(d), ids);
    text += tokenizer_->Decode(ids) + "|";
  }
  EXPECT_EQ(text, "abb|ba|bbaa|");
}

TEST_F(PrepareTest, BadDataIsNamed) {
  EXPECT_THAT(Message({folder_.Write("x.jsonl", "{\"text\": \"abc\"}\n{\"txt\": 1}\n")}),
              HasSubstr("x.jsonl' line 2: not a JSON object with a string \"text\""));
  EXPECT_THAT(Message({folder_.Write("z.txt", std::string("ab\0c", 4))}), HasSubstr("NUL bytes"));
  EXPECT_THAT(Message({folder_.Write("u.txt", "\xff\xfe")}), HasSubstr("not UTF-8"));
  EXPECT_THAT(Message({folder_.Write("e.jsonl", "")}), HasSubstr("holds no text"));
  EXPECT_THAT(Message({folder_.path() + "/none.txt"}), HasSubstr("none.txt"));
  EXPECT_THAT(Message({}), HasSubstr("no data files"));
}

TEST_F(PrepareTest, FullDiskIsSaid) {
  // Every write to /dev/full fails for want of space; the writer's temporary file is made to be it.
  const std::string path = folder_.path() + "/full.tokens";
  std::filesystem::create_symlink("/dev/full", fmt::format("{}.tmp.{}", path, ::getpid()));
  auto writer = TokenFileWriter::Create(path, 96);
  ASSERT_TRUE(writer.ok());
  ASSERT_TRUE(writer->Add(std::vector<int32_t>{1, 2}).ok());
  EXPECT_EQ(writer->Finish().message(),
            fmt::format("cannot write '{}': No space left on device", path));
  EXPECT_FALSE(std::filesystem::exists(path));
}

SamplerOptions Options() {
  SamplerOptions options;
  options.seed = 3;
  options.lengths = {64, 2048};
  options.length_shares = {0.75, 0.25};
  options.tokens_per_step = 4096;
  options.long_share = 1;
  options.recall_share = 0.25;
  return options;
}

TEST(SamplerTest, BatchesAreAFunctionOfSeedStreamAndStep) {
  TempDir folder;
  const TokenFile file = WriteTokens(folder.path() + "/t", {3000, 500, 4000}, 5000);
  const auto a = Sampler::Create(file, 0, 3, Options()), b = Sampler::Create(file, 0, 3, Options());
  ASSERT_TRUE(a.ok() && b.ok());
  int recall = 0, longer = 0;
  constexpr int kSteps = 400;
  for (int step = 0; step < kSteps; ++step) {
    const TokenBatch batch = a->Training(Stream::kAlign, step);
    EXPECT_EQ(batch.ids, b->Training(Stream::kAlign, step).ids);
    EXPECT_EQ(batch.rows * batch.length, 4096);
    EXPECT_EQ(static_cast<int>(batch.ids.size()), 4096);
    recall += !batch.targets.empty();
    longer += batch.length == 2048;
  }
  EXPECT_NE(a->Training(Stream::kAlign, 1).ids, a->Training(Stream::kChain, 1).ids);
  EXPECT_NEAR(recall, kSteps / 4, 50);  // over five standard deviations
  EXPECT_NEAR(longer, kSteps / 4, 50);
}

TEST(SamplerTest, LongSequencesStayInOneDocument) {
  TempDir folder;
  const TokenFile file = WriteTokens(folder.path() + "/t", {3000, 500, 4000}, 500);
  const auto sampler = Sampler::Create(file, 0, 3, Options());
  ASSERT_TRUE(sampler.ok());
  for (int index = 0; index < 50; ++index) {
    const TokenBatch batch = sampler->Text(Stream::kAlign, index, 2, 2048);
    for (int row = 0; row < 2; ++row) {
      const int document = batch.ids[row * 2048] / 100;
      EXPECT_NE(document, 1);  // too short
      for (int i = 0; i < 2048; ++i) ASSERT_EQ(batch.ids[row * 2048 + i] / 100, document);
    }
  }
}

TEST(SamplerTest, SeparateRowsHoldOneDocumentAndPadding) {
  TempDir folder;
  const TokenFile file = WriteTokens(folder.path() + "/t", {30, 50, 400}, 500);
  SamplerOptions options = Options();
  options.lengths = {64};
  options.length_shares = {1};
  options.separate = true;
  const auto sampler = Sampler::Create(file, 0, 3, options);
  ASSERT_TRUE(sampler.ok());
  bool padded = false;
  for (int index = 0; index < 50; ++index) {
    const TokenBatch batch = sampler->Text(Stream::kAlign, index, 4, 64);
    for (int row = 0; row < 4 && !batch.counts.empty(); ++row) {
      const int n = batch.counts[row];
      padded = padded || n < 64;
      EXPECT_TRUE(n == 30 || n == 50 || n == 64);
      for (int i = 1; i < n; ++i)
        ASSERT_EQ(batch.ids[row * 64 + i] / 100, batch.ids[row * 64] / 100);
    }
  }
  EXPECT_TRUE(padded);
}

TEST(SamplerTest, RecallTargetsStandEarlierInTheRow) {
  TempDir folder;
  const TokenFile file = WriteTokens(folder.path() + "/t", {5000}, 40000);
  const auto sampler = Sampler::Create(file, 0, 1, Options());
  ASSERT_TRUE(sampler.ok());
  for (const Recall kind : {Recall::kCopy, Recall::kKeyValue, Recall::kNeedle}) {
    for (int index = 0; index < 20; ++index) {
      const TokenBatch batch = sampler->RecallBatch(kind, Stream::kChain, index, 2, 512);
      for (int row = 0; row < 2; ++row) {
        const int32_t* const ids = batch.ids.data() + row * 512;
        const int32_t* const targets = batch.targets.data() + row * 512;
        int asked = 0;
        for (int i = 0; i < 512; ++i) {
          if (targets[i] < 0) continue;
          ++asked;
          ASSERT_LT(i, 511);
          ASSERT_EQ(targets[i], ids[i + 1]);
          // The pair of this token and its answer was seen before.
          bool seen = false;
          for (int j = 0; j < i; ++j) seen = seen || (ids[j] == ids[i] && ids[j + 1] == targets[i]);
          ASSERT_TRUE(seen) << Name(kind) << " at " << i;
        }
        EXPECT_GT(asked, 10) << Name(kind);
      }
    }
  }
}

TEST(SamplerTest, TooFewTokensAreRefused) {
  TempDir folder;
  const TokenFile file = WriteTokens(folder.path() + "/t", {300, 500}, 500);
  EXPECT_THAT(Sampler::Create(file, 0, 2, Options()).status().message(),
              HasSubstr("has 800 tokens here, fewer than one sequence of 2048"));
}

}  // namespace
}  // namespace dsla
