#include "server/engine_log.h"

#include <vector>

namespace dsla {

void EngineLog::OnFinish(const RequestResult& result) {
  const StatusCode code = result.status.code();
  if (result.status.ok() || code == StatusCode::kCancelled || code == StatusCode::kDeadlineExceeded)
    return;
  log_->Write(LogLevel::kError, "request_failed",
              {{"request", result.id}, {"message", result.status.message()}});
}

void EngineLog::LogChanges(const EngineState& state) {
  for (const LevelEvent& event : state.events) {
    if (event.sequence <= last_sequence_) continue;
    const int64_t missed = event.sequence - last_sequence_ - 1;
    if (missed > 0) log_->Write(LogLevel::kInfo, "changes_not_listed", {{"count", missed}});
    last_sequence_ = event.sequence;
    std::vector<LogField> fields = {{"from", int64_t{event.from}}, {"to", int64_t{event.to}}};
    if (!event.request_id.empty()) {
      fields.push_back({"request", event.request_id});
      fields.push_back({"position", int64_t{event.position}});
      fields.push_back({"seconds", event.seconds});
    }
    fields.push_back({"reason", event.reason});
    log_->Write(LogLevel::kInfo, event.request_id.empty() ? "level" : "raise", fields);
  }
}

}  // namespace dsla
