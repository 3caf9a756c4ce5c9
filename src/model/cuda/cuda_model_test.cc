// The model on a GPU against the same model on the CPU: random weights, rounded alike on both
// sides, all levels in one batch. Activations are bf16 on the GPU and fp32 on the CPU, so logits
// (of deviation about 1) differ by some roundings of 2^-9; what is compared is the divergence
// between the two distributions that they give.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <deque>
#include <filesystem>
#include <fstream>
#include <optional>

#include "model/hybrid_model.h"
#include "ops/sampling/sampling.h"

namespace dsla {
namespace {

// Of a divergence at any row, and of their mean.
struct Bounds {
  double most, mean;
};
constexpr Bounds kBounds{1e-2, 1e-3};
// Weights in fp8 and, where there are many, rows, which the CPU has in bf16, are off by 2.6% (rms)
// each; over four layers that comes to a tenth of what blocks add. Weights of other features, or
// without their scales, have divergences of 1 and more.
constexpr Bounds kFp8Bounds{8e-2, 2e-2};
constexpr int64_t kMemory = int64_t{64} << 20;

struct Shape {
  const char* name;
  int C, ffn, L, H, Hkv, D;
  const char* architecture = "LlamaForCausalLM";
  WeightFormat weights = WeightFormat::kBF16;
  bool tied = true;  // the head is the embedding
  bool also_unpacked = false;
};

std::string ConfigFile(const Shape& s) {
  const std::string path = testing::TempDir() + "/" + s.name + ".json";
  std::ofstream(path) << fmt::format(
      R"({{"architectures": ["{}"], "model_type": "{}", "hidden_size": {}, "intermediate_size": {},
  "num_hidden_layers": {}, "num_attention_heads": {}, "num_key_value_heads": {}, "head_dim": {},
  "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
  "max_position_embeddings": 4096, "vocab_size": 1000, "tie_word_embeddings": {},
  "eos_token_id": 2}})",
      s.architecture, std::string(s.architecture) == "Qwen3ForCausalLM" ? "qwen3" : "llama", s.C,
      s.ffn, s.L, s.H, s.Hkv, s.D, s.tied);
  return path;
}

// The same model on both sides, with a pool each.
class BothTest : public testing::TestWithParam<Shape> {
 protected:
  void SetUp() override {
    auto device = OpenDevice("cuda");
    if (!device.ok()) GTEST_SKIP() << "SKIPPED, no GPU: " << device.status().message();
    auto file = ModelFile::OpenRandom(ConfigFile(GetParam()));
    ASSERT_TRUE(file.ok()) << file.status().message();
    const auto adapter =
        RandomAdapter((*file)->config(), {.features = 2 * GetParam().D, .window = 64, .rank = 16});
    ctx_ = {.threads = 2, .workspace = &workspace_};
    for (const bool on_device : {false, true}) {
      ModelOptions options{.weights = GetParam().weights,
                           .also_unpacked = GetParam().also_unpacked};
      if (on_device) options.device = *device;
      if (!on_device && fp8()) options.weights = WeightFormat::kBF16;
      auto model = HybridModel::Load(ctx_, **file, adapter.get(), options);
      ASSERT_TRUE(model.ok()) << model.status().message();
      models_.push_back(std::move(model).value());
      auto pool =
          CachePool::Create(models_.back()->cache_geometry(), kMemory, models_.back()->memory());
      ASSERT_TRUE(pool.ok()) << pool.status().message();
      pools_.push_back(std::make_unique<CachePool>(std::move(pool).value()));
    }
  }

  // One sequence on both sides.
  struct Pair {
    SequenceCache cpu, gpu;
    std::vector<int32_t> tokens = {};  // of the next step
  };
  Pair NewPair(int level) {
    return {models_[0]->NewSequence(*pools_[0], level), models_[1]->NewSequence(*pools_[1], level)};
  }
  std::vector<int32_t> Tokens(int count) {
    std::vector<int32_t> tokens(static_cast<size_t>(count));
    for (int32_t& token : tokens)
      token = static_cast<int32_t>((next_ = next_ * 48271 % 2147483647) % 1000);
    return tokens;
  }

