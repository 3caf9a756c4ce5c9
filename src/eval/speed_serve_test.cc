#include "eval/speed_serve.h"

#include <gtest/gtest.h>

#include "engine/testing/test_engine.h"
#include "model/testing/small_models.h"

namespace dsla {
namespace {

using testing_models::CountingTokens;
using testing_models::SmallModel;

TEST(SpeedServe, MeasuresEveryPromptAndLevel) {
  SmallModel small("llama3", /*with_adapter=*/true);
  const auto tokenizer = testing_engine::ByteTokenizer();
  const int top = small.model().config().L;
  const ServeOptions options{.levels = {0, top},
                             .prompts = {40, 0},
                             .requests = 5,
                             .reply_tokens = 4,
                             .repetitions = 2,
                             .memory_bytes = 64 << 20};
  std::vector<std::string> progress;
  const auto speeds =
      MeasureServe(small.ctx(), small.model(), *tokenizer, CountingTokens(30), options,
                   [&](const std::string& what) { progress.push_back(what); });
  ASSERT_TRUE(speeds.ok()) << speeds.status().message();
  ASSERT_EQ(speeds->size(), 4u);
  EXPECT_EQ(progress.size(), 8u);
  for (size_t i = 0; i < speeds->size(); ++i) {
    const ServeSpeed& speed = (*speeds)[i];
    EXPECT_EQ(speed.prompt_tokens, i < 2 ? 1 : 40);
    EXPECT_EQ(speed.level, i % 2 == 0 ? 0 : top);
    EXPECT_EQ(speed.seconds.size(), 2u);
    ASSERT_EQ(speed.first_token.size(), 10u);
    EXPECT_EQ(speed.per_token.size(), 10u);
    for (size_t r = 0; r < 10; ++r) {
      EXPECT_GT(speed.first_token[r], 0);
      EXPECT_LE(speed.first_token[r], speed.seconds[r / 5]);
    }
  }
}

TEST(SpeedServe, RefusesWhatCannotBe) {
  SmallModel small("llama3");
  const auto tokenizer = testing_engine::ByteTokenizer();
  const auto status = [&](const ServeOptions& options) {
    return MeasureServe(small.ctx(), small.model(), *tokenizer, CountingTokens(5), options)
        .status();
  };
  EXPECT_EQ(status({.levels = {1}, .prompts = {4}, .memory_bytes = 64 << 20}).message(),
            "level 1: the adapter has levels 0 to 0");
  const int most = small.model().max_positions();
  EXPECT_EQ(status({.levels = {0}, .prompts = {most}, .memory_bytes = 64 << 20}).code(),
            StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace dsla
