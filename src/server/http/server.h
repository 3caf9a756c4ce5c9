// The HTTP/1.1 server: Asio, a fixed number of io threads, one strand per connection. Every wait
// has a time limit and every buffer a size; a handler answers through a Responder and never touches
// a socket.
//
// What reaches a handler has passed the limits, the route's access rule and the media-type check. A
// refusal goes out before the body is read and closes the connection if there is one.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "server/auth.h"
#include "server/http/dispatch.h"
#include "server/http/exchange.h"
#include "server/http/request_reader.h"
#include "server/http/router.h"

namespace dsla {

struct HttpServerOptions {
  std::string host = "127.0.0.1";  // an address, or a name, which may stand for several
  int port = 8080;                 // 0: any free one
  int io_threads = 2;
  std::string tls_cert, tls_key;  // PEM files, both or none
  std::vector<std::string> cors_origins;
  HttpRequestLimits limits;
  // 64 more are taken for one request each: a busy server still answers probes, and 503 to others.
  int max_connections = 1024;
  // Bytes of request bodies that all connections together may hold, from the first byte that comes
  // until nobody holds the request any more. One that would exceed it gets 503 and its connection
  // ends.
  int64_t max_body_total = 256 << 20;
  // Seconds. A head must be there in `read_timeout`; a body gets as long again, and a second for
  // each 16 KiB that has come. A write may stand still for `write_timeout`.
  double read_timeout = 10;
  double idle_timeout = 10;  // between two requests of a connection
  double write_timeout = 20;
  double comment_seconds = 15;        // between the comments of a stream that stands still
  int64_t stream_buffer = 1 << 20;    // bytes that may wait for a slow reader of a stream
  int64_t socket_buffer = 256 << 10;  // SO_SNDBUF, so that the kernel's share is bounded too
};

// Told of what happens, on io threads; must not block.
class HttpObserver {
 public:
  virtual ~HttpObserver() = default;
  virtual void OnConnections(int delta) = 0;
  virtual void OnRequestStarted() = 0;
  virtual void OnRequestFinished(const AccessRecord& record) = 0;
  // Something is wrong with the machine or with us: accept failed, a handler threw, memory ran out.
  virtual void OnTrouble(const std::string& message) = 0;
};

class HttpServer {
 public:
  // Binds, listens and serves at once, in phase kLoading. An address that cannot be had: kNotFound
  // or kInvalidArgument, naming it. The observer must outlive the server.
  static Expected<std::unique_ptr<HttpServer>> Start(const HttpServerOptions& options,
                                                     std::shared_ptr<const Router> router,
                                                     KeyRing keys, HttpObserver* observer);
  ~HttpServer();  // closes every connection and joins the threads
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  int port() const;
  bool local() const;  // only its own machine reaches it
  void SetRouter(std::shared_ptr<const Router> router);
  // kDraining: responses say Connection: close from now on.
  void SetPhase(Phase phase);

  int connections() const;
  int requests() const;        // whose head has come and whose answer has not been sent
  int64_t body_bytes() const;  // of requests that are being read or held by somebody
  // Waits until there is none of these requests, or for so long; whether there is none.
  bool WaitIdle(double seconds);

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsla
