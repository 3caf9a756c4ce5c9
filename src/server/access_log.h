// What the HTTP server tells goes to the log, a line per request, and to the metrics.
#pragma once

#include <atomic>
#include <string>

#include "server/http/server.h"
#include "server/log.h"
#include "server/metrics.h"

namespace dsla {

class AccessLog : public HttpObserver {
 public:
  explicit AccessLog(Log* log) : log_(log) {}  // which must outlive this
  // From now on; until then nothing is counted. May be null.
  void SetMetrics(ServerMetrics* metrics) { metrics_.store(metrics); }

  void OnConnections(int delta) override;
  void OnRequestStarted() override;
  void OnRequestFinished(const AccessRecord& record) override;
  void OnTrouble(const std::string& message) override;

 private:
  Log* const log_;
  std::atomic<ServerMetrics*> metrics_{nullptr};
};

// A W3C traceparent, if it is one: its value may then go into a log.
bool SoundTraceParent(std::string_view value);

}  // namespace dsla
