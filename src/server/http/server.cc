#include "server/http/server.h"

#include <algorithm>
#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ip/v6_only.hpp>
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

// One address that is listened on.
struct Listener {
  explicit Listener(asio::io_context& io)
      : acceptor(asio::make_strand(io)), back_off(acceptor.get_executor()) {}

  tcp::acceptor acceptor;
  asio::steady_timer back_off;
  bool troubled = false;
};

// Each address once, however often the name's file or server has it.
std::vector<tcp::endpoint> Endpoints(const tcp::resolver::results_type& found) {
  std::vector<tcp::endpoint> endpoints;
  for (const auto& entry : found) {
    if (std::find(endpoints.begin(), endpoints.end(), entry.endpoint()) == endpoints.end())
      endpoints.push_back(entry.endpoint());
  }
  return endpoints;
}

// A name may stand for addresses of a protocol, too, that this machine does not have.
bool IsNotOurs(error_code code) {
  return code == boost::system::errc::address_not_available ||
         code == boost::system::errc::address_family_not_supported;
}

error_code Open(const tcp::endpoint& endpoint, bool v6_only, tcp::acceptor& acceptor) {
  error_code code;
  acceptor.open(endpoint.protocol(), code);
  if (!code) acceptor.set_option(asio::socket_base::reuse_address(true), code);
  if (!code && v6_only && endpoint.address().is_v6())
    acceptor.set_option(asio::ip::v6_only(true), code);
  if (!code) acceptor.bind(endpoint, code);
  if (!code) acceptor.listen(asio::socket_base::max_listen_connections, code);
  return code;
}

}  // namespace

struct HttpServer::Impl : public ConnectionHost {
  Impl(const HttpServerOptions& o, std::shared_ptr<const Router> router, KeyRing keys,
       HttpObserver* obs)
      : options_(o),
        dispatcher_(std::move(router), std::move(keys), o.cors_origins),
        observer_(obs),
        io_(o.io_threads) {}

  Status Listen();
  void Run();
  void Stop();
  void RunIo();
  void Accept(Listener& listener);
  void OnAccept(Listener& listener, error_code code, tcp::socket socket);
  void Admit(tcp::socket socket);

  const HttpServerOptions& options() const override { return options_; }
  const Dispatcher& dispatcher() const override { return dispatcher_; }
  HttpObserver& observer() const override { return *observer_; }
  std::shared_ptr<const std::atomic<bool>> closing() const override { return closing_; }
  void RequestStarted() override;
  void RequestFinished() override;
  void OnFailure(const std::exception& error) override;
  bool HoldBodyBytes(int64_t bytes) override;
  std::shared_ptr<std::atomic<int64_t>> body_bytes() const override { return body_bytes_; }
  void Remove(const std::shared_ptr<ConnectionLink>& connection) override;

  const HttpServerOptions options_;
  Dispatcher dispatcher_;
  HttpObserver* const observer_;
  const std::shared_ptr<std::atomic<bool>> closing_ = std::make_shared<std::atomic<bool>>(false);
  std::unique_ptr<asio::ssl::context> tls_;
  asio::io_context io_;
  std::vector<std::unique_ptr<Listener>> listeners_;
  const std::shared_ptr<std::atomic<int64_t>> body_bytes_ =
      std::make_shared<std::atomic<int64_t>>(0);
  int port_ = 0;
  bool local_ = true;  // every address is this machine's own
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
  port_ = options_.port;
  Status unavailable;
  const std::vector<tcp::endpoint> endpoints = Endpoints(found);
  for (tcp::endpoint endpoint : endpoints) {
    endpoint.port(static_cast<asio::ip::port_type>(port_));  // where it is 0, the first one's
    auto listener = std::make_unique<Listener>(io_);
    code = Open(endpoint, /*v6_only=*/endpoints.size() > 1, listener->acceptor);
    if (code) {
      const Status status = InvalidArgument("cannot listen on {}: {} (see --host and --port)",
                                            HostPort(endpoint), code.message());
      if (!IsNotOurs(code)) return status;
      unavailable = status;
      continue;
    }
    port_ = listener->acceptor.local_endpoint(code).port();
    local_ = local_ && endpoint.address().is_loopback();
    listeners_.push_back(std::move(listener));
  }
  if (local_) dispatcher_.SetLocal(options_.host);
  return listeners_.empty() ? unavailable : Status::Ok();
}

void HttpServer::Impl::Run() {
  for (const auto& listener : listeners_)
    asio::post(listener->acceptor.get_executor(), [this, l = listener.get()] { Accept(*l); });
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

void HttpServer::Impl::Accept(Listener& listener) {
  listener.acceptor.async_accept(asio::make_strand(io_),
                                 [this, &listener](error_code code, tcp::socket socket) {
                                   OnAccept(listener, code, std::move(socket));
                                 });
}

void HttpServer::Impl::OnAccept(Listener& listener, error_code code, tcp::socket socket) {
  if (!listener.acceptor.is_open()) return;
  if (code && code != asio::error::connection_aborted) {
    // Out of descriptors or memory: the waiting clients stay in the backlog until there is room.
    if (!listener.troubled) observer_->OnTrouble("cannot accept connections: " + code.message());
    listener.troubled = true;
    listener.back_off.expires_after(kAcceptBackOff);
    listener.back_off.async_wait([this, &listener](error_code cancelled) {
      if (!cancelled && listener.acceptor.is_open()) Accept(listener);
    });
    return;
  }
  listener.troubled = false;
  try {
    if (!code) Admit(std::move(socket));
  } catch (const std::exception& error) {
    OnFailure(error);
  }
  Accept(listener);
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
  if (body_bytes_->fetch_add(bytes) + bytes <= options_.max_body_total) return true;
  *body_bytes_ -= bytes;
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
  for (const auto& listener : listeners_) {
    asio::post(listener->acceptor.get_executor(), [l = listener.get()] {
      error_code ignored;
      l->acceptor.close(ignored);
      l->back_off.cancel();
    });
  }
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

bool HttpServer::local() const { return impl_->local_; }

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

int64_t HttpServer::body_bytes() const { return *impl_->body_bytes_; }

bool HttpServer::WaitIdle(double seconds) {
  std::unique_lock lock(impl_->mutex_);
  return impl_->idle_.wait_for(lock, std::chrono::duration<double>(seconds),
                               [&] { return impl_->requests_ == 0; });
}

}  // namespace dsla
