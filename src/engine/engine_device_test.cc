// The engine over a device that runs steps by itself, as a GPU does: here one on the host that is
// as late as it may be (engine/testing/stream_device.h).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <numeric>
#include <random>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "engine/engine.h"
#include "engine/testing/stream_fixture.h"

namespace dsla {
namespace {

using ::testing::ElementsAre;
using testing_engine::FunctionPolicy;
using testing_engine::kL;
using testing_engine::kPage;
using testing_engine::kV;
using testing_engine::OneMore;
using testing_engine::OnStream;
using testing_engine::RecordingSink;
using testing_engine::RowContext;
using testing_engine::StreamModel;
using testing_engine::StreamTest;
using testing_engine::TargetPolicy;
using testing_engine::TestEngine;

int32_t Choose(uint64_t link, int level, int64_t position, const SamplingParams& sampling) {
  uint64_t x = link + static_cast<uint64_t>(level) * 0x632be59bd9b4e019;
  if (sampling.temperature > 0) x ^= (sampling.seed + static_cast<uint64_t>(position)) * 0xff51afd7;
  return static_cast<int32_t>((x ^ (x >> 31)) % kV);
}
int32_t ChooseRow(const RowContext& row) {
  return Choose(row.link, row.level, row.position,
                row.sampling != nullptr ? *row.sampling : SamplingParams{.temperature = 0});
}

class EngineDeviceTest : public StreamTest {
 protected:
  // Every token is the one that the recorded levels give to its request alone.
  static void ExpectTrue(const Request& request, RecordingSink& sink) {
    const RequestResult& result = sink.Wait();
    EXPECT_EQ(static_cast<int>(sink.tokens().size()), result.generated_tokens);
    uint64_t link = 0;
    for (const int32_t token : request.prompt) link = StreamModel::NextLink(link, token);
    int position = static_cast<int>(request.prompt.size());
    for (const TokenOutput& output : sink.outputs()) {
      EXPECT_EQ(output.level, LevelBefore(result.levels, position));
      ASSERT_EQ(output.token, Choose(link, output.level, position, request.sampling))
          << request.id << ", position " << position;
      link = StreamModel::NextLink(link, output.token);
      ++position;
    }
  }

  // A request of any kind.
  Request AnyRequest(std::mt19937& random) {
    const auto pick = [&](int low, int high) {
      return std::uniform_int_distribution(low, high)(random);
    };
    std::vector<int32_t> prompt(pick(1, 70));
    std::mt19937 document(pick(1, 3));
    for (int32_t& token : prompt) token = static_cast<int32_t>(document() % kV);
    Request request = Ask(pick(1, 60), std::move(prompt));
    request.prompt.back() = pick(0, kV - 1);
    if (pick(0, 1) == 0) request.sampling = {.seed = static_cast<uint64_t>(pick(0, 999))};
    if (pick(0, 1) == 0) request.stop_ids = {pick(0, kV - 1), pick(0, kV - 1), pick(0, kV - 1)};
    if (pick(0, 1) == 0) request.stop = {"0", "(1", "A"};
    if (pick(0, 3) == 0) {  // the host samples the first ones
      request.min_tokens = std::min(pick(0, 8), request.max_tokens);
      request.sampling.temperature = 0;
      request.stop_ids.clear();
    }
    request.tier = static_cast<Tier>(pick(0, 3));
    request.level = pick(0, kL);
    if (request.tier == Tier::kAuto) request.stop_ids.clear();
    return request;
  }

