// One request and its answer on a connection. Handlers write from any thread; the connection takes
// what is to be sent on its own. Between them stand one mutex and a bounded buffer, never a socket.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/http/http.h"

namespace dsla {

// The connection as an exchange sees it. Both calls may come from any thread and do not block; none
// comes after Exchange::Disconnect.
class ConnectionLink {
 public:
  virtual ~ConnectionLink() = default;
  virtual void Wake() = 0;  // there is something to send
  virtual void Drop() = 0;  // the reader is too slow
};

// What a finished request looked like, for the log and the metrics.
struct AccessRecord {
  std::shared_ptr<const HttpRequest> request;
  std::string route;       // the pattern that matched; empty: none
  int status = 0;          // as sent; 499: the client was gone first
  int64_t body_bytes = 0;  // of the request
  int64_t bytes = 0;       // of the response, head included
  double seconds = 0;
  std::vector<std::pair<std::string, std::string>> notes;
};

struct ExchangeOptions {
  int64_t stream_buffer = 1 << 20;  // bytes that may wait to be sent while a stream goes on
  bool keep_alive = true;
  bool http10 = false;
  std::string route;
  HttpHeaders extra;  // headers of the response
};

class Exchange : public std::enable_shared_from_this<Exchange> {
 public:
  // closing: once true, the answer says Connection: close.
  Exchange(HttpRequest head, int64_t body_bytes, std::weak_ptr<ConnectionLink> link,
           std::shared_ptr<const std::atomic<bool>> closing, ExchangeOptions options);

  // For the handler; when it is dropped without an answer, 500 goes out (or a begun stream breaks
  // off).
  static std::shared_ptr<Responder> NewResponder(std::shared_ptr<Exchange> exchange);

  // --- The connection's side.
  const HttpRequest& head() const { return *head_; }  // the request without its body
  // What is to be sent now; empty: nothing. Before the next Take, Sent says that it is gone.
  std::string Take();
  void Sent();
  bool complete() const;    // answered and all of it sent
  bool answered() const;    // nothing will be added any more
  bool keep_alive() const;  // after it is complete
  bool takes_comments() const;
  void Comment();  // in a stream that stands still
  // The client is gone or given up on. Runs the callback.
  void Disconnect();
  AccessRecord Record() const;

 private:
  class Handle;
  enum class State { kPending, kStreaming, kEnded, kGone };

  bool Respond(HttpResponse response);
  void ExpectStream(HttpResponse head);
  bool StartStream(HttpResponse head);
  bool Write(std::string_view chunk);
  void End();
  void Abandon();
  void OnDisconnect(std::function<void()> callback);
  bool gone() const;
  void Note(std::string name, std::string value);

  // All with mutex_ held.
  void Enqueue(std::string bytes);
  void AppendBody(std::string_view chunk, std::string& bytes) const;
  void BeginHead(const HttpResponse& response, bool stream, std::string& bytes);
  void WakeLocked();

  const std::shared_ptr<const HttpRequest> head_;
  const int64_t body_bytes_;
  const std::weak_ptr<ConnectionLink> link_;
  const std::shared_ptr<const std::atomic<bool>> closing_;
  const ExchangeOptions options_;

  mutable std::mutex mutex_;  // of all below
  State state_ = State::kPending;
  std::string out_;
  size_t in_write_ = 0;
  bool woken_ = false;
  bool keep_alive_;
  bool chunked_ = false;
  bool dropped_ = false;
  std::optional<HttpResponse> early_head_;  // of the stream that is expected
  bool opened_early_ = false;               // with it, before StartStream
  int status_ = 0;
  int64_t bytes_ = 0;
  std::function<void()> on_disconnect_;
  std::vector<std::pair<std::string, std::string>> notes_;
};

}  // namespace dsla