  // Runs every pair's tokens in one batch, and compares the logits of the last row of each.
  void Step(std::deque<Pair>& pairs) {
    std::vector<float> logits[2];
    for (int side = 0; side < 2; ++side) {
      std::vector<SequenceRows> batch;
      for (Pair& pair : pairs) {
        SequenceCache& cache = side == 0 ? pair.cpu : pair.gpu;
        ASSERT_TRUE(cache.Reserve(static_cast<int>(pair.tokens.size())).ok());
        batch.push_back({.cache = &cache, .tokens = pair.tokens, .logits_rows = 1});
      }
      Buffer<float> out;
      models_[side]->Forward(ctx_, *pools_[side], batch, out);
      for (const SequenceRows& rows : batch)
        rows.cache->Commit(static_cast<int>(rows.tokens.size()));
      logits[side].assign(out.data(), out.data() + out.size());
    }
    const size_t V = static_cast<size_t>(models_[0]->config().V);
    ASSERT_EQ(logits[1].size(), pairs.size() * V);
    for (size_t n = 0; n < pairs.size(); ++n) {
      const double kl = Kl(logits[0].data() + n * V, logits[1].data() + n * V, V);
      EXPECT_LT(kl, bounds().most) << "sequence " << n << " at level " << pairs[n].cpu.level()
                                   << ", " << pairs[n].cpu.length() << " tokens";
      sum_ += kl;
      ++rows_;
    }
  }
  void TearDown() override {
    if (rows_ > 0) {
      EXPECT_LT(sum_ / rows_, bounds().mean);
    }
  }

  static bool fp8() { return GetParam().weights == WeightFormat::kFp8; }
  static Bounds bounds() { return fp8() ? kFp8Bounds : kBounds; }

  static double Kl(const float* p, const float* q, size_t V) {
    const auto log_sum = [&](const float* x) {
      const double max = *std::max_element(x, x + V);
      double sum = 0;
      for (size_t i = 0; i < V; ++i) sum += std::exp(x[i] - max);
      return max + std::log(sum);
    };
    const double zp = log_sum(p), zq = log_sum(q);
    double kl = 0;
    for (size_t i = 0; i < V; ++i) kl += std::exp(p[i] - zp) * ((p[i] - zp) - (q[i] - zq));
    return kl;  // NaN fails every comparison
  }
  void Raise(Pair& pair, int level) {
    ASSERT_TRUE(models_[0]->Raise(ctx_, *pools_[0], pair.cpu, level).ok());
    ASSERT_TRUE(models_[1]->Raise(ctx_, *pools_[1], pair.gpu, level).ok());
  }

  Workspace workspace_;
  ExecContext ctx_;
  std::vector<std::unique_ptr<HybridModel>> models_;
  std::vector<std::unique_ptr<CachePool>> pools_;
  int64_t next_ = 12345;
  double sum_ = 0;
  int rows_ = 0;
};

TEST_P(BothTest, AllLevelsInOneBatchWithRaisesInBetween) {
  const int L = GetParam().L;
  std::deque<Pair> pairs;
  const int prompts[] = {1, 63, 64, 65, 200, 150, 2};
  for (size_t n = 0; n < std::size(prompts); ++n) {
    pairs.push_back(NewPair(static_cast<int>(n) % (L + 1)));
    pairs.back().tokens = Tokens(prompts[n]);
  }
  Step(pairs);
  // Three steps per mix: the first is launched, the second captured, the third replayed.
  for (int round = 0; round < 4; ++round) {
    for (int step = 0; step < 3; ++step) {
      for (Pair& pair : pairs) pair.tokens = Tokens(1);
      Step(pairs);
    }
    for (size_t n = 0; n < pairs.size(); n += 2)
      Raise(pairs[n], std::min(L, pairs[n].cpu.level() + 1));
  }
  // Prompts and single rows in one step.
  for (size_t n = 0; n < pairs.size(); ++n) pairs[n].tokens = Tokens(n % 3 == 0 ? 70 : 1);
  Step(pairs);
}

// Steps of one level have graphs of their own, and where they are not replayed merged matrices,
// too.
TEST_P(BothTest, AllRowsAtOneLevel) {
  for (const int level : {1, GetParam().L}) {
    std::deque<Pair> pairs;
    for (int n = 0; n < 5; ++n) {
      pairs.push_back(NewPair(level));
      pairs.back().tokens = Tokens(90 + n);
    }
    Step(pairs);
    for (int step = 0; step < 4; ++step) {
      for (Pair& pair : pairs) pair.tokens = Tokens(1);
      Step(pairs);
    }
    for (size_t n = 0; n < pairs.size(); ++n) pairs[n].tokens = Tokens(n % 2 == 0 ? 200 : 1);
    Step(pairs);
  }
}

