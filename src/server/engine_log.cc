#include "server/engine_log.h"

#include <vector>

namespace dsla {
namespace {

constexpr int kNoReplica = -1;  // there is one engine

void AddReplica(int replica, std::vector<LogField>& fields) {
  if (replica != kNoReplica) fields.push_back({"replica", int64_t{replica}});
}

}  // namespace

void EngineLog::OnFinish(const RequestResult& result) {
  const StatusCode code = result.status.code();
  if (result.status.ok() || code == StatusCode::kCancelled || code == StatusCode::kDeadlineExceeded)
    return;
  std::vector<LogField> fields = {{"request", result.id}};
  AddReplica(result.replica, fields);
  fields.push_back({"message", result.status.message()});
  log_->Write(LogLevel::kError, "request_failed", fields);
}

void EngineLog::LogChanges(const EngineState& state) {
  if (state.replicas.empty()) return LogChanges(state.events, kNoReplica);
  for (size_t r = 0; r < state.replicas.size(); ++r) {
    const EngineState& replica = state.replicas[r];
    const int number = static_cast<int>(r);
    LogChanges(replica.events, number);
    if (replica.device_error.empty() || !failed_.insert(number).second) continue;
    log_->Write(LogLevel::kError, "replica_failed",
                {{"replica", int64_t{number}},
                 {"device", replica.device},
                 {"message", replica.device_error}});
  }
}

void EngineLog::LogChanges(const std::vector<LevelEvent>& events, int replica) {
  int64_t& last = last_sequence_[replica];
  for (const LevelEvent& event : events) {
    if (event.sequence <= last) continue;
    const int64_t missed = event.sequence - last - 1;
    std::vector<LogField> fields;
    AddReplica(replica, fields);
    if (missed > 0) {
      std::vector<LogField> of_missed = fields;
      of_missed.push_back({"count", missed});
      log_->Write(LogLevel::kInfo, "changes_not_listed", of_missed);
    }
    last = event.sequence;
    fields.push_back({"from", int64_t{event.from}});
    fields.push_back({"to", int64_t{event.to}});
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
