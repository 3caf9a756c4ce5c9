// The choice of tokens against the sampler's fp64 reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
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

// rows: how each row is sampled.
std::vector<RowChoice> RunRows(const std::vector<float>& logits, int V,
                               const std::vector<RowSampling>& rows) {
  const int T = static_cast<int>(rows.size());
  const DeviceBytes from(logits), sampling(rows),
      to(int64_t{T} * static_cast<int64_t>(sizeof(RowChoice))),
      workspace(cuda::ChooseWorkspaceBytes(T, V));
  CheckCuda(cuda::Choose(from.as<float>(), T, V, sampling.as<RowSampling>(), to.as<RowChoice>(),
                         workspace.as<void>(), workspace.bytes(), nullptr));
  std::vector<RowChoice> choices(static_cast<size_t>(T));
  to.Read(choices.data());
  return choices;
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

// Rows of all kinds side by side, some greedy, against the reference; draws that rounding may
// decide otherwise are left out, and there are few of them.
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
    params.seed = random_() | uint64_t{random_()} << 32;
    return params;
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
    std::vector<float> logits(static_cast<size_t>(T) * v);
    std::vector<SamplingParams> params;
    std::vector<RowSampling> rows;
    for (size_t t = 0; t < static_cast<size_t>(T); ++t) {
      FillRow({logits.data() + t * v, v});
      params.push_back(RandomParams());
      rows.push_back(cuda::RowSamplingOf(params.back(), static_cast<int64_t>(t) * 1000));
    }
    const std::vector<RowChoice> got = RunRows(logits, V, rows), again = RunRows(logits, V, rows);
    for (size_t t = 0; t < got.size(); ++t) {
      const SamplingParams& p = params[t];
      SCOPED_TRACE(testing::Message()
                   << "row " << t << " of " << T << ", V " << V << ", temperature " << p.temperature
                   << ", top_k " << p.top_k << ", top_p " << p.top_p << ", min_p " << p.min_p);
      ASSERT_EQ(got[t].token, again[t].token) << "two runs differ";
      ASSERT_TRUE(got[t].token >= 0 && got[t].token < V);
      double margin = 0;
      const auto want =
          SampleRef(p, {}, {}, {logits.data() + t * v, v}, static_cast<int64_t>(t) * 1000, &margin);
      ASSERT_EQ(got[t].broken, want.ok() ? 0 : 1);
      if (!want.ok()) continue;
      ++(margin < kMargin ? skipped_ : compared_);
      if (margin < kMargin) continue;
      EXPECT_EQ(got[t].token, want->token) << "margin " << margin;
      EXPECT_NEAR(got[t].logprob, want->logprob, kLogprobTolerance * (1 + std::abs(want->logprob)));
    }
  }

  // The GPU's weights are off by some 2^-22, those of the sampler on the CPU by somewhat less.
  static constexpr double kMargin = 4e-6;

  std::mt19937 random_{20250104};
  int compared_ = 0, skipped_ = 0;
};

TEST_F(SampledTest, EqualsReference) {
  for (const int V : {1, 7, 1000, 4096, 4097, 5000}) Compare(V, 256);
  for (const int V : {49152, 128256, 151936}) Compare(V, 100);
  EXPECT_GT(compared_, 1600);
  EXPECT_LT(skipped_, 120);
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
