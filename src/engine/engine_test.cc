#include "engine/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <new>
#include <random>
#include <stdexcept>
#include <thread>

#include "base/clock.h"
#include "base/half.h"
#include "engine/session.h"
#include "engine/testing/test_engine.h"
#include "format/safetensors.h"

namespace dsla {
namespace {

using testing_engine::ByteTokenizer;
using testing_engine::FunctionPolicy;
using testing_engine::RandomPrompt;
using testing_engine::RecordingSink;
using testing_engine::SmallOptions;
using testing_engine::TargetPolicy;
using testing_engine::TestEngine;
using testing_models::SmallModel;

class EngineTest : public ::testing::Test {
 protected:
  Request Greedy(int prompt, int max_tokens, uint32_t seed = 1) {
    Request request;
    request.id = fmt::format("r{}", ++count_);
    request.prompt = RandomPrompt(model(), prompt, seed);
    request.sampling.temperature = 0;
    request.max_tokens = max_tokens;
    request.ignore_eos = true;
    return request;
  }
  // The reply of a Session, which is tested against transformers.
  std::vector<int32_t> Alone(const Request& request, int level = 0) {
    Session session(&model(), &small_.pool(), small_.ctx(), {.level = level});
    EXPECT_TRUE(session.Prefill(request.prompt).ok());
    GenerateOptions options;
    options.sampling = request.sampling;
    options.max_tokens = request.max_tokens;
    const auto result = session.Generate(options);
    EXPECT_TRUE(result.ok());
    return result->tokens;
  }
  const HybridModel& model() { return small_.model(); }

