// What the HTTP server tells goes to the log, a line per request, and to the metrics.
#pragma once

#include <map>
#include <mutex>
#include <string>

#include "server/http/server.h"
#include "server/log.h"
#include "server/metrics.h"

namespace dsla {

class AccessLog : public HttpObserver {
 public:
  explicit AccessLog(Log* log) : log_(log) {}  // which must outlive this
  // From now on; finished requests are not counted until then, what is open is handed over. May be
  // null.
  void SetMetrics(ServerMetrics* metrics);

  void OnConnections(int delta) override;
  void OnRequestStarted() override;
  void OnRequestFinished(const AccessRecord& record) override;
  void OnTrouble(const std::string& message) override;

 private:
  void Change(int connections, int requests);

  Log* const log_;
  std::mutex mutex_;
  ServerMetrics* metrics_ = nullptr;
  int connections_ = 0, requests_ = 0;  // open now
  std::map<std::string, int> probed_;   // the last status by route
};

// A W3C traceparent, if it is one: its value may then go into a log.
bool SoundTraceParent(std::string_view value);

}  // namespace dsla
