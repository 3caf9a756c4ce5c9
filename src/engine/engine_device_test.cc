// The engine over a device that runs steps by itself, as a GPU does: here one that only counts.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <tuple>

#include "engine/engine.h"
#include "engine/testing/test_engine.h"

namespace dsla {
namespace {

using ::testing::ElementsAre;
using testing_engine::ByteTokenizer;
using testing_engine::RecordingSink;
using testing_engine::TestEngine;
using testing_models::SmallModel;

// What a test does at the two moments of each step, and with each sequence whose token is chosen.
struct StepHooks {
  std::function<void(int step)> begins = [](int) {}, runs = [](int) {};
  std::function<void(const SequenceRows& rows)> chooses = [](const SequenceRows&) {};
};

// Its likeliest token is one more than the last, the next likeliest one more than that, and so on.
class CountingModel : public DeviceModel {
 public:
  CountingModel(int V, const StepHooks* hooks) : V_(V), hooks_(hooks) {}
  void Forward(const CacheViews&, const PlacedRows& rows, const DeviceLogitsVisitor& visit,
               const LaunchedHook& launched) override {
    hooks_->begins(++step_);
    if (launched) launched();
    hooks_->runs(step_);
    std::vector<TokenChoice> choices;
    std::vector<TokenLogprob> top(rows.wanted.size() * kMostDeviceTop);
    for (const LogitsRow& row : rows.wanted) {
      for (int n = 0; n < rows.N(); ++n) {
        if (rows.batch_index[n] != row.sequence) continue;
        const SequenceRows& of = *rows.sequences[n];
        EXPECT_NE(of.sampling, nullptr);
        hooks_->chooses(of);
        const auto told =
            std::span(top).subspan(choices.size() * kMostDeviceTop, static_cast<size_t>(of.top));
        for (size_t i = 0; i < told.size(); ++i)
          told[i] = {(of.tokens[row.row] + 1 + static_cast<int>(i)) % V_,
                     -1.f - static_cast<float>(i)};
        choices.push_back({.token = (of.tokens[row.row] + 1) % V_, .logprob = -1, .top = told});
      }
    }
    if (!choices.empty()) visit(rows.wanted, nullptr, choices.data());
  }
  void Fold(const CacheViews&, const SequenceCache&, int, int32_t) override {}
  Expected<std::unique_ptr<DeviceModel>> WithAdapter(const DeviceModelSpec&) const override {
    return Unsupported("not of this test");
  }
  int64_t weight_bytes(int) const override { return 0; }

 private:
  const int V_;
  const StepHooks* hooks_;
  int step_ = 0;
};

class CountingDevice : public Device {
 public:
  explicit CountingDevice(const StepHooks* hooks) : hooks_(hooks) {}
  const std::string& name() const override { return name_; }
  BlockMemory& memory() override { return HostMemory(); }
  int64_t free_bytes() const override { return int64_t{1} << 30; }
  void Synchronize() override {}
  DeviceLimits Measure() override { return {}; }
  Expected<std::unique_ptr<DeviceModel>> Load(const DeviceModelSpec& spec, const TensorReader&,
                                              const ParallelRunner&) override {
    return std::unique_ptr<DeviceModel>(new CountingModel(spec.config.V, hooks_));
  }

 private:
  const std::string name_ = "counting";
  const StepHooks* hooks_;
};

class EngineDeviceTest : public ::testing::Test {
 protected:
  EngineDeviceTest()
      : small_("smollm2", false, {},
               {.page_size = 16, .device = std::make_shared<CountingDevice>(&hooks_)}),
        tokenizer_(ByteTokenizer()) {}
  Request Ask(int max_tokens) {
    Request request;
    request.id = fmt::format("r{}", ++count_);
    request.prompt = {7, 8, 9};
    request.sampling.temperature = 0;
    request.max_tokens = max_tokens;
    request.ignore_eos = true;
    return request;
  }

  static EngineOptions Options() { return {.memory_bytes = 16 << 20, .default_max_level = 0}; }

