// The trainer on tiny models on the CPU: losses fall to stated values, a run that was cut short
// ends in the same bits, the teacher stays as it was, and bad input is named.
#include "distill/distill.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <numeric>

#include "base/random.h"
#include "distill/checkpoint.h"
#include "distill/distill_testing.h"
#include "distill/network.h"
#include "distill/run_log.h"
#include "distill/token_file.h"
#include "format/adapter.h"
#include "format/testing/file_writers.h"

namespace dsla {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using testing::TempDir;

constexpr uint64_t kSeed = 11;

class DistillTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const ModelConfig config = testing::TrainingModel();
    testing::Weights weights = testing::RandomWeights(config, kSeed);
    const std::string path = folder_.Write("m.gguf", testing::TinyGguf(config, weights).Build());
    auto file = ModelFile::Open(path);
    ASSERT_TRUE(file.ok()) << file.status().message();
    model_ = std::move(file).value();
    // Tokens that repeat with some structure, so that attention has something to find.
    auto writer = TokenFileWriter::Create(folder_.path() + "/data.tokens", config.V);
    ASSERT_TRUE(writer.ok());
    for (int d = 0; d < 40; ++d) {
      Random random(kSeed, {static_cast<uint64_t>(d)});
      std::vector<int32_t> ids(200);
      for (size_t i = 0; i < ids.size(); ++i)
        ids[i] = i >= 20 && random.Uniform() < 0.7 ? ids[i - 20]
                                                   : static_cast<int32_t>(random.Below(64));
      ASSERT_TRUE(writer->Add(ids).ok());
    }
    ASSERT_TRUE(writer->Finish().ok());
  }

  DistillJob Job(const std::string& name) const {
    DistillJob job = testing::TrainingJob(folder_.path(), name);
    DistillConfig& c = job.config;
    c.order_method = DistillConfig().order_method;
    c.tokens_per_step = 192;
    c.align_tokens = 192 * 30;
    c.chain_tokens = 192 * 20;
    c.order_sequences = 4;
    c.evaluate_length = 96;
    c.evaluate_documents = 3;
    c.log_every = 5;
    return job;
  }

  Status Run(const DistillJob& job) { return Distill(ctx_, *model_, job).status(); }

  std::unique_ptr<Network> NewNetwork(const AdapterSettings& settings) {
    auto layout = ParameterLayout::Create(model_->config(), settings);
    EXPECT_TRUE(layout.ok()) << layout.status().message();
    auto network =
        Network::Create(*model_, *layout, {.device = "cpu", .dtype = "fp32", .threads = 1});
    EXPECT_TRUE(network.ok()) << network.status().message();
    return std::move(network).value();
  }

  // Parameters away from the start, so that every one of them matters.
  static std::vector<float> RandomValues(const ParameterLayout& layout) {
    std::vector<float> values = layout.Start({16, 64, 2, 8}, kSeed);
    Random random(kSeed, {99});
    for (float& value : values) value += static_cast<float>(0.2 * random.Normal());
    return values;
  }

  static TokenBatch Batch(int rows, int length) {
    TokenBatch batch;
    batch.rows = rows, batch.length = length;
    Random random(kSeed, {7});
    for (int i = 0; i < rows * length; ++i)
      batch.ids.push_back(static_cast<int32_t>(random.Below(64)));
    return batch;
  }

  TempDir folder_;
  ExecContext ctx_{.threads = 1};
  std::unique_ptr<ModelFile> model_;
};

ChainStep Converted(std::vector<int> layers) {
  ChainStep step;
  step.converted = std::move(layers);
  return step;
}

// The derivative along a random direction against the difference of losses in fp32.
void ExpectGradient(Network& network, const std::vector<float>& values,
                    const std::function<void()>& backward) {
  network.SetValues(values);
  backward();
  network.TakeLosses();
  const std::vector<float> gradient = network.Gradients();
  UpdateOptions none;
  network.Update(none);  // clears the gradients; a learning rate of 0 moves nothing
  Random random(kSeed, {5});
  std::vector<float> direction(values.size());
  double norm = 0, along = 0;
  for (const float g : gradient) norm += double{g} * g;
  norm = std::sqrt(norm);
  ASSERT_GT(norm, 0);
  // Half along the gradient, so that the difference stands out of fp32's rounding; half random.
  for (size_t i = 0; i < direction.size(); ++i) {
    direction[i] = static_cast<float>(
        gradient[i] / norm + random.Normal() / std::sqrt(static_cast<double>(direction.size())));
    along += double{direction[i]} * gradient[i];
  }
  constexpr double kStep = 2e-2;
  double losses[2];
  for (const int side : {0, 1}) {
    std::vector<float> moved = values;
    for (size_t i = 0; i < moved.size(); ++i)
      moved[i] += static_cast<float>((side == 0 ? -kStep : kStep) * direction[i]);
    network.SetValues(moved);
    backward();
    losses[side] = network.TakeLosses().back();
    network.Update(none);
  }
  EXPECT_NEAR((losses[1] - losses[0]) / (2 * kStep), along, 0.02 * std::abs(along));
}

