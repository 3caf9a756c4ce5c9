#include "eval/speed_depths.h"

#include "eval/cost.h"
#include "model/testing/small_models.h"

namespace dsla {
namespace {

using testing_models::CountingTokens;
using testing_models::SmallModel;

Expected<CachePool> Pool(const HybridModel& model, int64_t bytes = 64 << 20) {
  return CachePool::Create(model.cache_geometry(), bytes);
}

TEST(SpeedDepths, MeasuresEveryDepthLevelAndBatch) {
  SmallModel small("llama3", /*with_adapter=*/true);
  auto pool = Pool(small.model());
  ASSERT_TRUE(pool.ok());
  // A text shorter than the depths, which are not whole pages and not in order.
  const DepthOptions options{.levels = {0, small.model().config().L},
                             .depths = {100, 0, 70},
                             .batches = {1, 3},
                             .prefill_tokens = 20,
                             .decode_tokens = 2,
                             .repetitions = 2,
                             .prefill_chunk = 33,
                             .stages = true};
  const auto speeds = MeasureDepths(small.ctx(), small.model(), *pool, CountingTokens(40), options);
  ASSERT_TRUE(speeds.ok()) << speeds.status().message();
  ASSERT_EQ(speeds->size(), 12u);
  for (size_t i = 0; i < speeds->size(); ++i) {
    const DepthSpeed& speed = (*speeds)[i];
    EXPECT_EQ(speed.depth, (std::vector<int>{0, 70, 100})[i / 4]);
    EXPECT_EQ(speed.level, options.levels[i / 2 % 2]);
    EXPECT_EQ(speed.sequences, options.batches[i % 2]);
    EXPECT_EQ(speed.prefill.size(), speed.sequences == 1 ? 2u : 0u);
    ASSERT_EQ(speed.decode.size(), 2u);
    for (const double seconds : speed.decode) EXPECT_GT(seconds, 0);
    for (const double seconds : speed.prefill) EXPECT_GT(seconds, 0);
    // The stages take no longer than the steps that they are the stages of.
    const auto sum = [](const StageTimes& times) {
      double seconds = 0;
      for (const auto& [name, part] : times.stages()) seconds += part;
      return seconds;
    };
    const double decode = options.decode_tokens * (speed.decode[0] + speed.decode[1]);
    EXPECT_GT(sum(speed.decode_stages), 0);
    EXPECT_LE(sum(speed.decode_stages), decode);
    for (const auto& [name, part] : speed.decode_stages.stages())
      EXPECT_EQ(name == "DSLA" && speed.level == 0, false) << "level 0 has no DSLA layer";
    EXPECT_EQ(sum(speed.prefill_stages) > 0, !speed.prefill.empty());
  }
  EXPECT_EQ(pool->ledger().used_bytes(), 0) << "every copy gives its memory back";
}

TEST(SpeedDepths, RefusesWhatCannotBe) {
  SmallModel small("llama3");
  auto pool = Pool(small.model());
  ASSERT_TRUE(pool.ok());
  const auto status = [&](const DepthOptions& options) {
    return MeasureDepths(small.ctx(), small.model(), *pool, CountingTokens(5), options)
        .status()
        .message();
  };
  EXPECT_EQ(status({.levels = {1}, .depths = {0}, .prefill_tokens = 4, .decode_tokens = 2}),
            "level 1: the adapter has levels 0 to 0");
  EXPECT_EQ(status({.levels = {0}, .depths = {-1}, .prefill_tokens = 4, .decode_tokens = 2}),
            "depth -1: is negative");
  const int most = small.model().max_positions();
  EXPECT_EQ(status({.levels = {0}, .depths = {most}, .prefill_tokens = 4, .decode_tokens = 2}),
            fmt::format("depth {} and 4 tokens after it do not fit the context of {}", most, most));
}

TEST(SpeedDepths, LittleMemoryIsAnError) {
  SmallModel small("llama3");
  const auto& model = small.model();
  auto pool = Pool(model, model.config().L * 3 * model.cache_geometry().page_bytes());
  ASSERT_TRUE(pool.ok());
  const auto speeds = MeasureDepths(small.ctx(), model, *pool, CountingTokens(50),
                                    {.levels = {0},
                                     .depths = {100},
                                     .batches = {8},
                                     .prefill_tokens = 4,
                                     .decode_tokens = 2,
                                     .repetitions = 1});
  EXPECT_EQ(speeds.status().code(), StatusCode::kResourceExhausted);
}

TEST(Cost, AddsUpOverDepthsAndSequences) {
  SmallModel small("llama3", /*with_adapter=*/true);
  const HybridModel& model = small.model();
  const double logits = 2.0 * model.config().C * model.config().V;
  for (int level = 0; level <= model.config().L; ++level) {
    EXPECT_NEAR(PrefillFlops(model, level, 90) + logits,
                PrefillFlops(model, level, 30) + PrefillFlops(model, level, 60, 30), 1e-3);
    const int64_t one = DecodeBytes(model, level, 100), weights = model.weight_bytes(level);
    EXPECT_GT(one, weights);
    EXPECT_EQ(DecodeBytes(model, level, 100, 5), weights + 5 * (one - weights));
  }
}

}  // namespace
}  // namespace dsla