  StepHooks hooks_;
  SmallModel small_;
  std::unique_ptr<Tokenizer> tokenizer_;
  int count_ = 0;
};

TEST_F(EngineDeviceTest, TokensAreHandedOnWhileTheNextStepRuns) {
  std::vector<int> begins, runs;
  std::atomic<int> sent = 0;
  hooks_.begins = [&](int) { begins.push_back(sent); };
  hooks_.runs = [&](int) { runs.push_back(sent); };
  TestEngine engine(small_.model(), *tokenizer_, Options());
  const auto sink = engine.Submit(Ask(4), [&](int count) { sent = count; });
  EXPECT_TRUE(sink->Wait().status.ok());
  EXPECT_THAT(sink->tokens(), ElementsAre(10, 11, 12, 13));
  EXPECT_THAT(begins, ElementsAre(0, 0, 1, 2));
  EXPECT_THAT(runs, ElementsAre(0, 1, 2, 3)) << "the last token goes out with the reply's end";
}

// What its text says decides whether it goes on: no step is run for nothing.
TEST_F(EngineDeviceTest, StopStringsAreLookedForBeforeTheNextStep) {
  int steps = 0;
  hooks_.begins = [&](int step) { steps = step; };
  TestEngine engine(small_.model(), *tokenizer_, Options());
  Request request = Ask(20);
  request.prompt = {'0'};
  request.stop = {"34"};
  const auto sink = engine.Submit(request);
  EXPECT_EQ(sink->Wait().stop_string, "34");
  EXPECT_EQ(sink->text(), "12");
  EXPECT_EQ(steps, 4);
}

TEST_F(EngineDeviceTest, NothingIsLostWhenTheRequestEndsInBetween) {
  TestEngine engine(small_.model(), *tokenizer_, Options());
  hooks_.begins = [](int step) {
    if (step == 3) throw DeviceError("gone");
  };
  const auto failed = engine.Submit(Ask(9));
  EXPECT_EQ(failed->Wait().status.message(), "the device failed: gone");
  EXPECT_THAT(failed->tokens(), ElementsAre(10, 11));
  EXPECT_EQ(failed->Wait().generated_tokens, 2);

  hooks_.begins = [](int) {};
  const auto cancelled = std::make_shared<RecordingSink>();
  const Request request = Ask(60);
  hooks_.runs = [&](int step) {
    if (step == 6) engine->Cancel(request.id);
  };
  EXPECT_FALSE(engine->Submit(request, cancelled).has_value());
  EXPECT_EQ(cancelled->Wait().finish, FinishReason::kCancelled);
  EXPECT_EQ(static_cast<int>(cancelled->tokens().size()), cancelled->Wait().generated_tokens);
}

// What a request does to its logits goes to the device, as it is at each step.
TEST_F(EngineDeviceTest, TheDeviceIsToldOfPenaltiesBiasesAndEnds) {
  using Edit = std::tuple<int32_t, int32_t, float>;
  std::vector<std::vector<Edit>> edits;
  std::vector<size_t> ruled_out;
  hooks_.chooses = [&](const SequenceRows& rows) {
    edits.emplace_back();
    for (const LogitEdit& edit : rows.edits)
      edits.back().emplace_back(edit.token, edit.outputs, edit.bias);
    ruled_out.push_back(rows.ruled_out.size());
    EXPECT_TRUE(rows.ruled_out.empty() || rows.ruled_out[0] == 20);
    EXPECT_EQ(rows.top, 0);
  };
  TestEngine engine(small_.model(), *tokenizer_, Options());
  Request request = Ask(3);
  request.sampling.repetition_penalty = 2;
  request.sampling.logit_bias = {{10, 1.5f}, {50, -2.f}};
  request.stop_ids = {20};
  request.min_tokens = 2;
  request.top_logprobs = 0;
  const auto sink = engine.Submit(request);
  EXPECT_TRUE(sink->Wait().status.ok());
  EXPECT_THAT(sink->tokens(), ElementsAre(10, 11, 12));
  EXPECT_THAT(ruled_out, ElementsAre(1, 1, 0));
  ASSERT_EQ(edits.size(), 3u);
  std::vector<Edit> want = {{10, -1, 1.5f}, {50, -1, -2.f}, {7, 0, 0.f}, {8, 0, 0.f}, {9, 0, 0.f}};
  EXPECT_EQ(edits[0], want);
  std::get<1>(want[0]) = 1;
  EXPECT_EQ(edits[1], want);
  want.emplace_back(11, 1, 0.f);
  EXPECT_EQ(edits[2], want);
}

TEST_F(EngineDeviceTest, TheDeviceTellsTheLikeliest) {
  TestEngine engine(small_.model(), *tokenizer_, Options());
  Request request = Ask(2);
  request.top_logprobs = 2;
  const auto sink = engine.Submit(request);
  EXPECT_TRUE(sink->Wait().status.ok());
  const std::vector<TokenOutput> outputs = sink->outputs();
  ASSERT_EQ(outputs.size(), 2u);
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(outputs[i].logprob, -1);
    ASSERT_EQ(outputs[i].top.size(), 2u);
    for (int k = 0; k < 2; ++k) {
      EXPECT_EQ(outputs[i].top[k].token, 10 + i + k);
      EXPECT_EQ(outputs[i].top[k].logprob, -1.f - k);
    }
  }
}

}  // namespace
}  // namespace dsla