TEST_P(BothTest, BatchesOfChangingSizeShareTheGraphs) {
  std::deque<Pair> pairs;
  for (int n = 0; n < 9; ++n) {
    pairs.push_back(NewPair(n % 2 == 0 ? 0 : GetParam().L));
    pairs.back().tokens = Tokens(20 + n);
  }
  Step(pairs);
  for (int round = 0; round < 6; ++round) {
    for (Pair& pair : pairs) pair.tokens = Tokens(1);
    Step(pairs);
    if (pairs.size() > 1) pairs.pop_front();
  }
}

// Greedy rows and rows that are drawn, some with edits, tokens that are ruled out, masks or the
// likeliest asked for, each beside a twin that wants its logits, in one batch: prompts, then single
// rows in steps that are launched, captured and replayed with ever other params.
TEST_P(BothTest, ChoicesAreThoseOfTheLogits) {
  const SamplingParams all[] = {
      {.temperature = 0},
      {.top_k = 20},
      {.top_p = 0.8f},
      {.min_p = 0.1f},
      {.temperature = 1.5f},
      {.temperature = 0, .repetition_penalty = 1.5f, .frequency_penalty = 0.5f},
      {.top_p = 0.9f, .presence_penalty = 1, .logit_bias = {{3, 4.f}, {5, -100.f}}}};
  const HybridModel& model = *models_[1];
  const auto V = static_cast<size_t>(model.config().V);
  constexpr size_t kPairs = 6;
  std::deque<SequenceCache> caches;
  for (size_t i = 0; i < 2 * kPairs; ++i)
    caches.push_back(model.NewSequence(*pools_[1], static_cast<int>(i / 2) % (GetParam().L + 1)));
  int different = 0;
  for (size_t step = 0; step < 6; ++step) {
    std::vector<std::vector<int32_t>> tokens;
    std::vector<SamplingParams> params;
    std::vector<Sampler> samplers;
    const std::vector<int32_t> ruled_out = {3, 7, 11, 13, 17};
    for (size_t n = 0; n < kPairs; ++n) {
      tokens.push_back(Tokens(step == 0 ? 20 + 5 * static_cast<int>(n) : 1));
      params.push_back(all[(n + step) % std::size(all)]);
      params.back().seed = 7 * step + n;
      samplers.emplace_back(params.back(), static_cast<int64_t>(V));
      samplers.back().AddPrompt(Tokens(30));
      for (const int32_t token : Tokens(10 * static_cast<int>(step))) samplers.back().Accept(token);
    }
    const auto ruled_out_of = [&](size_t n) {
      return (n + step) % 3 == 0 ? std::span(ruled_out) : std::span<const int32_t>();
    };
    std::vector<uint32_t> mask((V + 31) / 32);
    for (size_t i = 0; i < mask.size(); ++i)
      mask[i] = 0x5a5a5a5au * static_cast<uint32_t>(i + step + 1) | 1;
    const auto allowed_of = [&](size_t n) {
      return (n + step) % 4 == 1 ? std::span<const uint32_t>(mask) : std::span<const uint32_t>();
    };
    const auto top_of = [&](size_t n) { return static_cast<int>((n + step) % 4) * 5; };
    std::vector<SequenceRows> batch;
    for (size_t i = 0; i < 2 * kPairs; ++i) {
      ASSERT_TRUE(caches[i].Reserve(static_cast<int>(tokens[i / 2].size())).ok());
      batch.push_back({.cache = &caches[i],
                       .tokens = tokens[i / 2],
                       .logits_rows = 1,
                       .sampling = i % 2 == 0 ? &params[i / 2] : nullptr,
                       .edits = samplers[i / 2].edits(),
                       .ruled_out = ruled_out_of(i / 2),
                       .allowed = allowed_of(i / 2),
                       .top = top_of(i / 2)});
    }
    std::optional<TokenChoice> choices[kPairs];
    std::vector<TokenLogprob> tops[kPairs];
    std::vector<float> logits[kPairs];
    model.Forward(ctx_, *pools_[1], batch, Products::kFastest,
                  [&](std::span<const LogitsRow> rows, float* of, const TokenChoice* chosen) {
                    for (size_t i = 0; i < rows.size(); ++i) {
                      const int sequence = rows[i].sequence;
                      ASSERT_EQ(chosen != nullptr, sequence % 2 == 0);
                      if (chosen != nullptr) {
                        choices[sequence / 2] = chosen[i];
                        tops[sequence / 2].assign(chosen[i].top.begin(), chosen[i].top.end());
                      } else {
                        logits[sequence / 2].assign(of + i * V, of + (i + 1) * V);
                      }
                    }
                  });
    for (const SequenceRows& rows : batch) rows.cache->Commit(static_cast<int>(rows.tokens.size()));
    for (size_t n = 0; n < kPairs; ++n) {
      SCOPED_TRACE(testing::Message() << "step " << step << ", pair " << n);
      ASSERT_TRUE(choices[n].has_value());
      ASSERT_EQ(logits[n].size(), V);
      const auto want =
          samplers[n].Sample(logits[n], caches[2 * n].length(), ruled_out_of(n), allowed_of(n));
      const auto top = TopLogprobs(logits[n], top_of(n));
      ASSERT_TRUE(want.ok() && top.ok());
      EXPECT_FALSE(choices[n]->broken);
      ASSERT_EQ(tops[n].size(), top->size());
      for (size_t i = 0; i < top->size(); ++i) {
        EXPECT_EQ(tops[n][i].token, (*top)[i].token);
        EXPECT_NEAR(tops[n][i].logprob, (*top)[i].logprob, 1e-4);
      }
      different += choices[n]->token != want->token;
      if (choices[n]->token != want->token) continue;
      EXPECT_NEAR(choices[n]->logprob, want->logprob, 1e-4);
    }
  }
  // A draw whose place is as near to a token's end as rounding may go either way.
  EXPECT_LE(different, 1);
}

