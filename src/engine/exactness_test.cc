// What a client gets must not depend on who else is served. Greedy replies alone, batched, cut into
// other steps, pre-empted, from the prefix cache, and replayed from the recorded level history.
//
// In deterministic mode they are compared bit for bit, log-probabilities included.
//
// Otherwise sums may be ordered otherwise and, on CPUs with bf16 dot products, activations rounded,
// so that near-ties may fall the other way: every token is judged by its logit in a replay of the
// same tokens by invariant products, which round nothing. Its gap to the largest logit there is at
// most
//
//     kDeviations * sqrt(2) * noise * rms(logits)
//
// noise is what the faster products do to a logit on this machine, measured: the relative rms
// difference of two replays of the same tokens, by faster and by invariant products, the largest of
// the test's positions (they differ by a factor of ten); a gap is a difference of two logits. A
// reply at other levels than recorded has gaps of the size of the logits themselves.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>

#include "engine/engine_checks.h"
#include "engine/testing/test_engine.h"

namespace dsla {
namespace {

using testing_engine::ByteTokenizer;
using testing_engine::FunctionPolicy;
using testing_engine::RandomPrompt;
using testing_engine::RecordingSink;
using testing_engine::TargetPolicy;
using testing_engine::TestEngine;
using testing_models::AdapterShape;
using testing_models::SmallModel;

constexpr uint32_t kSeed = 20250304;
constexpr int kPage = 16;
constexpr int kLongReply = 120;  // longer than what is promised a request when it is admitted

struct Reply {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  RequestResult result;
};

struct Case {
  std::string name, family;
  AdapterShape shape;
};

class ExactnessTest : public ::testing::TestWithParam<Case> {
 protected:
  const HybridModel& model() const { return small_.model(); }

  EngineOptions Options(bool deterministic) const {
    return {.memory_bytes = 64 << 20,
            .max_batch_tokens = 2 * DeterministicChunk(kPage),
            .max_running = 32,
            .prefix_cache = false,
            .snapshot_stride = 64,
            .deterministic = deterministic,
            .default_max_level = model().max_level()};
  }

  // Prompts around chunk, page and window borders; all levels.
  std::vector<Request> Requests(int count, int max_tokens = 20) const {
    constexpr int kLengths[] = {1, 15, 16, 17, 100, 128, 129, 131, 200, 256, 300, 40};
    std::mt19937 random(kSeed);
    std::vector<Request> requests;
    for (int i = 0; i < count; ++i) {
      Request request;
      request.id = fmt::format("r{}", i);
      request.prompt = RandomPrompt(model(), kLengths[i % std::size(kLengths)], random());
      request.sampling.temperature = i % 4 == 3 ? 0.8f : 0;  // drawn by seed and position
      request.sampling.seed = random();
      request.max_tokens = 12 + static_cast<int>(random() % max_tokens);
      request.ignore_eos = true;
      request.top_logprobs = 0;
      request.tier = Tier::kExact;
      request.level = i % (model().max_level() + 1);
      requests.push_back(std::move(request));
    }
    return requests;
  }

  static Reply ReplyOf(RecordingSink& sink) {
    const RequestResult& result = sink.Wait();
    EXPECT_TRUE(result.status.ok()) << result.status.message();
    return {sink.tokens(), sink.logprobs(), result};
  }

  std::vector<Reply> Together(TestEngine& engine, const std::vector<Request>& requests) {
    std::vector<Reply> replies;
    for (const auto& sink : engine.SubmitTogether(requests)) replies.push_back(ReplyOf(*sink));
    return replies;
  }
  std::vector<Reply> Alone(const EngineOptions& options, const std::vector<Request>& requests) {
    std::vector<Reply> replies;
    for (const Request& request : requests) {
      TestEngine engine(model(), *tokenizer_, options);
      replies.push_back(ReplyOf(*engine.Submit(request)));
    }
    return replies;
  }

