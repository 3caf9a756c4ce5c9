#include "base/thread_team.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/check.h"

namespace dsla {
namespace {

// Longer than what lies between two loops of a decode step, shorter than anybody minds.
constexpr auto kAwake = std::chrono::microseconds(200);
constexpr int kPausesPerLook = 64;  // at the clock
// The caller waits so long for the others' last tasks before it offers its core to them.
constexpr int kPausesBeforeYield = 2000;

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

thread_local bool in_task = false;

}  // namespace

ThreadTeam& ThreadTeam::OfCaller() {
  thread_local ThreadTeam team;
  return team;
}

ThreadTeam::~ThreadTeam() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadTeam::Grow(int workers) {
  if (static_cast<int>(workers_.size()) >= workers) return;
  const int cores = static_cast<int>(std::thread::hardware_concurrency());  // a system call
  awake_ = cores == 0 || workers < cores;
  while (static_cast<int>(workers_.size()) < workers) {
    const int worker = static_cast<int>(workers_.size()) + 1;
    workers_.emplace_back([this, worker] { Work(worker); });
  }
}

void ThreadTeam::Run(int threads, int64_t tasks, Task run, void* arg) {
  if (threads <= 1 || tasks <= 1 || in_task) {
    for (int64_t task = 0; task < tasks; ++task) run(arg, task, 0);
    return;
  }
  DSLA_CHECK(threads <= static_cast<int>(kInside));
  Grow(threads - 1);
  loop_ = {.run = run, .arg = arg, .tasks = tasks, .threads = threads};
  next_.store(0, std::memory_order_relaxed);
  // Sequentially consistent, as is the count of sleepers: either the count is seen here, or the new
  // loop by the worker that is about to sleep.
  state_.store((state_.load(std::memory_order_relaxed) & ~(kLoop - 1)) + kLoop + kOpen);
  if (sleepers_.load() > 0) {
    { const std::lock_guard lock(mutex_); }
    wake_.notify_all();
  }
  TakeTasks(0);
  uint32_t state = state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int pauses = 0; (state & kInside) != 0; state = state_.load(std::memory_order_acquire)) {
    if (++pauses < kPausesBeforeYield)
      Pause();
    else
      std::this_thread::yield();
  }
}

void ThreadTeam::TakeTasks(int thread) noexcept {
  in_task = true;
  for (;;) {
    const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
    if (task >= loop_.tasks) break;
    loop_.run(loop_.arg, task, thread);
  }
  in_task = false;
}

void ThreadTeam::Work(int worker) {
  uint32_t last = 0;  // the loop that this worker saw last
  auto slept = std::chrono::steady_clock::now();
  const auto is_new = [&](uint32_t state) {
    return (state & kOpen) != 0 && (state & ~(kOpen | kInside)) != last;
  };
  for (int pauses = 0; !stop_.load(std::memory_order_relaxed);) {
    uint32_t state = state_.load(std::memory_order_acquire);
    if (is_new(state)) {
      if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) continue;
      last = state & ~(kOpen | kInside);
      if (worker < loop_.threads) TakeTasks(worker);
      state_.fetch_sub(1, std::memory_order_release);
      slept = std::chrono::steady_clock::now();
      continue;
    }
    Pause();
    if (awake_.load(std::memory_order_relaxed) &&
        (++pauses % kPausesPerLook != 0 || std::chrono::steady_clock::now() - slept < kAwake))
      continue;
    std::unique_lock lock(mutex_);
    ++sleepers_;
    wake_.wait(lock, [&] { return stop_.load() || is_new(state_.load()); });
    --sleepers_;
  }
}

}  // namespace dsla
