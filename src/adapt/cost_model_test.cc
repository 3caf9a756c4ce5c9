#include "adapt/cost_model.h"

#include <gmock/gmock.h>

#include <random>

#include "adapt/least_squares.h"

namespace dsla {
namespace {

using testing::HasSubstr;

// A 30-layer model on two cores, about.
CostModel Truth() {
  return CostModel::FromCoefficients(30, {2e-2, 5e-5, 6e-5, 8e-9}, {8e-3, 4e-5, 5e-5, 2.5e-8},
                                     {2e-4, 3.5e-6});
}

CostMeasurements Measure(const CostModel& truth, CostMeasurements plan, double noise,
                         unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> factor(1 - noise, 1 + noise);
  for (PrefillPoint& p : plan.prefill) {
    p.seconds = truth.PrefillSeconds(p.level, p.tokens, p.context) * factor(random);
  }
  for (DecodePoint& p : plan.decode) p.seconds = truth.DecodeSeconds(p.rows) * factor(random);
  for (FoldPoint& p : plan.fold) {
    p.seconds = truth.FoldSeconds(p.from, p.to, p.length) * factor(random);
  }
  return plan;
}

CalibrationLimits SomeLimits() {
  return {.layers = 30,
          .top_level = 22,
          .max_positions = 8192,
          .memory_tokens = 100000,
          .tokens_per_second = 500};
}

// Largest relative difference of all predictions over levels and lengths.
double Difference(const CostModel& a, const CostModel& b, int64_t shortest = 0) {
  double worst = 0;
  const auto differ = [&](double x, double y) { worst = std::max(worst, std::abs(x / y - 1)); };
  for (const int level : {0, 5, 11, 22}) {
    for (const int64_t length : {0, 100, 256, 1000, 8000}) {
      if (length < shortest) continue;
      differ(a.PrefillSeconds(level, 256, length), b.PrefillSeconds(level, 256, length));
      const std::vector<DecodeRow> rows{{level, length}, {0, 500}};
      differ(a.DecodeSeconds(rows), b.DecodeSeconds(rows));
      if (level > 0) differ(a.FoldSeconds(0, level, length), b.FoldSeconds(0, level, length));
    }
  }
  return worst;
}

TEST(LeastSquares, ExactWhereItCanBe) {
  const std::array<double, 4> x = FitNonNegative({{{1, 2, 0, 0}, 8}, {{1, 5, 0, 0}, 17}});
  EXPECT_NEAR(x[0], 2, 1e-9);
  EXPECT_NEAR(x[1], 3, 1e-9);
  EXPECT_EQ(x[2], 0);
}

TEST(LeastSquares, NeverNegative) {
  // The unconstrained line falls: 10 at 1, 4 at 2. The best x0 + x1 f with x >= 0 has x1 = 0.
  const std::array<double, 4> x = FitNonNegative({{{1, 1, 0, 0}, 10}, {{1, 2, 0, 0}, 4}});
  EXPECT_EQ(x[1], 0);
  // Relative errors: (c/10 - 1)^2 + (c/4 - 1)^2 is least at (1/10 + 1/4) / (1/100 + 1/16).
  EXPECT_NEAR(x[0], 0.35 / 0.0725, 1e-9);
}

// Against random search: no other x >= 0 near it or far from it does better.
TEST(LeastSquares, NoPointBeatsIt) {
  constexpr unsigned kSeed = 7;
  std::mt19937 random(kSeed);
  std::uniform_real_distribution<double> u(0, 1);
  for (int trial = 0; trial < 50; ++trial) {
    std::vector<Observation> data(6);
    for (Observation& o : data) {
      for (double& f : o.features) f = u(random);
      o.value = 0.1 + u(random);
    }
    const auto error = [&](const std::array<double, 4>& x) {
      double sum = 0;
      for (const Observation& o : data) {
        double p = 0;
        for (int i = 0; i < 4; ++i) p += o.features[i] * x[i];
        sum += (p / o.value - 1) * (p / o.value - 1);
      }
      return sum;
    };
    const std::array<double, 4> x = FitNonNegative(data);
    const double best = error(x);
    for (int i = 0; i < 4; ++i) ASSERT_GE(x[i], 0) << "seed " << kSeed << " trial " << trial;
    for (int probe = 0; probe < 300; ++probe) {
      std::array<double, 4> y;
      const double step = probe % 2 ? 0.01 : 1.0;
      for (int i = 0; i < 4; ++i) y[i] = std::max(0.0, x[i] + step * (2 * u(random) - 1));
      ASSERT_GE(error(y), best - 1e-12) << "seed " << kSeed << " trial " << trial;
    }
  }
}

TEST(CostModel, FitRecoversWhatTheMeasurementsFollow) {
  const auto fit = CostModel::Fit(30, Measure(Truth(), CalibrationPlan(SomeLimits()), 0, 1));
  ASSERT_TRUE(fit.ok()) << fit.status().message();
  EXPECT_LT(Difference(*fit, Truth()), 1e-6);
  EXPECT_LT(fit->max_error(), 1e-6);
}

TEST(CostModel, NoiseStaysBounded) {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    const auto fit =
        CostModel::Fit(30, Measure(Truth(), CalibrationPlan(SomeLimits()), 0.03, seed));
    ASSERT_TRUE(fit.ok());
    EXPECT_LT(fit->max_error(), 0.06) << "seed " << seed;
    // Also where it extrapolates, to twice the longest context measured.
    EXPECT_LT(Difference(*fit, Truth(), 256), 0.25) << "seed " << seed;
  }
}

TEST(CostModel, WithoutAnAdapter) {
  CalibrationLimits limits = SomeLimits();
  limits.top_level = 0;
  const CostMeasurements plan = CalibrationPlan(limits);
  EXPECT_TRUE(plan.fold.empty());
  const auto fit = CostModel::Fit(30, Measure(Truth(), plan, 0, 1));
  ASSERT_TRUE(fit.ok());
  EXPECT_NEAR(fit->PrefillSeconds(0, 512, 2000) / Truth().PrefillSeconds(0, 512, 2000), 1, 1e-6);
  EXPECT_EQ(fit->FoldSeconds(0, 3, 1000), 0);
}

TEST(CostModel, PromptIsTheSumOfItsChunks) {
  const CostModel truth = Truth();
  double sum = 0;
  for (int64_t at = 0; at < 1300; at += 512) {
    sum += truth.PrefillSeconds(4, std::min<int64_t>(512, 1300 - at), 100 + at);
  }
  EXPECT_NEAR(truth.PromptSeconds(4, 1300, 100, 512), sum, 1e-12 * sum);
  EXPECT_EQ(truth.PromptSeconds(4, 0, 100, 512), 0);
}

TEST(CostModel, RowsAddUp) {
  const CostModel truth = Truth();
  const std::vector<DecodeRow> rows{{0, 100}, {22, 5000}, {3, 7}};
  double sum = truth.step_seconds();
  for (const DecodeRow& row : rows) sum += truth.RowSeconds(row.level, row.length);
  EXPECT_NEAR(truth.DecodeSeconds(rows), sum, 1e-15);
  EXPECT_EQ(truth.DecodeSeconds({}), 0);
}

TEST(CostModel, RefusesWhatCannotBe) {
  CostMeasurements measured = Measure(Truth(), CalibrationPlan(SomeLimits()), 0, 1);
  measured.decode[0].seconds = 0;
  EXPECT_THAT(CostModel::Fit(30, measured).status().message(), HasSubstr("decode step took 0 s"));
  measured.decode.resize(1);
  EXPECT_THAT(CostModel::Fit(30, measured).status().message(), HasSubstr("1 decode points"));
  EXPECT_FALSE(CostModel::Fit(0, measured).ok());
}

TEST(CostModel, JsonRoundTrip) {
  const auto again = CostModel::FromJson(Truth().ToJson());
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(again->ToJson(), Truth().ToJson());
  EXPECT_EQ(Difference(*again, Truth()), 0);
}

TEST(CostModel, JsonErrors) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "not a JSON object"},
      {"[]", "not a JSON object"},
      {"{}", "'layers'"},
      {R"({"layers":-3})", "'layers'"},
      {R"({"layers":3})", "'prefill'"},
      {R"({"layers":3,"prefill":[1,2,3]})", "'prefill'"},
      {R"({"layers":3,"prefill":[1,2,3,"4"]})", "'prefill'"},
      {R"({"layers":3,"prefill":[1,2,3,-4]})", "'prefill' has -4"},
      {R"({"layers":3,"prefill":[1,2,3,4],"decode":[1,2,3,4]})", "'fold'"},
  };
  for (const auto& [text, message] : cases) {
    EXPECT_THAT(CostModel::FromJson(text).status().message(), HasSubstr(message)) << text;
  }
}