  // The logits of each position of the reply, of a run of the recorded levels that follows the
  // reply's own tokens. Prompts are cut at the raises and, with a chunk, at its multiples.
  std::vector<std::vector<float>> Replay(const Request& request, const Reply& reply, int chunk,
                                         Products products) {
    const std::vector<LevelSpan>& levels = reply.result.levels;
    SequenceCache cache = small_.NewSequence(levels.front().level);
    std::vector<int32_t> tokens = request.prompt;
    tokens.insert(tokens.end(), reply.tokens.begin(), reply.tokens.end());
    const int prompt = static_cast<int>(request.prompt.size());
    std::vector<std::vector<float>> rows;
    Buffer<float> logits;
    for (int begin = 0; begin + 1 < static_cast<int>(tokens.size());) {
      for (const LevelSpan& span : levels) {
        if (span.position != begin || span.level == cache.level()) continue;
        EXPECT_TRUE(small_.model().Raise(small_.ctx(), small_.pool(), cache, span.level).ok());
      }
      int end = begin < prompt ? std::min(prompt, (begin / chunk + 1) * chunk) : begin + 1;
      for (const LevelSpan& span : levels) {
        if (span.position > begin) end = std::min(end, span.position);
      }
      EXPECT_TRUE(model()
                      .Append(small_.ctx(), small_.pool(), cache,
                              std::span(tokens).subspan(begin, end - begin), 1, logits, products)
                      .ok());
      if (end >= prompt) rows.emplace_back(logits.data(), logits.data() + logits.size());
      begin = end;
    }
    if (reply.tokens.size() == rows.size()) return rows;
    ADD_FAILURE() << rows.size() << " rows for " << reply.tokens.size() << " tokens";
    return {};
  }

  void ExpectSameBits(const std::vector<Reply>& got, const std::vector<Reply>& want) {
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i) {
      SCOPED_TRACE(::testing::Message() << "seed " << kSeed << ", request " << i);
      EXPECT_EQ(got[i].tokens, want[i].tokens);
      ASSERT_EQ(got[i].logprobs.size(), want[i].logprobs.size());
      EXPECT_EQ(std::memcmp(got[i].logprobs.data(), want[i].logprobs.data(),
                            got[i].logprobs.size() * sizeof(float)),
                0);
    }
  }

  // Bit for bit: the tokens that the replay would have chosen, with their log-probabilities.
  void ExpectReplayedBits(const std::vector<Request>& requests, const std::vector<Reply>& replies) {
    const int64_t V = model().config().V;
    for (size_t i = 0; i < requests.size(); ++i) {
      SCOPED_TRACE(::testing::Message() << "seed " << kSeed << ", request " << i);
      auto rows = Replay(requests[i], replies[i], DeterministicChunk(kPage), Products::kInvariant);
      const Sampler sampler(requests[i].sampling, V);
      for (size_t t = 0; t < rows.size(); ++t) {
        const auto choice =
            sampler.Sample(rows[t], static_cast<int64_t>(requests[i].prompt.size() + t));
        ASSERT_TRUE(choice.ok());
        EXPECT_EQ(choice->token, replies[i].tokens[t]) << "token " << t;
        EXPECT_EQ(choice->logprob, replies[i].logprobs[t]) << "token " << t;
      }
    }
  }

