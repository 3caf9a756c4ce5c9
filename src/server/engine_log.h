// What the engine tells goes to the log: requests that failed, every change of level with its
// reason, and which of several replicas failed.
#pragma once

#include <cstdint>
#include <map>
#include <set>

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
  // were more than the state lists, a line says how many. Of several replicas, those of each.
  void LogChanges(const EngineState& state);

 private:
  void LogChanges(const std::vector<LevelEvent>& events, int replica);

  Log* const log_;
  std::map<int, int64_t> last_sequence_;  // of the events that were logged, by replica
  std::set<int> failed_;                  // replicas of which it is logged
};

}  // namespace dsla