  SmallModel small_{"smollm2", true};
  std::unique_ptr<Tokenizer> tokenizer_ = ByteTokenizer();
  int count_ = 0;
};

// Everything is given back once nothing runs.
void ExpectNothingHeld(const EngineState& state) {
  EXPECT_EQ(state.page_bytes, 0);
  EXPECT_EQ(state.state_bytes, 0);
  EXPECT_EQ(state.running, 0);
  EXPECT_EQ(state.queued, 0);
  EXPECT_EQ(state.queued_tokens, 0);
}

// Until the last end has been told.
EngineState WaitIdle(TestEngine& engine) {
  while (true) {
    const EngineState state = engine->state();
    if (state.idle) return state;
    std::this_thread::yield();
  }
}

TEST_F(EngineTest, AReplyEqualsTheSessions) {
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  for (const int prompt : {1, 20, 30}) {
    const Request request = Greedy(prompt, 12, prompt);
    const auto sink = engine.Submit(request);
    const RequestResult& result = sink->Wait();
    ASSERT_TRUE(result.status.ok()) << result.status.message();
    EXPECT_EQ(sink->tokens(), Alone(request));
    EXPECT_EQ(result.finish, FinishReason::kLength);
    EXPECT_EQ(result.prompt_tokens, prompt);
    EXPECT_EQ(result.generated_tokens, 12);
    EXPECT_EQ(result.levels, (std::vector<LevelSpan>{{0, 0}}));
    EXPECT_GT(result.first_token_seconds, 0);
    EXPECT_GE(result.first_token_seconds, result.queue_seconds);
    EXPECT_GE(result.total_seconds, result.first_token_seconds);
    EXPECT_EQ(sink->text(), tokenizer_->Decode(sink->tokens()));
  }
  const EngineState state = engine->state();
  ExpectNothingHeld(state);
  EXPECT_EQ(state.finished, 3) << "who has the reply finds it counted";
  EXPECT_EQ(state.generated_tokens, 36);
  EXPECT_EQ(state.prompt_tokens, 51);
  EXPECT_EQ(state.prefill_tokens + state.cached_tokens, 51);
  EXPECT_GT(state.model_seconds, 0);
  EXPECT_GE(state.busy_seconds, state.model_seconds);
  EXPECT_EQ(state.policy, "function");
}

TEST_F(EngineTest, StopTokensAndMinTokens) {
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  Request request = Greedy(20, 12);
  const std::vector<int32_t> all = Alone(request);
  const int32_t last = all[5];
  const auto first = std::find(all.begin(), all.end(), last);
  request.stop_ids = {last};
  auto sink = engine.Submit(request);
  EXPECT_EQ(sink->Wait().finish, FinishReason::kStop);
  EXPECT_EQ(sink->Wait().stop_token, last);
  EXPECT_EQ(sink->tokens(), std::vector<int32_t>(all.begin(), first)) << "it is not in the reply";

  request.id = "min";
  request.min_tokens = 12;
  sink = engine.Submit(request);
  EXPECT_EQ(sink->Wait().finish, FinishReason::kLength);
  const auto tokens = sink->tokens();
  EXPECT_EQ(tokens.size(), 12u);
  EXPECT_EQ(std::find(tokens.begin(), tokens.end(), last), tokens.end()) << "it is ruled out";
}

TEST_F(EngineTest, TheModelsEndTokenEndsTheReply) {
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  const int32_t eos = model().config().eos_ids.at(0);
  Request request = Greedy(20, 12);
  request.sampling.logit_bias = {{eos, 100.f}};
  auto sink = engine.Submit(request);
  EXPECT_EQ(sink->Wait().finish, FinishReason::kLength) << "ignore_eos";
  request.id = "stop";
  request.ignore_eos = false;
  sink = engine.Submit(request);
  EXPECT_EQ(sink->Wait().finish, FinishReason::kStop);
  EXPECT_EQ(sink->Wait().stop_token, eos);
  EXPECT_TRUE(sink->tokens().empty());
  EXPECT_EQ(sink->Wait().first_token_seconds, 0);
  EXPECT_EQ(sink->Wait().generated_tokens, 0);
}

TEST_F(EngineTest, StopStrings) {
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  Request request = Greedy(20, 12);
  const std::string all = tokenizer_->Decode(Alone(request));
  const std::string stop = all.substr(6, 2);
  request.stop = {"never in it", stop};
  const auto sink = engine.Submit(request);
  const RequestResult& result = sink->Wait();
  EXPECT_EQ(result.finish, FinishReason::kStop);
  EXPECT_EQ(result.stop_string, stop);
  EXPECT_EQ(sink->text(), all.substr(0, all.find(stop)));
}

// The prompt's and the reply's log-probabilities are those of a Forward that gives all logits; a
// greedy token's is the very value of the likeliest.
TEST_F(EngineTest, Logprobs) {
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  Request request = Greedy(150, 5);
  request.top_logprobs = 3;
  request.prompt_logprobs = true;
  const auto sink = engine.Submit(request);
  ASSERT_TRUE(sink->Wait().status.ok());

  std::vector<int32_t> all = request.prompt;
  for (const int32_t token : sink->tokens()) all.push_back(token);
  SequenceCache cache = small_.NewSequence(0);
  const std::vector<float> logits = small_.Run(cache, all);
  const int64_t V = model().config().V;
  const auto want = [&](size_t position, int32_t token) {
    const float* row = logits.data() + static_cast<int64_t>(position - 1) * V;
    double sum = 0;
    for (int64_t i = 0; i < V; ++i) sum += std::exp(static_cast<double>(row[i]));
    return row[token] - std::log(sum);
  };
  // fp32 on both sides, cut differently: the logits' scale is about 1 here.
  constexpr double kTolerance = 1e-3;
  ASSERT_EQ(sink->prompt().size(), 150u);
  EXPECT_TRUE(sink->prompt()[0].top.empty());
  for (size_t i = 0; i < all.size(); ++i) {
    SCOPED_TRACE(i);
    const bool in_prompt = i < 150;
    const int32_t token = in_prompt ? sink->prompt()[i].token : sink->outputs()[i - 150].token;
    ASSERT_EQ(token, all[i]);
    if (i == 0) continue;
    const float logprob = in_prompt ? sink->prompt()[i].logprob : sink->outputs()[i - 150].logprob;
    const auto& top = in_prompt ? sink->prompt()[i].top : sink->outputs()[i - 150].top;
    EXPECT_NEAR(logprob, want(i, token), kTolerance);
    ASSERT_EQ(top.size(), 3u);
    EXPECT_GE(top[0].logprob, top[1].logprob);
    for (const TokenLogprob& entry : top) {
      EXPECT_NEAR(entry.logprob, want(i, entry.token), kTolerance);
      if (entry.token == token) {
        EXPECT_EQ(entry.logprob, logprob);
      }
    }
    if (!in_prompt) {
      EXPECT_EQ(top[0].token, token);
    }
  }
}

TEST_F(EngineTest, OnlyThePromptsLogprobs) {
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  Request request = Greedy(100, 0);
  request.prompt_logprobs = true;
  request.top_logprobs = 0;
  const auto sink = engine.Submit(request);
  EXPECT_TRUE(sink->Wait().status.ok());
  EXPECT_EQ(sink->Wait().finish, FinishReason::kLength);
  ASSERT_EQ(sink->prompt().size(), 100u);
  for (size_t i = 1; i < 100; ++i) {
    EXPECT_EQ(sink->prompt()[i].token, request.prompt[i]);
    EXPECT_LT(sink->prompt()[i].logprob, 0);
  }
  EXPECT_TRUE(sink->outputs().empty());
  request.id = "one";
  request.prompt.resize(1);
  EXPECT_EQ(engine.Submit(request)->Wait().prompt_tokens, 1);
}

TEST_F(EngineTest, RefusedAtSubmit) {
  EngineOptions options = SmallOptions();
  options.memory_bytes = 5 * model().cache_geometry().page_bytes();
  TestEngine engine(model(), *tokenizer_, options);
  const auto submit = [&](Request request) {
    return engine->Submit(std::move(request), std::make_shared<RecordingSink>());
  };
  // 2 layers of 3 pages of 16 tokens.
  Request six_pages = Greedy(20, 20);
  six_pages.tier = Tier::kFull;
  const auto large = submit(six_pages);
  ASSERT_TRUE(large);
  EXPECT_EQ(large->kind, Rejection::Kind::kTooLargeForCache);
  EXPECT_EQ(submit(Greedy(500, 20))->kind, Rejection::Kind::kContextLength);
  Request wrong = Greedy(5, 5);
  wrong.tier = Tier::kExact;
  wrong.level = 3;
  EXPECT_EQ(submit(wrong)->message, "level 3: must be from 0 to 2");
  engine->Drain();
  EXPECT_EQ(submit(Greedy(5, 5))->kind, Rejection::Kind::kUnavailable);
  EXPECT_TRUE(engine->state().draining);
}

// The first request holds the only place; those behind it wait, and one too many is refused.
TEST_F(EngineTest, TheQueueIsBounded) {
  EngineOptions options = SmallOptions();
  options.max_running = 1;
  options.max_queued = 3;
  TestEngine engine(model(), *tokenizer_, options);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  std::atomic<bool> go = false;
  // The engine's thread stands in the first token until everything has been submitted.
  sinks.push_back(engine.Submit(Greedy(5, 3), [&](int) {
    while (!go) std::this_thread::yield();
  }));
  sinks[0]->WaitForTokens(1);
  for (int i = 0; i < 3; ++i) sinks.push_back(engine.Submit(Greedy(5, 3)));
  EXPECT_EQ(engine->state().queued, 3);
  EXPECT_EQ(engine->state().queued_tokens, 15);
  const auto rejected = engine->Submit(Greedy(5, 3), std::make_shared<RecordingSink>());
  const auto refused = engine->RefusesAll();
  go = true;
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->kind, Rejection::Kind::kQueueFull);
  ASSERT_TRUE(refused);
  EXPECT_EQ(refused->message, rejected->message);
  EXPECT_GE(rejected->retry_after_seconds, 1);
  EXPECT_LE(rejected->retry_after_seconds, 60);
  for (const auto& sink : sinks) EXPECT_TRUE(sink->Wait().status.ok());
}

// Bounds of the queue hold for what waits already: a group that an idle engine has room for is not
// refused because of its own first request.
TEST_F(EngineTest, AGroupIsTakenWholeOrNotAtAll) {
  EngineOptions options = SmallOptions();
  options.max_queued_tokens = 8;
  TestEngine engine(model(), *tokenizer_, options);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  const auto group = [&](std::vector<Request> requests) {
    std::vector<Submission> submissions;
    sinks.clear();
    for (Request& request : requests) {
      sinks.push_back(std::make_shared<RecordingSink>());
      submissions.push_back({std::move(request), sinks.back()});
    }
    return submissions;
  };
  EXPECT_FALSE(engine->SubmitAll(group({Greedy(6, 3), Greedy(6, 3), Greedy(6, 3)})));
  for (const auto& sink : sinks) EXPECT_TRUE(sink->Wait().status.ok());
  const auto rejected = engine->SubmitAll(group({Greedy(6, 3), Greedy(500, 20)}));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->kind, Rejection::Kind::kContextLength);
  EXPECT_EQ(rejected->index, 1u);
  EXPECT_EQ(WaitIdle(engine).finished, 3);
  EXPECT_EQ(sinks[0]->finishes(), 0);
}

