// The choice of tokens against the sampler's fp64 reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <span>
#include <vector>

#include "ops/dsla/cuda/dsla_cuda_testing.cuh"
#include "ops/sampling/cuda/sampling_cuda.h"
#include "ops/sampling/philox.h"
#include "ops/sampling/sampling.h"

namespace dsla {
namespace {

using cuda::RowChoice;
using cuda::RowSampling;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class ChooseTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0)
      GTEST_SKIP() << "SKIPPED: no CUDA device here";
  }
};

std::vector<float> Random(int64_t n, uint32_t seed, float scale) {
  std::mt19937 random(20250103 + seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = normal(random);
  return values;
}

// Rows of V logits and how each is sampled.
struct Batch {
  int V = 0;
  std::vector<float> logits;
  std::vector<RowSampling> rows = {};
  std::vector<LogitEdit> edits = {};
};
struct Chosen {
  std::vector<RowChoice> choices;
  std::vector<TokenLogprob> top;  // [T, kMostTop]
  std::vector<float> logits;      // as they are then
};

Chosen RunBatch(const Batch& batch) {
  const size_t T = batch.rows.size();
  Chosen chosen;
  chosen.choices.resize(T);
  chosen.top.resize(T * cuda::kMostTop, {-2, 0});
  chosen.logits.resize(batch.logits.size());
  std::vector<LogitEdit> edits = batch.edits;
  edits.emplace_back();  // no array is empty
  const DeviceBytes logits(batch.logits), rows(batch.rows), sent(edits), choices(chosen.choices),
      top(chosen.top), workspace(cuda::ChooseWorkspaceBytes(static_cast<int>(T), batch.V));
  CheckCuda(cuda::Choose({.logits = logits.as<float>(),
                          .T = static_cast<int>(T),
                          .V = batch.V,
                          .rows = rows.as<RowSampling>(),
                          .edits = sent.as<LogitEdit>(),
                          .choices = choices.as<RowChoice>(),
                          .top = top.as<TokenLogprob>(),
                          .workspace = workspace.as<void>(),
                          .workspace_bytes = workspace.bytes()},
                         nullptr));
  choices.Read(chosen.choices.data());
  top.Read(chosen.top.data());
  logits.Read(chosen.logits.data());
  return chosen;
}

std::vector<RowChoice> RunRows(const std::vector<float>& logits, int V,
                               const std::vector<RowSampling>& rows) {
  return RunBatch({.V = V, .logits = logits, .rows = rows}).choices;
}

std::vector<RowChoice> RunGreedy(const std::vector<float>& logits, int V) {
  return RunRows(logits, V, std::vector<RowSampling>(logits.size() / static_cast<size_t>(V)));
}

// Differences l - max of up to 100 are rounded on the way to a weight, which matters only where it
// is not small: 4 roundings of each weight, and those of the sums and the logarithm.
constexpr double kLogprobTolerance = 16 * 0x1p-24;

void ExpectEqualsReference(const std::vector<float>& logits, int V) {
  const std::vector<RowChoice> got = RunGreedy(logits, V), again = RunGreedy(logits, V);
  SamplingParams params;
  params.temperature = 0;
  for (size_t t = 0; t < got.size(); ++t) {
    SCOPED_TRACE(testing::Message() << "row " << t << ", V " << V);
    const std::span row(logits.data() + t * static_cast<size_t>(V), static_cast<size_t>(V));
    const auto want = SampleRef(params, {}, {}, row, 0);
    ASSERT_EQ(got[t].broken, want.ok() ? 0 : 1);
    EXPECT_TRUE(got[t].token >= 0 && got[t].token < V);
    EXPECT_EQ(got[t].token, again[t].token);
    EXPECT_EQ(got[t].logprob, again[t].logprob) << "two runs differ";
    if (!want.ok()) continue;
    EXPECT_EQ(got[t].token, want->token);
    // An error of the sum is one of the logarithm's value, and its own rounding is relative.
    EXPECT_NEAR(got[t].logprob, want->logprob, kLogprobTolerance * (1 + std::abs(want->logprob)));
  }
}

// The last has more blocks than the merging warp has lanes.
constexpr int kVocabularies[] = {1, 7, 4096, 4097, 49152, 128256, 151936};

TEST_F(ChooseTest, EqualsReference) {
  for (const int V : kVocabularies)
    for (const int T : {1, 3, 17}) {
      ExpectEqualsReference(Random(int64_t{T} * V, 1, 3), V);
      ExpectEqualsReference(Random(int64_t{T} * V, 2, 0.01f), V);  // nearly uniform
    }
}

TEST_F(ChooseTest, LargeDifferences) {
  for (const int V : kVocabularies) {
    std::vector<float> logits = Random(4 * int64_t{V}, 3, 40);
    const auto v = static_cast<size_t>(V);
    logits[v - 1] = 3e38f;  // one token has it all
    logits[v] = -3e38f;
    for (size_t i = 2 * v; i < 3 * v; ++i) logits[i] = i % 3 == 0 ? logits[i] : -kInfinity;
    for (size_t i = 3 * v; i < 4 * v; ++i) logits[i] = -kInfinity;
    logits[4 * v - 1] = -2;  // the only one left
    ExpectEqualsReference(logits, V);
    const std::vector<RowChoice> got = RunGreedy(logits, V);
    EXPECT_EQ(got[0].token, V - 1);
    EXPECT_EQ(got[0].logprob, 0);
    EXPECT_EQ(got[3].token, V - 1);
    EXPECT_EQ(got[3].logprob, 0);
  }
}

// Logits of few values: the lowest id among equals, wherever blocks, warps and lanes meet; zeros of
// both signs are equal.
TEST_F(ChooseTest, TiesTakeTheLowestId) {
  for (const int V : kVocabularies) {
    const auto v = static_cast<size_t>(V);
    std::vector<float> logits;
    std::mt19937 random(4);
    for (int t = 0; t < 32; ++t) {
      const size_t first = logits.size();
      logits.resize(first + v, -1.5f);
      // Up to 4 places with the largest value, none of them all too often at the front.
      for (int i = 0; i < 4; ++i) logits[first + random() % v] = t % 2 ? 2.f : (i % 2 ? 0.f : -0.f);
    }
    logits.resize(logits.size() + v, 1.f);  // all are equal
    ExpectEqualsReference(logits, V);
    EXPECT_EQ(RunGreedy(logits, V).back().token, 0);
  }
}

TEST_F(ChooseTest, BrokenRows) {
  for (const int V : kVocabularies) {
    const auto v = static_cast<size_t>(V);
    std::vector<float> logits = Random(8 * int64_t{V}, 5, 3);
    logits[v / 2] = kNaN;
    logits[2 * v - 1] = -kNaN;
    logits[2 * v] = kInfinity;
    std::fill_n(logits.begin() + 3 * V, V, -kInfinity);
    std::fill_n(logits.begin() + 4 * V, V, kNaN);
    std::fill_n(logits.begin() + 5 * V, V, kInfinity);
    logits[6 * v + v / 3] = -kInfinity;  // alone it breaks nothing, unless there is nothing else
    ExpectEqualsReference(logits, V);
    const std::vector<RowChoice> got = RunGreedy(logits, V);
    for (size_t t = 0; t < 6; ++t) EXPECT_EQ(got[t].broken, 1) << "row " << t;
    EXPECT_EQ(got[6].broken, V == 1 ? 1 : 0);
    EXPECT_EQ(got[7].broken, 0);
  }
}

// Rows of all kinds side by side, some greedy, some edited, against the reference; draws that
// rounding may decide otherwise are left out, and there are few of them.
class SampledTest : public ChooseTest {
 protected:
  bool OneIn(uint32_t n) { return random_() % n == 0; }
  float Uniform(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(random_);
  }

  SamplingParams RandomParams() {
    SamplingParams params;
    params.temperature = OneIn(8)    ? 0
                         : OneIn(12) ? 100
                         : OneIn(12) ? 2e-5f
                                     : std::exp(Uniform(-2, 1.5f));
    if (OneIn(2))
      params.top_k = OneIn(8) ? 1 : OneIn(4) ? 5000 : 1 + static_cast<int32_t>(random_() % 60);
    if (OneIn(2)) params.top_p = OneIn(8) ? 1e-6f : Uniform(0.01f, 1);
    if (OneIn(3)) params.min_p = OneIn(8) ? 1 : std::exp(Uniform(-8, 0));
    if (OneIn(4)) params.repetition_penalty = Uniform(0.5f, 2);
    if (OneIn(4)) params.presence_penalty = Uniform(-2, 2);
    if (OneIn(4)) params.frequency_penalty = Uniform(-2, 2);
    params.seed = random_() | uint64_t{random_()} << 32;
    return params;
  }

  // What the row's request has seen and does not want; many of the tokens are likely ones.
  struct Wishes {
    std::vector<int32_t> prompt, output, ruled_out = {};
    std::vector<uint32_t> allowed = {};
    int top = 0;
  };
  Wishes RandomWishes(std::span<const float> row, SamplingParams& params) {
    const auto V = static_cast<uint32_t>(row.size());
    const float largest = *std::max_element(row.begin(), row.end());
    std::vector<int32_t> likely;
    for (uint32_t i = 0; i < V; ++i)
      if (row[i] >= largest - 0.3f * std::abs(largest)) likely.push_back(static_cast<int32_t>(i));
    const auto token = [&] {
      if (likely.empty() || OneIn(2)) return static_cast<int32_t>(random_() % V);
      return likely[random_() % likely.size()];
    };
    const auto tokens = [&](size_t most) {
      std::vector<int32_t> all(random_() % (most + 1));
      for (int32_t& each : all) each = token();
      return all;
    };
    Wishes wishes{.prompt = tokens(OneIn(8) ? 3000 : 50), .output = tokens(OneIn(8) ? 3000 : 20)};
    if (OneIn(4)) wishes.ruled_out = tokens(5);
    if (OneIn(4)) {
      wishes.allowed.resize((V + 31) / 32);
      for (uint32_t& word : wishes.allowed) word = static_cast<uint32_t>(random_());
    }
    if (OneIn(4)) {
      std::set<int32_t> distinct;
      for (const int32_t each : tokens(OneIn(4) ? 300 : 5)) distinct.insert(each);
      for (const int32_t each : distinct)
        params.logit_bias.emplace_back(each, OneIn(8) ? -100 : Uniform(-5, 5));
    }
    if (OneIn(3)) wishes.top = 1 + static_cast<int>(random_() % cuda::kMostTop);
    return wishes;
  }

  void CompareTop(std::span<const float> row, std::span<const TokenLogprob> top, int asked) {
    const auto want = TopLogprobs(row, asked);
    ASSERT_TRUE(want.ok());
    for (size_t i = 0; i < top.size(); ++i) {
      SCOPED_TRACE(testing::Message() << "place " << i << " of " << asked);
      if (i >= static_cast<size_t>(asked)) {
        EXPECT_EQ(top[i].token, -2) << "not asked for";
      } else if (i >= want->size()) {
        EXPECT_EQ(top[i].token, -1);
      } else {
        ASSERT_EQ(top[i].token, (*want)[i].token);
        EXPECT_NEAR(top[i].logprob, (*want)[i].logprob,
                    2 * kLogprobTolerance * (1 - (*want)[i].logprob));
      }
    }
  }

  void FillRow(std::span<float> row) {
    std::normal_distribution<float> normal(OneIn(2) ? 0 : 15, OneIn(3)   ? 0.3f
                                                              : OneIn(6) ? 0.003f
                                                              : OneIn(6) ? 40.f
                                                                         : 3.f);
    for (float& l : row) l = normal(random_);
    if (OneIn(5))  // many equals, zeros of both signs among them
      for (float& l : row) l = std::round(l * 2) / 2;
    if (OneIn(20)) std::fill(row.begin(), row.end(), -1.25f);
    if (OneIn(6))
      for (size_t i = 1; i < row.size(); i += 3) row[i] = -kInfinity;
    if (OneIn(20)) {  // little is left
      std::fill(row.begin(), row.end(), -kInfinity);
      for (int i = 0; i < 5; ++i) row[random_() % row.size()] = normal(random_);
    }
    if (OneIn(40)) row[random_() % row.size()] = 3e38f;
    if (OneIn(40)) row[random_() % row.size()] = -3e38f;
    if (OneIn(40)) row[random_() % row.size()] = kNaN;
    if (OneIn(80)) row[random_() % row.size()] = kInfinity;
  }

  void Compare(int V, int T) {
    const auto v = static_cast<size_t>(V);
    Batch batch{.V = V, .logits = std::vector<float>(static_cast<size_t>(T) * v)};
    std::vector<SamplingParams> params;
    std::vector<Wishes> wishes;
    for (size_t t = 0; t < static_cast<size_t>(T); ++t) {
      const std::span<float> row(batch.logits.data() + t * v, v);
      FillRow(row);
      params.push_back(RandomParams());
      wishes.push_back(RandomWishes(row, params.back()));
      RowSampling sampling = cuda::RowSamplingOf(params.back(), static_cast<int64_t>(t) * 1000);
      Sampler sampler(params.back(), V);
      sampler.AddPrompt(wishes.back().prompt);
      for (const int32_t token : wishes.back().output) sampler.Accept(token);
      const size_t first = batch.edits.size();
      const Wishes& wish = wishes.back();
      batch.edits.resize(first + static_cast<size_t>(cuda::EditElements(
                                     sampler.edits(), wish.ruled_out, wish.allowed)));
      cuda::PackEdits(sampler.edits(), wish.ruled_out, wish.allowed, batch.edits.data(),
                      static_cast<int64_t>(first), sampling);
      sampling.top = wishes.back().top;
      batch.rows.push_back(sampling);
      edited_ += sampling.edits > 0 ? 1 : 0;
    }
    const Chosen got = RunBatch(batch), again = RunBatch(batch);
    for (size_t t = 0; t < params.size(); ++t) {
      const SamplingParams& p = params[t];
      const Wishes& w = wishes[t];
      const RowChoice& choice = got.choices[t];
      SCOPED_TRACE(testing::Message()
                   << "row " << t << " of " << T << ", V " << V << ", temperature " << p.temperature
                   << ", top_k " << p.top_k << ", top_p " << p.top_p << ", min_p " << p.min_p
                   << ", repetition " << p.repetition_penalty << ", presence " << p.presence_penalty
                   << ", frequency " << p.frequency_penalty << ", " << batch.rows[t].edits
                   << " edits, " << w.ruled_out.size() << " ruled out, mask of "
                   << w.allowed.size());
      ASSERT_EQ(choice.token, again.choices[t].token) << "two runs differ";
      ASSERT_TRUE(choice.token >= 0 && choice.token < V);
      const std::span row(batch.logits.data() + t * v, v);
      double margin = 0;
      const auto want = SampleRef(p, w.prompt, w.output, row, static_cast<int64_t>(t) * 1000,
                                  &margin, w.ruled_out, w.allowed);
      ASSERT_EQ(choice.broken, want.ok() ? 0 : 1);
      if (!want.ok()) continue;
      CompareTop(row, std::span(got.top).subspan(t * cuda::kMostTop, cuda::kMostTop), w.top);
      ++(margin < kMargin ? skipped_ : compared_);
      if (margin < kMargin) continue;
      EXPECT_EQ(choice.token, want->token) << "margin " << margin;
      EXPECT_NEAR(choice.logprob, want->logprob, kLogprobTolerance * (1 + std::abs(want->logprob)));
    }
  }

  // The GPU's weights are off by some 2^-22, those of the sampler on the CPU by somewhat less.
  static constexpr double kMargin = 4e-6;

  std::mt19937 random_{20250104};
  int compared_ = 0, skipped_ = 0, edited_ = 0;
};

TEST_F(SampledTest, EqualsReference) {
  for (const int V : {1, 7, 1000, 4096, 4097, 5000}) Compare(V, 256);
  for (const int V : {49152, 128256, 151936}) Compare(V, 100);
  EXPECT_GT(compared_, 1600);
  EXPECT_LT(skipped_, 120);
  EXPECT_GT(edited_, 800);
}

// The same bits as on the host, whatever a compiler would like to fuse, and nothing else changes.
TEST_F(SampledTest, EditsAreThoseOfTheHost) {
  constexpr int kV = 10000;
  Batch batch{.V = kV, .logits = Random(kV, 8, 4)};
  batch.logits[3] = 3e38f, batch.logits[6] = -3e38f, batch.logits[9] = -kInfinity;
  const SamplingParams params{.temperature = 0,
                              .repetition_penalty = 0.7f,
                              .presence_penalty = 0.3f,
                              .frequency_penalty = -0.37f};
  std::vector<float> want = batch.logits;
  std::vector<LogitEdit> edits;
  for (int32_t token = 0; token < kV; token += 3) {
    const LogitEdit edit{.token = token,
                         .outputs = static_cast<int32_t>(random_() % 9) - 1,
                         .bias = OneIn(2) ? 0 : Uniform(-3, 3)};
    edits.push_back(edit);
    float& l = want[static_cast<size_t>(token)];
    if (l == -kInfinity) continue;
    if (edit.outputs >= 0) l = l > 0 ? l / 0.7f : l * 0.7f;
    const float frequency = -0.37f * static_cast<float>(edit.outputs);
    if (edit.outputs > 0) l = l - 0.3f, l = l - frequency;
    constexpr float kMax = std::numeric_limits<float>::max();
    l = std::clamp(std::clamp(l, -kMax, kMax) + edit.bias, -kMax, kMax);
  }
  const std::vector<int32_t> ruled_out = {0, 4095, 4096, 4097, 9999};
  for (const int32_t token : ruled_out) want[static_cast<size_t>(token)] = -kInfinity;
  std::vector<uint32_t> allowed((kV + 31) / 32, ~0u);
  for (const int32_t token : {5, 31, 32, 4094, 8192, 9998}) {
    allowed[static_cast<size_t>(token / 32)] &= ~(1u << token % 32);
    want[static_cast<size_t>(token)] = -kInfinity;
  }
  batch.rows.push_back(cuda::RowSamplingOf(params, 5));
  batch.edits.resize(static_cast<size_t>(cuda::EditElements(edits, ruled_out, allowed)));
  cuda::PackEdits(edits, ruled_out, allowed, batch.edits.data(), 0, batch.rows[0]);
  const Chosen got = RunBatch(batch);
  EXPECT_EQ(got.logits, want);
  EXPECT_EQ(got.choices[0].token, 3);
  EXPECT_EQ(got.choices[0].logprob, 0);
}

// The same rows alone and beside others.
TEST_F(SampledTest, ARowDoesNotDependOnTheOthers) {
  constexpr int kV = 5000, kT = 40;
  std::vector<float> logits = Random(int64_t{kT} * kV, 7, 2);
  std::vector<RowSampling> rows;
  for (int t = 0; t < kT; ++t) rows.push_back(cuda::RowSamplingOf(RandomParams(), t));
  const std::vector<RowChoice> together = RunRows(logits, kV, rows);
  for (int t = 0; t < kT; ++t) {
    const std::vector<float> row(logits.begin() + t * kV, logits.begin() + (t + 1) * kV);
    EXPECT_EQ(RunRows(row, kV, {rows[static_cast<size_t>(t)]})[0].token,
              together[static_cast<size_t>(t)].token);
  }
}

// More logits at the cut than shared memory has room for, and the draws that they leave.
TEST_F(SampledTest, ManyEquals) {
  constexpr int kV = 49152;
  const std::vector<float> logits(kV, 2.5f);
  const auto token = [&](const SamplingParams& params, int64_t position) {
    return RunRows(logits, kV, {cuda::RowSamplingOf(params, position)})[0].token;
  };
  for (int64_t position = 0; position < 20; ++position) {
    EXPECT_LT(token({.top_k = 100}, position), 100);
    EXPECT_EQ(token({.top_k = 1}, position), 0);
    EXPECT_EQ(token({.top_p = 1e-6f}, position), 0);
    EXPECT_LT(token({.top_k = 10000, .top_p = 0.25f}, position), 2501);
    const double u = UniformAt(9, position);
    EXPECT_NEAR(token({.seed = 9}, position), u * kV, 1);
    EXPECT_NEAR(token({.top_p = 0.5f, .seed = 9}, position), u * kV / 2, 1);
    EXPECT_NEAR(token({.top_k = 30000, .seed = 9}, position), u * 30000, 1);
  }
}

// As the sampler on the host says it.
TEST_F(ChooseTest, LogprobIsTheSamplers) {
  constexpr int kV = 49152;
  const std::vector<float> logits = Random(5 * int64_t{kV}, 6, 4);
  const std::vector<RowChoice> got = RunGreedy(logits, kV);
  for (size_t t = 0; t < got.size(); ++t) {
    const auto want = LogprobOf(std::span(logits).subspan(t * kV, kV), got[t].token);
    ASSERT_TRUE(want.ok());
    EXPECT_NEAR(got[t].logprob, want->logprob, 2 * kLogprobTolerance * (1 - want->logprob));
  }
}

}  // namespace
}  // namespace dsla