// Two steps under way at once, the second fed by the first, with the rows in ever another order,
// prompts in pieces among them and then fewer and fewer sequences: the same tokens as step after
// step.
TEST_P(BothTest, TokensGoFromStepToStepOnTheDevice) {
  const HybridModel& model = *models_[1];
  CachePool& pool = *pools_[1];
  constexpr int kSequences = 7, kPiece = 40, kSteps = 18;
  std::vector<SamplingParams> params(kSequences);
  std::vector<std::vector<int32_t>> prompts;
  for (int i = 0; i < kSequences; ++i) {
    params[i] = {.temperature = i % 2 == 0 ? 0.f : 1.f, .seed = static_cast<uint64_t>(i)};
    prompts.push_back(Tokens(30 + 17 * i));
  }
  std::deque<SequenceCache> caches;
  std::vector<int32_t> last(kSequences);  // each one's last token, where steps are not begun
  struct Batch {
    std::vector<SequenceRows> rows;
    std::vector<int> sequence;  // of each
  };
  // One sequence more in each of the first steps, one less in each of the last.
  const auto batch_of = [&](int step, const Batch* before) {
    Batch batch;
    const int leaving = std::max(0, step - (kSteps - kSequences));
    const int there = std::min(step + 1, kSequences) - leaving;
    for (int k = 0; k < there; ++k) {
      const int i = (k + step) % there;
      const int cached = caches[i].length();
      const int rest = static_cast<int>(prompts[i].size()) - cached;
      SequenceRows rows{.cache = &caches[i], .tokens = {&last[i], 1}, .sampling = &params[i]};
      if (rest > 0) rows.tokens = std::span(prompts[i]).subspan(cached, std::min(rest, kPiece));
      rows.logits_rows = rest > kPiece ? 0 : 1;
      if (before != nullptr && rest <= 0) {
        rows.feed =
            static_cast<int>(std::ranges::find(before->sequence, i) - before->sequence.begin());
      }
      EXPECT_TRUE(caches[i].Reserve(static_cast<int>(rows.tokens.size())).ok());
      batch.rows.push_back(rows);
      batch.sequence.push_back(i);
    }
    return batch;
  };
  const auto commit = [](const Batch& batch) {
    for (const SequenceRows& of : batch.rows) of.cache->Commit(static_cast<int>(of.tokens.size()));
  };
  const auto restart = [&] {
    caches.clear();
    for (int i = 0; i < kSequences; ++i)
      caches.push_back(model.NewSequence(pool, i % (GetParam().L + 1)));
  };

  restart();
  std::vector<std::vector<int32_t>> want;
  for (int step = 0; step < kSteps; ++step) {
    const Batch batch = batch_of(step, nullptr);
    want.emplace_back(batch.rows.size(), -1);
    model.Forward(ctx_, pool, batch.rows, Products::kFastest,
                  [&](std::span<const LogitsRow> of, float*, const TokenChoice* choices) {
                    for (size_t i = 0; i < of.size(); ++i)
                      want.back()[of[i].sequence] = choices[i].token;
                  });
    commit(batch);
    for (size_t i = 0; i < batch.rows.size(); ++i) last[batch.sequence[i]] = want.back()[i];
  }

  restart();
  last.assign(kSequences, 0);
  Batch in_flight;
  for (int step = 0; step <= kSteps; ++step) {
    commit(in_flight);
    Batch next;
    if (step < kSteps) {
      next = batch_of(step, &in_flight);
      model.Begin(ctx_, pool, next.rows);
      if (step % 3 == 0) model.AwaitNearlyDone(step % 2 == 0 ? 0 : 1e-4);
    }
    if (step > 0) {
      std::vector<TokenChoice> choices(in_flight.rows.size());
      model.End(choices);
      for (size_t i = 0; i < choices.size(); ++i) {
        if (in_flight.rows[i].logits_rows == 0) continue;
        EXPECT_FALSE(choices[i].broken);
        EXPECT_EQ(choices[i].token, want[step - 1][i]) << "step " << step - 1 << ", row " << i;
      }
    }
    in_flight = std::move(next);
  }
}

