// What tests of the engine share: a sink that remembers, a policy from a function, a tokenizer for
// the small models.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "adapt/policy.h"
#include "engine/engine.h"
#include "engine/worker.h"
#include "format/tokenizer/testing.h"
#include "format/tokenizer/tokenizer.h"
#include "model/testing/small_models.h"

namespace dsla::testing_engine {

// Everything that a request sent, in order.
class RecordingSink : public RequestSink {
 public:
  void OnPromptLogprobs(std::vector<PromptLogprob> logprobs) override {
    const std::lock_guard lock(mutex_);
    EXPECT_TRUE(prompt_.empty() && tokens_.empty() && finishes_ == 0);
    prompt_ = std::move(logprobs);
  }
  void OnToken(TokenOutput token) override {
    size_t count;
    {
      const std::lock_guard lock(mutex_);
      EXPECT_EQ(finishes_, 0);
      text_ += token.text;
      tokens_.push_back(std::move(token));
      count = tokens_.size();
      changed_.notify_all();
    }
    if (on_token_) on_token_(static_cast<int>(count));
  }
  void OnFinish(const RequestResult& result) override {
    const std::lock_guard lock(mutex_);
    ++finishes_;
    result_ = result;
    text_ += result.tail_text;
    changed_.notify_all();
  }

  // Called on the engine's thread with the number of tokens so far; set before Submit.
  void set_on_token(std::function<void(int)> on_token) { on_token_ = std::move(on_token); }

  // Waits, up to a time that only a hang reaches.
  const RequestResult& Wait() {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, kHang, [this] { return finishes_ > 0; })) << "no end";
    return result_;
  }
  void WaitForTokens(size_t count) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(
        changed_.wait_for(lock, kHang, [&] { return tokens_.size() >= count || finishes_ > 0; }));
  }

  // After Wait.
  const std::vector<TokenOutput>& outputs() const { return tokens_; }
  std::vector<int32_t> tokens() const {
    std::vector<int32_t> ids;
    for (const TokenOutput& token : tokens_) ids.push_back(token.token);
    return ids;
  }
  std::vector<float> logprobs() const {
    std::vector<float> values;
    for (const TokenOutput& token : tokens_) values.push_back(token.logprob);
    return values;
  }
  const std::vector<PromptLogprob>& prompt() const { return prompt_; }
  const std::string& text() const { return text_; }
  int finishes() {
    const std::lock_guard lock(mutex_);
    return finishes_;
  }

 private:
  static constexpr std::chrono::minutes kHang{5};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::function<void(int)> on_token_;
  std::vector<PromptLogprob> prompt_;
  std::vector<TokenOutput> tokens_;
  std::string text_;
  RequestResult result_;
  int finishes_ = 0;
};

class FunctionPolicy : public LevelPolicy {
 public:
  using Function = std::function<LevelDecision(const LoadSnapshot&)>;
  explicit FunctionPolicy(Function decide) : decide_(std::move(decide)) {}
  const char* name() const override { return "function"; }
  LevelDecision Decide(const LoadSnapshot& load) override { return decide_(load); }

 private:
  Function decide_;
};

inline std::unique_ptr<LevelPolicy> TargetPolicy(int target) {
  return std::make_unique<FunctionPolicy>([=](const LoadSnapshot&) {
    return LevelDecision{.target = target, .raises = {}, .reason = {}};
  });
}

// The small models have 96 tokens: of this tokenizer those are the bytes 0 to 95.
inline std::unique_ptr<Tokenizer> ByteTokenizer() {
  auto data = ParseTokenizerJson(testing::ByteLevelJson().dump(), "tokenizer.json");
  EXPECT_TRUE(data.ok()) << data.status().message();
  auto tokenizer = Tokenizer::Create(std::move(data).value());
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  return std::move(tokenizer).value();
}

inline std::vector<int32_t> RandomPrompt(const HybridModel& model, int count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % model.config().V);
  return tokens;
}

// Of an engine for a small model.
inline EngineOptions SmallOptions() {
  return {.memory_bytes = 16 << 20,
          .max_batch_tokens = 64,
          .max_running = 16,
          .snapshot_stride = 64,
          .default_max_level = 2};
}

// An engine over a small model.
class TestEngine {
 public:
  TestEngine(const HybridModel& model, const Tokenizer& tokenizer, const EngineOptions& options,
             std::unique_ptr<LevelPolicy> policy = TargetPolicy(0), FaultInjector faults = {},
             int threads = 2) {
    auto engine = CreateEngine(&model, &tokenizer, {threads, &workspace_}, options,
                               std::move(policy), std::move(faults));
    EXPECT_TRUE(engine.ok()) << engine.status().message();
    engine_ = std::move(engine).value();
  }

  Engine* operator->() { return engine_.get(); }
  void Destroy() { engine_.reset(); }

  // The request must be accepted.
  std::shared_ptr<RecordingSink> Submit(Request request, std::function<void(int)> on_token = {}) {
    auto sink = std::make_shared<RecordingSink>();
    sink->set_on_token(std::move(on_token));
    const auto rejected = engine_->Submit(std::move(request), sink);
    EXPECT_FALSE(rejected.has_value()) << rejected->message;
    return sink;
  }

  // Likewise all of them, which are there before the next step.
  std::vector<std::shared_ptr<RecordingSink>> SubmitTogether(const std::vector<Request>& requests) {
    std::vector<std::shared_ptr<RecordingSink>> sinks;
    std::vector<Submission> group;
    for (const Request& request : requests) {
      sinks.push_back(std::make_shared<RecordingSink>());
      group.push_back({request, sinks.back()});
    }
    const auto rejected = engine_->SubmitAll(std::move(group));
    EXPECT_FALSE(rejected.has_value()) << rejected->message;
    return sinks;
  }

 private:
  Workspace workspace_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace dsla::testing_engine
