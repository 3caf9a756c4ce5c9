#include "server/http/server.h"

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <unordered_set>

#include "server/http/connection.h"

namespace dsla {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

constexpr auto kAcceptBackOff = std::chrono::milliseconds(100);
constexpr int kConnectionsBeyondLimit = 64;

std::string HostPort(const tcp::endpoint& endpoint) {
  const std::string address = endpoint.address().to_string();
  return endpoint.address().is_v6() ? fmt::format("[{}]:{}", address, endpoint.port())
                                    : fmt::format("{}:{}", address, endpoint.port());
}

Status SetUpTls(const HttpServerOptions& options, asio::ssl::context& context) {
  error_code code;
  context.set_options(asio::ssl::context::default_workarounds | asio::ssl::context::no_sslv2 |
                          asio::ssl::context::no_sslv3 | asio::ssl::context::no_tlsv1 |
                          asio::ssl::context::no_tlsv1_1,
                      code);
  context.use_certificate_chain_file(options.tls_cert, code);
  if (code)
    return InvalidArgument("--tls-cert: cannot use '{}': {}", options.tls_cert, code.message());
  context.use_private_key_file(options.tls_key, asio::ssl::context::pem, code);
  if (code)
    return InvalidArgument("--tls-key: cannot use '{}': {}", options.tls_key, code.message());
  return Status::Ok();
}

}  // namespace

struct HttpServer::Impl : public ConnectionHost {
  Impl(const HttpServerOptions& o, std::shared_ptr<const Router> router, KeyRing keys,
       HttpObserver* obs)
      : options_(o),
        dispatcher_(std::move(router), std::move(keys), o.cors_origins),
        observer_(obs),
        io_(o.io_threads),
        acceptor_(asio::make_strand(io_)),
        back_off_(acceptor_.get_executor()) {}

  Status Listen();
  void Run();
  void Stop();
  void RunIo();
  void Accept();
  void OnAccept(error_code code, tcp::socket socket);
  void Admit(tcp::socket socket);

  const HttpServerOptions& options() const override { return options_; }
  const Dispatcher& dispatcher() const override { return dispatcher_; }
  HttpObserver& observer() const override { return *observer_; }
  std::shared_ptr<const std::atomic<bool>> closing() const override { return closing_; }
  void RequestStarted() override;
  void RequestFinished() override;
  void OnFailure(const std::exception& error) override;
  bool HoldBodyBytes(int64_t bytes) override;
  void ReleaseBodyBytes(int64_t bytes) override { body_bytes_ -= bytes; }
  void Remove(const std::shared_ptr<ConnectionLink>& connection) override;

  const HttpServerOptions options_;
  Dispatcher dispatcher_;
  HttpObserver* const observer_;
  const std::shared_ptr<std::atomic<bool>> closing_ = std::make_shared<std::atomic<bool>>(false);
  std::unique_ptr<asio::ssl::context> tls_;
  asio::io_context io_;
  tcp::acceptor acceptor_;
  asio::steady_timer back_off_;
  bool accept_troubled_ = false;
  std::atomic<int64_t> body_bytes_{0};
  int port_ = 0;
  std::vector<std::thread> threads_;

  mutable std::mutex mutex_;  // of what follows
  std::condition_variable idle_;
  std::unordered_set<std::shared_ptr<ConnectionLink>> connections_;
  int requests_ = 0;
  bool stopping_ = false;
};

Status HttpServer::Impl::Listen() {
  if (options_.tls_cert.empty() != options_.tls_key.empty())
    return InvalidArgument("--tls-cert and --tls-key go together: one is missing");
  if (!options_.tls_cert.empty()) {
    tls_ = std::make_unique<asio::ssl::context>(asio::ssl::context::tls_server);
    DSLA_RETURN_IF_ERROR(SetUpTls(options_, *tls_));
  }
  error_code code;
  tcp::resolver resolver(io_);
  const auto found =
      resolver.resolve(options_.host, std::to_string(options_.port),
                       tcp::resolver::passive | tcp::resolver::numeric_service, code);
  if (code || found.empty())
    return InvalidArgument("--host: '{}' is not an address of this machine: {}", options_.host,
                           code.message());
  const tcp::endpoint endpoint = found.begin()->endpoint();
  acceptor_.open(endpoint.protocol(), code);
  if (!code) acceptor_.set_option(asio::socket_base::reuse_address(true), code);
  if (!code) acceptor_.bind(endpoint, code);
  if (!code) acceptor_.listen(asio::socket_base::max_listen_connections, code);
  if (code)
    return InvalidArgument("cannot listen on {}: {} (see --host and --port)", HostPort(endpoint),
                           code.message());
  port_ = acceptor_.local_endpoint(code).port();
  return Status::Ok();
}

void HttpServer::Impl::Run() {
  asio::post(acceptor_.get_executor(), [this] { Accept(); });
  for (int i = 0; i < options_.io_threads; ++i) {
    threads_.emplace_back([this] { RunIo(); });
  }
}

void HttpServer::Impl::RunIo() {
  while (true) {
    try {
      io_.run();
      return;
    } catch (const std::exception& error) {
      OnFailure(error);
    }
  }
}

