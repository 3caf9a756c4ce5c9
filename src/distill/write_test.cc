// Texts by the teacher: the cache against the trainer's own pass, the draws against what
// temperature and top-p mean, files that were cut short, bad input.
#include "distill/write.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "base/random.h"
#include "distill/generator.h"
#include "distill/network.h"
#include "distill/prepare.h"
#include "distill/token_file.h"
#include "format/testing/file_writers.h"

namespace dsla {
namespace {

using ::testing::HasSubstr;
using testing::TempDir;

constexpr int kVocabulary = 24, kStop = 5;

class WriteTest : public ::testing::Test {
 protected:
  void SetUp() override {
    config_ = testing::TinyConfig("llama");
    config_.L = 2, config_.C = 32, config_.H = 4, config_.Hkv = 2, config_.D = 8, config_.ffn = 48;
    config_.V = kVocabulary, config_.max_position = 128;
    model_ = Model("m.gguf", true);
    ASSERT_NE(model_, nullptr);
  }

  // Tokens a, b, ab, <3>, ...; <5> ends texts, <4> begins them.
  std::unique_ptr<ModelFile> Model(const std::string& name, bool with_bos) {
    testing::Weights weights = testing::RandomWeights(config_, 3);
    // Wide logits, so that probabilities differ.
    for (float& w : weights.at("model.norm.weight")) w *= 3;
    testing::GgufBuilder gguf = testing::TinyGguf(config_, weights);
    gguf.Remove("tokenizer.ggml.token_type");
    std::vector<int32_t> types(kVocabulary, 1);
    types[4] = types[kStop] = 3;  // control tokens
    gguf.I32s("tokenizer.ggml.token_type", types);
    if (with_bos) gguf.U32("tokenizer.ggml.bos_token_id", 4);
    gguf.U32("tokenizer.ggml.eos_token_id", kStop);
    auto file = ModelFile::Open(folder_.Write(name, gguf.Build()));
    EXPECT_TRUE(file.ok()) << file.status().message();
    return file.ok() ? std::move(file).value() : nullptr;
  }

  std::unique_ptr<Generator> NewGenerator(std::vector<int> stops) {
    GeneratorOptions options;
    options.threads = 1;
    options.stops.assign(kVocabulary, false);
    for (const int id : stops) options.stops[id] = true;
    auto generator = Generator::Create(*model_, options);
    EXPECT_TRUE(generator.ok()) << generator.status().message();
    return std::move(generator).value();
  }

  WriteJob Job(const std::string& name) {
    WriteJob job;
    job.out = folder_.path() + "/" + name;
    job.documents = 10, job.batch = 4, job.length = 24;
    job.threads = 1;
    job.quiet = true;
    return job;
  }
  std::string Written(const WriteJob& job) {
    const auto outcome = WriteTexts(ctx_, *model_, job);
    EXPECT_TRUE(outcome.ok()) << outcome.status().message();
    EXPECT_TRUE(outcome.ok() && outcome->finished);
    return testing::ReadFile(job.out);
  }

