// A client of a plain socket, which sends what it is told, byte by byte, right or wrong.
#pragma once

#include <string>
#include <string_view>

#include "server/http/http.h"

namespace dsla::testing {

struct RawResponse {
  int status = 0;  // 0: none came (closed, reset or out of time)
  HttpHeaders headers;
  std::string body;       // chunks put together
  bool complete = false;  // as its framing says
};

class RawClient {
 public:
  // To 127.0.0.1. receive_buffer: SO_RCVBUF in bytes; 0: the system's.
  explicit RawClient(int port, int receive_buffer = 0);
  ~RawClient();
  RawClient(const RawClient&) = delete;
  RawClient& operator=(const RawClient&) = delete;

  // False when the server has closed or reset the connection, or takes no more for 10 s.
  bool Send(std::string_view bytes);
  void ShutdownSend();
  void Close();
  void Reset();  // closes with a reset

  // The next response; `head`: of a HEAD request, without a body.
  RawResponse Read(double timeout_seconds = 20, bool head = false);
  // The next bytes; empty: closed, or nothing came.
  std::string ReadSome(double timeout_seconds = 20);
  // Whether the server closes within the time; what comes before is thrown away.
  bool ClosedWithin(double seconds);

  RawResponse Call(std::string_view bytes) {
    Send(bytes);
    return Read();
  }

 private:
  bool Fill(double deadline);  // reads into in_; false: closed or out of time
  bool TakeLine(double deadline, std::string* line);
  bool TakeBytes(double deadline, size_t n, std::string* bytes);

  int fd_ = -1;
  std::string in_;
};

std::string Get(std::string_view path, std::string_view extra_headers = "");
std::string PostJson(std::string_view path, std::string_view body,
                     std::string_view extra_headers = "");

}  // namespace dsla::testing
