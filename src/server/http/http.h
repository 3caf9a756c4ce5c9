// HTTP without a transport: what a handler is given and how it answers. The Beast server
// (server/http/server.h) implements Responder; tests implement their own.
//
// A handler is called on an io thread and must not block: it answers at once, or keeps the
// Responder and answers later from any thread. A Responder that is dropped unanswered answers 500.
#pragma once

#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dsla {

// In the order in which they came; names compare without regard to case.
class HttpHeaders {
 public:
  HttpHeaders() = default;
  HttpHeaders(std::initializer_list<std::pair<std::string, std::string>> list) : list_(list) {}

  void Add(std::string name, std::string value) {
    list_.emplace_back(std::move(name), std::move(value));
  }
  // The first of that name, or null.
  const std::string* Find(std::string_view name) const;
  // Its value, or "".
  std::string_view Get(std::string_view name) const;
  size_t Count(std::string_view name) const;

  auto begin() const { return list_.begin(); }
  auto end() const { return list_.end(); }
  size_t size() const { return list_.size(); }

 private:
  std::vector<std::pair<std::string, std::string>> list_;
};

bool EqualsIgnoreCase(std::string_view a, std::string_view b);

struct HttpRequest {
  std::string method;  // as sent: "GET"
  std::string path;    // percent-decoded, without the query; one trailing slash is dropped
  std::string query;   // after '?', as sent
  HttpHeaders headers;
  std::string body;            // empty in an AccessRecord
  std::string request_id;      // the client's X-Request-Id where it is sound, else made here
  std::string remote_address;  // "127.0.0.1:51234"
  bool admin = false;          // the admin key was given
  double arrival = 0;          // NowSeconds() when its first byte had come
  std::vector<std::pair<std::string, std::string>> path_params;  // {name} of the route's pattern

  std::string_view PathParam(std::string_view name) const;
};

struct HttpResponse {
  int status = 200;
  HttpHeaders headers;  // Content-Type and what else the handler wants; the server adds
                        // Content-Length or Transfer-Encoding, Date, Connection and X-Request-Id
  std::string body;
};
HttpResponse JsonResponse(int status, std::string body);
HttpResponse TextResponse(int status, std::string body,
                          std::string content_type = "text/plain; charset=utf-8");

// Answers one request. Thread-safe; no call blocks or waits for the socket. Either Respond once, or
// StartStream, Write..., End. A call that comes too late (after the answer, or with the client
// gone) does nothing and returns false.
class Responder {
 public:
  virtual ~Responder() = default;

  // The whole answer at once.
  virtual bool Respond(HttpResponse response) = 0;

  // A stream of events may follow. When nothing has gone out for a while (HttpServerOptions::
  // comment_seconds), a comment does, at first behind `head`, so that proxies keep the connection.
  // From then on StartStream adds only its body, and Respond returns false: an error has to be an
  // event.
  virtual void ExpectStream(HttpResponse head) = 0;
  // Status and headers of a streamed answer, sent chunked; each Write is flushed. A body in `head`
  // is the first chunk.
  virtual bool StartStream(HttpResponse head) = 0;
  // False: the client is gone, or so slow that its bounded buffer is full, which drops it (the
  // callback of OnDisconnect runs, on an io thread).
  virtual bool Write(std::string_view chunk) = 0;
  virtual void End() = 0;

  // The callback runs at most once, on an io thread or in this call, if the client leaves before
  // the answer has ended (Respond or End called), also when the server gives up on it. It is
  // released then. It must not block.
  virtual void OnDisconnect(std::function<void()> callback) = 0;
  virtual bool gone() const = 0;  // the client left, or the answer has ended

  // A field for the request's line in the access log, such as ("tokens", "42"). Never text of a
  // prompt or a reply.
  virtual void Note(std::string name, std::string value) = 0;
};

using Handler = std::function<void(std::shared_ptr<const HttpRequest> request,
                                   std::shared_ptr<Responder> responder)>;

// Server-sent events: `head` for StartStream, and one event's bytes ("data: ...\n\n"; `data` must
// hold no line break).
HttpResponse SseHead();
std::string SseEvent(std::string_view data);
inline constexpr std::string_view kSseComment = ": waiting\n\n";  // which clients skip

}  // namespace dsla