  static double MeanSquare(std::span<const float> logits) {
    double squares = 0;
    for (const float logit : logits) squares += double{logit} * logit;
    return squares / static_cast<double>(logits.size());
  }
  // The largest gap of the replies' tokens, in units of the bound at the top of the file.
  double WorstGap(const std::vector<Request>& requests, const std::vector<Reply>& replies) {
    constexpr double kDeviations = 6;
    constexpr int kOtherChunk = 80;  // than the engine's, and more rows than the loops for few take
    double noise = std::ldexp(1., -20);  // of sums in fp32, in whatever order
    double worst = 0;                    // gap, relative to its row's rms
    double mean_noise = 0;               // over a request, the largest
    for (size_t i = 0; i < requests.size(); ++i) {
      const auto exact = Replay(requests[i], replies[i], kOtherChunk, Products::kInvariant);
      const auto fast = Replay(requests[i], replies[i], kOtherChunk, Products::kFastest);
      double difference = 0, size = 0;
      for (size_t t = 0; t < exact.size(); ++t) {
        std::vector<float> delta(fast[t]);
        for (size_t v = 0; v < delta.size(); ++v) delta[v] -= exact[t][v];
        const double error = MeanSquare(delta), square = MeanSquare(exact[t]);
        difference += error, size += square;
        noise = std::max(noise, std::sqrt(error / square));
        const double gap = *std::max_element(exact[t].begin(), exact[t].end()) -
                           exact[t][static_cast<size_t>(replies[i].tokens[t])];
        worst = std::max(worst, gap / std::sqrt(square));
      }
      if (size > 0) mean_noise = std::max(mean_noise, std::sqrt(difference / size));
    }
    EXPECT_LT(mean_noise, 0.05) << "products this rough would hide anything";
    return worst / (kDeviations * std::sqrt(2.) * noise);
  }
  void ExpectNearReplay(const std::vector<Request>& requests, const std::vector<Reply>& replies) {
    EXPECT_LE(WorstGap(requests, replies), 1) << "seed " << kSeed;
  }

  static int64_t Preemptions(const std::vector<Reply>& replies) {
    int64_t sum = 0;
    for (const Reply& reply : replies) sum += reply.result.preemptions;
    return sum;
  }

  // Somebody was pre-empted: where nobody was, because levels rose in time, all is done and checked
  // again.
  template <typename Check>
  void ExpectPreempted(TestEngine& engine, std::vector<Request> requests,
                       std::vector<Reply> replies, const Check& check) {
    for (int round = 0; round < 5 && Preemptions(replies) == 0; ++round) {
      for (Request& request : requests) request.id += "again";
      replies = Together(engine, requests);
      check(replies);
    }
    EXPECT_GT(Preemptions(replies), 0);
  }

  // Little enough that a dozen requests cannot all be there, enough for any of them.
  int64_t TinyMemory() const {
    const CacheGeometry geometry = model().cache_geometry();
    const int L = model().config().L;
    return L * std::max(25 * geometry.page_bytes(), 2 * geometry.slot_block_bytes());
  }

  // Raises running sequences by one now and then, each call another.
  static std::unique_ptr<LevelPolicy> RaisingPolicy() {
    auto random = std::make_shared<std::mt19937>(kSeed);
    return std::make_unique<FunctionPolicy>([random](const LoadSnapshot& load) {
      LevelDecision decision;
      for (const SequenceLoad& running : load.running) {
        if (running.level < running.max_level && (*random)() % 8 == 0)
          decision.raises.push_back({running.id, running.level + 1});
      }
      return decision;
    });
  }
  std::vector<Request> AutoRequests(int count, int max_tokens = 20) const {
    std::vector<Request> requests = Requests(count, max_tokens);
    for (Request& request : requests) request.tier = Tier::kAuto;
    return requests;
  }

