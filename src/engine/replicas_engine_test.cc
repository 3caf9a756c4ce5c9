// Replicas over real engines on the CPU, each with its own cache over one shared model.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <set>
#include <thread>

#include "engine/replicas.h"
#include "engine/testing/test_engine.h"

namespace dsla {
namespace {

using testing_engine::ByteTokenizer;
using testing_engine::FunctionPolicy;
using testing_engine::RandomPrompt;
using testing_engine::RecordingSink;
using testing_engine::TargetPolicy;
using testing_engine::TestEngine;
using testing_models::SmallModel;

class ReplicasEngineTest : public ::testing::Test {
 protected:
  static EngineOptions Options() {
    EngineOptions options = testing_engine::SmallOptions();
    options.max_batch_tokens = 256;
    options.deterministic = true;
    return options;
  }
  // `faults`: of each replica.
  std::unique_ptr<Engine> Front(EngineOptions options,
                                const std::array<FaultInjector, 2>& faults = {}) {
    options.queue = std::make_shared<QueueBound>(options.max_queued, options.max_queued_tokens);
    std::vector<Replica> replicas;
    for (int r = 0; r < 2; ++r) {
      auto engine = CreateEngine(&small_.model(), tokenizer_.get(), {1, &workspaces_[r]}, options,
                                 TargetPolicy(0), faults[r]);
      EXPECT_TRUE(engine.ok()) << engine.status().message();
      replicas.push_back({std::move(engine).value(), "cpu"});
    }
    return JoinReplicas(std::move(replicas), options.queue,
                        {.block_tokens = small_.model().options().page_size});
  }
  Request Ask(int prompt, int max_tokens, uint32_t seed) {
    Request request;
    request.id = fmt::format("r{}", ++count_);
    request.prompt = RandomPrompt(small_.model(), prompt, seed);
    request.sampling.temperature = seed % 2 == 0 ? 0 : 1;
    request.sampling.seed = seed;
    request.max_tokens = max_tokens;
    request.ignore_eos = true;
    return request;
  }
  static std::shared_ptr<RecordingSink> Submit(Engine& engine, const Request& request,
                                               std::function<void(int)> on_token = {}) {
    auto sink = std::make_shared<RecordingSink>();
    sink->set_on_token(std::move(on_token));
    const auto rejected = engine.Submit(request, sink);
    EXPECT_FALSE(rejected) << rejected->message;
    return sink;
  }