TEST_F(EngineTest, TheLongestReplyFits) {
  EngineOptions options = SmallOptions();
  options.memory_bytes = 5 * model().cache_geometry().page_bytes();
  TestEngine engine(model(), *tokenizer_, options);
  // 2 layers of 2 pages of 16 tokens; the last token of a reply is not cached.
  const int longest = engine->LongestReply(20, Tier::kFull, 0);
  EXPECT_EQ(longest, 13);
  Request request = Greedy(20, longest);
  request.tier = Tier::kFull;
  EXPECT_TRUE(engine.Submit(request)->Wait().status.ok());
  request.max_tokens = longest + 1;
  EXPECT_EQ(engine->Submit(request, std::make_shared<RecordingSink>())->kind,
            Rejection::Kind::kTooLargeForCache);
  EXPECT_EQ(engine->LongestReply(50, Tier::kFull, 0), 0);
  TestEngine roomy(model(), *tokenizer_, SmallOptions());
  EXPECT_EQ(roomy->LongestReply(20, Tier::kFull, 0), model().max_positions() - 20);
}

// An answer that cannot be made costs its own request its end, and nobody else anything.
TEST_F(EngineTest, ASinkOrAnObserverThatThrows) {
  class Throwing : public RecordingSink {
    void OnFinish(const RequestResult&) override { throw std::bad_alloc(); }
  };
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  std::atomic<int> observed = 0;
  engine->SetFinishObserver([&](const RequestResult&) {
    ++observed;
    throw std::runtime_error("no room for a metric");
  });
  auto throwing = std::make_shared<Throwing>();
  const std::weak_ptr<Throwing> alive = throwing;
  EXPECT_FALSE(engine->Submit(Greedy(5, 3), std::move(throwing)));
  EXPECT_TRUE(engine.Submit(Greedy(5, 3))->Wait().status.ok());
  const EngineState state = WaitIdle(engine);
  EXPECT_EQ(state.finished, 2);
  EXPECT_EQ(observed, 2);
  EXPECT_TRUE(alive.expired()) << "so that its client is told";
  ExpectNothingHeld(state);
}

