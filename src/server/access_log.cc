#include "server/access_log.h"

#include <algorithm>
#include <charconv>
#include <utility>

namespace dsla {
namespace {

// What probes and scrapers ask all day long is only logged when the answer is another than before.
bool IsProbe(const std::string& route) {
  static constexpr const char* kProbes[] = {"/health", "/live", "/ready", "/ping", "/metrics"};
  return std::any_of(std::begin(kProbes), std::end(kProbes),
                     [&](const char* probe) { return route == probe; });
}

// Notes are text; those that count something are numbers in the log.
LogField FieldOf(const std::string& name, const std::string& note) {
  static constexpr const char* kCounts[] = {"prompt_tokens", "tokens", "dsla_level"};
  int64_t count = 0;
  const char* const end = note.data() + note.size();
  const bool counts =
      std::any_of(std::begin(kCounts), std::end(kCounts), [&](const char* c) { return name == c; });
  if (counts && std::from_chars(note.data(), end, count).ptr == end) return {name, count};
  return {name, note};
}

}  // namespace

bool SoundTraceParent(std::string_view value) {
  constexpr std::string_view kForm = "00-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx-xxxxxxxxxxxxxxxx-xx";
  if (value.size() != kForm.size()) return false;
  for (size_t i = 0; i < value.size(); ++i) {
    const char c = value[i];
    const bool hex = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
    if (kForm[i] == '-' ? c != '-' : !hex) return false;
  }
  return true;
}

void AccessLog::SetMetrics(ServerMetrics* metrics) {
  const std::lock_guard lock(mutex_);
  metrics_ = metrics;
  if (metrics_ == nullptr) return;
  metrics_->AddConnections(connections_);
  metrics_->AddHttpInFlight(requests_);
}

void AccessLog::Change(int connections, int requests) {
  const std::lock_guard lock(mutex_);
  connections_ += connections;
  requests_ += requests;
  if (metrics_ == nullptr) return;
  metrics_->AddConnections(connections);
  metrics_->AddHttpInFlight(requests);
}

void AccessLog::OnConnections(int delta) { Change(delta, 0); }

void AccessLog::OnRequestStarted() { Change(0, 1); }

void AccessLog::OnRequestFinished(const AccessRecord& record) {
  Change(0, -1);
  bool quiet = false;
  {
    const std::lock_guard lock(mutex_);
    if (metrics_ != nullptr) {
      metrics_->CountHttp(record.route.empty() ? "other" : record.route, record.status,
                          record.seconds);
    }
    if (IsProbe(record.route)) {
      int& before = probed_.try_emplace(record.route, 200).first->second;
      quiet = std::exchange(before, record.status) == record.status;
    }
  }
  const HttpRequest& request = *record.request;
  std::vector<LogField> fields = {{"id", request.request_id},
                                  {"method", request.method.substr(0, 16)},
                                  {"path", request.path.substr(0, 256)},
                                  {"status", int64_t{record.status}},
                                  {"seconds", record.seconds},
                                  {"bytes_in", record.body_bytes},
                                  {"bytes_out", record.bytes},
                                  {"remote", request.remote_address}};
  for (const auto& [name, value] : record.notes) fields.push_back(FieldOf(name, value));
  const std::string_view trace = request.headers.Get("traceparent");
  if (SoundTraceParent(trace)) fields.push_back({"traceparent", std::string(trace)});
  const LogLevel level = quiet                  ? LogLevel::kDebug
                         : record.status >= 500 ? LogLevel::kWarning
                                                : LogLevel::kInfo;
  log_->Write(level, "request", fields);
}

void AccessLog::OnTrouble(const std::string& message) {
  log_->Write(LogLevel::kError, "trouble", {{"message", message}});
}

}  // namespace dsla
