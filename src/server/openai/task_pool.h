// TaskPool: threads for work that must not hold up the caller's, in the order in which it comes.
// What has not begun at the end is dropped.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace dsla::openai {

class TaskPool {
 public:
  explicit TaskPool(int threads);
  ~TaskPool();  // waits for what has begun
  TaskPool(const TaskPool&) = delete;
  TaskPool& operator=(const TaskPool&) = delete;

  void Post(std::function<void()> task);  // which must not throw; returns at once

 private:
  void Run();

  std::mutex mutex_;  // of what follows
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace dsla::openai