TEST_F(EngineTest, CancelledWhileRunningAndWhileWaiting) {
  EngineOptions options = SmallOptions();
  options.max_running = 1;
  TestEngine engine(model(), *tokenizer_, options);
  const Request running = Greedy(20, 400), waiting = Greedy(20, 4), after = Greedy(20, 4);
  // The engine's thread stands in each of these tokens until it is let go on.
  std::atomic<int> held = 2;
  const auto a = engine.Submit(running, [&](int count) {
    while (count == held) std::this_thread::yield();
  });
  a->WaitForTokens(2);
  const auto b = engine.Submit(waiting), c = engine.Submit(after);
  engine->Cancel(waiting.id);
  held = 3;
  EXPECT_EQ(b->Wait().status.code(), StatusCode::kCancelled);
  EXPECT_EQ(b->Wait().finish, FinishReason::kCancelled);
  EXPECT_TRUE(b->tokens().empty());
  engine->Cancel(running.id);
  engine->Cancel("unknown");
  held = 0;
  EXPECT_EQ(a->Wait().status.code(), StatusCode::kCancelled);
  EXPECT_LT(a->tokens().size(), 400u);
  EXPECT_EQ(a->text(), tokenizer_->Decode(a->tokens())) << "the tokens sent so far stand";
  EXPECT_TRUE(c->Wait().status.ok());
  ExpectNothingHeld(WaitIdle(engine));
}

TEST_F(EngineTest, ADeadlineEndsTheRequest) {
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  Request request = Greedy(20, 400);
  request.deadline = NowSeconds();  // passed when the first step is planned
  const auto sink = engine.Submit(request);
  EXPECT_EQ(sink->Wait().status.code(), StatusCode::kDeadlineExceeded);
  ExpectNothingHeld(WaitIdle(engine));
}

// A failing step ends the requests that were in it, with a status that says why; the engine lives.
TEST_F(EngineTest, AFailedStep) {
  std::atomic<int> fault = 0;
  TestEngine engine(model(), *tokenizer_, SmallOptions(), TargetPolicy(0), [&](int64_t) {
    if (fault == 1) throw std::bad_alloc();
    if (fault == 2) throw std::runtime_error("no such kernel\nat line 3");
    if (fault == 3) throw DeviceError("CUDA: a step: unspecified launch failure");
  });
  const Request good = Greedy(20, 4);
  fault = 1;
  EXPECT_EQ(engine.Submit(good)->Wait().status.message(), "out of memory in a step of 20 tokens");
  fault = 2;
  EXPECT_EQ(engine.Submit(good)->Wait().status.message(), "a step failed: no such kernel");
  fault = 3;
  EXPECT_EQ(engine->state().device_error, "");
  EXPECT_EQ(engine.Submit(good)->Wait().status.message(),
            "the device failed: CUDA: a step: unspecified launch failure");
  EXPECT_EQ(engine->state().device_error, "CUDA: a step: unspecified launch failure");
  fault = 0;
  const auto sink = engine.Submit(good);
  EXPECT_TRUE(sink->Wait().status.ok());
  EXPECT_EQ(sink->Wait().cached_tokens, 0) << "nothing of a failed step was kept";
  EXPECT_EQ(sink->tokens(), Alone(good));
  ExpectNothingHeld(WaitIdle(engine));
}

