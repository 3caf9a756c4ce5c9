// A server with small routes, for tests of the transport:
//   GET  /open       "open", needs no key
//   GET  /probe      "well", needs no key, while draining too
//   GET  /again      "again" while draining too
//   GET  /items/{id} the id
//   POST /echo       the body, as application/json
//   POST /hold       nothing: the test answers through Held()
//   POST /stream     likewise, and a stream is expected
//   POST /throw      throws
//   POST /admin      needs the admin key
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "server/http/server.h"

namespace dsla::testing {

class TestServer : public HttpObserver {
 public:
  struct Held {
    std::shared_ptr<const HttpRequest> request;
    std::shared_ptr<Responder> responder;
  };

  explicit TestServer(HttpServerOptions options = DefaultOptions(), KeyRing keys = {});
  ~TestServer() override;

  static HttpServerOptions DefaultOptions();  // any free port of 127.0.0.1

  HttpServer& server() { return *server_; }
  int port() const { return server_->port(); }

  Held TakeHeld();  // waits for the next request to /hold or /stream
  // Waits until `n` requests have finished, and returns their records.
  std::vector<AccessRecord> WaitFinished(size_t n);
  std::string WaitTrouble();  // waits for the first message

  // Memory that runs out where the observer is told of the next connection, or the next request's
  // end, which is outside of any request's handler.
  void FailAtConnection() { fail_connection_ = true; }
  void FailAtFinish() { fail_finish_ = true; }

  void OnConnections(int delta) override;
  void OnRequestStarted() override {}
  void OnRequestFinished(const AccessRecord& record) override;
  void OnTrouble(const std::string& message) override;

 private:
  std::atomic<bool> fail_connection_{false}, fail_finish_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Held> held_;
  std::vector<AccessRecord> finished_;
  std::vector<std::string> troubles_;
  std::unique_ptr<HttpServer> server_;
};

}  // namespace dsla::testing
