// What the engine tells goes to the log: requests that failed, and every change of level with its
// reason.
#pragma once

#include <cstdint>

#include "engine/engine.h"
#include "server/log.h"

namespace dsla {

class EngineLog {
 public:
  explicit EngineLog(Log* log) : log_(log) {}  // which must outlive this

  // To be called by the engine's FinishObserver. That a client left or a deadline passed is no
  // failure.
  void OnFinish(const RequestResult& result);

  // The changes since the last call, by one thread: to be called about once a second. Where there
  // were more than the state lists, a line says how many.
  void LogChanges(const EngineState& state);

 private:
  Log* const log_;
  int64_t last_sequence_ = 0;  // of the events that were logged
};

}  // namespace dsla