// A copy of a small model that overflows after one token: its embedding is so large in one column
// that the last norm leaves nothing else, and that column of the output head takes it out of range.
// (Weights that are not finite are refused at loading.)
std::string OverflowingModel(int32_t token) {
  const std::filesystem::path to = std::filesystem::path(::testing::TempDir()) /
                                   fmt::format("engine_test_overflow_{}", ::getpid());
  std::filesystem::remove_all(to);
  std::filesystem::copy(testing_models::DataPath("models/llama3"), to);
  const std::string path = (to / "model.safetensors").string();
  auto bytes = testing_models::ReadRaw<std::byte>(path);
  const auto file = SafetensorsFile::Parse(bytes, path);
  EXPECT_TRUE(file.ok()) << file.status().message();
  const auto set = [&](const std::string& name, int64_t row, float value) {
    for (const SafetensorsTensor& tensor : file->tensors()) {
      if (tensor.name != name) continue;
      EXPECT_EQ(tensor.dtype, "BF16");
      const bf16 narrow = ToBf16(value);
      const int64_t at = (tensor.data.data() - bytes.data()) +
                         row * tensor.shape[1] * static_cast<int64_t>(sizeof(narrow));
      std::memcpy(bytes.data() + at, &narrow, sizeof(narrow));
    }
  };
  set("model.embed_tokens.weight", token, 1e18f);
  set("lm_head.weight", 0, 7.5e37f);  // 8 = sqrt(C) times that overflows, 4 times does not
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<int64_t>(bytes.size()));
  return to.string();
}

TEST_F(EngineTest, NumericalErrorsEndOnlyTheirOwnSequence) {
  constexpr int32_t kBad = 77;
  const std::string path = OverflowingModel(kBad);
  auto file = ModelFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status().message();
  auto model =
      HybridModel::Load(small_.ctx(), **file, nullptr,
                        {.weights = WeightFormat::kF32, .kv_dtype = DType::kF32, .page_size = 16});
  ASSERT_TRUE(model.ok()) << model.status().message();
  EngineOptions options = SmallOptions();
  options.default_max_level = 0;
  TestEngine engine(**model, *tokenizer_, options);
  std::vector<Request> requests;
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 6; ++i) {
    Request request = Greedy(20 + i, 6, i);
    std::replace(request.prompt.begin(), request.prompt.end(), kBad, 1);
    request.sampling.logit_bias = {{kBad, -100.f}};
    if (i == 1) request.prompt.back() = kBad;
    if (i == 4) {
      request.prompt[7] = kBad;
      request.prompt_logprobs = true;
    }
    requests.push_back(request);
    sinks.push_back(engine.Submit(request));
  }
  for (int i = 0; i < 6; ++i) {
    SCOPED_TRACE(i);
    const RequestResult& result = sinks[i]->Wait();
    if (i % 3 == 1) {
      EXPECT_EQ(result.status.code(), StatusCode::kInternal);
      EXPECT_EQ(result.status.message(), "numerical_error: the logit of token 0 is inf");
      EXPECT_TRUE(sinks[i]->tokens().empty());
    } else {
      EXPECT_TRUE(result.status.ok()) << result.status.message();
      EXPECT_EQ(sinks[i]->tokens().size(), 6u);
    }
  }
  EXPECT_EQ(WaitIdle(engine).numerical_errors, 2);
  // What the bad ones computed is not shared.
  requests[4].prompt.resize(35, 1);
  requests[4].prompt_logprobs = false;
  requests[4].id = "again";
  EXPECT_EQ(engine.Submit(requests[4])->Wait().cached_tokens, 0);
  std::filesystem::remove_all(path);
}

