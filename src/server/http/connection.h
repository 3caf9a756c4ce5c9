// One client's connection: reads requests, hands each to its route, sends the answer, watches for
// the client's leaving meanwhile. Internal to server/http: it includes Asio.
//
// Everything but Wake, Drop and Stop runs on the socket's strand. Requests that a client sends
// ahead (pipelining) wait in the read buffer until the one before is answered; one that fills it
// while an answer is being made is closed.
#pragma once

#include <array>
#include <atomic>
#include <boost/asio/steady_timer.hpp>
#include <exception>
#include <memory>
#include <string>

#include "server/http/dispatch.h"
#include "server/http/exchange.h"
#include "server/http/request_reader.h"
#include "server/http/server.h"
#include "server/http/stream.h"

namespace dsla {

// What the connections of a server share; outlives them.
class ConnectionHost {
 public:
  virtual ~ConnectionHost() = default;
  virtual const HttpServerOptions& options() const = 0;
  virtual const Dispatcher& dispatcher() const = 0;
  virtual HttpObserver& observer() const = 0;
  virtual std::shared_ptr<const std::atomic<bool>> closing() const = 0;
  // From a request's head on, until its answer is sent.
  virtual void RequestStarted() = 0;
  virtual void RequestFinished() = 0;
  // Tells the observer of what went wrong outside of a request's handler.
  virtual void OnFailure(const std::exception& error) = 0;
  // Takes so many more bytes of the bound on bodies; false: they are not to be had.
  virtual bool HoldBodyBytes(int64_t bytes) = 0;
  // What is held of it; whoever gives back subtracts.
  virtual std::shared_ptr<std::atomic<int64_t>> body_bytes() const = 0;
  virtual void Remove(const std::shared_ptr<ConnectionLink>& connection) = 0;
};

class Connection : public ConnectionLink, public std::enable_shared_from_this<Connection> {
 public:
  // beyond_limit: for one request, and the dispatcher serves few.
  Connection(ConnectionHost* host, std::unique_ptr<Stream> stream, std::string remote_address,
             bool beyond_limit);

  void Start();
  void Stop();  // closes at once; thread-safe
  void Wake() override;
  void Drop() override;

 private:
  // What is waited for; each has its own time limit.
  enum class Waiting { kHandshake, kIdle, kHead, kBody, kHandler, kComment, kLinger };

  // A completion handler that does `work` unless the connection is closed. Memory that runs out in
  // it costs this connection and no other.
  template <typename Work>
  auto Guarded(Work work);
  template <typename Work>
  bool Attempt(const Work& work);  // false: it threw, and the observer was told

  void ReadMore();
  void OnRead(boost::system::error_code code, size_t bytes);
  void OnReadEnd(boost::system::error_code code);
  void Parse();
  bool OnHead();    // false: refused
  bool HoldBody();  // what has come of the body; false: refused
  void ReleaseBody();
  void SendContinue();
  void OnRequest();
  void Refuse(HttpResponse response, bool close);
  // body: gets the request's, which else goes.
  std::shared_ptr<Exchange> NewExchange(bool keep_alive, std::string* body = nullptr);
  std::shared_ptr<const HttpRequest> WithBody(const HttpRequest& head, std::string body);
  void BeginRequest();  // counts it, once, when its head has come
  void EndRequest();
  void FillRequest();
  void AwaitAnswer();

  void Send();
  void WriteSome();
  void OnWritten(boost::system::error_code code, size_t bytes);
  void FinishExchange();

  void SetDeadline(Waiting waiting, double seconds);
  void ArmTimer();
  void OnTimer();
  void OnTimeout();
  void Linger();
  void Close();

  ConnectionHost* const host_;
  const std::unique_ptr<Stream> stream_;
  const std::string remote_address_;
  const bool beyond_limit_;
  boost::asio::steady_timer timer_;
  std::array<char, 16384> chunk_;  // one read
  std::string in_;                 // read, not used yet
  RequestReader reader_;
  Dispatched dispatched_;  // of the request being read
  double arrival_ = 0;     // of its first byte
  int64_t held_ = 0;       // bytes of its body that the server's bound counts
  bool counted_ = false;   // among the server's requests
  std::shared_ptr<Exchange> exchange_;
  std::string continue_;  // an interim response that waits to be sent
  std::string write_;     // being sent
  size_t written_ = 0;    // of it
  bool reading_ = false, writing_ = false, closed_ = false;
  bool saw_end_ = false;  // the client sends no more
  Waiting waiting_ = Waiting::kHandshake;
  double deadline_ = 0;   // NowSeconds(); 0: none
  double armed_for_ = 0;  // when the timer fires; 0: it does not run
  int64_t lingered_ = 0;  // bytes thrown away since the last response
};

}  // namespace dsla