void HttpServer::Impl::Accept() {
  acceptor_.async_accept(asio::make_strand(io_), [this](error_code code, tcp::socket socket) {
    OnAccept(code, std::move(socket));
  });
}

void HttpServer::Impl::OnAccept(error_code code, tcp::socket socket) {
  if (!acceptor_.is_open()) return;
  if (code && code != asio::error::connection_aborted) {
    // Out of descriptors or memory: the waiting clients stay in the backlog until there is room.
    if (!accept_troubled_) observer_->OnTrouble("cannot accept connections: " + code.message());
    accept_troubled_ = true;
    back_off_.expires_after(kAcceptBackOff);
    back_off_.async_wait([this](error_code cancelled) {
      if (!cancelled && acceptor_.is_open()) Accept();
    });
    return;
  }
  accept_troubled_ = false;
  try {
    if (!code) Admit(std::move(socket));
  } catch (const std::exception& error) {
    OnFailure(error);
  }
  Accept();
}

void HttpServer::Impl::Admit(tcp::socket socket) {
  error_code ignored;
  const tcp::endpoint remote = socket.remote_endpoint(ignored);
  if (ignored) return;  // gone already
  socket.set_option(tcp::no_delay(true), ignored);
  socket.set_option(asio::socket_base::keep_alive(true), ignored);
  socket.set_option(asio::socket_base::send_buffer_size(static_cast<int>(options_.socket_buffer)),
                    ignored);
  std::unique_ptr<Stream> stream =
      tls_ ? NewTlsStream(std::move(socket), *tls_) : NewPlainStream(std::move(socket));
  std::shared_ptr<Connection> connection;
  {
    const std::lock_guard lock(mutex_);
    const int beyond = static_cast<int>(connections_.size()) - options_.max_connections;
    if (stopping_ || beyond >= kConnectionsBeyondLimit) return;
    connection = std::make_shared<Connection>(this, std::move(stream), HostPort(remote),
                                              /*beyond_limit=*/beyond >= 0);
    connections_.insert(connection);
  }
  observer_->OnConnections(1);
  connection->Start();
}

void HttpServer::Impl::RequestStarted() {
  const std::lock_guard lock(mutex_);
  ++requests_;
}

void HttpServer::Impl::RequestFinished() {
  const std::lock_guard lock(mutex_);
  if (--requests_ == 0) idle_.notify_all();
}

void HttpServer::Impl::OnFailure(const std::exception& error) {
  try {
    observer_->OnTrouble(std::string("HTTP failed outside of a request's handler: ") +
                         error.what());
  } catch (const std::exception&) {  // not even memory to say so
  }
}

bool HttpServer::Impl::HoldBodyBytes(int64_t bytes) {
  if (body_bytes_.fetch_add(bytes) + bytes <= options_.max_body_total) return true;
  body_bytes_ -= bytes;
  return false;
}

void HttpServer::Impl::Remove(const std::shared_ptr<ConnectionLink>& connection) {
  {
    const std::lock_guard lock(mutex_);
    if (connections_.erase(connection) == 0) return;
  }
  observer_->OnConnections(-1);
}

void HttpServer::Impl::Stop() {
  asio::post(acceptor_.get_executor(), [this] {
    error_code ignored;
    acceptor_.close(ignored);
    back_off_.cancel();
  });
  std::vector<std::shared_ptr<ConnectionLink>> open;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    open.assign(connections_.begin(), connections_.end());
  }
  for (const auto& connection : open) connection->Drop();
  open.clear();
  for (std::thread& thread : threads_) thread.join();  // no work is left once all are closed
}

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

HttpServer::~HttpServer() { impl_->Stop(); }

Expected<std::unique_ptr<HttpServer>> HttpServer::Start(const HttpServerOptions& options,
                                                        std::shared_ptr<const Router> router,
                                                        KeyRing keys, HttpObserver* observer) {
  auto impl = std::make_unique<Impl>(options, std::move(router), std::move(keys), observer);
  DSLA_RETURN_IF_ERROR(impl->Listen());
  impl->Run();
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

int HttpServer::port() const { return impl_->port_; }

void HttpServer::SetRouter(std::shared_ptr<const Router> router) {
  impl_->dispatcher_.SetRouter(std::move(router));
}

void HttpServer::SetPhase(Phase phase) {
  impl_->dispatcher_.SetPhase(phase);
  *impl_->closing_ = phase == Phase::kDraining;
}

int HttpServer::connections() const {
  const std::lock_guard lock(impl_->mutex_);
  return static_cast<int>(impl_->connections_.size());
}

int HttpServer::requests() const {
  const std::lock_guard lock(impl_->mutex_);
  return impl_->requests_;
}

int64_t HttpServer::body_bytes() const { return impl_->body_bytes_; }

bool HttpServer::WaitIdle(double seconds) {
  std::unique_lock lock(impl_->mutex_);
  return impl_->idle_.wait_for(lock, std::chrono::duration<double>(seconds),
                               [&] { return impl_->requests_ == 0; });
}

}  // namespace dsla
