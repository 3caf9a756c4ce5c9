// Greedy against the sampler's fp64 reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "ops/dsla/cuda/dsla_cuda_testing.cuh"
#include "ops/sampling/cuda/sampling_cuda.h"
#include "ops/sampling/sampling.h"

namespace dsla {
namespace {

using cuda::GreedyChoice;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class GreedyTest : public ::testing::Test {
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

std::vector<GreedyChoice> RunGreedy(const std::vector<float>& logits, int V) {
  const int T = static_cast<int>(logits.size()) / V;
  const DeviceBytes from(logits), to(int64_t{T} * static_cast<int64_t>(sizeof(GreedyChoice))),
      workspace(cuda::GreedyWorkspaceBytes(T, V));
  CheckCuda(cuda::Greedy(from.as<float>(), T, V, to.as<GreedyChoice>(), workspace.as<void>(),
                         workspace.bytes(), nullptr));
  std::vector<GreedyChoice> choices(static_cast<size_t>(T));
  to.Read(choices.data());
  return choices;
}

// Differences l - max of up to 100 are rounded on the way to a weight, which matters only where it
// is not small: 4 roundings of each weight, and those of the sums and the logarithm.
constexpr double kLogprobTolerance = 16 * 0x1p-24;

void ExpectEqualsReference(const std::vector<float>& logits, int V) {
  const std::vector<GreedyChoice> got = RunGreedy(logits, V), again = RunGreedy(logits, V);
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

TEST_F(GreedyTest, EqualsReference) {
  for (const int V : kVocabularies)
    for (const int T : {1, 3, 17}) {
      ExpectEqualsReference(Random(int64_t{T} * V, 1, 3), V);
      ExpectEqualsReference(Random(int64_t{T} * V, 2, 0.01f), V);  // nearly uniform
    }
}

TEST_F(GreedyTest, LargeDifferences) {
  for (const int V : kVocabularies) {
    std::vector<float> logits = Random(4 * int64_t{V}, 3, 40);
    const auto v = static_cast<size_t>(V);
    logits[v - 1] = 3e38f;  // one token has it all
    logits[v] = -3e38f;
    for (size_t i = 2 * v; i < 3 * v; ++i) logits[i] = i % 3 == 0 ? logits[i] : -kInfinity;
    for (size_t i = 3 * v; i < 4 * v; ++i) logits[i] = -kInfinity;
    logits[4 * v - 1] = -2;  // the only one left
    ExpectEqualsReference(logits, V);
    const std::vector<GreedyChoice> got = RunGreedy(logits, V);
    EXPECT_EQ(got[0].token, V - 1);
    EXPECT_EQ(got[0].logprob, 0);
    EXPECT_EQ(got[3].token, V - 1);
    EXPECT_EQ(got[3].logprob, 0);
  }
}

// Logits of few values: the lowest id among equals, wherever blocks, warps and lanes meet; zeros of
// both signs are equal.
TEST_F(GreedyTest, TiesTakeTheLowestId) {
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

TEST_F(GreedyTest, BrokenRows) {
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
    const std::vector<GreedyChoice> got = RunGreedy(logits, V);
    for (size_t t = 0; t < 6; ++t) EXPECT_EQ(got[t].broken, 1) << "row " << t;
    EXPECT_EQ(got[6].broken, V == 1 ? 1 : 0);
    EXPECT_EQ(got[7].broken, 0);
  }
}

// As the sampler on the host says it.
TEST_F(GreedyTest, LogprobIsTheSamplers) {
  constexpr int kV = 49152;
  const std::vector<float> logits = Random(5 * int64_t{kV}, 6, 4);
  const std::vector<GreedyChoice> got = RunGreedy(logits, kV);
  for (size_t t = 0; t < got.size(); ++t) {
    const auto want = LogprobOf(std::span(logits).subspan(t * kV, kV), got[t].token);
    ASSERT_TRUE(want.ok());
    EXPECT_NEAR(got[t].logprob, want->logprob, 2 * kLogprobTolerance * (1 - want->logprob));
  }
}

}  // namespace
}  // namespace dsla