  SmallModel small_{"smollm2", true};
  std::unique_ptr<Tokenizer> tokenizer_ = ByteTokenizer();
  Workspace workspaces_[2];
  int count_ = 0;
};

TEST_F(ReplicasEngineTest, RepliesAreThoseOfOneEngine) {
  std::vector<Request> requests;
  for (uint32_t i = 0; i < 24; ++i) requests.push_back(Ask(10 + 7 * (i % 6), 12, i % 8));
  std::vector<std::vector<int32_t>> alone;
  {
    TestEngine engine(small_.model(), *tokenizer_, Options());
    for (const Request& request : requests) {
      const auto sink = engine.Submit(request);
      EXPECT_TRUE(sink->Wait().status.ok());
      alone.push_back(sink->tokens());
    }
  }
  const auto front = Front(Options());
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (const Request& request : requests) sinks.push_back(Submit(*front, request));
  std::set<int> replicas;
  for (size_t i = 0; i < sinks.size(); ++i) {
    const RequestResult& result = sinks[i]->Wait();
    EXPECT_TRUE(result.status.ok()) << result.status.message();
    EXPECT_EQ(sinks[i]->tokens(), alone[i]) << i;
    replicas.insert(result.replica);
  }
  EXPECT_EQ(replicas, (std::set<int>{0, 1})) << "both had some";
  const EngineState state = front->state();
  EXPECT_EQ(state.finished, 24);
  EXPECT_EQ(state.generated_tokens, 24 * 12);
  EXPECT_GT(state.replicas[0].finished, 4);
  EXPECT_GT(state.replicas[1].finished, 4);
}

TEST_F(ReplicasEngineTest, APrefixIsFoundWhereItIs) {
  EngineOptions options = Options();
  options.deterministic = false;
  const auto front = Front(options);
  const Request first = Ask(48, 2, 3);
  EXPECT_EQ(Submit(*front, first)->Wait().cached_tokens, 0);
  for (int turn = 0; turn < 4; ++turn) {
    Request next = Ask(48, 2, 3);
    const std::vector<int32_t> more = RandomPrompt(small_.model(), 10, 100 + turn);
    next.prompt.insert(next.prompt.end(), more.begin(), more.end());
    const auto sink = Submit(*front, next);
    EXPECT_EQ(sink->Wait().cached_tokens, 48);
    EXPECT_EQ(sink->Wait().replica, 0);
  }
}

TEST_F(ReplicasEngineTest, AStepThatFailsIsItsReplicasAlone) {
  const auto front =
      Front(Options(), {[](int64_t) { throw DeviceError("an illegal access"); }, nullptr});
  const auto lost = Submit(*front, Ask(20, 8, 2)), kept = Submit(*front, Ask(20, 8, 4));
  EXPECT_EQ(lost->Wait().status.code(), StatusCode::kInternal);
  EXPECT_TRUE(kept->Wait().status.ok());
  EXPECT_FALSE(front->device_failed());
  EXPECT_EQ(front->state().replicas[0].device_error, "an illegal access");
  for (uint32_t i = 0; i < 8; ++i) {
    const auto sink = Submit(*front, Ask(20, 4, i));
    EXPECT_TRUE(sink->Wait().status.ok());
    EXPECT_EQ(sink->Wait().replica, 1);
  }
}

TEST_F(ReplicasEngineTest, CancelAndDrain) {
  const auto front = Front(Options());
  std::vector<Request> requests;
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  // Both engines stand in their first token until all has been said.
  std::atomic<bool> hold = true;
  for (uint32_t i = 0; i < 4; ++i) {
    requests.push_back(Ask(10, i < 2 ? 400 : 30, i));
    sinks.push_back(Submit(*front, requests.back(), [&](int) {
      while (hold) std::this_thread::yield();
    }));
  }
  for (int i = 0; i < 2; ++i) sinks[i]->WaitForTokens(1);
  front->Drain();
  const auto refused = front->Submit(Ask(10, 4, 9), std::make_shared<RecordingSink>());
  ASSERT_TRUE(refused);
  EXPECT_EQ(refused->kind, Rejection::Kind::kUnavailable);
  for (int i = 0; i < 2; ++i) front->Cancel(requests[i].id);
  hold = false;
  for (int i = 0; i < 2; ++i) EXPECT_EQ(sinks[i]->Wait().finish, FinishReason::kCancelled);
  for (int i = 2; i < 4; ++i) EXPECT_TRUE(sinks[i]->Wait().status.ok()) << "go on to their end";
}

// At the end of the front both engines end what they have, each request once.
TEST_F(ReplicasEngineTest, TheEndEndsEverything) {
  auto front = Front(Options());
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (uint32_t i = 0; i < 12; ++i) {
    sinks.push_back(Submit(*front, Ask(30, 400, i), [](int) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));  // to be met running
    }));
  }
  front.reset();
  for (const auto& sink : sinks) {
    EXPECT_EQ(sink->finishes(), 1);
    EXPECT_EQ(sink->Wait().status.code(), StatusCode::kCancelled);
  }
}

TEST_F(ReplicasEngineTest, TheQueueOfBothIsBounded) {
  std::atomic<bool> hold = true;
  EngineOptions options = Options();
  options.max_queued = 3;
  options.max_running = 1;
  const auto wait = [&](int64_t) {
    while (hold) std::this_thread::yield();
  };
  const auto front = Front(options, {wait, wait});
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  std::optional<Rejection> rejected;
  for (uint32_t i = 0; !rejected && i < 40; ++i) {
    sinks.push_back(std::make_shared<RecordingSink>());
    rejected = front->Submit(Ask(30, 200, i), sinks.back());
  }
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->kind, Rejection::Kind::kQueueFull);
  EXPECT_THAT(rejected->message, ::testing::HasSubstr("at most 3 requests"));
  EXPECT_LE(front->state().queued, 3);
  sinks.pop_back();
  hold = false;
  for (const auto& sink : sinks) EXPECT_TRUE(sink->Wait().status.ok());
}

}  // namespace
}  // namespace dsla
