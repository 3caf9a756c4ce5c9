// ExecContext: what an operator may use while it runs: threads and scratch memory. Passed
// explicitly; there are no globals.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "base/buffer.h"
#include "base/check.h"

namespace dsla {

// A bump allocator whose memory is kept between steps. Not thread-safe: take what a parallel
// section needs before it.
class Workspace {
 public:
  // Frees at its end everything taken during its life.
  class Scope {
   public:
    explicit Scope(Workspace& workspace)
        : workspace_(workspace), block_(workspace.block_), used_(workspace.used_) {}
    ~Scope() {
      workspace_.block_ = block_;
      workspace_.used_ = used_;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Workspace& workspace_;
    size_t block_;
    int64_t used_;
  };

  // n elements of T, 64-byte aligned, contents undefined, valid until the enclosing Scope ends.
  template <typename T>
  T* Take(int64_t n) {
    return static_cast<T*>(TakeBytes(n * static_cast<int64_t>(sizeof(T))));
  }

 private:
  void* TakeBytes(int64_t bytes);

  std::vector<Buffer<char>> blocks_;
  size_t block_ = 0;  // the block in use
  int64_t used_ = 0;  // bytes used of it
};

class StageTimes;

struct ExecContext {
  int threads = 1;
  Workspace* workspace =
      nullptr;  // one per thread that calls operators; never shared between callers
  StageTimes* stages = nullptr;  // where HybridModel on the CPU notes its time; null: nowhere
};

// `asked` threads, or, if that is 0, as many as the machine has cores.
int ThreadCount(int asked);

namespace internal {
void ParallelRun(int threads, int64_t tasks, void (*run)(void*, int64_t task, int thread),
                 void* arg);
}  // namespace internal

// Calls body(task, thread) for every task in [0, tasks), handed out one by one; thread is in [0,
// ctx.threads). The order is unspecified, so a result must not depend on it. No task waits for
// another: one thread may run them all.
template <typename Body>
void ParallelFor(const ExecContext& ctx, int64_t tasks, Body&& body) {
  if (ctx.threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  using Fn = std::remove_reference_t<Body>;
  internal::ParallelRun(
      ctx.threads, tasks,
      [](void* arg, int64_t task, int thread) { (*static_cast<Fn*>(arg))(task, thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Cuts [0, n) into contiguous ranges, two per thread if there are enough, each a multiple of
// `grain` but the last, and calls body(begin, end, thread) for each.
template <typename Body>
void ParallelRanges(const ExecContext& ctx, int64_t n, int64_t grain, Body&& body) {
  const int64_t units = (n + grain - 1) / grain;
  const int64_t ranges = units < 2 * ctx.threads ? units : 2 * ctx.threads;
  ParallelFor(ctx, ranges, [&](int64_t r, int thread) {
    const int64_t begin = units * r / ranges * grain, end = units * (r + 1) / ranges * grain;
    body(begin, end < n ? end : n, thread);
  });
}

}  // namespace dsla
