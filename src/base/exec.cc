#include "base/exec.h"

#include <algorithm>
#include <thread>

#include "base/thread_team.h"

namespace dsla {

void* Workspace::TakeBytes(int64_t bytes) {
  const int64_t rounded = (std::max<int64_t>(bytes, 1) + 63) / 64 * 64;
  while (block_ < blocks_.size() && used_ + rounded > blocks_[block_].size()) {
    ++block_;
    used_ = 0;
  }
  if (block_ == blocks_.size()) {
    constexpr int64_t kMinBlockBytes = int64_t{1} << 20;
    const int64_t grown = blocks_.empty() ? 0 : 2 * blocks_.back().size();
    blocks_.emplace_back(std::max({rounded, kMinBlockBytes, grown}));
  }
  char* p = blocks_[block_].data() + used_;
  used_ += rounded;
  return p;
}

int ThreadCount(int asked) {
  if (asked > 0) return asked;
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

namespace internal {

void ParallelRun(int threads, int64_t tasks, void (*run)(void*, int64_t, int), void* arg) {
  ThreadTeam::OfCaller().Run(threads, tasks, run, arg);
}

}  // namespace internal
}  // namespace dsla
