#include "adapt/cost_correction.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace dsla {
namespace {

constexpr int kLayers = 30;

CostModel Model() {
  return CostModel::FromCoefficients(kLayers, {2e-2, 5e-5, 6e-5, 1.6e-8},
                                     {8e-3, 4e-5, 4.5e-5, 1.8e-8}, {2e-4, 3.7e-6});
}

StepTime DecodeStep(int rows, const CostFactors& real) {
  StepTime step;
  step.decode.assign(rows, {.level = 0, .length = 500});
  step.seconds = real.decode * PredictStep(Model(), step).decode;
  return step;
}

StepTime PrefillStep(int decode_rows, const CostFactors& real) {
  StepTime step;
  step.prefill = {{.level = 0, .tokens = 400, .context = 64},
                  {.level = 10, .tokens = 100, .context = 0}};
  step.decode.assign(decode_rows, {.level = 0, .length = 500});
  const StepParts parts = PredictStep(Model(), step);
  step.seconds = real.prefill * parts.prefill + real.decode * parts.decode;
  return step;
}

TEST(CostCorrection, AStepIsTheSumOfItsParts) {
  const CostModel model = Model();
  StepTime step;
  step.decode = {{.level = 0, .length = 100}, {.level = 22, .length = 900}};
  EXPECT_NEAR(PredictStep(model, step).decode, model.DecodeSeconds(step.decode), 1e-12);
  EXPECT_EQ(PredictStep(model, step).prefill, 0);
  // Two chunks of a step read the weights once, and the decode rows beside them not again.
  step.prefill = {{.level = 0, .tokens = 64, .context = 0},
                  {.level = 5, .tokens = 8, .context = 64}};
  const StepParts parts = PredictStep(model, step);
  EXPECT_NEAR(parts.prefill,
              model.PrefillSeconds(0, 64, 0) + model.PrefillSeconds(5, 8, 64) -
                  model.prefill_step_seconds(),
              1e-12);
  EXPECT_NEAR(parts.decode, model.RowSeconds(0, 100) + model.RowSeconds(22, 900), 1e-12);
  EXPECT_EQ(PredictStep(model, {}).decode, 0);
}

TEST(CostCorrection, FollowsEachKindFromAnyStart) {
  for (const double wrong : {1.0 / 16, 0.2, 1.0, 5.0, 16.0}) {
    const CostFactors real{.prefill = wrong, .decode = 1 / wrong, .fold = 3};
    CostCorrection correction;
    for (const StepTime& step : {PrefillStep(0, real), DecodeStep(8, real)}) {
      for (int i = 0; i < 10 || i * step.seconds < 10; ++i) correction.ObserveStep(Model(), step);
    }
    for (int i = 0; i < 20; ++i) {
      correction.ObserveFold(
          Model(),
          {.from = 0, .to = 4, .length = 3000, .seconds = 3 * Model().FoldSeconds(0, 4, 3000)});
    }
    EXPECT_NEAR(correction.factors().prefill / real.prefill, 1, 0.1) << wrong;
    EXPECT_NEAR(correction.factors().decode / real.decode, 1, 0.1) << wrong;
    EXPECT_NEAR(correction.factors().fold / real.fold, 1, 0.1) << wrong;
    const CostModel scaled = Model().Scaled(correction.factors());
    EXPECT_NEAR(scaled.DecodeSeconds(DecodeStep(8, real).decode) / DecodeStep(8, real).seconds, 1,
                0.1);
  }
}

TEST(CostCorrection, StepsOfBothKindsAddUp) {
  const CostFactors real{.prefill = 4, .decode = 4, .fold = 1};
  CostCorrection correction;
  for (int i = 0; i < 20; ++i) correction.ObserveStep(Model(), PrefillStep(16, real));
  const StepTime step = PrefillStep(16, real);
  const StepParts parts = PredictStep(Model().Scaled(correction.factors()), step);
  EXPECT_NEAR((parts.prefill + parts.decode) / step.seconds, 1, 0.05);
}

TEST(CostCorrection, StepsThatWereHeldUpMoveItLittle) {
  constexpr unsigned kSeed = 3;
  std::mt19937 random(kSeed);
  CostCorrection correction;
  for (int i = 0; i < 2000; ++i) {
    StepTime step = DecodeStep(4, {});
    if (random() % 20 == 0) step.seconds *= 1000;
    correction.ObserveStep(Model(), step);
    ASSERT_GE(correction.factors().decode, 0.999) << "seed " << kSeed << " step " << i;
    ASSERT_LE(correction.factors().decode, 1.5) << "seed " << kSeed << " step " << i;
  }
  EXPECT_LT(correction.factors().decode, 1.2);
  EXPECT_EQ(correction.factors().prefill, 1);
}

// `seconds` of decode steps that take `factor` times what the model says.
void Decode(CostCorrection& correction, double factor, double seconds) {
  const StepTime step = DecodeStep(8, {.prefill = 1, .decode = factor, .fold = 1});
  for (double done = 0; done < seconds; done += step.seconds) correction.ObserveStep(Model(), step);
}

TEST(CostCorrection, DoubtsWhatIsFarOffForLong) {
  for (const double factor : {1.0 / 3, 3.0}) {
    CostCorrection correction;
    Decode(correction, factor, 15);
    EXPECT_FALSE(correction.doubtful()) << factor << ": not yet";
    Decode(correction, factor, 15);
    EXPECT_TRUE(correction.doubtful()) << factor;
    Decode(correction, 1, 15);
    EXPECT_FALSE(correction.doubtful()) << factor << ": it has come back";
  }
  CostCorrection near, hit;
  for (int i = 0; i < 20; ++i) {
    Decode(near, i % 2 == 0 ? 1.8 : 0.6, 10);
    EXPECT_FALSE(near.doubtful()) << "such is the work";
    Decode(hit, i % 2 == 0 ? 4 : 1, 10);
    EXPECT_FALSE(hit.doubtful()) << "what disturbs comes and goes";
  }
}

// Of a kind that was seen for a moment nothing is known, however long others run.
TEST(CostCorrection, DoubtTakesWorkOfItsKind) {
  CostCorrection correction;
  const double seconds = 30 * Model().FoldSeconds(0, 4, 3000);
  for (int i = 0; i < 3; ++i)
    correction.ObserveFold(Model(), {.from = 0, .to = 4, .length = 3000, .seconds = seconds});
  ASSERT_GT(correction.factors().fold, 2);
  Decode(correction, 1, 100);
  EXPECT_FALSE(correction.doubtful());
}

TEST(CostCorrection, FactorsThatCameBackAreNotDoubtful) {
  CostCorrection correction({.prefill = 1, .decode = 0.3, .fold = 1});
  Decode(correction, 0.3, 60);
  EXPECT_FALSE(correction.doubtful()) << "as by the measurement before";
  Decode(correction, 1, 60);
  EXPECT_FALSE(correction.doubtful()) << "as measured";
  Decode(correction, 3, 60);
  EXPECT_TRUE(correction.doubtful()) << "neither";
}

TEST(CostCorrection, WhatSaysNothingChangesNothing) {
  CostCorrection correction;
  StepTime step = DecodeStep(4, {});
  for (const double seconds : {0.0, -1.0, 1e-12, double{NAN}, double{INFINITY}}) {
    step.seconds = seconds;
    correction.ObserveStep(Model(), step);
    correction.ObserveFold(Model(), {.from = 0, .to = 3, .length = 100, .seconds = seconds});
  }
  correction.ObserveStep(Model(), {.prefill = {}, .decode = {}, .seconds = 1});
  correction.ObserveStep(CostModel(), DecodeStep(4, {}));  // of a model that was never measured
  const CostFactors factors = correction.factors();
  EXPECT_EQ(factors.prefill, 1);
  EXPECT_EQ(factors.decode, 1);
  EXPECT_EQ(factors.fold, 1);
}

}  // namespace
}  // namespace dsla