TEST_F(EngineTest, ThePolicyIsFollowedAndRecorded) {
  // Raises every running sequence to 2 once it has 5 tokens in its cache, and new ones start at 1.
  auto policy = std::make_unique<FunctionPolicy>([](const LoadSnapshot& load) {
    LevelDecision decision{.target = 1, .raises = {}, .reason = "queue: test"};
    for (const SequenceLoad& running : load.running) {
      if (running.cached_tokens >= 5 && running.level < running.max_level)
        decision.raises.push_back({running.id, 2});
    }
    return decision;
  });
  TestEngine engine(model(), *tokenizer_, SmallOptions(), std::move(policy));
  const Request request = Greedy(4, 40);
  const auto sink = engine.Submit(request);
  const RequestResult& result = sink->Wait();
  ASSERT_TRUE(result.status.ok());
  ASSERT_EQ(result.levels.size(), 2u);
  EXPECT_EQ(result.levels[0], (LevelSpan{0, 1}));
  EXPECT_EQ(result.levels[1].level, 2);
  EXPECT_GE(result.levels[1].position, 5);
  EXPECT_EQ(sink->outputs().front().level, 1);
  EXPECT_EQ(sink->outputs().back().level, 2);

  Request full = Greedy(4, 20);
  full.tier = Tier::kFull;
  EXPECT_EQ(engine.Submit(full)->Wait().levels, (std::vector<LevelSpan>{{0, 0}}));
  Request economy = Greedy(4, 20);
  economy.tier = Tier::kEconomy;
  EXPECT_EQ(engine.Submit(economy)->Wait().levels, (std::vector<LevelSpan>{{0, 2}}));

  const EngineState state = WaitIdle(engine);
  EXPECT_EQ(state.target_level, 1);
  EXPECT_EQ(state.target_changes, 1);
  EXPECT_EQ(state.raises, 1);
  ASSERT_EQ(state.events.size(), 2u);
  EXPECT_EQ(state.events[0].request_id, "");
  EXPECT_EQ(state.events[0].to, 1);
  EXPECT_EQ(state.events[0].reason, "queue: test");
  EXPECT_EQ(state.events[1].request_id, request.id);
  EXPECT_EQ(state.events[1].from, 1);
  EXPECT_EQ(state.events[1].to, 2);
  EXPECT_EQ(state.events[1].position, result.levels[1].position);
  EXPECT_GT(state.events[1].seconds, 0);
  EXPECT_EQ(state.events[0].sequence, 1);
  EXPECT_EQ(state.events[1].sequence, 2);

  engine->SetMaxLevel(0);
  EXPECT_EQ(engine.Submit(Greedy(4, 4))->Wait().levels, (std::vector<LevelSpan>{{0, 0}}));
  EXPECT_EQ(engine->state().max_level, 0);
  ASSERT_GT(engine->state().events.size(), 2u);
  EXPECT_EQ(engine->state().events[2].to, 0);
  EXPECT_EQ(engine->state().events[2].reason, "admin: max level 0");
  engine->SetPolicy([](int) { return TargetPolicy(0); });
  EXPECT_TRUE(engine.Submit(Greedy(4, 4))->Wait().status.ok());
  const EngineState changed = WaitIdle(engine);
  EXPECT_EQ(changed.target_level, 0);
  EXPECT_EQ(changed.events.size(), 3u) << "a policy that asks for more, or for what there is";
  engine->SetPolicy([](int) {
    return std::make_unique<FunctionPolicy>([](const LoadSnapshot&) {
      return LevelDecision{.target = 2, .raises = {}, .reason = "queue: test"};
    });
  });
  engine->SetMaxLevel(2);
  EXPECT_TRUE(engine.Submit(Greedy(4, 4))->Wait().status.ok());
  EXPECT_THAT(WaitIdle(engine).events.back().reason,
              ::testing::AnyOf("admin: policy function, max level 2; queue: test",
                               "admin: max level 2; queue: test"))
      << "in one mail or in two";
}

// What a decision costs is what it computes: one that is held up is not the last one for long.
TEST_F(EngineTest, APolicyThatHadToWaitIsAskedAgainSoon) {
  std::atomic<int> decisions = 0;
  TestEngine engine(model(), *tokenizer_, SmallOptions(),
                    std::make_unique<FunctionPolicy>([&](const LoadSnapshot&) {
                      ++decisions;
                      std::this_thread::sleep_for(std::chrono::milliseconds(100));
                      return LevelDecision{};
                    }));
  EXPECT_TRUE(engine.Submit(Greedy(4, 400))->Wait().status.ok());
  EXPECT_GE(decisions, 3);
}

TEST_F(EngineTest, TheBatchIsNoLargerThanItsSteps) {
  EngineOptions options = SmallOptions();
  EXPECT_EQ(TestEngine(model(), *tokenizer_, options)->state().max_running, 16);
  options.max_running = 100;  // of 64 rows a page of 16 tokens is a prompt's
  EXPECT_EQ(TestEngine(model(), *tokenizer_, options)->state().max_running, 48);
}

// Raises at 5 tokens as above, and keeps what it is told of steps and folds.
class ObservingPolicy final : public LevelPolicy {
 public:
  struct Seen {
    std::vector<StepTime> steps;
    std::vector<FoldPoint> folds;
    std::vector<FirstToken> first_tokens;
    int tokens = 0;  // after those
  };
  explicit ObservingPolicy(Seen* seen) : seen_(seen) {}
  const char* name() const override { return "observing"; }
  LevelDecision Decide(const LoadSnapshot& load) override {
    LevelDecision decision{.target = 1, .raises = {}, .reason = "queue: test"};
    for (const SequenceLoad& running : load.running) {
      if (running.cached_tokens >= 5 && running.level < 2)
        decision.raises.push_back({running.id, 2});
    }
    return decision;
  }
  void ObserveStep(const StepTime& step) override { seen_->steps.push_back(step); }
  void ObserveFold(const FoldPoint& fold) override { seen_->folds.push_back(fold); }
  void ObserveFirstToken(const FirstToken& token) override { seen_->first_tokens.push_back(token); }
  void ObserveToken(double, double seconds) override {
    EXPECT_GT(seconds, 0);
    ++seen_->tokens;
  }
  CostFactors cost_factors() const override { return {.prefill = 2, .decode = 3, .fold = 4}; }
  bool cost_doubtful() const override { return true; }

