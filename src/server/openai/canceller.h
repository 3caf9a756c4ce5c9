// Canceller: cancels requests from where the engine must not be called, its own thread (a sink
// that finds one of several replies failed has the others to end). One thread, there from the
// start, as starting it may fail; what is not done at the end is dropped.
#pragma once

#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "engine/engine.h"

namespace dsla::openai {

class Canceller {
 public:
  explicit Canceller(Engine* engine);
  ~Canceller();
  Canceller(const Canceller&) = delete;
  Canceller& operator=(const Canceller&) = delete;

  void Cancel(std::vector<std::string> ids);  // never waits for the engine

 private:
  void Run();

  Engine* const engine_;
  std::mutex mutex_;  // of what follows
  std::condition_variable wake_;
  std::vector<std::string> ids_;
  bool stop_ = false;
  std::thread thread_;  // after all that it uses
};

}  // namespace dsla::openai