  TempDir folder_;
  ExecContext ctx_{.threads = 1};
  ModelConfig config_;
  std::unique_ptr<ModelFile> model_;
};

double None(int, int) { return 0; }

// The most likely tokens are those that the trainer's teacher holds for most likely, and going on
// from a longer prompt gives the same.
TEST_F(WriteTest, TheCacheGivesWhatAWholePassGives) {
  const auto generator = NewGenerator({});
  const Sampling greedy{.length = 60, .temperature = 0, .top_p = 1};
  const auto texts = generator->Generate({{4, 7}, {9, 1}, {0, 0}}, greedy, None);
  TokenBatch batch;
  batch.rows = 3, batch.length = 60;
  for (const auto& text : texts) {
    ASSERT_EQ(text.size(), 60u);
    for (int t = 0; t < 60; ++t) {
      batch.ids.push_back(text[t]);
      batch.targets.push_back(t >= 1 && t < 59 ? text[t + 1] : -1);
    }
  }
  const auto layout = ParameterLayout::Create(config_, {.window = 8, .sinks = 2, .rank = 0});
  const auto network =
      Network::Create(*model_, *layout, {.device = "cpu", .dtype = "fp32", .threads = 1});
  ASSERT_TRUE(network.ok()) << network.status().message();
  const Divergence found = (*network)->Measure(batch, std::vector<int>{});
  EXPECT_EQ(found.asked, 3 * 58);
  EXPECT_EQ(found.teacher_hits, found.asked);
  std::vector<std::vector<int32_t>> longer;
  for (const auto& text : texts) longer.emplace_back(text.begin(), text.begin() + 31);
  EXPECT_EQ(generator->Generate(longer, greedy, None), texts);
}

// One step of many equal prompts with evenly spread numbers shows the distribution itself.
TEST_F(WriteTest, DrawsFollowTemperatureAndTopP) {
  const auto generator = NewGenerator({});
  constexpr int kRows = 8000;
  const std::vector<std::vector<int32_t>> prompts(kRows, {4});
  const auto shares = [&](double temperature, double top_p) {
    std::map<int, double> found;
    for (const auto& text :
         generator->Generate(prompts, {.length = 2, .temperature = temperature, .top_p = top_p},
                             [](int row, int) { return (row + 0.5) / kRows; }))
      found[text[1]] += 1.0 / kRows;
    return found;
  };
  auto plain = shares(1, 1), flat = shares(2, 1), half = shares(1, 0.5);
  ASSERT_GT(plain.size(), 5u);
  // p at temperature 2 is the square root of p at 1, scaled.
  double sum = 0;
  for (const auto& [id, p] : plain) sum += std::sqrt(p);
  for (const auto& [id, p] : plain) EXPECT_NEAR(flat[id], std::sqrt(p) / sum, 0.01) << id;
  // top-p keeps the likeliest, up to the one that passes it, in their proportions.
  std::vector<std::pair<double, int>> order;
  for (const auto& [id, p] : plain) order.emplace_back(p, id);
  std::sort(order.rbegin(), order.rend());
  double kept = 0;
  size_t n = 0;
  while (kept < 0.5) kept += order[n++].first;
  ASSERT_EQ(half.size(), n);
  for (size_t i = 0; i < n; ++i)
    EXPECT_NEAR(half.at(order[i].second), order[i].first / kept, 2.0 / kRows / kept);
  // And no token at all behind the last one, however the numbers round.
  for (const auto& text :
       generator->Generate(prompts, {.length = 2, .temperature = 1, .top_p = 0.5},
                           [](int, int) { return 1 - 0x1p-53; }))
    ASSERT_TRUE(half.contains(text[1]));
  // The most likely one alone.
  EXPECT_EQ(generator->Generate({{4}}, {.length = 2, .temperature = 0, .top_p = 1}, None)[0][1],
            order[0].second);
}

TEST_F(WriteTest, ATextEndsBeforeItsStopToken) {
  const Sampling plain{.length = 100, .temperature = 1, .top_p = 1};
  const auto uniform = [](int row, int position) {
    return Random(1, {static_cast<uint64_t>(row), static_cast<uint64_t>(position)}).Uniform();
  };
  const std::vector<std::vector<int32_t>> prompts(6, {4, 0});
  const auto whole = NewGenerator({})->Generate(prompts, plain, uniform);
  const auto cut = NewGenerator({kStop})->Generate(prompts, plain, uniform);
  int ended = 0;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const auto stop = std::find(whole[i].begin() + 2, whole[i].end(), kStop);
    EXPECT_EQ(cut[i], std::vector<int32_t>(whole[i].begin(), stop));
    ended += stop != whole[i].end();
  }
  EXPECT_GT(ended, 0);
}

TEST_F(WriteTest, CutShortAnywhereItEndsInTheSameFile) {
  const std::string whole = Written(Job("whole.jsonl"));
  EXPECT_EQ(std::count(whole.begin(), whole.end(), '\n'), 10);
  EXPECT_EQ(Written(Job("again.jsonl")), whole);
  WriteJob other = Job("other.jsonl");
  other.seed = 2;
  EXPECT_NE(Written(other), whole);
  // Killed while writing: at line ends, within lines, within the first one.
  for (const size_t bytes : {size_t{0}, size_t{3}, whole.find('\n') + 1, whole.size() / 2,
                             whole.rfind('\n', whole.size() - 2) + 1, whole.size() - 1}) {
    WriteJob job = Job(fmt::format("cut{}.jsonl", bytes));
    Written(job);
    std::filesystem::resize_file(job.out, bytes);
    EXPECT_EQ(Written(job), whole) << bytes;
  }
  // Asked to end between batches.
  WriteJob job = Job("asked.jsonl");
  int asked = 0, runs = 1;
  job.interrupted = [&] { return ++asked % 2 == 0; };
  for (;; ++runs) {
    ASSERT_LT(runs, 10);
    const auto outcome = WriteTexts(ctx_, *model_, job);
    ASSERT_TRUE(outcome.ok()) << outcome.status().message();
    if (outcome->finished) break;
  }
  EXPECT_GT(runs, 1);
  EXPECT_EQ(testing::ReadFile(job.out), whole);
}

TEST_F(WriteTest, OpeningsComeFromTheDataAndPrepareReadsTheResult) {
  WriteJob job = Job("opened.jsonl");
  job.prompts = {folder_.Write("p.jsonl", "{\"text\": \"aab\"}\n{\"text\": \"bbbbbb\"}\n"),
                 folder_.Write("q.txt", "aaaabbaa")};
  job.prompt_tokens = 4;
  const std::string written = Written(job);
  EXPECT_FALSE(std::filesystem::exists(job.out + ".prompts.tokens"));
  int of_first = 0, lines = 0;
  for (size_t begin = 0; begin < written.size(); ++lines) {
    const size_t end = written.find('\n', begin);
    const std::string text = nlohmann::json::parse(written.substr(begin, end - begin))["text"];
    EXPECT_TRUE(text.starts_with("bbbb") || text.starts_with("aaaab")) << text;
    of_first += text.starts_with("bbbb");
    begin = end + 1;
  }
  EXPECT_EQ(lines, 10);
  EXPECT_TRUE(of_first > 0 && of_first < 10) << of_first;
  auto data = model_->ReadTokenizer();
  ASSERT_TRUE(data.ok());
  const auto tokenizer = Tokenizer::Create(std::move(data).value());
  ASSERT_TRUE(tokenizer.ok());
  const auto prepared = PrepareTokens(ctx_, {job.out}, **tokenizer, folder_.path() + "/t");
  ASSERT_TRUE(prepared.ok()) << prepared.status().message();
  EXPECT_EQ(prepared->documents, 10);
}

TEST_F(WriteTest, BadInputIsNamedInOneLine) {
  const auto message = [&](auto change) {
    WriteJob job = Job("bad.jsonl");
    change(job);
    const auto outcome = WriteTexts(ctx_, *model_, job);
    EXPECT_FALSE(outcome.ok());
    EXPECT_EQ(outcome.status().message().find('\n'), std::string::npos);
    return outcome.status().message();
  };
  EXPECT_THAT(message([](auto& j) { j.out = ""; }), HasSubstr("--out"));
  EXPECT_THAT(message([](auto& j) { j.documents = 0; }), HasSubstr("--documents: not positive"));
  EXPECT_THAT(message([](auto& j) { j.batch = -1; }), HasSubstr("--batch: not positive"));
  EXPECT_THAT(message([](auto& j) { j.length = 200; }),
              HasSubstr("--length: 200 is not in 2 to the model's context of 128"));
  EXPECT_THAT(message([](auto& j) { j.temperature = -1; }), HasSubstr("--temperature: -1"));
  EXPECT_THAT(message([](auto& j) { j.top_p = 0; }), HasSubstr("--top-p: 0"));
  EXPECT_THAT(message([](auto& j) { j.device = "tpu"; }), HasSubstr("device 'tpu'"));
  EXPECT_THAT(message([](auto& j) { j.out = "/proc/none/a"; }), HasSubstr("/proc/none/a"));
  EXPECT_THAT(message([](auto& j) { j.prompts = {"/none.jsonl"}, j.length = 64; }),
              HasSubstr("/none.jsonl"));
  EXPECT_THAT(message([&](auto& j) { j.prompts = {folder_.Write("s.txt", "aab")}, j.length = 64; }),
              HasSubstr("none of 1 documents is longer than --prompt-tokens 32"));
  EXPECT_THAT(message([&](auto& j) { j.out = folder_.Write("mine.jsonl", "{}\n"); }),
              HasSubstr("was not written by dsla distill write"));
  EXPECT_EQ(testing::ReadFile(folder_.path() + "/mine.jsonl"), "{}\n");
  Written(Job("first.jsonl"));
  EXPECT_THAT(message([&](auto& j) { j.out = folder_.path() + "/first.jsonl", j.seed = 9; }),
              HasSubstr("was written with other settings"));
  // Every write to /dev/full fails for want of space.
  std::filesystem::remove(folder_.path() + "/first.jsonl");
  std::filesystem::create_symlink("/dev/full", folder_.path() + "/first.jsonl");
  EXPECT_THAT(message([&](auto& j) { j.out = folder_.path() + "/first.jsonl"; }),
              HasSubstr("first.jsonl': No space left on device"));
  const auto without = Model("n.gguf", false);
  ASSERT_NE(without, nullptr);
  EXPECT_THAT(WriteTexts(ctx_, *without, Job("n.jsonl")).status().message(),
              HasSubstr("no BOS token"));
}

}  // namespace
}  // namespace dsla
