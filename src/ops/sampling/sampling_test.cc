#include "ops/sampling/sampling.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "ops/sampling/philox.h"
#include "ops/simd/each_target.h"

namespace dsla {
namespace {

using ::testing::ElementsAre;

constexpr uint32_t kSeed = 20250103;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<float> RandomLogits(int64_t V, float spread, std::mt19937& random) {
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(static_cast<size_t>(V));
  for (float& l : logits) l = normal(random);
  return logits;
}

int32_t SampleToken(const SamplingParams& params, std::vector<float> logits, int64_t position) {
  const Sampler sampler(params, static_cast<int64_t>(logits.size()));
  const Expected<Sampler::Choice> choice = sampler.Sample(logits, position);
  EXPECT_TRUE(choice.ok()) << choice.status().message();
  return choice->token;
}

// All tokens that come out at many positions.
std::vector<int32_t> Support(const SamplingParams& params, const std::vector<float>& logits) {
  std::vector<int32_t> tokens;
  for (int64_t position = 0; position < 4000; ++position)
    tokens.push_back(SampleToken(params, logits, position));
  std::sort(tokens.begin(), tokens.end());
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  return tokens;
}

// The known answers published with the generator (Random123, kat_vectors).
TEST(PhiloxTest, KnownAnswers) {
  EXPECT_THAT(Philox4x32({0, 0, 0, 0}, {0, 0}),
              ElementsAre(0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
  EXPECT_THAT(Philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
              ElementsAre(0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
  EXPECT_THAT(
      Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
      ElementsAre(0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1));
}

TEST(ValidateTest, AcceptsTheEndsOfEveryRange) {
  SamplingParams p;
  EXPECT_TRUE(Validate(p, 10).ok());
  p = {.temperature = 0,
       .top_k = 1000,
       .top_p = 1e-6f,
       .min_p = 1,
       .repetition_penalty = 100,
       .presence_penalty = -2,
       .frequency_penalty = 2,
       .logit_bias = {{0, -100.f}, {9, 100.f}}};
  EXPECT_TRUE(Validate(p, 10).ok());
}

std::string MessageOf(const SamplingParams& params) {
  const Status status = Validate(params, 10);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  return status.message();
}

template <typename T>
std::string MessageWith(T SamplingParams::*member, T value) {
  SamplingParams params;
  params.*member = value;
  return MessageOf(params);
}

TEST(ValidateTest, NamesFieldValueAndRange) {
  using P = SamplingParams;
  EXPECT_EQ(MessageWith(&P::temperature, -0.5f), "temperature -0.5: must be from 0 to 100");
  EXPECT_EQ(MessageWith(&P::temperature, kNaN), "temperature nan: must be from 0 to 100");
  EXPECT_EQ(MessageWith(&P::temperature, kInfinity), "temperature inf: must be from 0 to 100");
  EXPECT_EQ(MessageWith(&P::top_k, -1), "top_k -1: must be 0 (off) or positive");
  EXPECT_EQ(MessageWith(&P::top_p, 0.f), "top_p 0: must be above 0 and at most 1");
  EXPECT_EQ(MessageWith(&P::top_p, 1.5f), "top_p 1.5: must be above 0 and at most 1");
  EXPECT_EQ(MessageWith(&P::top_p, kNaN), "top_p nan: must be above 0 and at most 1");
  EXPECT_EQ(MessageWith(&P::min_p, -0.25f), "min_p -0.25: must be from 0 to 1");
  EXPECT_EQ(MessageWith(&P::min_p, 1.25f), "min_p 1.25: must be from 0 to 1");
  EXPECT_EQ(MessageWith(&P::repetition_penalty, 0.f),
            "repetition_penalty 0: must be above 0 and at most 100");
  EXPECT_EQ(MessageWith(&P::repetition_penalty, -1.f),
            "repetition_penalty -1: must be above 0 and at most 100");
  EXPECT_EQ(MessageWith(&P::presence_penalty, 2.5f), "presence_penalty 2.5: must be from -2 to 2");
  EXPECT_EQ(MessageWith(&P::frequency_penalty, -2.5f),
            "frequency_penalty -2.5: must be from -2 to 2");
  using Biases = std::vector<std::pair<int32_t, float>>;
  EXPECT_EQ(MessageWith(&P::logit_bias, Biases{{10, 1.f}}),
            "logit_bias: token 10 is not in the vocabulary of 10");
  EXPECT_EQ(MessageWith(&P::logit_bias, Biases{{-1, 1.f}}),
            "logit_bias: token -1 is not in the vocabulary of 10");
  EXPECT_EQ(MessageWith(&P::logit_bias, Biases{{3, 101.f}}),
            "logit_bias of token 3 is 101: must be from -100 to 100");
  EXPECT_EQ(MessageWith(&P::logit_bias, Biases{{3, 1.f}, {3, 1.f}}),
            "logit_bias: token 3 is given twice");
}

TEST(SamplerTest, GreedyTakesTheLargestAndTheLowestIdOfEquals) {
  EXPECT_EQ(SampleToken({.temperature = 0}, {1, 3, 2, 3, 0}, 7), 1);
  EXPECT_EQ(SampleToken({.temperature = 1e-6f}, {-kInfinity, -9, -kInfinity}, 7), 1);
  std::vector<float> logits(3000, 0.f);
  logits[2999] = logits[1000] = 1;
  EXPECT_EQ(SampleToken({.temperature = 0}, logits, 0), 1000);
}

TEST(SamplerTest, LogprobIsOfTheLogitsAsGiven) {
  std::vector<float> logits = {std::log(1.f), std::log(2.f), std::log(5.f)};
  // The bias changes the choice, not the probability that is reported.
  const Sampler sampler({.temperature = 0, .logit_bias = {{0, 50.f}}}, 3);
  const auto choice = sampler.Sample(logits, 0);
  ASSERT_TRUE(choice.ok());
  EXPECT_EQ(choice->token, 0);
  EXPECT_NEAR(choice->logprob, std::log(1. / 8), 1e-6);
  EXPECT_EQ(logits[0], std::log(1.f));
}

TEST(SamplerTest, RepetitionPenaltyCountsPromptAndOutput) {
  std::vector<float> logits = {4, 3, -1, 2};
  Sampler sampler({.temperature = 0, .repetition_penalty = 2}, 4);
  EXPECT_EQ(sampler.Sample(logits, 0)->token, 0);
  sampler.AddPrompt(std::vector<int32_t>{0, 0, 0});  // 4 -> 2, once
  EXPECT_EQ(sampler.Sample(logits, 0)->token, 1);
  sampler.Accept(1);  // 3 -> 1.5
  EXPECT_EQ(sampler.Sample(logits, 0)->token, 0);
  sampler.Accept(3);  // 2 -> 1
  EXPECT_EQ(sampler.Sample(logits, 0)->token, 0);
  EXPECT_THAT(logits, ElementsAre(4, 3, -1, 2));
  // A negative logit is multiplied: -1 -> -2.
  std::vector<float> negative = {-1, -1.5f};
  Sampler second({.temperature = 0, .repetition_penalty = 2}, 2);
  second.Accept(0);
  EXPECT_EQ(second.Sample(negative, 0)->token, 1);
}

TEST(SamplerTest, PresenceAndFrequencyCountTheOutputAlone) {
  std::vector<float> logits = {2, 1.2f, 0.5f};
  Sampler presence({.temperature = 0, .presence_penalty = 1}, 3);
  presence.AddPrompt(std::vector<int32_t>{0});
  EXPECT_EQ(presence.Sample(logits, 0)->token, 0);
  presence.Accept(0);
  EXPECT_EQ(presence.Sample(logits, 0)->token, 1);
  Sampler frequency({.temperature = 0, .frequency_penalty = 0.5f}, 3);
  frequency.AddPrompt(std::vector<int32_t>{0, 0, 0, 0});
  frequency.Accept(0);
  EXPECT_EQ(frequency.Sample(logits, 0)->token, 0);  // 1.5
  frequency.Accept(0);
  EXPECT_EQ(frequency.Sample(logits, 0)->token, 1);  // 1 against 1.2
}

TEST(SamplerTest, EditsNameEachTokenOnce) {
  using Edit = std::tuple<int32_t, int32_t, float>;
  const auto edits = [](const Sampler& sampler) {
    std::vector<Edit> all;
    for (const LogitEdit& edit : sampler.edits())
      all.emplace_back(edit.token, edit.outputs, edit.bias);
    return all;
  };
  const std::vector<int32_t> prompt = {5, 2, 5};
  Sampler plain({.top_k = 3}, 8);
  plain.AddPrompt(prompt);
  plain.Accept(1);
  EXPECT_TRUE(plain.edits().empty());
  EXPECT_FALSE(plain.counts_output());

  Sampler biased({.logit_bias = {{3, -1.f}, {1, 2.f}}}, 8);
  biased.AddPrompt(prompt);
  biased.Accept(1);
  EXPECT_THAT(edits(biased), ElementsAre(Edit(3, -1, -1.f), Edit(1, -1, 2.f)));
  EXPECT_FALSE(biased.counts_output());

  // Presence and frequency do not need the prompt.
  Sampler frequency({.frequency_penalty = 1, .logit_bias = {{5, 2.f}}}, 8);
  frequency.AddPrompt(prompt);
  frequency.Accept(4);
  frequency.Accept(5);
  frequency.Accept(4);
  EXPECT_THAT(edits(frequency), ElementsAre(Edit(5, 1, 2.f), Edit(4, 2, 0.f)));
  EXPECT_TRUE(frequency.counts_output());

  Sampler repetition({.repetition_penalty = 2, .logit_bias = {{2, 2.f}, {7, 3.f}}}, 8);
  repetition.AddPrompt(prompt);
  repetition.Accept(5);
  repetition.Accept(0);
  EXPECT_THAT(edits(repetition),
              ElementsAre(Edit(2, 0, 2.f), Edit(7, -1, 3.f), Edit(5, 1, 0.f), Edit(0, 1, 0.f)));
  EXPECT_TRUE(repetition.counts_output());
}

// A token may be penalised, biased and ruled out; its logit is as before afterwards, and the
// log-probability that of the model.
TEST(SamplerTest, WhatIsRuledOutIsNotChosen) {
  std::vector<float> logits = {std::log(5.f), std::log(2.f), std::log(1.f)};
  const std::vector<float> before = logits;
  Sampler sampler({.temperature = 0, .presence_penalty = -1, .logit_bias = {{0, 3.f}}}, 3);
  sampler.Accept(0);
  EXPECT_EQ(sampler.Sample(logits, 0)->token, 0);
  const auto choice = sampler.Sample(logits, 0, std::vector<int32_t>{0});
  ASSERT_TRUE(choice.ok());
  EXPECT_EQ(choice->token, 1);
  EXPECT_NEAR(choice->logprob, std::log(2. / 8), 1e-6);
  EXPECT_EQ(logits, before);
  const auto none = sampler.Sample(logits, 0, std::vector<int32_t>{2, 1, 0});
  EXPECT_EQ(none.status().message(), "all 3 logits are -inf: no token can be chosen");
  EXPECT_EQ(logits, before);
  logits[1] = kNaN;
  EXPECT_EQ(sampler.Sample(logits, 0, std::vector<int32_t>{1}).status().message(),
            "the logit of token 1 is NaN");
}

TEST(SamplerTest, SupportOfTheFilters) {
  const std::vector<float> logits = {std::log(0.1f), std::log(0.4f), std::log(0.2f),
                                     std::log(0.3f)};
  EXPECT_THAT(Support({}, logits), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(Support({.top_k = 1}, logits), ElementsAre(1));
  EXPECT_THAT(Support({.top_k = 3}, logits), ElementsAre(1, 2, 3));
  EXPECT_THAT(Support({.top_k = 9}, logits), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(Support({.top_p = 1e-6f}, logits), ElementsAre(1));
  EXPECT_THAT(Support({.top_p = 0.39f}, logits), ElementsAre(1));
  EXPECT_THAT(Support({.top_p = 0.41f}, logits), ElementsAre(1, 3));
  EXPECT_THAT(Support({.top_p = 0.71f}, logits), ElementsAre(1, 2, 3));
  EXPECT_THAT(Support({.top_p = 0.91f}, logits), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(Support({.min_p = 0.6f}, logits), ElementsAre(1, 3));
  EXPECT_THAT(Support({.min_p = 1}, logits), ElementsAre(1));
  // Of the two likeliest, renormalised, the first has 4/7.
  EXPECT_THAT(Support({.top_k = 2, .top_p = 0.55f}, logits), ElementsAre(1));
  EXPECT_THAT(Support({.top_k = 2, .top_p = 0.6f}, logits), ElementsAre(1, 3));
}

// Among equals the lowest ids are kept; all filters leave at least one token.
TEST(SamplerTest, TiesAreBrokenByLowestId) {
  const std::vector<float> equal(200, 0.25f);
  EXPECT_THAT(Support({.top_k = 3}, equal), ElementsAre(0, 1, 2));
  EXPECT_THAT(Support({.top_p = 0.0101f}, equal), ElementsAre(0, 1, 2));
  EXPECT_THAT(Support({.top_p = 1e-30f}, equal), ElementsAre(0));
  EXPECT_EQ(Support({.min_p = 1}, equal).size(), 200u);
}

TEST(SamplerTest, RuledOutTokensAreNeverDrawn) {
  std::vector<float> logits(300, -kInfinity);
  logits[17] = 1, logits[255] = 0.5f;
  for (const SamplingParams& params :
       {SamplingParams{}, SamplingParams{.top_k = 50}, SamplingParams{.top_p = 0.999f},
        SamplingParams{.temperature = 100, .min_p = 0.01f},
        SamplingParams{.logit_bias = {{3, 100.f}}}})
    EXPECT_THAT(Support(params, logits), ElementsAre(17, 255));
}

// The log-probability is that under the softmax over all logits.
TEST(SamplerTest, AMaskLeavesWhatIsAllowed) {
  std::vector<float> logits = {5, 4, 3, 2};
  const std::vector<float> before = logits;
  const Sampler sampler({.temperature = 0}, 4);
  const std::vector<uint32_t> third = {0b0100}, none = {0};
  const auto choice = sampler.Sample(logits, 0, {}, third);
  ASSERT_TRUE(choice.ok());
  EXPECT_EQ(choice->token, 2);
  EXPECT_EQ(choice->logprob, LogprobOf(logits, 2)->logprob);
  EXPECT_EQ(sampler.Sample(logits, 0, {}, none).status().message(),
            "all 4 logits are -inf: no token can be chosen");
  EXPECT_EQ(logits, before);
}

TEST(SamplerTest, BrokenLogitsAreErrors) {
  for (const float temperature : {0.f, 1.f}) {
    const Sampler sampler({.temperature = temperature}, 4);
    const auto message = [&](std::vector<float> logits) {
      const auto choice = sampler.Sample(logits, 0);
      EXPECT_FALSE(choice.ok());
      EXPECT_EQ(choice.status().code(), StatusCode::kInternal);
      const auto top = TopLogprobs(logits, 2);
      EXPECT_FALSE(top.ok());
      EXPECT_EQ(top.status().message(), choice.status().message());
      return choice.status().message();
    };
    EXPECT_EQ(message({0, 1, kNaN, 2}), "the logit of token 2 is NaN");
    EXPECT_EQ(message({0, kInfinity, 0, 2}), "the logit of token 1 is inf");
    EXPECT_EQ(message({-kInfinity, -kInfinity, -kInfinity, -kInfinity}),
              "all 4 logits are -inf: no token can be chosen");
  }
}

// Penalties on the largest finite logits saturate instead of overflowing.
TEST(SamplerTest, ExtremeLogitsStayFinite) {
  constexpr float kMax = std::numeric_limits<float>::max();
  for (const float temperature : {0.f, 1.f, 1e-4f}) {
    std::vector<float> logits = {kMax, -kMax, 0};
    Sampler sampler({.temperature = temperature, .repetition_penalty = 0.5f}, 3);
    sampler.Accept(0);
    sampler.Accept(1);
    const auto choice = sampler.Sample(logits, 3);
    ASSERT_TRUE(choice.ok());
    EXPECT_EQ(choice->token, 0);
    EXPECT_THAT(logits, ElementsAre(kMax, -kMax, 0));
  }
}

SamplingParams RandomParams(int64_t V, std::mt19937& random) {
  const auto uniform = [&](float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(random);
  };
  const auto one_in = [&](int n) { return random() % static_cast<uint32_t>(n) == 0; };
  SamplingParams p;
  p.temperature = one_in(8) ? 0 : std::exp(uniform(-2, 1.5f));
  if (one_in(2)) p.top_k = one_in(4) ? 5000 : 1 + static_cast<int32_t>(random() % 60);
  if (one_in(2)) p.top_p = uniform(0.01f, 1);
  if (one_in(3)) p.min_p = std::exp(uniform(-8, 0));
  if (one_in(3)) p.repetition_penalty = uniform(0.5f, 2);
  if (one_in(3)) p.presence_penalty = uniform(-2, 2);
  if (one_in(3)) p.frequency_penalty = uniform(-2, 2);
  for (int i = 0; one_in(2) && i < 5; ++i)
    p.logit_bias.emplace_back(static_cast<int32_t>(V * i / 5 + static_cast<int64_t>(random() % 2)) %
                                  static_cast<int32_t>(V),
                              uniform(-10, 10));
  p.seed = random() | uint64_t{random()} << 32;
  return p;
}

TEST(SamplerTest, EqualsReference) {
  ForEachTarget([] {
    std::mt19937 random(kSeed);
    int compared = 0, skipped = 0;
    for (int trial = 0; trial < 1000; ++trial) {
      const int64_t V = trial % 100 == 0  ? 70000  // more than 64 logits per block
                        : trial % 20 == 0 ? 5000
                                          : 11 + static_cast<int64_t>(random() % 700);
      std::vector<float> logits = RandomLogits(V, trial % 3 == 0 ? 0.3f : 3.f, random);
      if (trial % 4 == 0)  // many equals
        for (float& l : logits) l = std::round(l * 2) / 2;
      if (trial % 5 == 0)
        for (size_t i = 0; i < logits.size(); i += 3) logits[i] = -kInfinity;
      const SamplingParams params = RandomParams(V, random);
      ASSERT_TRUE(Validate(params, V).ok()) << Validate(params, V).message();
      std::vector<int32_t> prompt, output;
      for (int i = 0; i < 20; ++i)
        (i < 10 ? prompt : output)
            .push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(i % 2 ? V : 4)));
      Sampler sampler(params, V);
      sampler.AddPrompt(prompt);
      for (const int32_t token : output) sampler.Accept(token);
      const int64_t position = static_cast<int64_t>(random());
      const std::vector<int32_t> ruled_out =
          trial % 3 == 0 ? std::vector<int32_t>{7, output[0], prompt[1]} : std::vector<int32_t>();
      std::vector<uint32_t> allowed;
      if (trial % 7 == 0) {
        allowed.resize(static_cast<size_t>((V + 31) / 32));
        for (uint32_t& word : allowed) word = static_cast<uint32_t>(random() & random());
        allowed[0] |= 0x17;
      }
      double margin = 0;
      const auto want =
          SampleRef(params, prompt, output, logits, position, &margin, ruled_out, allowed);
      const std::vector<float> before = logits;
      const auto got = sampler.Sample(logits, position, ruled_out, allowed);
      ASSERT_TRUE(got.ok() && want.ok());
      if (!allowed.empty()) {
        ASSERT_EQ(allowed[static_cast<size_t>(got->token / 32)] >> got->token % 32 & 1, 1u);
      }
      EXPECT_EQ(logits, before);
      // fp32 sums decide differently where the reference was this close to
      // deciding differently.
      if (margin < 2e-6) {
        ++skipped;
        continue;
      }
      ++compared;
      ASSERT_EQ(got->token, want->token) << "trial " << trial << ", margin " << margin;
      EXPECT_NEAR(got->logprob, want->logprob, 2e-6 * (1 + std::abs(want->logprob)));
    }
    EXPECT_LT(skipped, 10);
    EXPECT_GT(compared, 900);
  });
}

// Chi-square over the tokens that are expected at least 20 times, the others
// together as one.
double ChiSquare(const std::vector<int>& counts, const std::vector<double>& probabilities,
                 int* cells) {
  int draws = 0;
  for (const int c : counts) draws += c;
  double chi = 0, rest_expected = 0, rest_count = 0;
  *cells = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    const double expected = probabilities[i] * draws;
    if (expected < 20) {
      rest_expected += expected;
      rest_count += counts[i];
      continue;
    }
    chi += (counts[i] - expected) * (counts[i] - expected) / expected;
    ++*cells;
  }
  if (rest_expected > 0) {
    chi += (rest_count - rest_expected) * (rest_count - rest_expected) / rest_expected;
    ++*cells;
  }
  return chi;
}

void CheckStatistics(const SamplingParams& params, const std::vector<float>& logits,
                     const std::vector<double>& probabilities) {
  std::vector<int> counts(logits.size());
  std::vector<float> work = logits;
  const Sampler sampler(params, static_cast<int64_t>(logits.size()));
  for (int64_t position = 0; position < 100000; ++position)
    ++counts[static_cast<size_t>(sampler.Sample(work, position)->token)];
  for (size_t i = 0; i < counts.size(); ++i)
    EXPECT_TRUE(probabilities[i] > 0 || counts[i] == 0) << "token " << i;
  int cells = 0;
  const double chi = ChiSquare(counts, probabilities, &cells);
  ASSERT_GT(cells, 5);
  // Mean cells - 1, variance 2 (cells - 1): within 4 standard deviations either
  // way, as too even a count is as wrong as too uneven a one.
  EXPECT_NEAR(chi, cells - 1, 4 * std::sqrt(2. * (cells - 1)));
}

TEST(SamplerTest, DrawsFollowTheDistribution) {
  std::mt19937 random(kSeed + 1);
  const std::vector<float> logits = RandomLogits(300, 1.5f, random);
  const double temperature = 0.8f;
  std::vector<double> p(logits.size());
  const auto softmax = [&] {
    double total = 0;
    for (const double x : p) total += x;
    for (double& x : p) x /= total;
  };
  for (size_t i = 0; i < p.size(); ++i) p[i] = std::exp(logits[i] / temperature);
  softmax();
  CheckStatistics({.temperature = 0.8f, .seed = kSeed}, logits, p);

  std::vector<double> sorted = p;
  std::sort(sorted.rbegin(), sorted.rend());
  for (double& x : p) x = x >= sorted[39] ? x : 0;
  softmax();
  CheckStatistics({.temperature = 0.8f, .top_k = 40, .seed = kSeed + 1}, logits, p);

  const double least = 0.1f * *std::max_element(p.begin(), p.end());
  for (double& x : p) x = x >= least ? x : 0;
  softmax();
  CheckStatistics({.temperature = 0.8f, .top_k = 40, .min_p = 0.1f, .seed = kSeed + 2}, logits, p);
}

// Seeds and positions are both needed, and nothing else counts.
TEST(SamplerTest, DrawsDependOnSeedAndPositionAlone) {
  std::mt19937 random(kSeed + 2);
  std::vector<float> logits = RandomLogits(1000, 1, random);
  const SamplingParams params{.top_p = 0.95f, .seed = 5};
  Sampler used(params, 1000);
  std::vector<int32_t> forward(200), other_seed(200);
  for (int64_t t = 0; t < 200; ++t) {
    forward[static_cast<size_t>(t)] = used.Sample(logits, t)->token;
    used.Accept(forward[static_cast<size_t>(t)]);
    other_seed[static_cast<size_t>(t)] = SampleToken({.top_p = 0.95f, .seed = 6}, logits, t);
  }
  EXPECT_NE(forward, other_seed);
  EXPECT_GT(std::set<int32_t>(forward.begin(), forward.end()).size(), 50u);
  for (int64_t t = 199; t >= 0; --t)
    EXPECT_EQ(SampleToken(params, logits, t), forward[static_cast<size_t>(t)]) << t;
}

TEST(TopLogprobsTest, LikeliestFirst) {
  const std::vector<float> logits = {std::log(1.f), std::log(4.f), -kInfinity, std::log(1.f),
                                     std::log(2.f)};
  const auto top = TopLogprobs(logits, 10);
  ASSERT_TRUE(top.ok());
  std::vector<int32_t> tokens;
  for (const Sampler::Choice& c : *top) tokens.push_back(c.token);
  EXPECT_THAT(tokens, ElementsAre(1, 4, 0, 3));
  EXPECT_NEAR((*top)[0].logprob, std::log(0.5), 1e-6);
  EXPECT_NEAR((*top)[3].logprob, std::log(0.125), 1e-6);
  EXPECT_EQ(TopLogprobs(logits, 2)->size(), 2u);
  EXPECT_TRUE(TopLogprobs(logits, 0)->empty());
}

TEST(TopLogprobsTest, EqualsASort) {
  std::mt19937 random(kSeed + 3);
  for (const int64_t V : {1, 5, 64, 65, 5000, 70000}) {
    const std::vector<float> logits = RandomLogits(V, 2, random);
    std::vector<float> sorted = logits;
    std::sort(sorted.rbegin(), sorted.rend());
    for (const int n : {1, 5, 20, 1500}) {
      const auto top = TopLogprobs(logits, n);
      ASSERT_EQ(top->size(), static_cast<size_t>(std::min<int64_t>(n, V)));
      for (size_t i = 0; i < top->size(); ++i)
        EXPECT_EQ(logits[static_cast<size_t>((*top)[i].token)], sorted[i]);
      // One value for a token, however it was asked for.
      std::vector<float> copy = logits;
      const auto greedy = Sampler({.temperature = 0}, V).Sample(copy, 0);
      EXPECT_EQ(greedy->logprob, (*top)[0].logprob);
      for (const auto& choice : *top)
        ASSERT_EQ(LogprobOf(logits, choice.token)->logprob, choice.logprob);
    }
  }
}

}  // namespace
}  // namespace dsla
