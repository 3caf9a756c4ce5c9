// From bytes to requests, whatever pieces they come in: the part of the server that every unknown
// client reaches. Beast parses; what it lets pass and we do not is refused here. No sockets, so it
// can be fuzzed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "server/http/errors.h"
#include "server/http/http.h"

namespace dsla {

struct HttpRequestLimits {
  int64_t head_bytes = 16 << 10;
  int64_t uri_bytes = 8 << 10;
  int64_t body_bytes = 16 << 20;
};

class RequestReader {
 public:
  explicit RequestReader(const HttpRequestLimits& limits);
  ~RequestReader();
  RequestReader(const RequestReader&) = delete;
  RequestReader& operator=(const RequestReader&) = delete;

  enum class Event {
    kNeedMore,  // all that could be used was; keep the rest and come again with more
    kHead,      // once per request: request() holds all but the body
    kDone,      // the body is whole; what is left of `data` belongs to the next request
    kError,     // error() is the answer, and the connection is of no use after it
  };
  // `data`: what Feed has not used yet, from the start, with what came since. *used: how many bytes
  // of it are done with. To be called again with the rest until kNeedMore, kDone or kError.
  Event Feed(std::string_view data, size_t* used);

  // Method, path, query, headers and, after kDone, the body.
  HttpRequest& request();
  const HttpError& error() const;
  bool has_body() const;          // the head announced one
  bool expects_continue() const;  // Expect: 100-continue
  bool keep_alive() const;        // HTTP/1.1 without Connection: close
  bool http10() const;
  bool started() const;  // a byte of the request has come
  bool head_done() const;
  int64_t body_received() const;

  void Reset();  // for the connection's next request

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// "%41" -> "A"; false for a broken escape or a NUL.
bool PercentDecode(std::string_view text, std::string* decoded);

}  // namespace dsla