  SmallModel small_{GetParam().family,
                    true,
                    GetParam().shape,
                    {.weights = WeightFormat::kBF16, .kv_dtype = DType::kBF16, .page_size = kPage}};
  std::unique_ptr<Tokenizer> tokenizer_ = ByteTokenizer();
};

TEST_P(ExactnessTest, DeterministicBatchesAndSteps) {
  const auto requests = Requests(24);
  const EngineOptions options = Options(true);
  const auto alone = Alone(options, requests);
  ExpectReplayedBits(requests, alone);
  {
    TestEngine engine(model(), *tokenizer_, options);
    ExpectSameBits(Together(engine, requests), alone);
  }
  EngineOptions larger = options;
  larger.max_batch_tokens = 700;
  larger.max_running = 5;
  TestEngine engine(model(), *tokenizer_, larger, TargetPolicy(0), {}, 1);
  ExpectSameBits(Together(engine, requests), alone);
}

TEST_P(ExactnessTest, DeterministicPreemption) {
  const auto requests = Requests(24, kLongReply);
  const auto alone = Alone(Options(true), requests);
  for (const bool prefix_cache : {false, true}) {
    EngineOptions tiny = Options(true);
    tiny.memory_bytes = TinyMemory();
    tiny.prefix_cache = prefix_cache;
    TestEngine engine(model(), *tokenizer_, tiny);
    const auto check = [&](const std::vector<Reply>& replies) { ExpectSameBits(replies, alone); };
    const auto together = Together(engine, requests);
    check(together);
    if (!prefix_cache) ExpectPreempted(engine, requests, together, check);
  }
}

TEST_P(ExactnessTest, DeterministicPrefixCache) {
  auto requests = Requests(24);
  const auto alone = Alone(Options(true), requests);
  EngineOptions options = Options(true);
  options.prefix_cache = true;
  TestEngine engine(model(), *tokenizer_, options);
  ExpectSameBits(Together(engine, requests), alone);
  for (Request& request : requests) request.id += "again";
  const auto again = Together(engine, requests);
  ExpectSameBits(again, alone);
  std::set<int> levels;  // of those that did not start from nothing
  for (size_t i = 0; i < requests.size(); ++i) {
    if (again[i].result.cached_tokens > 0) levels.insert(requests[i].level);
    EXPECT_LT(again[i].result.cached_tokens, static_cast<int>(requests[i].prompt.size()));
  }
  EXPECT_EQ(static_cast<int>(levels.size()), model().max_level() + 1);
}

TEST_P(ExactnessTest, DeterministicRaisesEqualTheirRecord) {
  for (const bool tiny : {false, true}) {
    const auto requests = AutoRequests(24, tiny ? kLongReply : 20);
    EngineOptions options = Options(true);
    if (tiny) options.memory_bytes = TinyMemory();
    options.prefix_cache = tiny;
    TestEngine engine(model(), *tokenizer_, options, RaisingPolicy());
    const auto replies = Together(engine, requests);
    int64_t raised = 0;
    for (const Reply& reply : replies)
      raised += static_cast<int64_t>(reply.result.levels.size()) - 1;
    EXPECT_GT(raised, 0);
    const auto check = [&](const std::vector<Reply>& got) { ExpectReplayedBits(requests, got); };
    check(replies);
    if (tiny) ExpectPreempted(engine, requests, replies, check);
  }
}

TEST_P(ExactnessTest, OtherwiseUpToNearTies) {
  for (const bool tiny : {false, true}) {
    auto requests = AutoRequests(24, tiny ? kLongReply : 20);
    for (Request& request : requests) request.sampling.temperature = 0;
    EngineOptions options = Options(false);
    if (tiny) options.memory_bytes = TinyMemory();
    options.prefix_cache = true;
    TestEngine engine(model(), *tokenizer_, options, RaisingPolicy());
    const auto check = [&](const std::vector<Reply>& got) { ExpectNearReplay(requests, got); };
    const auto replies = Together(engine, requests);
    check(replies);
    if (tiny) {
      ExpectPreempted(engine, requests, replies, check);
      continue;  // the prefix cache has no room
    }
    for (Request& request : requests) request.id += "again";
    const auto again = Together(engine, requests);
    ExpectNearReplay(requests, again);
    // The bound tells replies apart: with the raises left out, the replay is of another sequence.
    std::vector<Reply> unraised = again;
    for (Reply& reply : unraised) reply.result.levels.resize(1);
    EXPECT_GT(WorstGap(requests, unraised), 3);
    int64_t cached = 0;
    for (const Reply& reply : again) cached += reply.result.cached_tokens;
    EXPECT_GT(cached, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Adapters, ExactnessTest,
                         ::testing::Values(Case{"window_two_states", "smollm2", {}},
                                           Case{"no_window", "qwen2", {.window = 0, .sinks = 0}}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace dsla
