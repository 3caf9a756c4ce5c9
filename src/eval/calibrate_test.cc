#include "eval/calibrate.h"

#include "base/clock.h"
#include "model/testing/small_models.h"

namespace dsla {
namespace {

using testing_models::SmallModel;

TEST(Calibrate, MeasuresEveryLevelAndLength) {
  SmallModel small("llama3", /*with_adapter=*/true);
  const int L = small.model().config().L;
  const auto cost = Calibrate(small.ctx(), small.model(),
                              {.memory_bytes = 64 << 20, .top_level = L, .most_seconds = 1});
  ASSERT_TRUE(cost.ok()) << cost.status().message();
  EXPECT_EQ(cost->layers(), L);
  for (int level = 0; level <= L; ++level) {
    EXPECT_GT(cost->PrefillSeconds(level, 64, 0), 0);
    const DecodeRow row{level, 100};
    EXPECT_GT(cost->DecodeSeconds({&row, 1}), 0);
    // Nothing shrinks with the context.
    EXPECT_GE(cost->PrefillSeconds(level, 64, 500), cost->PrefillSeconds(level, 64, 0));
  }
  EXPECT_GT(cost->FoldSeconds(0, L, 200), 0);
}

TEST(Calibrate, WithoutAnAdapter) {
  SmallModel small("llama3");
  const auto cost =
      Calibrate(small.ctx(), small.model(), {.memory_bytes = 64 << 20, .most_seconds = 1});
  ASSERT_TRUE(cost.ok()) << cost.status().message();
  EXPECT_GT(cost->PrefillSeconds(0, 64, 0), 0);
  EXPECT_EQ(cost->FoldSeconds(0, 1, 100), 0);
}

TEST(Calibrate, LittleMemory) {
  // Room for a few pages and slots only: contexts are cut, points left out, or the error says why.
  SmallModel small("llama3", /*with_adapter=*/true);
  const int L = small.model().config().L;
  const CacheGeometry geometry = small.model().cache_geometry();
  for (const int blocks : {1, 2, 4, 16, 64}) {
    const int64_t memory = blocks * L * (geometry.page_bytes() + geometry.slot_block_bytes());
    const auto cost = Calibrate(small.ctx(), small.model(),
                                {.memory_bytes = memory, .top_level = L, .most_seconds = 1});
    if (!cost.ok()) {
      EXPECT_EQ(cost.status().code(), StatusCode::kResourceExhausted) << cost.status().message();
      EXPECT_LT(blocks, 16);
    }
  }
}

TEST(Calibrate, RefusesALevelThatIsNotThere) {
  SmallModel small("llama3");
  EXPECT_EQ(Calibrate(small.ctx(), small.model(), {.memory_bytes = 64 << 20, .top_level = 1})
                .status()
                .code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace dsla