TEST_F(DistillTest, GradientsMatchDifferences) {
  for (const AdapterSettings& settings :
       {AdapterSettings{.window = 8, .sinks = 2, .states = 2, .rank = 4},
        AdapterSettings{.window = 0, .sinks = 0, .states = 2, .features_per_channel = 2, .rank = 4},
        AdapterSettings{.window = 8, .sinks = 0, .states = 1, .rank = 0},
        AdapterSettings{.window = 8, .sinks = 2, .states = 2, .rank = 4, .op = Operator::kWindow},
        AdapterSettings{.window = 0, .sinks = 0, .states = 2, .rank = 4, .op = Operator::kPaper}}) {
    SCOPED_TRACE(fmt::format("W {} states {} rank {} operator {}", settings.window, settings.states,
                             settings.rank, static_cast<int>(settings.op)));
    const auto network = NewNetwork(settings);
    const std::vector<float> values = RandomValues(network->layout());
    const TokenBatch batch = Batch(2, 70);
    {
      SCOPED_TRACE("align");
      // Its loss is the mean over layers, its gradient the sum.
      const double L = model_->config().L;
      network->SetValues(values);
      const auto align = [&] { network->Align(batch); };
      network->SetValues(values);
      align();
      const double loss = network->TakeLosses().back();
      EXPECT_NEAR(loss, network->AlignmentError(batch), 1e-5 * loss);
      const std::vector<float> gradient = network->Gradients();
      network->Update({});
      double norm = 0;
      for (const float g : gradient) norm += double{g} * g;
      norm = std::sqrt(norm);
      std::vector<float> up = values, down = values;
      constexpr double kStep = 1e-2;
      for (size_t i = 0; i < values.size(); ++i) {
        up[i] += static_cast<float>(kStep * gradient[i] / norm);
        down[i] -= static_cast<float>(kStep * gradient[i] / norm);
      }
      network->SetValues(up);
      const double above = network->AlignmentError(batch);
      network->SetValues(down);
      const double below = network->AlignmentError(batch);
      EXPECT_NEAR(L * (above - below) / (2 * kStep), norm, 0.02 * norm);
    }
    {
      SCOPED_TRACE("chain");
      ExpectGradient(*network, values, [&] { network->Chain(batch, Converted({0, 1, 2})); });
    }
    {
      SCOPED_TRACE("chain, switched, all losses");
      ExpectGradient(*network, values, [&] {
        ChainStep step = Converted({2, 0});
        step.switch_at = settings.op == Operator::kPaper ? 0 : 30;
        step.kl_weight = 0.7;
        step.align_weight = 0.5;
        step.cosine_weight = 0.3;
        network->Chain(batch, step);
      });
    }
  }
}

// Every loss, a switch, a layer that is frozen and one that is not converted.
TEST_F(DistillTest, RecomputedLayersGiveTheSameBits) {
  const TokenBatch batch = Batch(2, 70);
  std::vector<std::vector<float>> gradients;
  std::vector<double> losses;
  for (const int layers : {0, 1, 2, 3}) {
    NetworkOptions options;
    options.dtype = "fp32";
    options.threads = 1;
    options.checkpoint_layers = layers;
    const auto layout =
        ParameterLayout::Create(model_->config(), {.window = 8, .sinks = 2, .rank = 4});
    const auto network = Network::Create(*model_, *layout, options);
    ASSERT_TRUE(network.ok()) << network.status().message();
    (*network)->SetValues(RandomValues(*layout));
    ChainStep step = Converted({0, 2});
    step.align_weight = 0.5;
    step.cosine_weight = 0.3;
    (*network)->Chain(batch, step);
    step = Converted({2, 1});
    step.trained = {2};
    step.switch_at = 30;
    (*network)->Chain(batch, step);
    gradients.push_back((*network)->Gradients());
    const std::vector<double> both = (*network)->TakeLosses();
    losses.insert(losses.end(), both.begin(), both.end());
  }
  for (size_t i = 1; i < gradients.size(); ++i) {
    EXPECT_EQ(gradients[i], gradients[0]) << i << " layers";
    EXPECT_EQ(losses[2 * i], losses[0]);
    EXPECT_EQ(losses[2 * i + 1], losses[1]);
  }
}