 private:
  Seen* const seen_;  // read by the test once the engine is gone
};

TEST_F(EngineTest, ThePolicyIsToldWhatStepsAndFoldsTook) {
  ObservingPolicy::Seen seen;
  {
    TestEngine engine(model(), *tokenizer_, SmallOptions(),
                      std::make_unique<ObservingPolicy>(&seen), [](int64_t step) {
                        if (step == 3) throw std::runtime_error("on purpose");
                      });
    EXPECT_FALSE(engine.Submit(Greedy(96, 40))->Wait().status.ok());  // its step counts for nothing
    EXPECT_TRUE(engine.Submit(Greedy(4, 20))->Wait().status.ok());
    const EngineState state = WaitIdle(engine);
    EXPECT_EQ(state.cost_factors.decode, 3);
    EXPECT_TRUE(state.cost_doubtful);
    EXPECT_EQ(static_cast<int64_t>(seen.steps.size()), state.steps - 1);
  }
  // A prompt of 96 tokens in two chunks, a decode step; then, at 4 tokens, the next request.
  ASSERT_GE(seen.steps.size(), 4u);
  ASSERT_EQ(seen.steps[0].prefill.size(), 1u);
  EXPECT_EQ(seen.steps[0].prefill[0].tokens, 64);
  EXPECT_EQ(seen.steps[0].prefill[0].context, 0);
  EXPECT_EQ(seen.steps[0].prefill[0].level, 1);
  EXPECT_TRUE(seen.steps[0].decode.empty());
  EXPECT_EQ(seen.steps[1].prefill[0].tokens, 32);
  EXPECT_EQ(seen.steps[1].prefill[0].context, 64);
  ASSERT_EQ(seen.steps[2].decode.size(), 1u);
  EXPECT_EQ(seen.steps[2].decode[0].length, 96);
  EXPECT_EQ(seen.steps[3].prefill[0].tokens, 4);
  for (const StepTime& step : seen.steps) {
    EXPECT_GT(step.seconds, 0);
    EXPECT_LT(step.seconds, 100);
  }
  ASSERT_GE(seen.folds.size(), 1u);
  EXPECT_EQ(seen.folds.back().from, 1);
  EXPECT_EQ(seen.folds.back().to, 2);
  EXPECT_GE(seen.folds.back().length, 5);
  EXPECT_GT(seen.folds.back().seconds, 0);
}

TEST_F(EngineTest, ThePolicyIsToldWhatClientsSee) {
  ObservingPolicy::Seen seen;
  RequestResult again;
  {
    TestEngine engine(model(), *tokenizer_, SmallOptions(),
                      std::make_unique<ObservingPolicy>(&seen));
    Request request = Greedy(40, 3);
    request.tier = Tier::kFull;
    EXPECT_TRUE(engine.Submit(request)->Wait().status.ok());
    request.id += " again";
    again = engine.Submit(request)->Wait();
  }
  ASSERT_EQ(seen.first_tokens.size(), 2u);
  EXPECT_EQ(seen.first_tokens[0].prompt_tokens, 40);
  EXPECT_EQ(seen.first_tokens[0].cached_tokens, 0);
  EXPECT_GT(again.cached_tokens, 0);
  EXPECT_EQ(seen.first_tokens[1].cached_tokens, again.cached_tokens);
  EXPECT_EQ(seen.first_tokens[1].seconds, again.first_token_seconds);
  EXPECT_EQ(seen.tokens, 4);
}

// In calm the policy brings the target down although no request comes.
TEST_F(EngineTest, AnIdleEngineStillAsksItsPolicy) {
  std::atomic<bool> calm = false;
  TestEngine engine(model(), *tokenizer_, SmallOptions(),
                    std::make_unique<FunctionPolicy>([&](const LoadSnapshot&) {
                      return LevelDecision{
                          .target = calm ? 0 : 2, .raises = {}, .reason = "calm: test"};
                    }));
  EXPECT_TRUE(engine.Submit(Greedy(4, 4))->Wait().status.ok());
  EXPECT_EQ(WaitIdle(engine).target_level, 2);
  calm = true;
  const double deadline = NowSeconds() + 60;
  while (engine->state().target_level != 0 && NowSeconds() < deadline) std::this_thread::yield();
  EXPECT_EQ(engine->state().target_level, 0);
  EXPECT_EQ(engine->state().target_changes, 2);
}