  // A request whose states are copied: for the prefix cache, and by the next of its kind from
  // there.
  Request AskForCopies() {
    Request request = Ask(9, std::vector<int32_t>(40, 7));
    request.tier = Tier::kExact;
    request.level = kL;
    return request;
  }
  // Raises, and starts at, any levels.
  static std::unique_ptr<LevelPolicy> RandomPolicy(uint32_t seed) {
    return std::make_unique<FunctionPolicy>(
        [chance = std::mt19937(seed)](const LoadSnapshot& l) mutable {
          LevelDecision decision;
          decision.target = static_cast<int>(chance() % (kL + 1));
          for (const SequenceLoad& sequence : l.running) {
            if (sequence.level < sequence.max_level && chance() % 4 == 0)
              decision.raises.push_back({sequence.id, sequence.level + 1});
          }
          decision.reason = "memory: a test";
          return decision;
        });
  }
};

TEST_F(EngineDeviceTest, TheNextStepBeginsBeforeTokensAreRead) {
  std::vector<std::string> log;
  OnStream on({.choose = OneMore, .note = [&](const char* what, int step) {
                 log.push_back(fmt::format("{} {}", what, step));
               }});
  TestEngine engine(on.small.model(), *tokenizer_, Options());
  const auto sink =
      engine.Submit(Ask(5), [&](int count) { log.push_back(fmt::format("token {}", count)); });
  EXPECT_TRUE(sink->Wait().status.ok());
  EXPECT_THAT(sink->tokens(), ElementsAre(10, 11, 12, 13, 14));
  EXPECT_THAT(log, ElementsAre("begin 1", "begin 2", "end 1", "begin 3", "token 1", "end 2",
                               "begin 4", "token 2", "end 3", "begin 5", "token 3", "end 4",
                               "token 4", "end 5", "token 5"))
      << "no step for tokens beyond max_tokens";
  ExpectNoLeak(engine);
}

// A request is waiting or running at any time, also in the first step of all.
TEST_F(EngineDeviceTest, WhoeverIsInAStepIsSaidToRun) {
  std::function<void()> note = [] {};
  OnStream on({.choose = OneMore, .note = [&](const char*, int) { note(); }});
  TestEngine engine(on.small.model(), *tokenizer_, Options());
  std::vector<std::pair<int, int>> seen;
  note = [&] {
    const EngineState state = engine->state();
    seen.emplace_back(state.queued, state.running);
  };
  EXPECT_TRUE(engine.Submit(Ask(2))->Wait().status.ok());
  ExpectNoLeak(engine);
  EXPECT_THAT(seen, ::testing::Each(std::pair(0, 1)));
}

// Also where one is admitted, as its prompt is mostly cached, but has no rows in the step yet.
TEST_F(EngineDeviceTest, WhoeverHasNoRowsYetIsCountedOnce) {
  std::function<void()> note = [] {};
  OnStream on({.choose = ChooseRow, .note = [&](const char*, int) { note(); }});
  EngineOptions options = Options();
  options.max_batch_tokens = 2 * kPage;
  TestEngine engine(on.small.model(), *tokenizer_, options);
  EXPECT_TRUE(engine.Submit(Ask(1, std::vector<int32_t>(40, 7)))->Wait().status.ok());
  std::vector<Submission> together;
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 4; ++i) {
    std::vector<int32_t> prompt(i == 0 ? 200 : 42, i == 0 ? 8 : 7);
    sinks.push_back(std::make_shared<RecordingSink>());
    together.push_back({Ask(1, std::move(prompt)), sinks.back()});
  }
  int least = 4, most = 0;
  note = [&] {
    const EngineState state = engine->state();
    EXPECT_GE(state.queued, 0);
    EXPECT_EQ(state.running,
              std::accumulate(state.rows_per_level.begin(), state.rows_per_level.end(), 0));
    least = std::min(least, state.queued + state.running);
    most = std::max(most, state.queued + state.running);
  };
  EXPECT_FALSE(engine->SubmitAll(std::move(together)).has_value());
  for (const auto& sink : sinks) EXPECT_TRUE(sink->Wait().status.ok());
  EXPECT_EQ(most, 4);
  EXPECT_EQ(least, 1);
}

// So do those with prompts, and whoever comes while one runs is in the next.
TEST_F(EngineDeviceTest, ANewPromptComesIntoTheStepBehindOneWithPrompts) {
  std::vector<std::vector<std::pair<int, bool>>> begun;  // rows of each sequence, whether fed
  std::function<void(int)> nearly_done = [](int) {};
  OnStream on({.choose = ChooseRow,
               .begins =
                   [&](const PlacedRows& rows) {
                     begun.emplace_back(rows.N());
                     for (int n = 0; n < rows.N(); ++n)
                       begun.back()[rows.batch_index[n]] = {
                           static_cast<int>(rows.sequences[n]->tokens.size()),
                           rows.sequences[n]->feed >= 0};
                   },
               .nearly_done = [&](int step, double) { nearly_done(step); }});
  EngineOptions options = Options();
  options.max_batch_tokens = 2 * kPage;
  TestEngine engine(on.small.model(), *tokenizer_, options);
  const Request longer = Ask(3, std::vector<int32_t>(40, 7)), newcomer = Ask(2);
  const auto other = std::make_shared<RecordingSink>();
  nearly_done = [&](int step) {
    if (step != 1) return;
    EXPECT_FALSE(engine->Submit(newcomer, other).has_value());
  };
  const auto sink = engine.Submit(longer);
  ExpectTrue(longer, *sink);
  ExpectTrue(newcomer, *other);
  using Step = std::vector<std::pair<int, bool>>;
  EXPECT_THAT(begun, ElementsAre(Step{{32, false}}, Step{{8, false}, {3, false}},
                                 Step{{1, true}, {1, true}}, Step{{1, true}}));
  ExpectNoLeak(engine);
}

// As early as that took of late, by halves, and no earlier.
TEST_F(EngineDeviceTest, TheStepBehindOneWithPromptsIsBegunInTime) {
  using namespace std::chrono_literals;
  std::vector<double> leads, ends = {NowSeconds()};  // of each step
  OnStream on({.choose = ChooseRow,
               .note =
                   [&](const char* what, int step) {
                     if (std::string_view(what) == "end") ends.push_back(NowSeconds());
                     if (std::string_view(what) == "begin" && step == 3)
                       std::this_thread::sleep_for(50ms);
                   },
               .nearly_done = [&](int, double seconds) { leads.push_back(seconds); }});
  EngineOptions options = Options();
  options.max_batch_tokens = 2 * kPage;
  TestEngine engine(on.small.model(), *tokenizer_, options);
  EXPECT_TRUE(engine.Submit(Ask(2, std::vector<int32_t>(14 * kPage, 7)))->Wait().status.ok());
  ASSERT_EQ(leads.size(), 7u);
  EXPECT_EQ(leads[0], 0);
  EXPECT_GE(leads[2], 0.05);
  for (size_t i = 0; i < 6; ++i) {
    const double most = ends[i + 1] - ends[i];  // that the step behind can have taken
    EXPECT_LE(leads[i + 1], std::max(most, 0.5 * (leads[i] + most))) << i;
  }
}

// What happens to one of three requests at any moment of two steps that are under way costs nobody
// else anything, and leaves no trace of it.
TEST_F(EngineDeviceTest, WhateverHappensBetweenTwoStepsWithPrompts) {
  enum Event { kCancelReply, kCancelPrompt, kSubmit, kFail, kRaise, kEvents };
  int64_t cancelled = 0, failed = 0, raised = 0;
  for (int event = 0; event < kEvents; ++event) {
    for (int moment = 0; moment < 24; ++moment) {
      SCOPED_TRACE(::testing::Message() << "event " << event << " at moment " << moment);
      std::function<void(const char*, int)> note = [](const char*, int) {};
      std::atomic<bool> raise = false;
      OnStream on({.choose = ChooseRow,
                   .note = [&](const char* what, int step) { note(what, step); },
                   .nearly_done = [&](int step, double) { note("nearly done", step); }});
      EngineOptions options = Options();
      options.max_batch_tokens = 2 * kPage;
      options.snapshot_stride = kPage;
      TestEngine engine(on.small.model(), *tokenizer_, options,
                        std::make_unique<FunctionPolicy>([&](const LoadSnapshot& load) {
                          LevelDecision decision{.target = 0, .raises = {}, .reason = "a test"};
                          for (const SequenceLoad& sequence : load.running) {
                            if (sequence.level < sequence.max_level && raise.exchange(false))
                              decision.raises.push_back({sequence.id, 1});
                          }
                          return decision;
                        }));
      std::vector<Request> requests = {Ask(8, {1, 2, 3}), Ask(4, std::vector<int32_t>(150, 7)),
                                       Ask(3, std::vector<int32_t>(70, 8))};
      requests[1].tier = Tier::kExact;  // states at each page
      requests[1].level = 1;
      std::vector<std::shared_ptr<RecordingSink>> sinks(3);
      for (auto& sink : sinks) sink = std::make_shared<RecordingSink>();
      const auto submit = [&](int i) {
        EXPECT_FALSE(engine->Submit(requests[i], sinks[i]).has_value());
      };
      std::atomic<int> now = 0;
      note = [&](const char*, int) {
        if (now++ != moment) return;
        if (event == kCancelPrompt) engine->Cancel(requests[1].id);
        if (event == kCancelReply) engine->Cancel(requests[0].id);
        if (event == kSubmit) submit(2);
        if (event == kRaise) raise = true;
        if (event == kFail) throw std::runtime_error("lost");
      };
      std::vector<Submission> together = {{requests[0], sinks[0]}, {requests[1], sinks[1]}};
      if (event != kSubmit) together.push_back({requests[2], sinks[2]});
      EXPECT_FALSE(engine->SubmitAll(std::move(together)).has_value());
      for (int i = 0; i < 3; ++i) {
        if (i == 2 && event == kSubmit && now <= moment) submit(2);  // that was never reached
        const RequestResult& result = sinks[i]->Wait();
        ExpectTrue(requests[i], *sinks[i]);
        if (event == kFail && !result.status.ok()) {
          EXPECT_EQ(result.status.message(), "a step failed: lost");
          ++failed;
        } else if (result.finish == FinishReason::kCancelled) {
          EXPECT_EQ(i, event == kCancelPrompt ? 1 : 0);
          ++cancelled;
        } else {
          EXPECT_EQ(result.generated_tokens, requests[i].max_tokens);
        }
      }
      ExpectNoLeak(engine);
      raised += engine->state().raises;
      // What was left in the prefix cache is sound.
      note = [](const char*, int) {};
      ExpectTrue(requests[1], *engine.Submit(requests[1]));
    }
  }
  EXPECT_GT(cancelled, 20);
  EXPECT_GT(failed, 20);
  EXPECT_GT(raised, 10);
}

// A request that came into the step behind one that fails goes on.
TEST_F(EngineDeviceTest, TheStepBehindOneThatFailsIsSound) {
  std::function<void(int)> nearly_done = [](int) {};
  OnStream on({.choose = ChooseRow,
               .note =
                   [](const char* what, int step) {
                     if (std::string_view(what) == "end" && step == 1)
                       throw std::runtime_error("lost");
                   },
               .nearly_done = [&](int step, double) { nearly_done(step); }});
  TestEngine engine(on.small.model(), *tokenizer_, Options());
  const Request newcomer = Ask(4);
  const auto sink = std::make_shared<RecordingSink>();
  nearly_done = [&](int step) {
    if (step != 1) return;
    EXPECT_FALSE(engine->Submit(newcomer, sink).has_value());
  };
  const auto failed = engine.Submit(Ask(3, std::vector<int32_t>(40, 7)));
  EXPECT_EQ(failed->Wait().status.message(), "a step failed: lost");
  EXPECT_EQ(failed->Wait().generated_tokens, 0);
  EXPECT_TRUE(sink->Wait().status.ok());
  ExpectTrue(newcomer, *sink);
  EXPECT_EQ(sink->Wait().generated_tokens, 4);
  ExpectNoLeak(engine);
}

// Rows that the host samples keep to the order in which each step knows all tokens.
TEST_F(EngineDeviceTest, RowsThatTheHostSamplesAreNotBegun) {
  std::vector<std::string> log;
  OnStream on({.choose = OneMore, .note = [&](const char* what, int step) {
                 log.push_back(fmt::format("{} {}", what, step));
               }});
  TestEngine engine(on.small.model(), *tokenizer_, Options());
  Request request = Ask(3);
  request.sampling.presence_penalty = 0.5f;
  const auto sink = engine.Submit(
      std::move(request), [&](int count) { log.push_back(fmt::format("token {}", count)); });
  EXPECT_TRUE(sink->Wait().status.ok());
  EXPECT_THAT(sink->tokens(), ElementsAre(10, 11, 12));
  EXPECT_THAT(log, ElementsAre("forward 1", "runs 1", "forward 2", "token 1", "runs 2", "forward 3",
                               "token 2", "runs 3", "token 3"));
}

TEST_F(EngineDeviceTest, WhatFollowsTheEndOfAReplyIsNotSeen) {
  int steps = 0;
  OnStream on({.choose = OneMore, .note = [&](const char*, int step) { steps = step; }});
  TestEngine engine(on.small.model(), *tokenizer_, Options());
  Request request = Ask(20, {'0'});
  request.stop = {"34"};
  const auto stopped = engine.Submit(request);
  EXPECT_EQ(stopped->Wait().stop_string, "34");
  EXPECT_EQ(stopped->text(), "12");
  EXPECT_EQ(stopped->Wait().generated_tokens, 4);
  ExpectNoLeak(engine);
  EXPECT_EQ(steps, 5) << "one row more than the reply took";

  request = Ask(20, {'0'});
  request.stop_ids = {'3'};
  const auto ended = engine.Submit(request);
  EXPECT_EQ(ended->Wait().stop_token, '3');
  EXPECT_EQ(ended->text(), "12");
  EXPECT_EQ(ended->Wait().generated_tokens, 2);
  ExpectNoLeak(engine);
}

TEST_F(EngineDeviceTest, NothingIsLostWhenTheRequestEndsInBetween) {
  std::function<void(const char*, int)> note = [](const char*, int step) {
    if (step == 3) throw DeviceError("gone");
  };
  OnStream on({.choose = OneMore, .note = [&](const char* what, int step) { note(what, step); }});
  TestEngine engine(on.small.model(), *tokenizer_, Options());
  const auto failed = engine.Submit(Ask(9));
  EXPECT_EQ(failed->Wait().status.message(), "the device failed: gone");
  EXPECT_THAT(failed->tokens(), ElementsAre(10, 11));
  EXPECT_EQ(failed->Wait().generated_tokens, 2);
  ExpectNoLeak(engine);

  const auto cancelled = std::make_shared<RecordingSink>();
  const Request request = Ask(60);
  note = [&](const char*, int step) {
    if (step == 8) engine->Cancel(request.id);
  };
  EXPECT_FALSE(engine->Submit(request, cancelled).has_value());
  EXPECT_EQ(cancelled->Wait().finish, FinishReason::kCancelled);
  EXPECT_EQ(static_cast<int>(cancelled->tokens().size()), cancelled->Wait().generated_tokens);
  ExpectNoLeak(engine);
}

// Text that was held back goes out with whatever end.
TEST_F(EngineDeviceTest, WhoeverIsCancelledWithTheLastTokenHasAllText) {
  std::function<void()> nearly_done = [] {};
  OnStream on({.choose = OneMore, .nearly_done = [&](int, double) { nearly_done(); }});
  TestEngine engine(on.small.model(), *tokenizer_, Options());
  Request request = Ask(1, {'0'});
  request.stop = {"12"};
  nearly_done = [&] { engine->Cancel(request.id); };
  const auto sink = std::make_shared<RecordingSink>();
  EXPECT_FALSE(engine->Submit(request, sink).has_value());
  EXPECT_EQ(sink->Wait().finish, FinishReason::kCancelled);
  EXPECT_THAT(sink->tokens(), ElementsAre('1'));
  EXPECT_EQ(sink->text(), "1");
}

// States are copied between steps: a failure there ends all requests as one in a step does its own.
// Where states are to be kept, and in the middle of a plan, where a request starts from some.
TEST_F(EngineDeviceTest, ADeviceThatFailsAtACopyFailsEverybody) {
  for (const bool from_cache : {false, true}) {
    std::atomic<bool> fails = !from_cache;
    OnStream on({.choose = OneMore,
                 .note =
                     [](const char*, int) {
                       std::this_thread::sleep_for(
                           std::chrono::milliseconds(5));  // to be met running
                     },
                 .copies =
                     [&] {
                       if (fails) throw DeviceError("gone");
                     }});
    TestEngine engine(on.small.model(), *tokenizer_, Options());
    const Request copied = AskForCopies();
    if (from_cache) {
      EXPECT_TRUE(engine.Submit(copied)->Wait().status.ok());
    }
    fails = true;
    Request request = Ask(400);
    request.tier = Tier::kFull;
    const auto running = engine.Submit(request);
    running->WaitForTokens(2);
    for (const auto& sink : {running, engine.Submit(copied)}) {
      EXPECT_EQ(sink->Wait().status.code(), StatusCode::kInternal);
      EXPECT_EQ(sink->Wait().status.message(), "the device failed: gone");
    }
    EXPECT_EQ(engine->state().device_error, "gone");
    EXPECT_TRUE(engine.Submit(Ask(3))->Wait().status.ok()) << "nothing of it is left";
  }
}

// Whoever has just had the last token, or whose deadline has passed, when the copy fails, too.
TEST_F(EngineDeviceTest, ADeviceThatFailsAtACopyLosesNoEnd) {
  for (const bool at_commit : {true, false}) {
    std::atomic<bool> fails = at_commit;
    std::function<void()> note = [] {};
    OnStream on({.choose = OneMore,
                 .note = [&](const char*, int) { note(); },
                 .copies =
                     [&] {
                       if (fails) throw DeviceError("gone");
                     }});
    TestEngine engine(on.small.model(), *tokenizer_, Options());
    const Request copied = AskForCopies();
    Request ends = Ask(at_commit ? 1 : 400);
    ends.sampling.presence_penalty = 0.5f;  // so that nothing is begun behind
    ends.tier = Tier::kFull;
    std::vector<std::shared_ptr<RecordingSink>> sinks = {std::make_shared<RecordingSink>(),
                                                         std::make_shared<RecordingSink>()};
    if (at_commit) {
      EXPECT_FALSE(engine->SubmitAll({{ends, sinks[0]}, {copied, sinks[1]}}).has_value());
    } else {
      EXPECT_TRUE(engine.Submit(copied)->Wait().status.ok());  // which leaves states
      ends.deadline = NowSeconds() + 2;                        // once its first step has begun
      note = [&, submitted = false]() mutable {
        if (std::exchange(submitted, true)) return;
        EXPECT_FALSE(engine->Submit(copied, sinks[1]).has_value());
        std::this_thread::sleep_for(std::chrono::milliseconds(2100));
        fails = true;
      };
      EXPECT_FALSE(engine->Submit(ends, sinks[0]).has_value());
    }
    for (const auto& sink : sinks)
      EXPECT_EQ(sink->Wait().status.message(), "the device failed: gone");
    EXPECT_GE(sinks[0]->tokens().size(), 1u);
    EXPECT_EQ(sinks[0]->Wait().levels, (LevelHistory{{0, 0}}));
    ExpectNoLeak(engine);
  }
}

// Entries of the prefix cache may keep units of memory that the ledger knows nothing of.
TEST_F(EngineDeviceTest, WithoutMemoryForRowsThePrefixCacheIsGivenUp) {
  std::atomic<int> fails = 0;
  OnStream on({.choose = OneMore, .backs = [&] {
                 if (fails > 0 && fails-- > 0) throw std::bad_alloc();
               }});
  TestEngine engine(on.small.model(), *tokenizer_, Options());
  const std::vector<int32_t> prompt(40, 7);
  EXPECT_TRUE(engine.Submit(Ask(2, prompt))->Wait().status.ok());
  EXPECT_EQ(engine.Submit(Ask(2, prompt))->Wait().cached_tokens, 32);
  for (const int count : {2, 40}) {
    fails = count;
    const auto sink = engine.Submit(Ask(2, std::vector<int32_t>(200, 9 + count)));
    EXPECT_EQ(sink->Wait().status.ok(), count == 2) << sink->Wait().status.message();
    fails = 0;
  }
  EXPECT_EQ(engine.Submit(Ask(2, prompt))->Wait().cached_tokens, 0);
  ExpectNoLeak(engine);
}

TEST_F(EngineDeviceTest, WithoutMemoryForACopyThereIsNoSnapshot) {
  int backs = 0;
  OnStream on({.choose = OneMore, .backs = [&] {
                 if (++backs == kL + 1) throw std::bad_alloc();  // the first behind its own slots
               }});
  TestEngine engine(on.small.model(), *tokenizer_, Options());
  for (const int cached : {0, 0, 32}) {
    Request request = Ask(2, std::vector<int32_t>(40, 7));
    request.tier = Tier::kExact;
    request.level = kL;
    const auto sink = engine.Submit(request);
    EXPECT_TRUE(sink->Wait().status.ok()) << sink->Wait().status.message();
    EXPECT_EQ(sink->Wait().cached_tokens, cached);
    EXPECT_THAT(sink->tokens(), ElementsAre(8, 9));
  }
  ExpectNoLeak(engine);
}

// Steps that were begun and nobody will ask for must not reach the next engine on that model.
TEST_F(EngineDeviceTest, AnEngineEndsWithStepsUnderWay) {
  OnStream on({.choose = ChooseRow, .note = [](const char*, int) {
                 std::this_thread::sleep_for(std::chrono::milliseconds(5));  // it has to be met
               }});
  for (int round = 0; round < 3; ++round) {
    TestEngine engine(on.small.model(), *tokenizer_, Options());
    const Request request = Ask(400);
    const auto sink = engine.Submit(request);
    sink->WaitForTokens(5);
    engine.Destroy();
    EXPECT_EQ(sink->Wait().finish, FinishReason::kCancelled);
    ExpectTrue(request, *sink);
  }
}

// All kinds of requests at once, on such a device and on one whose steps all run to their end.
TEST_F(EngineDeviceTest, RepliesAreThoseOfStepsThatRunToTheirEnd) {
  int begun = 0, with_prompts = 0;
  OnStream ahead({.choose = ChooseRow, .begins = [&](const PlacedRows& rows) {
                    ++begun;
                    with_prompts += rows.T() > rows.N();
                  }});
  OnStream in_order({.most_choices = 0, .choose = ChooseRow});
  for (uint32_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    std::vector<Request> requests;
    for (int i = 0; i < 12; ++i) {
      requests.push_back(AnyRequest(random));
      // What is there to start from would decide about its levels.
      if (requests.back().tier == Tier::kEconomy) requests.back().tier = Tier::kExact;
    }
    if (seed % 4 == 0) requests[5].sampling.presence_penalty = 0.1f;
    EngineOptions options = Options();
    options.snapshot_stride = 2 * kPage;
    if (seed % 3 != 0) options.max_batch_tokens = 2 * kPage;
    // Down to less than all of them need.
    options.memory_bytes = int64_t{4096} * (seed % 2 == 0 ? 2000 : 40);
    std::vector<std::shared_ptr<RecordingSink>> sinks[2];
    for (const auto* on : {&ahead, &in_order}) {
      TestEngine engine(on->small.model(), *tokenizer_, options, TargetPolicy(0));
      for (const Request& request : requests)
        sinks[on == &in_order].push_back(engine.Submit(request));
      for (const auto& sink : sinks[on == &in_order]) sink->Wait();
      ExpectNoLeak(engine);
    }
    for (size_t i = 0; i < requests.size(); ++i) {
      RecordingSink& got = *sinks[0][i];
      RecordingSink& want = *sinks[1][i];
      EXPECT_EQ(got.tokens(), want.tokens()) << requests[i].id;
      EXPECT_EQ(got.text(), want.text());
      EXPECT_EQ(got.Wait().finish, want.Wait().finish);
      EXPECT_EQ(got.Wait().stop_token, want.Wait().stop_token);
      EXPECT_EQ(got.Wait().stop_string, want.Wait().stop_string);
      EXPECT_EQ(got.Wait().generated_tokens, want.Wait().generated_tokens);
      EXPECT_EQ(got.Wait().levels, want.Wait().levels);
      if (requests[i].sampling.presence_penalty == 0) ExpectTrue(requests[i], got);
    }
  }
  EXPECT_GT(begun, 500);
  EXPECT_GT(with_prompts, 100);
}

// Raises, pre-emption, cancels and the prefix cache: what was recorded is what happened.
TEST_F(EngineDeviceTest, HistoriesAreTrueUnderPressure) {
  OnStream on({.choose = ChooseRow});
  int64_t raises = 0, preemptions = 0, cancelled = 0, cached = 0;
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    EngineOptions options = Options();
    options.snapshot_stride = kPage;
    if (seed % 2 == 0) options.max_batch_tokens = 2 * kPage;
    // Of three: room for all, room for few, and many short prompts whose replies grow beyond it.
    const bool tight = seed % 3 == 2;
    options.memory_bytes = int64_t{4096} * (seed % 3 == 0 ? 2000 : tight ? 28 : 24 + random() % 60);
    TestEngine engine(on.small.model(), *tokenizer_, options, RandomPolicy(seed));
    std::vector<int32_t> conversation;
    for (int turn = 0; turn < 4; ++turn) {
      std::vector<Request> requests;
      std::vector<std::shared_ptr<RecordingSink>> sinks;
      for (int i = 0; i < 8; ++i) {
        Request request = AnyRequest(random);
        if (!conversation.empty() && i % 2 == 0 && conversation.size() < 90) {
          conversation.push_back(static_cast<int32_t>(random() % kV));
          request.prompt = conversation;
        } else if (tight) {
          request.prompt.resize(1 + request.prompt.size() % 16);
          request.max_tokens = 60;
          request.tier = Tier::kFull;
        }
        requests.push_back(request);
        const int cancel_at = random() % 6 == 0 ? static_cast<int>(random() % 20) : -1;
        sinks.push_back(engine.Submit(request, [&engine, request, cancel_at](int tokens) {
          if (tokens == cancel_at) engine->Cancel(request.id);
        }));
      }
      for (size_t i = 0; i < requests.size(); ++i) {
        const RequestResult& result = sinks[i]->Wait();
        ExpectTrue(requests[i], *sinks[i]);
        cancelled += result.finish == FinishReason::kCancelled;
        cached += result.cached_tokens;
        if (i % 2 == 1 || !conversation.empty()) continue;
        conversation = requests[i].prompt;
        for (const int32_t token : sinks[i]->tokens()) conversation.push_back(token);
      }
    }
    raises += engine->state().raises;
    preemptions += engine->state().preemptions;
    ExpectNoLeak(engine);
  }
  EXPECT_GT(raises, 20);
  EXPECT_GT(preemptions, 20);
  EXPECT_GT(cancelled, 20);
  EXPECT_GT(cached, 500);
}

