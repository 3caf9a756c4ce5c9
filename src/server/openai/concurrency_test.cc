// The API as it is used: requests come on several threads, tokens on the engine's, and clients
// leave at any time.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <deque>
#include <iterator>
#include <random>
#include <set>
#include <thread>

#include "server/openai/testing.h"

namespace dsla::openai {
namespace {

using testing::FakeResponder;
using testing::Finished;
using testing::Token;

// Gives every request three tokens and an end, on a thread of its own.
class ThreadedEngine : public testing::FakeEngine {
 public:
  ThreadedEngine() : thread_([this] { Run(); }) {}
  ~ThreadedEngine() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_one();
    thread_.join();
  }

  std::optional<Rejection> SubmitAll(std::vector<Submission> group) override {
    {
      const std::lock_guard lock(mutex_);
      if (queue_.size() + group.size() > 16)
        return Rejection{Rejection::Kind::kQueueFull, "full", "", 0.5};
      std::move(group.begin(), group.end(), std::back_inserter(queue_));
    }
    wake_.notify_one();
    return std::nullopt;
  }
  void Cancel(const std::string& id) override {
    const std::lock_guard lock(mutex_);
    cancelled_.insert(id);
  }
  int finished() const { return finished_; }

 private:
  bool Cancelled(const std::string& id) {
    const std::lock_guard lock(mutex_);
    return cancelled_.contains(id);
  }
  void Run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      Submission job = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      int tokens = 0;
      while (tokens < 3 && !Cancelled(job.request.id)) {
        job.sink->OnToken(Token(97, std::to_string(tokens++)));
      }
      RequestResult result = Finished(FinishReason::kLength, 1, tokens);
      if (tokens < 3) result.status = Status(StatusCode::kCancelled, "cancelled");
      job.sink->OnFinish(result);
      ++finished_;
      job = {};  // without the lock: the last sink may be the last to hold what cancels
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Submission> queue_;
  std::set<std::string> cancelled_;
  bool stop_ = false;
  std::atomic<int> finished_{0};
  std::thread thread_;
};

TEST(Concurrency, EveryRequestIsAnsweredOnce) {
  constexpr int kThreads = 4, kRequests = 100;
  testing::TestApi api;
  ThreadedEngine engine;
  api.context.engine = &engine;
  api.Call("GET", "/v1/models");  // makes the routes before the threads start
  std::atomic<int> whole{0}, refused{0}, left{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(1000 + t);
      for (int i = 0; i < kRequests; ++i) {
        const bool stream = random() % 2 == 0;
        const auto responder = api.Completions(
            fmt::format(R"({{"prompt":"x","n":{},"stream":{}}})", random() % 3 + 1, stream));
        if (random() % 4 == 0) responder->Disconnect();
        responder->WaitForEnd();
        const int status = responder->head().status;
        if (status == 429) {
          ++refused;
        } else if (stream ? responder->body().ends_with("[DONE]\n\n") : status == 200) {
          ++whole;
        } else {
          EXPECT_TRUE(status == 0 || stream) << responder->body();
          ++left;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  api.router.reset();  // the engine outlives what calls it
  EXPECT_EQ(whole + refused + left, kThreads * kRequests);
  EXPECT_GT(whole, 0);
}

}  // namespace
}  // namespace dsla::openai
