#include "model/hybrid_model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "model/testing/small_models.h"
#include "ops/testing/expect_close.h"

namespace dsla {
namespace {

using testing_models::AdapterShape;
using testing_models::DataPath;
using testing_models::ReadRaw;
using testing_models::SmallModel;

// Whole models against each other in fp32: rounding errors pass through every layer's products and
// softmaxes, which amplify them. 1e-4 of the logits' scale is the project's bound for it, far under
// what a wrong formula gives.
constexpr Tolerance kModelTolerance{1e-4};

std::vector<int32_t> RandomTokens(const ModelConfig& config, int count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % config.V);
  return tokens;
}

std::vector<int32_t> Slice(const std::vector<int32_t>& tokens, int begin, int end) {
  return {tokens.begin() + begin, tokens.begin() + end};
}

void Append(std::vector<float>& to, const std::vector<float>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

class FamilyTest : public testing::TestWithParam<std::string> {};

// transformers, fp32 on both sides, for every family: prefill whole, and token by token.
TEST_P(FamilyTest, LogitsEqualTransformers) {
  SmallModel small(GetParam());
  const auto tokens = ReadRaw<int32_t>(DataPath("models/" + GetParam() + "/tokens.i32"));
  const auto want = ReadRaw<float>(DataPath("models/" + GetParam() + "/logits.f32"));
  SequenceCache whole = small.NewSequence(0);
  ExpectClose(small.Run(whole, tokens), want, kModelTolerance);

  SequenceCache stepwise = small.NewSequence(0);
  std::vector<float> got;
  for (const int32_t token : tokens) Append(got, small.Run(stepwise, {token}));
  ExpectClose(got, want, kModelTolerance);
}

INSTANTIATE_TEST_SUITE_P(Families, FamilyTest,
                         testing::Values("llama2", "llama-linear-rope", "llama3",
                                         "llama-attention-bias", "smollm2", "mistral", "qwen2",
                                         "qwen3"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

struct HybridCase {
  std::string name, family;
  AdapterShape shape;
};
class HybridTest : public testing::TestWithParam<HybridCase> {
 protected:
  SmallModel small_{GetParam().family, true, GetParam().shape};
  const ModelConfig& config() const { return small_.model().config(); }
};

TEST_P(HybridTest, APromptSplitAnywhereEqualsTheWhole) {
  const auto tokens = RandomTokens(config(), 150, 1);
  for (int level = 0; level <= small_.model().max_level(); ++level) {
    SequenceCache whole = small_.NewSequence(level);
    const std::vector<float> want = small_.Run(whole, tokens);
    for (uint32_t seed = 1; seed <= 4; ++seed) {
      SCOPED_TRACE(testing::Message() << "level " << level << ", seed " << seed);
      std::mt19937 random(seed);
      SequenceCache split = small_.NewSequence(level);
      std::vector<float> got;
      for (int begin = 0; begin < 150;) {
        const int end =
            std::min<int>(150, begin + 1 + static_cast<int>(random() % (seed == 1 ? 3 : 60)));
        Append(got, small_.Run(split, Slice(tokens, begin, end)));
        begin = end;
      }
      ExpectClose(got, want, kModelTolerance);
    }
  }
}

// Sequences of different levels, lengths and phases in one batch, in an order that is not sorted by
// level.
TEST_P(HybridTest, AMixedBatchEqualsEachSequenceAlone) {
  const int L = small_.model().max_level();
  std::vector<SequenceCache> together, alone;
  std::vector<std::vector<int32_t>> tokens;
  const int lengths[] = {70, 1, 33, 129, 20};
  for (int i = 0; i < 5; ++i) {
    const int level = (L - i % (L + 1));
    together.push_back(small_.NewSequence(level));
    alone.push_back(small_.NewSequence(level));
    tokens.push_back(RandomTokens(config(), lengths[i] + 9, 10 + i));
  }
  std::vector<SmallModel::Rows> first, second;
  for (int i = 0; i < 5; ++i) {
    first.push_back({&together[i], Slice(tokens[i], 0, lengths[i])});
    // Then decode rows beside a prefill chunk.
    second.push_back({&together[i], Slice(tokens[i], lengths[i], lengths[i] + (i == 2 ? 9 : 1))});
  }
  const auto got_first = small_.Run(first), got_second = small_.Run(second);
  for (int i = 0; i < 5; ++i) {
    SCOPED_TRACE(i);
    ExpectClose(got_first[i], small_.Run(alone[i], first[i].tokens), kModelTolerance);
    ExpectClose(got_second[i], small_.Run(alone[i], second[i].tokens), kModelTolerance);
  }
}

// Logits by tiles: every row of a prompt longer than a tile, three rows of another sequence, none
// of a third. And with invariant products, each row's bits are those of the sequence alone.
TEST_P(HybridTest, TilesOfLogitsEqualEachSequenceAlone) {
  const int64_t V = config().V;
  const int lengths[] = {90, 5, 7}, wanted[] = {90, 3, 0}, levels[] = {1, 0, 2};
  std::vector<SequenceCache> caches;
  std::vector<std::vector<int32_t>> tokens;
  std::vector<SequenceRows> batch;
  for (int i = 0; i < 3; ++i) {
    caches.push_back(small_.NewSequence(std::min(levels[i], small_.model().max_level())));
    tokens.push_back(RandomTokens(config(), lengths[i], 20 + i));
  }
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(caches[i].Reserve(lengths[i]).ok());
    batch.push_back({.cache = &caches[i], .tokens = tokens[i], .logits_rows = wanted[i]});
  }
  std::vector<std::pair<int, int>> places;
  std::vector<float> got;
  small_.model().Forward(
      small_.ctx(), small_.pool(), batch, Products::kInvariant,
      [&](std::span<const LogitsRow> rows, float* logits, const TokenChoice*) {
        ASSERT_LE(static_cast<int64_t>(rows.size()), HybridModel::kLogitsTileRows);
        for (const LogitsRow& row : rows) places.emplace_back(row.sequence, row.row);
        got.insert(got.end(), logits, logits + static_cast<int64_t>(rows.size()) * V);
      });
  std::vector<std::pair<int, int>> want_places;
  std::vector<float> want;
  for (int i = 0; i < 2; ++i) {
    for (int row = lengths[i] - wanted[i]; row < lengths[i]; ++row)
      want_places.emplace_back(i, row);
    SequenceCache alone = small_.NewSequence(caches[i].level());
    Buffer<float> logits;
    ASSERT_TRUE(small_.model()
                    .Append(small_.ctx(), small_.pool(), alone, tokens[i], wanted[i], logits,
                            Products::kInvariant)
                    .ok());
    want.insert(want.end(), logits.data(), logits.data() + logits.size());
  }
  EXPECT_EQ(places, want_places);
  ASSERT_EQ(got.size(), want.size());
  EXPECT_EQ(std::memcmp(got.data(), want.data(), got.size() * sizeof(float)), 0);
}

// At the bottom of the ladder the two definitions meet: raising the first converted layer at t must
// equal running the same tokens as DSLA over the K and V that level 0 cached. For the layer that
// reads the embeddings, K and V do not depend on the level, so folding it at any t equals having
// run it from the start.
TEST_P(HybridTest, FoldingALayerWhoseKeysDoNotDependOnTheLevelEqualsTheStart) {
  auto reversed =
      std::make_shared<Adapter>(*testing_models::RandomAdapter(config(), GetParam().shape, 5));
  std::reverse(reversed->ladder.begin(), reversed->ladder.end());  // layer 0 converts first
  auto file = ModelFile::Open(DataPath("models/" + GetParam().family));
  ASSERT_TRUE(file.ok());
  auto model = HybridModel::Load(small_.ctx(), **file, reversed.get(), small_.model().options());
  ASSERT_TRUE(model.ok());
  const auto tokens = RandomTokens(config(), 120, 3);
  const auto run = [&](SequenceCache& cache, const std::vector<int32_t>& part) {
    Buffer<float> logits;
    EXPECT_TRUE((*model)->Append(small_.ctx(), small_.pool(), cache, part, 1, logits).ok());
    return std::vector<float>(logits.data(), logits.data() + logits.size());
  };
  for (const int at : {1, 7, 64, 100}) {
    SCOPED_TRACE(at);
    SequenceCache start = (*model)->NewSequence(small_.pool(), 1);
    run(start, Slice(tokens, 0, at));
    SequenceCache raised = (*model)->NewSequence(small_.pool(), 0);
    run(raised, Slice(tokens, 0, at));
    ASSERT_TRUE((*model)->Raise(small_.ctx(), small_.pool(), raised, 1).ok());
    EXPECT_TRUE(raised.pages(0).empty());
    // Later layers cached other K and V before the switch, so only a model of one layer would go on
    // equally; compare the layer's slot itself, byte for byte in meaning: fp32 states, window ring
    // and sinks.
    const DslaShape& shape = (*model)->dsla_shape(0);
    const DslaSlotLayout layout = MakeSlotLayout(shape);
    const auto slot = [&](const SequenceCache& cache) {
      return small_.pool().slots().base + cache.slot(0) * small_.pool().slots().slot_bytes;
    };
    const auto floats = [&](const SequenceCache& cache, int64_t offset, int64_t count) {
      const auto* data = reinterpret_cast<const float*>(slot(cache) + offset);
      return std::vector<float>(data, data + count);
    };
    const int64_t states = int64_t{shape.Hkv} * shape.SF();
    ExpectClose(floats(raised, layout.state, states * shape.D),
                floats(start, layout.state, states * shape.D), kModelTolerance);
    ExpectClose(floats(raised, layout.norm, states), floats(start, layout.norm, states),
                kModelTolerance);
  }
}

TEST_P(HybridTest, RaisingBeforeTheFirstTokenEqualsStartingThere) {
  const int L = small_.model().max_level();
  const auto tokens = RandomTokens(config(), 40, 4);
  SequenceCache start = small_.NewSequence(L), raised = small_.NewSequence(0);
  ASSERT_TRUE(small_.model().Raise(small_.ctx(), small_.pool(), raised, L).ok());
  ExpectClose(small_.Run(raised, tokens), small_.Run(start, tokens), kModelTolerance);
}

// In the middle of decoding: in one step or in several, alone or in a batch; the pages go back.
TEST_P(HybridTest, ARaiseInMidDecodeDoesNotDependOnHowItIsDone) {
  const int L = small_.model().max_level();
  const auto tokens = RandomTokens(config(), 110, 6);
  std::vector<SequenceCache> caches;
  for (int i = 0; i < 3; ++i) caches.push_back(small_.NewSequence(0));
  for (SequenceCache& cache : caches) {
    small_.Run(cache, Slice(tokens, 0, 90));
    for (int t = 90; t < 95; ++t) small_.Run(cache, Slice(tokens, t, t + 1));
  }
  const int64_t pages = small_.pool().ledger().used(BlockKind::kPage);
  ASSERT_TRUE(small_.model().Raise(small_.ctx(), small_.pool(), caches[0], L).ok());
  for (int level = 1; level <= L; ++level) {
    ASSERT_TRUE(small_.model().Raise(small_.ctx(), small_.pool(), caches[1], level).ok());
  }
  EXPECT_EQ(small_.pool().ledger().used(BlockKind::kPage), pages / 3)
      << "two of three sequences hold no pages";
  for (int t = 95; t < 110; ++t) {
    // The third stays at level 0, in one batch with a raised one.
    const auto both =
        small_.Run({{&caches[2], Slice(tokens, t, t + 1)}, {&caches[0], Slice(tokens, t, t + 1)}});
    ExpectClose(small_.Run(caches[1], Slice(tokens, t, t + 1)), both[1], kModelTolerance);
    for (const float logit : both[1]) ASSERT_TRUE(std::isfinite(logit));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Adapters, HybridTest,
    testing::Values(HybridCase{"window_two_states", "smollm2", {}},
                    HybridCase{"one_state", "llama3", {.features_per_dim = 1, .states = 1}},
                    HybridCase{"no_window", "qwen2", {.window = 0, .sinks = 0}},
                    HybridCase{"qk_norm", "qwen3", {.window = 16, .sinks = 4}},
                    HybridCase{"no_deltas", "llama2", {.rank = 0}}),
    [](const auto& info) { return info.param.name; });

// Prompt, decode, a raise and decode again beside the same with an fp32 cache: as far apart as
// integers of 7 bits and a sign make it.
TEST(HybridModelTest, AnInt8CacheChangesLittle) {
  const ModelOptions exact = {
      .weights = WeightFormat::kF32, .kv_dtype = DType::kF32, .page_size = 16};
  ModelOptions small = exact;
  small.kv_dtype = DType::kI8;
  SmallModel want("smollm2", true, {}, exact), got("smollm2", true, {}, small);
  const auto tokens = RandomTokens(want.model().config(), 120, 9);
  SequenceCache a = want.NewSequence(0), b = got.NewSequence(0);
  const auto expect_near = [&](int begin, int end) {
    const auto x = want.Run(a, Slice(tokens, begin, end)),
               y = got.Run(b, Slice(tokens, begin, end));
    double error = 0, size = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      error += std::pow(double{x[i]} - double{y[i]}, 2);
      size += std::pow(double{x[i]}, 2);
    }
    EXPECT_LT(std::sqrt(error / size), 0.1) << "tokens from " << begin;
    EXPECT_GT(error, 0) << "the cache is not int8";
  };
  expect_near(0, 80);
  for (int t = 80; t < 90; ++t) expect_near(t, t + 1);
  ASSERT_TRUE(want.model().Raise(want.ctx(), want.pool(), a, 2).ok());
  ASSERT_TRUE(got.model().Raise(got.ctx(), got.pool(), b, 2).ok());
  for (int t = 90; t < 100; ++t) expect_near(t, t + 1);
  expect_near(100, 120);
}

TEST(HybridModelTest, LevelsBeyondTheAdapterAreRefused) {
  SmallModel small("smollm2", true);
  SequenceCache cache = small.NewSequence(0);
  EXPECT_EQ(small.model().Raise(small.ctx(), small.pool(), cache, 3).message(),
            "level 3: the adapter has levels 0 to 2");
  SequenceCache top = small.NewSequence(2);
  EXPECT_EQ(small.model().Raise(small.ctx(), small.pool(), top, 1).message(),
            "level 1: the sequence is at 2 and levels only rise");
}

TEST(HybridModelTest, ARaiseWithoutRoomLeavesAUsableSequence) {
  SmallModel small("smollm2", true);
  auto tiny = CachePool::Create(small.model().cache_geometry(),
                                2 * small.model().cache_geometry().page_bytes());
  ASSERT_TRUE(tiny.ok());
  SequenceCache cache = small.model().NewSequence(*tiny, 0);
  const std::vector<int32_t> tokens = {1, 2, 3};
  Buffer<float> logits;
  ASSERT_TRUE(small.model().Append(small.ctx(), *tiny, cache, tokens, 1, logits).ok());
  EXPECT_EQ(small.model().Raise(small.ctx(), *tiny, cache, 2).code(),
            StatusCode::kResourceExhausted);
  EXPECT_EQ(cache.level(), 0);
  EXPECT_TRUE(cache.Reserve(1).ok());
}

TEST(HybridModelTest, TheContextCannotExceedTheModels) {
  auto file = ModelFile::Open(DataPath("models/smollm2"));
  ASSERT_TRUE(file.ok());
  Workspace workspace;
  const ExecContext ctx{.threads = 1, .workspace = &workspace};
  EXPECT_EQ(HybridModel::Load(ctx, **file, nullptr, {.max_positions = 513}).status().message(),
            "context of 513 tokens: the model has 512");
}

}  // namespace
}  // namespace dsla