TEST_F(DistillTest, PaddingChangesNothing) {
  const auto network = NewNetwork({.window = 8, .sinks = 2, .rank = 4});
  network->SetValues(RandomValues(network->layout()));
  const TokenBatch whole = Batch(1, 60);
  TokenBatch padded = whole;
  padded.length = 90;
  padded.ids.resize(90, 3);
  padded.counts = {60};
  const Divergence a = network->Measure(whole, {0, 2}), b = network->Measure(padded, {0, 2});
  EXPECT_EQ(a.tokens, 60);
  EXPECT_EQ(b.tokens, 60);
  EXPECT_NEAR(a.kl, b.kl, 1e-4 * a.kl);
  network->Chain(whole, Converted({0, 2}));
  const std::vector<float> of_whole = network->Gradients();
  network->Update({});
  network->Chain(padded, Converted({0, 2}));
  const std::vector<float> of_padded = network->Gradients();
  double difference = 0, norm = 0;
  for (size_t i = 0; i < of_whole.size(); ++i) {
    difference += std::pow(of_whole[i] - of_padded[i], 2);
    norm += std::pow(of_whole[i], 2);
  }
  EXPECT_LT(std::sqrt(difference / norm), 1e-4);
}

TEST_F(DistillTest, FrozenLayersGetNoUpdate) {
  const auto network = NewNetwork({.window = 8, .sinks = 2, .rank = 4});
  const std::vector<float> values = RandomValues(network->layout());
  network->SetValues(values);
  ChainStep step = Converted({2, 1});
  step.trained = {1};
  network->Chain(Batch(2, 40), step);
  UpdateOptions update;
  update.lr = update.low_rank_lr = 1e-2;
  network->Update(update);
  const OptimizerState state = network->State();
  const int64_t row = network->layout().row();
  for (const int l : {0, 1, 2}) {
    const bool moved = !std::equal(values.begin() + l * row, values.begin() + (l + 1) * row,
                                   state.values.begin() + l * row);
    EXPECT_EQ(moved, l == 1) << "layer " << l;
    EXPECT_EQ(state.steps[l], l == 1 ? 1 : 0);
  }
}

TEST_F(DistillTest, WholeRunReachesItsLossAndLeavesTheTeacher) {
  DistillJob job = Job("a.safetensors");
  // One kind of batch and one level, so that losses can be compared along the run.
  DistillConfig& c = job.config;
  c.lengths = {96};
  c.length_shares = {1};
  c.tokens_per_step = 384;
  c.recall_share = 0;
  c.align_tokens = 384 * 100;
  c.chain_tokens = 384 * 60;
  c.align_low_rank_lr = c.align_lr = 1e-2;
  c.chain_low_rank_lr = c.chain_lr = 3e-3;
  c.chain_levels = {3};
  c.chain_level_share = 1;
  c.chain_switch_share = 0;
  const auto outcome = Distill(ctx_, *model_, job);
  ASSERT_TRUE(outcome.ok()) << outcome.status().message();
  EXPECT_TRUE(outcome->finished);
  const auto log = ReadLog(job.out + ".work/log.jsonl");
  ASSERT_TRUE(log.ok());
  std::map<std::string, std::vector<double>> losses;
  std::string teacher;
  for (const auto& event : *log) {
    if (event["event"] == "step") losses[event["stage"]].push_back(event["loss"]);
    if (event["event"] == "done" && event["stage"] == "init") teacher = event["teacher"];
  }
  fmt::print("align {:.4f} to {:.4f}, chain {:.4f} to {:.4f}\n", losses["align"].front(),
             losses["align"].back(), losses["chain"].front(), losses["chain"].back());
  EXPECT_LT(losses["align"].back(), 0.22);
  EXPECT_LT(losses["chain"].back(), 0.5);
  const auto evaluation = nlohmann::json::parse(testing::ReadFile(job.out + ".work/evaluate.json"));
  EXPECT_EQ(evaluation["teacher"], teacher);  // of all its weights, after training
  EXPECT_EQ(evaluation["levels"].size(), 3u);
  EXPECT_TRUE(fs::exists(job.out + ".work/report.html"));
  EXPECT_TRUE(fs::exists(job.out + ".work/report.md"));
  const auto adapter = Adapter::Open(job.out, model_->config());
  ASSERT_TRUE(adapter.ok()) << adapter.status().message();
  EXPECT_TRUE((*adapter)->CheckBase(*model_->Fingerprint(), "m").ok());
  EXPECT_EQ((*adapter)->ladder.size(), 3u);
  EXPECT_EQ((*adapter)->layers[0].window, 8);
}