TEST(CostModel, FactorsByAnother) {
  const CostModel truth = Truth();
  const CostModel slow = truth.Scaled({.prefill = 4, .decode = 2, .fold = 0.5});
  // Where the other one was wrong, nothing is left; where both say the same, all of it.
  const CostFactors found = FactorsBy(slow, truth, {.prefill = 4, .decode = 1, .fold = 0.5});
  EXPECT_NEAR(found.prefill, 1, 1e-9);
  EXPECT_NEAR(found.decode, 0.5, 1e-9);
  EXPECT_NEAR(found.fold, 1, 1e-9);
  EXPECT_EQ(FactorsBy(truth, truth, {.prefill = 3, .decode = 1, .fold = 1}).prefill, 3);
  const CostModel nothing = truth.Scaled({.prefill = 1, .decode = 1, .fold = 0});
  EXPECT_EQ(FactorsBy(nothing, truth, {.prefill = 1, .decode = 1, .fold = 3}).fold, 3);
  EXPECT_EQ(FactorsBy(truth, nothing, {.prefill = 1, .decode = 1, .fold = 3}).fold, 3);
}

TEST(CalibrationPlan, FitsTheLimits) {
  for (const int64_t memory : {3, 100, 1000, 10000, 1000000}) {
    for (const int64_t positions : {16, 512, 2048, 131072}) {
      for (const double rate : {1.0, 100.0, 500.0, 1e6}) {
        const CostMeasurements plan = CalibrationPlan({.layers = 30,
                                                       .top_level = 22,
                                                       .max_positions = positions,
                                                       .memory_tokens = memory,
                                                       .tokens_per_second = rate});
        for (const PrefillPoint& p : plan.prefill) {
          EXPECT_GE(p.tokens, 1);
          EXPECT_LE(p.tokens, 512);
          EXPECT_LE(p.tokens + p.context, std::max<int64_t>(positions, 1));
          EXPECT_LE(p.tokens + p.context, std::max<int64_t>(memory / 2, 1));
        }
        if (std::min(memory / 3, positions) >= 8) {
          EXPECT_FALSE(plan.fold.empty()) << memory << " " << positions << " " << rate;
          EXPECT_GT(plan.prefill[2].context, 0);
        }
      }
    }
  }
}

TEST(CalibrationPlan, MeasuresBothKindsAndLengths) {
  const CostMeasurements plan = CalibrationPlan(SomeLimits());
  EXPECT_EQ(plan.prefill.size(), 6u);
  EXPECT_EQ(plan.decode.size(), 6u);
  EXPECT_EQ(plan.fold.size(), 2u);
  int64_t tokens = 0;
  for (const PrefillPoint& p : plan.prefill) tokens += p.tokens;
  EXPECT_LT(static_cast<double>(tokens), 1.5 * SomeLimits().tokens_per_second);
}

TEST(CostModel, SummaryIsOneLine) {
  EXPECT_EQ(Truth().Summary().find('\n'), std::string::npos);
  EXPECT_EQ(CostModel().Summary().find("nan"), std::string::npos);
}

}  // namespace
}  // namespace dsla
