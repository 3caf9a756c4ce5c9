#include "server/http/testing/raw_client.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>

#include "base/check.h"
#include "base/clock.h"

namespace dsla::testing {

RawClient::RawClient(int port, int receive_buffer) {
  fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  DSLA_CHECK(fd_ >= 0);
  if (receive_buffer > 0)
    setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer));
  const int on = 1;
  setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  DSLA_CHECK(connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
}

RawClient::~RawClient() { Close(); }

bool RawClient::Send(std::string_view bytes) {
  const double deadline = NowSeconds() + 10;
  while (!bytes.empty()) {
    pollfd waiting{fd_, POLLOUT, 0};
    const double left = deadline - NowSeconds();
    if (left <= 0 || poll(&waiting, 1, static_cast<int>(left * 1000) + 1) <= 0) return false;
    const ssize_t sent = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno == EAGAIN) continue;
    if (sent <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(sent));
  }
  return true;
}

void RawClient::ShutdownSend() { shutdown(fd_, SHUT_WR); }

void RawClient::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

void RawClient::Reset() {
  const linger now{1, 0};
  setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
  Close();
}

bool RawClient::Fill(double deadline) {
  pollfd waiting{fd_, POLLIN, 0};
  const double left = deadline - NowSeconds();
  if (left <= 0 || poll(&waiting, 1, static_cast<int>(left * 1000) + 1) <= 0) return false;
  std::array<char, 65536> chunk;
  const ssize_t got = recv(fd_, chunk.data(), chunk.size(), 0);
  if (got <= 0) return false;
  in_.append(chunk.data(), static_cast<size_t>(got));
  return true;
}

bool RawClient::TakeLine(double deadline, std::string* line) {
  size_t end;
  while ((end = in_.find("\r\n")) == std::string::npos) {
    if (!Fill(deadline)) return false;
  }
  *line = in_.substr(0, end);
  in_.erase(0, end + 2);
  return true;
}

bool RawClient::TakeBytes(double deadline, size_t n, std::string* bytes) {
  while (in_.size() < n) {
    if (!Fill(deadline)) return false;
  }
  *bytes += in_.substr(0, n);
  in_.erase(0, n);
  return true;
}

RawResponse RawClient::Read(double timeout_seconds, bool head) {
  const double deadline = NowSeconds() + timeout_seconds;
  RawResponse response;
  std::string line;
  if (!TakeLine(deadline, &line) || line.size() < 12 || !line.starts_with("HTTP/1.1 "))
    return response;
  response.status = std::atoi(line.c_str() + 9);
  while (true) {
    if (!TakeLine(deadline, &line)) return response;
    if (line.empty()) break;
    const size_t colon = line.find(": ");
    if (colon == std::string::npos) return response;
    response.headers.Add(line.substr(0, colon), line.substr(colon + 2));
  }
  if (head || response.status == 204 || response.status == 304 || response.status == 100) {
    response.complete = true;
  } else if (response.headers.Get("Transfer-Encoding") == "chunked") {
    while (true) {
      if (!TakeLine(deadline, &line)) return response;
      const size_t size = std::strtoul(line.c_str(), nullptr, 16);
      if (!TakeBytes(deadline, size, &response.body) || !TakeLine(deadline, &line)) return response;
      if (size == 0) break;
    }
    response.complete = true;
  } else if (const std::string* length = response.headers.Find("Content-Length")) {
    response.complete =
        TakeBytes(deadline, std::strtoul(length->c_str(), nullptr, 10), &response.body);
  } else {
    while (Fill(deadline)) {
    }
    response.body.swap(in_);
    response.complete = true;
  }
  return response;
}

std::string RawClient::ReadSome(double timeout_seconds) {
  if (in_.empty()) Fill(NowSeconds() + timeout_seconds);
  std::string bytes;
  bytes.swap(in_);
  return bytes;
}

bool RawClient::ClosedWithin(double seconds) {
  const double deadline = NowSeconds() + seconds;
  while (Fill(deadline)) {
    in_.clear();
  }
  return NowSeconds() < deadline;
}

std::string Get(std::string_view path, std::string_view extra_headers) {
  return fmt::format("GET {} HTTP/1.1\r\nHost: localhost\r\n{}\r\n", path, extra_headers);
}

std::string PostJson(std::string_view path, std::string_view body, std::string_view extra_headers) {
  return fmt::format(
      "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
      "{}\r\n"
      "{}\r\n{}",
      path, body.size(), extra_headers, body);
}

}  // namespace dsla::testing
