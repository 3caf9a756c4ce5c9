// TextPool: threads on which large texts are read and tokenised, so that the io threads go on
// streaming replies. What has not begun at the end is dropped.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace dsla::openai {

class TextPool {
 public:
  explicit TextPool(int threads);
  ~TextPool();  // waits for what has begun
  TextPool(const TextPool&) = delete;
  TextPool& operator=(const TextPool&) = delete;

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