TEST_F(DistillTest, ARunCutShortAnywhereEndsInTheSameBits) {
  const DistillJob whole = Job("whole.safetensors");
  ASSERT_TRUE(Run(whole).ok());
  // Ended after every third question whether to go on, and begun again until it is done.
  DistillJob pieces = Job("pieces.safetensors");
  int runs = 0;
  for (bool finished = false; !finished; ++runs) {
    ASSERT_LT(runs, 100);
    int asked = 0;
    pieces.interrupted = [&] { return ++asked % 7 == 0; };
    const auto outcome = Distill(ctx_, *model_, pieces);
    ASSERT_TRUE(outcome.ok()) << outcome.status().message();
    finished = outcome->finished;
  }
  EXPECT_GT(runs, 4);
  EXPECT_EQ(testing::ReadFile(whole.out), testing::ReadFile(pieces.out));
  const auto a = LoadCheckpoint(whole.out + ".work", "chain"),
             b = LoadCheckpoint(pieces.out + ".work", "chain");
  EXPECT_EQ((*a)->state.values, (*b)->state.values);
  EXPECT_EQ((*a)->state.second, (*b)->state.second);
}

TEST_F(DistillTest, AnInterruptEndsInitBetweenLayers) {
  DistillJob job = Job("init.safetensors");
  for (const int nth : {1, 2, 3}) {  // before the model is loaded, and before two of its layers
    int asked = 0;
    job.interrupted = [&] { return ++asked >= nth; };
    const auto outcome = Distill(ctx_, *model_, job);
    ASSERT_TRUE(outcome.ok()) << outcome.status().message();
    EXPECT_FALSE(outcome->finished);
    EXPECT_EQ(outcome->stage, "init");
    EXPECT_EQ(asked, nth);
    EXPECT_FALSE(LoadCheckpoint(job.out + ".work", "init")->has_value());
  }
  job.interrupted = {};
  job.stop_after = 1e-9;
  const auto outcome = Distill(ctx_, *model_, job);
  ASSERT_TRUE(outcome.ok()) << outcome.status().message();
  EXPECT_EQ(outcome->stage, "align") << "the shortest piece is past init";
}

TEST_F(DistillTest, StagesAloneGiveTheWhole) {
  const DistillJob whole = Job("whole.safetensors");
  ASSERT_TRUE(Run(whole).ok());
  DistillJob alone = Job("alone.safetensors");
  alone.stage = "chain";
  EXPECT_THAT(Run(alone).message(), HasSubstr("the stage order has not run"));
  for (const char* stage : {"prepare", "init", "align", "order", "chain", "evaluate", "export"}) {
    alone.stage = stage;
    const Status status = Run(alone);
    ASSERT_TRUE(status.ok()) << stage << ": " << status.message();
  }
  EXPECT_EQ(testing::ReadFile(whole.out), testing::ReadFile(alone.out));
}

TEST_F(DistillTest, PaperRecipeAndControlsRun) {
  DistillJob job = Job("paper.safetensors");
  ASSERT_TRUE(ApplyRecipe("paper", &job.config).ok());
  job.config.documents = "separate";
  ASSERT_TRUE(Run(job).ok());
  const auto adapter = Adapter::Open(job.out, model_->config());
  ASSERT_TRUE(adapter.ok()) << adapter.status().message();
  EXPECT_EQ((*adapter)->layers[0].window, 0);
  EXPECT_EQ((*adapter)->layers[0].states, 2);
  for (const char* method : {"random", "uniform", "entropy"}) {
    DistillJob control = Job(std::string(method) + ".safetensors");
    control.config.order_method = method;
    control.config.align_tokens = control.config.chain_tokens = 192 * 2;
    EXPECT_TRUE(Run(control).ok()) << method;
  }
}

