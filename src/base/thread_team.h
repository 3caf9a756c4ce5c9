// A caller's worker threads, for loops of a few microseconds: between loops they wait awake for a
// short time, then asleep. A worker that the system does not let run takes no task and is not
// waited for, so that beside other programs a loop is slowed by what it loses of the machine, and
// no more.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace dsla {

class ThreadTeam {
 public:
  using Task = void (*)(void* arg, int64_t task, int thread);

  ThreadTeam() = default;
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  // The calling thread's own, which lives as long as the thread.
  static ThreadTeam& OfCaller();

  // Calls run(arg, task, thread) once for every task in [0, tasks), handed out one by one in
  // ascending order; the caller is thread 0, workers are threads 1 to threads - 1. Returns when all
  // are done. A call from within a task runs on that thread alone, as thread 0. An exception out of
  // a task ends the program.
  void Run(int threads, int64_t tasks, Task run, void* arg);

 private:
  struct Loop {
    Task run = nullptr;
    void* arg = nullptr;
    int64_t tasks = 0;
    int threads = 0;
  };

  void Grow(int workers);
  void Work(int worker);
  void TakeTasks(int thread) noexcept;

  // One word says which loop this is, whether workers may enter it, and how many are inside; the
  // rest is only read inside, and only changed when nobody is.
  static constexpr uint32_t kInside = (1u << 16) - 1, kOpen = 1u << 16, kLoop = 1u << 17;
  alignas(64) std::atomic<uint32_t> state_ = 0;
  alignas(64) std::atomic<int64_t> next_ = 0;
  alignas(64) Loop loop_;
  std::atomic<bool> awake_ = true;  // workers wait awake: there are cores for all of them

  std::atomic<int> sleepers_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<bool> stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace dsla
