#include "model/step_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "model/testing/small_models.h"

namespace dsla {
namespace {

using testing_models::SmallModel;

// Sequences of all levels and lengths in no order, one with more pages than the step needs.
class StepPlanTest : public testing::Test {
 protected:
  StepPlanTest() {
    const int levels[] = {1, 0, 2, 0, 1}, cached[] = {20, 0, 40, 33, 16}, rows[] = {1, 30, 1, 1, 7};
    for (int i = 0; i < 5; ++i) {
      caches_.push_back(small_.NewSequence(levels[i]));
      if (cached[i] > 0) small_.Run(caches_.back(), std::vector<int32_t>(cached[i], 1));
      tokens_.emplace_back(rows[i], 2);
    }
    for (int i = 0; i < 5; ++i) {
      EXPECT_TRUE(caches_[i].Reserve(rows[i] + (i == 3 ? 50 : 0)).ok());
      batch_.push_back({.cache = &caches_[i], .tokens = tokens_[i], .logits_rows = i % 2});
    }
    for (int rank = 0; rank < config().L; ++rank) ladder_.push_back(caches_[0].layer_of_rank(rank));
    placed_ = PlaceRows(batch_, workspace_);
    plan_ = PlanStep(placed_, config(), small_.model().options().page_size, ladder_, workspace_);
  }
  const ModelConfig& config() const { return small_.model().config(); }

  SmallModel small_{"smollm2", true};
  std::vector<SequenceCache> caches_;
  std::vector<std::vector<int32_t>> tokens_;
  std::vector<SequenceRows> batch_;
  std::vector<int> ladder_;
  Workspace workspace_;
  PlacedRows placed_;
  StepPlan plan_;
};

TEST_F(StepPlanTest, RowsAreSortedByLevelThenLength) {
  const std::vector<int> order(placed_.batch_index.begin(), placed_.batch_index.end());
  EXPECT_EQ(order, (std::vector<int>{3, 1, 0, 4, 2}));
  EXPECT_EQ(placed_.T(), 40);
  for (int n = 0; n < placed_.N(); ++n) {
    const SequenceRows& of = batch_[order[n]];
    EXPECT_EQ(placed_.sequences[n], &of);
    EXPECT_EQ(placed_.pos[n], of.cache->length());
    ASSERT_EQ(placed_.row_start[n + 1] - placed_.row_start[n], of.tokens.size());
    for (size_t i = 0; i < of.tokens.size(); ++i)
      EXPECT_EQ(placed_.positions[placed_.row_start[n] + i], of.cache->length() + i);
  }
  // The last row of the batch's second and fourth sequence.
  ASSERT_EQ(placed_.wanted.size(), 2);
  EXPECT_EQ(placed_.wanted[0].sequence, 1);
  EXPECT_EQ(placed_.wanted[0].row, 29);
  EXPECT_EQ(placed_.wanted_rows[0], 30);
  EXPECT_EQ(placed_.wanted[1].sequence, 3);
  EXPECT_EQ(placed_.wanted_rows[1], 0);
}

TEST_F(StepPlanTest, EveryLayerHasItsSequencesPagesAndSlots) {
  for (int layer = 0; layer < config().L; ++layer) {
    SCOPED_TRACE(layer);
    const RaggedRows softmax = plan_.softmax_rows(layer), dsla = plan_.dsla_rows(layer);
    ASSERT_EQ(softmax.N + dsla.N, placed_.N());
    EXPECT_EQ(plan_.split(layer).softmax_rows, softmax.row_start[softmax.N]);
    EXPECT_EQ(dsla.row_start[0], softmax.row_start[softmax.N]);
    EXPECT_EQ(dsla.row_start[dsla.N], placed_.T());
    const PageTables tables = plan_.tables(layer);
    for (int n = 0; n < placed_.N(); ++n) {
      const SequenceCache& cache = *placed_.sequences[n]->cache;
      ASSERT_EQ(cache.is_dsla(layer), n >= softmax.N);
      if (n >= softmax.N) {
        EXPECT_EQ(plan_.dsla_slots(layer)[n - softmax.N], cache.slot(layer));
        EXPECT_EQ(dsla.pos[n - softmax.N], cache.length());
        continue;
      }
      const int tokens = cache.length() + softmax.count(n),
                pages = tables.page_start[n + 1] - tables.page_start[n];
      EXPECT_EQ(pages, (tokens + 15) / 16);
      EXPECT_TRUE(std::equal(tables.pages + tables.page_start[n],
                             tables.pages + tables.page_start[n + 1], cache.pages(layer).begin()));
    }
  }
}

TEST_F(StepPlanTest, LayersOfTheSameSequencesShareAPlan) {
  for (int rank = 0; rank < config().L; ++rank) {
    const int layer = ladder_[rank];
    EXPECT_EQ(plan_.split(layer).softmax_sequences, placed_.SoftmaxSequences(rank));
    for (int other = 0; other < rank; ++other) {
      const bool same = placed_.SoftmaxSequences(rank) == placed_.SoftmaxSequences(other);
      EXPECT_EQ(&plan_.split(layer) == &plan_.split(ladder_[other]), same);
    }
  }
  EXPECT_EQ(plan_.split(ladder_[0]).softmax_sequences, 2);
  EXPECT_EQ(plan_.split(ladder_[1]).softmax_sequences, 4);
}

}  // namespace
}  // namespace dsla
