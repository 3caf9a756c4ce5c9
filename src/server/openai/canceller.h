// Canceller: cancels requests from where the engine must not be called, its own thread (a sink
// that finds one of several replies failed has the others to end). One thread, there from the
// start, as starting it may fail; what is not done at the end is dropped.
#pragma once

#include <string>
#include <vector>

#include "engine/engine.h"
#include "server/openai/task_pool.h"

namespace dsla::openai {

class Canceller {
 public:
  explicit Canceller(Engine* engine) : engine_(engine) {}
  Canceller(const Canceller&) = delete;
  Canceller& operator=(const Canceller&) = delete;

  void Cancel(std::vector<std::string> ids);  // never waits for the engine

 private:
  Engine* const engine_;
  TaskPool thread_{1};
};

}  // namespace dsla::openai
