// Settings, schedules, order and the start of the parameters.
#include "distill/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "distill/order.h"
#include "distill/parameters.h"
#include "distill/schedule.h"
#include "format/testing/file_writers.h"

namespace dsla {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::TempDir;

ModelConfig SmallConfig() {
  ModelConfig config;
  config.L = 6, config.C = 24, config.H = 4, config.Hkv = 2, config.D = 8;
  config.ffn = 16, config.V = 64, config.max_position = 512;
  return config;
}

DistillConfig SmallSettings() {
  DistillConfig config;
  config.lengths = {64};
  config.length_shares = {1};
  config.tokens_per_step = 256;
  return config;
}

TEST(ConfigTest, TomlRoundTripKeepsEveryValue) {
  TempDir folder;
  DistillConfig config = SmallSettings();
  config.align_lr = 0.125;
  config.order_layers = {3, 1, 2};
  config.chain_method = "chained";
  const std::string path = folder.Write("a.toml", WriteToml(config));
  DistillConfig read;
  const Status status = ReadToml(path, &read);
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(WriteToml(read), WriteToml(config));
  EXPECT_NE(WriteToml(read), WriteToml(DistillConfig()));
}

TEST(ConfigTest, TomlErrorsNameFileLineAndKey) {
  TempDir folder;
  const auto message = [&](const std::string& text) {
    DistillConfig config;
    return ReadToml(folder.Write("bad.toml", text), &config).message();
  };
  EXPECT_THAT(message("[align]\ntokens = 5\nspeed = 3\n"), HasSubstr("line 3: unknown key"));
  EXPECT_THAT(message("[align]\ntokens = \"many\"\n"), HasSubstr("'align.tokens' has the wrong"));
  EXPECT_THAT(message("[adapter]\nwindow = 5000000000\n"), HasSubstr("wrong type"));
  EXPECT_THAT(message("tokens = 1\n"), HasSubstr("outside a table"));
  EXPECT_THAT(message("[align\n"), HasSubstr("line 1"));
  EXPECT_THAT(message("[align]\ntokens = 5\nspeed = 3\n"), HasSubstr("bad.toml"));
}

TEST(ConfigTest, FlagsAreParsedWhole) {
  DistillConfig config;
  for (const ConfigKey& key : ConfigKeys(config)) {
    if (key.flag() == "--data-lengths") {
      EXPECT_TRUE(SetFromText(key, "64,128").ok());
      EXPECT_THAT(SetFromText(key, "64,").message(), HasSubstr("--data-lengths: '64,'"));
    }
    if (key.flag() == "--align-lr") {
      EXPECT_TRUE(SetFromText(key, "1e-2").ok());
      EXPECT_FALSE(SetFromText(key, "1e-2x").ok());
      EXPECT_FALSE(SetFromText(key, "nan").ok());
    }
    if (key.flag() == "--adapter-window") {
      EXPECT_FALSE(SetFromText(key, "3.5").ok());
    }
  }
  EXPECT_THAT(config.lengths, ElementsAre(64, 128));  // what was refused changed nothing
  EXPECT_EQ(config.align_lr, 1e-2);
}

TEST(ConfigTest, CompleteFillsLevelsAndRefusesWhatDoesNotFit) {
  const ModelConfig model = SmallConfig();
  DistillConfig config = SmallSettings();
  ASSERT_TRUE(CompleteConfig(model, &config).ok());
  EXPECT_EQ(config.top_level, 4);
  EXPECT_THAT(config.evaluate_levels, ElementsAre(1, 3, 4, 6));
  const auto refused = [&](auto change) {
    DistillConfig bad = SmallSettings();
    change(bad);
    return CompleteConfig(model, &bad).message();
  };
  EXPECT_THAT(refused([](auto& c) { c.recall_share = 1.5; }), HasSubstr("data.recall_share"));
  EXPECT_THAT(refused([](auto& c) { c.lengths = {1024}; }), HasSubstr("data.lengths: 1024"));
  EXPECT_THAT(refused([](auto& c) { c.length_shares = {}; }), HasSubstr("data.length_shares"));
  EXPECT_THAT(refused([](auto& c) { c.chain_levels = {7}; }), HasSubstr("chain.levels: 7"));
  EXPECT_THAT(refused([](auto& c) { c.order_method = "best"; }), HasSubstr("order.method: 'best'"));
  EXPECT_THAT(refused([](auto& c) {
                c.order_method = "given", c.order_layers = {0, 1, 1};
              }),
              HasSubstr("order.layers"));
  EXPECT_THAT(refused([](auto& c) { c.align_lr = -1; }), HasSubstr("align.lr"));
  EXPECT_THAT(ApplyRecipe("best", &config).message(), HasSubstr("recipe 'best'"));
}

TEST(ConfigTest, OperatorsTakeOnlyWhatTheyKnow) {
  const auto complete = [](auto change) {
    DistillConfig config;
    config.lengths = {64};
    config.length_shares = {1};
    change(config);
    ModelConfig model = SmallConfig();
    model.max_position = 4096;
    const Status status = CompleteConfig(model, &config);
    return std::pair{status.message(), config.adapter.op};
  };
  EXPECT_EQ(complete([](auto&) {}).second, Operator::kDsla);
  EXPECT_THAT(complete([](auto& c) { c.op = "fast"; }).first,
              HasSubstr("adapter.operator: 'fast' is not one of dsla, window, paper"));
  EXPECT_EQ(complete([](auto& c) { c.op = "window"; }).second, Operator::kWindow);
  EXPECT_THAT(complete([](auto& c) { c.op = "window", c.adapter.window = 0; }).first,
              HasSubstr("adapter.window"));
  EXPECT_THAT(complete([](auto& c) { c.op = "paper"; }).first, HasSubstr("adapter.window"));
  EXPECT_THAT(complete([](auto& c) { c.op = "paper", c.adapter.window = 0; }).first,
              HasSubstr("chain.switch_share"));
  const auto [message, op] =
      complete([](auto& c) { EXPECT_TRUE(ApplyRecipe("paper-operator", &c).ok()); });
  EXPECT_EQ(message, "");
  EXPECT_EQ(op, Operator::kPaper);
}

TEST(ConfigTest, StageSettingsHoldWhatTheStageDependsOnAlone) {
  DistillConfig config = SmallSettings(), other = config;
  other.chain_lr = 1;
  other.checkpoint_seconds = 5;
  EXPECT_EQ(StageSettings(config, 'a'), StageSettings(other, 'a'));
  EXPECT_NE(StageSettings(config, 'c'), StageSettings(other, 'c'));
  other = config;
  other.align_lr = 1;
  EXPECT_EQ(StageSettings(config, 'i'), StageSettings(other, 'i'));
  EXPECT_NE(StageSettings(config, 'c'), StageSettings(other, 'c'));
}

TEST(ScheduleTest, LearningRateRisesThenFallsToTheFloor) {
  EXPECT_DOUBLE_EQ(LearningRateShare(0, 100, 10, 0.05), 0.1);
  EXPECT_GT(LearningRateShare(9, 100, 10, 0.05), 0.95);
  EXPECT_NEAR(LearningRateShare(100, 100, 10, 0.05), 0.05, 1e-12);
  for (int step = 10; step < 100; ++step)
    EXPECT_GT(LearningRateShare(step, 100, 10, 0.05), LearningRateShare(step + 1, 100, 10, 0.05));
}

TEST(ScheduleTest, LevelsAndSwitchesComeWithTheirShares) {
  const LevelSampling sampling{30, {8, 15, 22}, 0.5, 0.3};
  int chosen = 0, switched = 0;
  constexpr int kSteps = 20000;
  for (int step = 0; step < kSteps; ++step) {
    const LevelDraw draw = DrawLevel(sampling, 7, step, 1024);
    ASSERT_GE(draw.level, 1);
    ASSERT_LE(draw.level, 30);
    chosen += draw.level == 8 || draw.level == 15 || draw.level == 22;
    if (draw.switch_at == 0) continue;
    ++switched;
    ASSERT_GE(draw.switch_at, 256);
    ASSERT_LE(draw.switch_at, 768);
  }
  // Half, and a tenth of the other half; the bounds are over five standard deviations away.
  EXPECT_NEAR(chosen, 0.55 * kSteps, 0.02 * kSteps);
  EXPECT_NEAR(switched, 0.3 * kSteps, 0.02 * kSteps);
  EXPECT_EQ(DrawLevel(sampling, 7, 5, 1024).level, DrawLevel(sampling, 7, 5, 1024).level);
}

TEST(OrderTest, GreedyFindsTheCheapestLayerOnTopOfThoseBefore) {
  // Layers 0 and 1 are cheap alone but dear together.
  const MeasureSets measure = [](const std::vector<std::vector<int>>& sets) {
    std::vector<double> costs;
    for (const auto& set : sets) {
      double cost = 0;
      for (const int l : set) cost += 1 + l;
      const bool both =
          std::count(set.begin(), set.end(), 0) + std::count(set.begin(), set.end(), 1) == 2;
      costs.push_back(cost + (both ? 10 : 0));
    }
    return costs;
  };
  OrderState state;
  state.method = "greedy";
  while (state.ladder.size() < 4) AdvanceGreedy(state, 4, 4, measure);
  EXPECT_THAT(state.single, ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(state.ladder, ElementsAre(0, 2, 3, 1));
  EXPECT_THAT(state.cost, ElementsAre(1, 4, 8, 20));
  const auto read = OrderState::FromJson(state.ToJson(), 4, "x");
  ASSERT_TRUE(read.ok());
  EXPECT_EQ(read->ladder, state.ladder);
  EXPECT_EQ(read->cost, state.cost);
  EXPECT_FALSE(OrderState::FromJson(state.ToJson(), 3, "x").ok());  // layer 3 of 3
}

TEST(OrderTest, RandomAndUniformArePermutations) {
  for (std::vector<int> order : {RandomOrder(30, 3), UniformOrder(30), UniformOrder(1)}) {
    std::sort(order.begin(), order.end());
    std::vector<int> all(order.size());
    std::iota(all.begin(), all.end(), 0);
    EXPECT_EQ(order, all);
  }
  EXPECT_EQ(UniformOrder(9)[0], 4);
  EXPECT_NE(RandomOrder(30, 3), RandomOrder(30, 4));
}

TEST(OrderTest, RankCorrelation) {
  EXPECT_DOUBLE_EQ(RankCorrelation({1, 2, 3}, {10, 20, 90}), 1);
  EXPECT_DOUBLE_EQ(RankCorrelation({1, 2, 3}, {5, 4, 3}), -1);
}

TEST(ParametersTest, GateBiasGivesTheHalfLife) {
  for (const double half_life : {2.0, 64.0, 8192.0}) {
    const double log_gate = -std::log1p(std::exp(-GateBias(half_life))) / 16;
    EXPECT_NEAR(std::exp(log_gate * half_life), 0.5, 1e-9);
  }
}

TEST(ParametersTest, StartSpreadsHalfLivesAndSurvivesTheAdapter) {
  const auto layout =
      ParameterLayout::Create(SmallConfig(), {.window = 8, .sinks = 2, .states = 2, .rank = 3});
  ASSERT_TRUE(layout.ok());
  const std::vector<float> values = layout->Start({}, 5);
  const Adapter adapter = layout->ToAdapter(values);
  ASSERT_EQ(adapter.layers.size(), 6u);
  std::vector<float> history(adapter.layers[0].gate_bias.begin(),
                             adapter.layers[0].gate_bias.begin() + 8);
  std::sort(history.begin(), history.end());
  EXPECT_FLOAT_EQ(history.front(), GateBias(256));
  EXPECT_FLOAT_EQ(history.back(), GateBias(8192));
  EXPECT_EQ(adapter.layers[0].phi_q[9], 1);  // [0, 1, 1]
  EXPECT_EQ(adapter.layers[0].phi_q[1], 0);
  const auto back = layout->FromAdapter(adapter, "x");
  ASSERT_TRUE(back.ok());
  EXPECT_EQ(*back, values);
  const auto other =
      ParameterLayout::Create(SmallConfig(), {.window = 9, .sinks = 2, .states = 2, .rank = 3});
  EXPECT_THAT(other->FromAdapter(adapter, "x").status().message(),
              HasSubstr("layer 0 has window 8, the settings say 9"));
  EXPECT_THAT(ParameterLayout::Create(SmallConfig(), {.window = 0, .sinks = 2}).status().message(),
              HasSubstr("sinks without a window"));
}

}  // namespace
}  // namespace dsla
