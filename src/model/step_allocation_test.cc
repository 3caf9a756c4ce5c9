// A decode step allocates nothing, in any thread: what it needs, the workspace holds from the steps
// before.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <thread>
#include <vector>

#include "model/testing/count_allocations.h"
#include "model/testing/small_models.h"

namespace dsla {
namespace {

using testing_models::SmallModel;

constexpr int kPageSize = 16;

TEST(CountAllocations, SeesEveryKindInEveryThread) {
  const auto allocated = [](auto&& body) {
    const int64_t before = Allocations();
    body();
    return Allocations() - before;
  };
  EXPECT_EQ(allocated([] {}), 0);
  // Calls, which the compiler keeps: it may leave out a new-expression whose object nobody uses.
  const auto one = [] { ::operator delete(::operator new(8)); };
  EXPECT_EQ(allocated(one), 1);
  EXPECT_EQ(allocated([] { ::operator delete[](::operator new[](8)); }), 1);
  constexpr std::align_val_t kLine{64};
  EXPECT_EQ(allocated([&] { ::operator delete(::operator new(8, kLine), kLine); }), 1);
  EXPECT_EQ(allocated([] { Buffer<float>(100); }), 1);
  // Each of two threads waits for the other, so that both have a task.
  const ExecContext ctx{.threads = 2};
  std::atomic<int> arrived = 0;
  const auto in_both = [&](auto&& body) {
    arrived = 0;
    ParallelFor(ctx, 2, [&](int64_t, int) {
      for (++arrived; arrived < 2;) std::this_thread::yield();
      body();
    });
  };
  in_both([] {});
  EXPECT_EQ(allocated([&] { in_both(one); }), 2);
}

struct Case {
  std::string name;
  WeightFormat weights;
  DType kv_dtype;
  std::vector<int> levels;  // one sequence each
};
class StepAllocationTest : public testing::TestWithParam<Case> {};

// Over more steps than a page holds, in both forms of Forward. The caches' bookkeeping is the
// caller's: it takes memory where a page begins.
TEST_P(StepAllocationTest, ADecodeStepTakesNoMemory) {
  const Case& c = GetParam();
  SmallModel small("smollm2", true, {},
                   {.weights = c.weights, .kv_dtype = c.kv_dtype, .page_size = kPageSize});
  const HybridModel& model = small.model();
  std::vector<SequenceCache> caches;
  for (size_t i = 0; i < c.levels.size(); ++i) {
    caches.push_back(small.NewSequence(c.levels[i]));
    small.Run(caches.back(), std::vector<int32_t>(5 + 3 * i, 7));
  }
  const int32_t token = 3;
  std::vector<SequenceRows> batch;
  for (SequenceCache& cache : caches) batch.push_back({.cache = &cache, .tokens = {&token, 1}});

  Buffer<float> logits;
  int64_t visited = 0;
  const LogitsVisitor visit = [&](std::span<const LogitsRow> rows, float*, const TokenChoice*) {
    visited += static_cast<int64_t>(rows.size());
  };
  constexpr int kWarm = 2, kSteps = kPageSize + 4;
  for (int step = 0; step < kWarm + kSteps; ++step) {
    int64_t before = Allocations();
    const bool new_page = std::any_of(caches.begin(), caches.end(), [](const SequenceCache& cache) {
      return cache.length() % kPageSize == 0;
    });
    for (SequenceCache& cache : caches) ASSERT_TRUE(cache.Reserve(1).ok());
    if (step >= kWarm && !new_page) {
      EXPECT_EQ(Allocations(), before) << "Reserve, step " << step;
    }
    before = Allocations();
    if (step % 2 == 0)
      model.Forward(small.ctx(), small.pool(), batch, logits);
    else
      model.Forward(small.ctx(), small.pool(), batch, Products::kInvariant, visit);
    for (SequenceCache& cache : caches) cache.Commit(1);
    if (step >= kWarm) {
      EXPECT_EQ(Allocations(), before) << "Forward, step " << step;
    }
  }
  EXPECT_EQ(visited, static_cast<int64_t>(batch.size()) * (kWarm + kSteps) / 2);
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const WeightFormat weights :
       {WeightFormat::kInt4, WeightFormat::kInt8, WeightFormat::kBF16, WeightFormat::kF32}) {
    for (const DType kv : {DType::kBF16, DType::kI8}) {
      const std::string name = std::string(Name(weights)) + "_" + Name(kv);
      cases.push_back({name + "_level_0", weights, kv, {0}});
      cases.push_back({name + "_mixed", weights, kv, {1, 0, 2, 0, 1, 2}});
    }
  }
  return cases;
}
INSTANTIATE_TEST_SUITE_P(Formats, StepAllocationTest, testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace dsla
