// Every task once, whatever the workers do; also run under ThreadSanitizer.
#include "base/thread_team.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>
#include <vector>

#include "base/exec.h"

namespace dsla {
namespace {

TEST(ThreadTeamTest, EveryTaskIsRunOnceByAThreadOfTheLoop) {
  // More threads than cores, loops far shorter and longer than a worker stays awake, and of
  // changing size.
  for (const int threads : {2, 3, 8}) {
    const ExecContext ctx{.threads = threads};
    for (int repetition = 0; repetition < 300; ++repetition) {
      const int64_t tasks = 1 + repetition * 7 % 61;
      std::vector<int> runs(static_cast<size_t>(tasks), 0);  // not atomic: no task may run twice
      std::atomic<int> worst = 0;
      ParallelFor(ctx, tasks, [&](int64_t task, int thread) {
        ++runs[static_cast<size_t>(task)];
        if (thread < 0 || thread >= threads) worst = thread;
      });
      ASSERT_EQ(std::accumulate(runs.begin(), runs.end(), 0), tasks);
      ASSERT_EQ(worst, 0);
      if (repetition % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
}

TEST(ThreadTeamTest, ALoopOfFewerThreadsUsesNoMore) {
  const auto largest = [](int threads) {
    std::atomic<int> largest = 0;
    ParallelFor(ExecContext{.threads = threads}, 64, [&](int64_t, int thread) {
      int seen = largest;
      while (thread > seen && !largest.compare_exchange_weak(seen, thread)) {
      }
    });
    return largest.load();
  };
  for (int repetition = 0; repetition < 200; ++repetition) {
    EXPECT_LT(largest(4), 4);
    EXPECT_LT(largest(2), 2);
  }
}

TEST(ThreadTeamTest, WorkersShareALoop) {
  // Two tasks that wait for each other: only two threads can end them.
  std::atomic<int> arrived = 0;
  for (int repetition = 1; repetition <= 20; ++repetition) {
    ParallelFor(ExecContext{.threads = 2}, 2, [&](int64_t, int) {
      ++arrived;
      while (arrived < 2 * repetition) std::this_thread::yield();
    });
    EXPECT_EQ(arrived, 2 * repetition);
  }
}

TEST(ThreadTeamTest, ALoopWithinATaskRunsOnItsThread) {
  std::atomic<int> inner = 0;
  ParallelFor(ExecContext{.threads = 2}, 8, [&](int64_t, int) {
    const auto self = std::this_thread::get_id();
    ParallelFor(ExecContext{.threads = 2}, 8, [&](int64_t, int thread) {
      EXPECT_EQ(thread, 0);
      EXPECT_EQ(std::this_thread::get_id(), self);
      ++inner;
    });
  });
  EXPECT_EQ(inner, 64);
}

TEST(ThreadTeamTest, CallersHaveTeamsOfTheirOwn) {
  std::vector<std::thread> callers;
  std::atomic<int64_t> total = 0;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int repetition = 0; repetition < 100; ++repetition)
        ParallelFor(ExecContext{.threads = 3}, 10, [&](int64_t task, int) { total += task; });
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total, 4 * 100 * 45);
}

TEST(ThreadTeamTest, RangesCoverAllOnce) {
  for (const int64_t n : {1, 7, 64, 1000}) {
    for (const int64_t grain : {1, 16, 300}) {
      std::vector<int> seen(static_cast<size_t>(n), 0);
      ParallelRanges(ExecContext{.threads = 3}, n, grain, [&](int64_t begin, int64_t end, int) {
        EXPECT_EQ(begin % grain, 0);
        EXPECT_LT(begin, end);
        for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
      });
      EXPECT_EQ(seen, std::vector<int>(static_cast<size_t>(n), 1)) << n << " by " << grain;
    }
  }
}

}  // namespace
}  // namespace dsla