// The same beside steps and copies that fail, deadlines, log-probabilities of prompts, and bounds
// and policies that change.
TEST_F(EngineDeviceTest, HistoriesAreTrueBesideFaults) {
  std::mt19937 faults(1);
  const auto may_fail = [&](uint32_t one_in) {
    if (faults() % one_in != 0) return;
    if (faults() % 2 == 0) throw std::bad_alloc();
    throw std::runtime_error("lost");
  };
  OnStream on({.choose = ChooseRow,
               .note =
                   [&](const char* what, int) {
                     if (std::string_view(what) != "runs") may_fail(200);
                   },
               .copies =
                   [&] {
                     if (faults() % 20 == 0) throw std::bad_alloc();
                   }});
  std::map<StatusCode, int> ends;
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    EngineOptions options = Options();
    options.snapshot_stride = kPage;
    options.max_batch_tokens = static_cast<int>(kPage * (2 + random() % 8));
    options.memory_bytes = int64_t{4096} * (seed % 3 == 0 ? 2000 : 24 + random() % 60);
    TestEngine engine(on.small.model(), *tokenizer_, options, RandomPolicy(seed));
    std::vector<std::pair<Request, std::shared_ptr<RecordingSink>>> asked;
    for (int i = 0; i < 30; ++i) {
      Request request = AnyRequest(random);
      if (random() % 5 == 0) {
        request.prompt_logprobs = true;
        request.top_logprobs = static_cast<int>(random() % 3);
        request.sampling.temperature = 0;
      }
      if (random() % 6 == 0) request.deadline = NowSeconds() + 1e-4 * (random() % 60);
      const auto sink = std::make_shared<RecordingSink>();
      if (engine->Submit(request, sink).has_value()) continue;  // too large at this bound
      asked.emplace_back(request, sink);
      if (random() % 10 == 0) engine->SetMaxLevel(static_cast<int>(random() % (kL + 1)));
      if (random() % 15 == 0) engine->SetPolicy([&](int) { return RandomPolicy(random()); });
      if (random() % 10 == 0) engine->Cancel(asked[random() % asked.size()].first.id);
    }
    for (const auto& [request, sink] : asked) {
      const Status& status = sink->Wait().status;
      ExpectTrue(request, *sink);
      ++ends[status.code()];
      if (status.ok() && sink->Wait().finish == FinishReason::kLength) {
        EXPECT_EQ(sink->Wait().generated_tokens, request.max_tokens);
      }
    }
    ExpectNoLeak(engine);
    const EngineState state = engine->state();
    EXPECT_EQ(state.queued + state.running + state.queued_tokens, 0);
  }
  for (const StatusCode code : {StatusCode::kOk, StatusCode::kInternal, StatusCode::kCancelled,
                                StatusCode::kResourceExhausted, StatusCode::kDeadlineExceeded})
    EXPECT_GT(ends[code], 10) << static_cast<int>(code);
}

}  // namespace
}  // namespace dsla