TEST_P(BothTest, MemoryThatIsGivenBackIsUsedAgain) {
  // More tokens one after another than the budget holds at once.
  for (int round = 0; round < 6; ++round) {
    std::deque<Pair> pairs;
    pairs.push_back(NewPair(round % 2 == 0 ? 0 : GetParam().L));
    pairs.back().tokens = Tokens(900);
    Step(pairs);
    EXPECT_LE(pools_[1]->resident_bytes(), kMemory);
  }
}

constexpr const char* kLlama = "LlamaForCausalLM";
INSTANTIATE_TEST_SUITE_P(
    Shapes, BothTest,
    testing::Values(Shape{"smollm", 576, 1536, 4, 9, 3, 64},
                    Shape{"heads32", 512, 1024, 3, 4, 4, 128},
                    Shape{"qwen3", 512, 768, 3, 8, 2, 64, "Qwen3ForCausalLM"},
                    Shape{"int4", 576, 1536, 4, 9, 3, 64, kLlama, WeightFormat::kInt4},
                    Shape{"int8", 576, 1528, 3, 9, 3, 64, kLlama, WeightFormat::kInt8, false},
                    Shape{"fp8", 576, 1536, 4, 9, 3, 64, kLlama, WeightFormat::kFp8},
                    Shape{"int4_bf16", 576, 1536, 4, 9, 3, 64, kLlama, WeightFormat::kInt4, false,
                          true}),
    [](const testing::TestParamInfo<Shape>& info) { return info.param.name; });

// Where there is room for bf16 beside them, and only in models whose weights are large.
TEST(DeviceTest, PrefersFewBits) {
  auto device = OpenDevice("cuda");
  if (!device.ok()) GTEST_SKIP() << "SKIPPED, no GPU: " << device.status().message();
  const auto config = [](const Shape& shape) {
    auto file = ModelFile::OpenRandom(ConfigFile(shape));
    EXPECT_TRUE(file.ok());
    return (*file)->config();
  };
  const ModelConfig small = config({"small", 576, 1536, 4, 9, 3, 64}),
                    large = config({"large", 4096, 11008, 2, 32, 32, 128}),
                    huge = config({"huge", 16384, 65536, 400, 128, 128, 128});
  for (const WeightFormat format : {WeightFormat::kInt4, WeightFormat::kInt8}) {
    EXPECT_FALSE((*device)->Prefers(small, format));
    EXPECT_TRUE((*device)->Prefers(large, format));
    EXPECT_FALSE((*device)->Prefers(huge, format));
  }
  EXPECT_FALSE((*device)->Prefers(large, WeightFormat::kBF16));
}

TEST(DeviceTest, NamesAreChecked) {
  EXPECT_EQ(OpenDevice("tpu").status().message(), "not one of auto, cpu, cuda, cuda:N");
  EXPECT_EQ(OpenDevice("cuda:x").status().code(), StatusCode::kInvalidArgument);
  EXPECT_FALSE(OpenDevice("cuda:99").ok());
}

}  // namespace
}  // namespace dsla