TEST_F(DistillTest, ALossThatIsNoNumberStopsAndKeepsTheLastCheckpoint) {
  DistillJob job = Job("nan.safetensors");
  job.config.checkpoint_seconds = 0;
  ASSERT_TRUE([&] {
    DistillJob first = job;
    int asked = 0;
    first.interrupted = [&] { return ++asked == 5; };
    return Run(first).ok();
  }());
  const auto before = LoadCheckpoint(job.out + ".work", "align");
  ASSERT_TRUE(before.ok() && before->has_value());
  const int64_t step = (*before)->step;
  // A parameter that is no number, as a bad update would leave it, comes in by the checkpoint.
  Checkpoint broken = **before;
  broken.state.values[0] = std::nanf("");
  ASSERT_TRUE(SaveCheckpoint(broken, job.out + ".work", "align").ok());
  const Status status = Run(job);
  EXPECT_EQ(status.code(), StatusCode::kInternal);
  EXPECT_THAT(status.message(), HasSubstr(fmt::format("align: the loss is nan at step {}", step)));
  EXPECT_THAT(status.message(), HasSubstr(" tokens, "));
  EXPECT_THAT(status.message(), HasSubstr("the last good checkpoint stands"));
  EXPECT_EQ((*LoadCheckpoint(job.out + ".work", "align"))->step, step);
}

TEST_F(DistillTest, BadInputIsNamedInOneLine) {
  const auto message = [&](auto change) {
    DistillJob job = Job("bad.safetensors");
    change(job);
    const Status status = Run(job);
    EXPECT_FALSE(status.ok());
    EXPECT_EQ(status.message().find('\n'), std::string::npos) << status.message();
    return status.message();
  };
  EXPECT_THAT(message([](auto& j) { j.data = {}; }), HasSubstr("--data"));
  EXPECT_THAT(message([](auto& j) { j.data = {"/none.jsonl"}; }), HasSubstr("/none.jsonl"));
  EXPECT_THAT(message([&](auto& j) { j.data = {folder_.Write("e.jsonl", "")}; }),
              HasSubstr("holds no text"));
  EXPECT_THAT(message([&](auto& j) { j.data = {folder_.Write("b.txt", std::string(9, '\0'))}; }),
              HasSubstr("NUL bytes"));
  EXPECT_THAT(message([&](auto& j) { j.data = {folder_.Write("s.txt", "abab")}; }),
              HasSubstr("fewer than one sequence of 96"));
  EXPECT_THAT(message([](auto& j) { j.stage = "polish"; }), HasSubstr("stage 'polish'"));
  EXPECT_THAT(message([](auto& j) { j.config.device = "tpu"; }), HasSubstr("device 'tpu'"));
  EXPECT_THAT(message([](auto& j) { j.config.dtype = "fp8"; }), HasSubstr("dtype 'fp8'"));
  EXPECT_THAT(message([](auto& j) { j.out = "/proc/none/a"; }), HasSubstr("/proc/none"));
  EXPECT_THAT(message([](auto& j) { j.start = "/none.safetensors"; }), HasSubstr("/none.safe"));
  EXPECT_THAT(message([](auto& j) { j.start = "x", j.config.op = "window"; }),
              HasSubstr("the operator window has no adapters"));
  // An adapter of the same sizes for another model.
  const auto layout = ParameterLayout::Create(model_->config(), Job("x").config.adapter);
  Adapter other = layout->ToAdapter(layout->Start({}, 1));
  other.base_fingerprint = std::string(64, '0');
  other.base_name = "other.gguf";
  other.ladder = {0, 1, 2};
  other.top_level = 2;
  const std::string path = folder_.path() + "/other.safetensors";
  ASSERT_TRUE(SaveAdapter(other, path).ok());
  EXPECT_THAT(message([&](auto& j) { j.start = path; }),
              HasSubstr("belongs to another model: other.gguf"));
}

TEST_F(DistillTest, WorkOfOtherSettingsIsNotContinued) {
  DistillJob job = Job("s.safetensors");
  job.config.align_tokens = job.config.chain_tokens = 192 * 2;
  ASSERT_TRUE(Run(job).ok());
  job.config.align_lr *= 2;
  EXPECT_THAT(Run(job).message(),
              HasSubstr("made with other settings (there 'align.lr = 0.005', here 'align.lr = "
                        "0.01')"));
}

}  // namespace
}  // namespace dsla