TEST_F(EngineTest, TheObserverSeesEveryEnd) {
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  std::atomic<int> seen = 0;
  engine->SetFinishObserver([&](const RequestResult& result) {
    EXPECT_EQ(result.generated_tokens, 3);
    EXPECT_EQ(result.id, fmt::format("r{}", ++seen));
  });
  for (int i = 1; i <= 5; ++i) {
    engine.Submit(Greedy(5, 3))->Wait();
    EXPECT_EQ(seen, i) << "before the client";
  }
}

// Many threads at once: requests of all tiers, some cancelled, some refused; under little memory,
// so that there are pre-emptions. Every accepted one ends exactly once.
TEST_F(EngineTest, ManySubmitters) {
  constexpr uint32_t kSeed = 20250303;
  EngineOptions options = SmallOptions();
  options.max_queued = 12;
  options.memory_bytes = 60 * model().cache_geometry().page_bytes();
  TestEngine engine(model(), *tokenizer_, options,
                    std::make_unique<FunctionPolicy>([](const LoadSnapshot& load) {
                      LevelDecision decision;
                      decision.target = load.waiting.size() > 4 ? 1 : 0;
                      for (const SequenceLoad& running : load.running) {
                        if (load.waiting.size() > 6 && running.level < running.max_level)
                          decision.raises.push_back({running.id, running.level + 1});
                      }
                      return decision;
                    }));
  constexpr int kThreads = 4, kEach = 30;
  std::atomic<int> ended = 0, refused = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(kSeed + t);
      std::vector<std::shared_ptr<RecordingSink>> sinks;
      for (int i = 0; i < kEach; ++i) {
        Request request;
        request.id = fmt::format("{}-{}", t, i);
        request.prompt = RandomPrompt(model(), 1 + static_cast<int>(random() % 90), random());
        request.max_tokens = 1 + static_cast<int>(random() % 30);
        request.sampling.seed = random();
        request.tier = static_cast<Tier>(random() % 4);
        request.level = static_cast<int>(random() % 3);
        request.ignore_eos = true;
        const auto sink = std::make_shared<RecordingSink>();
        const std::string id = request.id;
        while (true) {
          Request copy = request;
          const auto rejected = engine->Submit(std::move(copy), sink);
          if (!rejected) break;
          ASSERT_EQ(rejected->kind, Rejection::Kind::kQueueFull) << rejected->message;
          ++refused;
          if (!sinks.empty()) sinks[random() % sinks.size()]->Wait();
          std::this_thread::yield();
        }
        sinks.push_back(sink);
        if (random() % 5 == 0) engine->Cancel(id);
      }
      for (const auto& sink : sinks) {
        const RequestResult& result = sink->Wait();
        if (result.status.ok()) {
          EXPECT_EQ(static_cast<int>(sink->outputs().size()), result.generated_tokens);
        } else {
          EXPECT_EQ(result.status.code(), StatusCode::kCancelled) << result.status.message();
        }
        ++ended;
      }
      for (const auto& sink : sinks) EXPECT_EQ(sink->finishes(), 1);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(ended, kThreads * kEach) << "seed " << kSeed;
  const EngineState state = WaitIdle(engine);
  EXPECT_EQ(state.finished, kThreads * kEach);
  ExpectNothingHeld(state);
}

TEST_F(EngineTest, DestroyedWithWorkInFlight) {
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 20; ++i) {
    sinks.push_back(engine.Submit(Greedy(30, 300, i), [](int) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));  // to be met running
    }));
  }
  sinks[0]->WaitForTokens(3);
  engine.Destroy();
  for (const auto& sink : sinks) {
    EXPECT_EQ(sink->finishes(), 1);
    EXPECT_EQ(sink->Wait().status.code(), StatusCode::kCancelled);
  }
}

TEST_F(EngineTest, ADrainedEngineFinishesItsWork) {
  TestEngine engine(model(), *tokenizer_, SmallOptions());
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 8; ++i) sinks.push_back(engine.Submit(Greedy(30, 10, i)));
  engine->Drain();
  EXPECT_TRUE(engine->Submit(Greedy(5, 5), std::make_shared<RecordingSink>()).has_value());
  while (!engine->state().idle) std::this_thread::yield();
  for (const auto& sink : sinks) {
    EXPECT_EQ(sink->finishes(), 1) << "idle means that all have ended";
    EXPECT_TRUE(sink->Wait().status.ok());
  }
}

TEST_F(EngineTest, WrongOptionsAreRefused) {
  EngineOptions options = SmallOptions();
  options.memory_bytes = 0;
  Workspace workspace;
  const auto engine =
      Engine::Create(&model(), tokenizer_.get(), {1, &workspace}, options, TargetPolicy(0));
  EXPECT_EQ(engine.status().message(), "memory of 0 bytes: must be positive");
}

}  // namespace
}  // namespace dsla
