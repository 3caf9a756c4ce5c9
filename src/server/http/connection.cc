#include "server/http/connection.h"

#include <openssl/rand.h>

#include <algorithm>
#include <boost/asio/post.hpp>

#include "base/clock.h"
#include "server/http/errors.h"

namespace dsla {
namespace {

namespace asio = boost::asio;
using boost::system::error_code;

constexpr size_t kMaxReadAhead = 64 << 10;  // bytes of pipelined requests
constexpr double kLingerSeconds = 2;
constexpr int64_t kLingerBytes = 8 << 20;
constexpr double kBodyBytesPerSecond = 16 << 10;

// A client's id goes into logs and headers, so only what is harmless there.
bool SoundRequestId(std::string_view id) {
  return !id.empty() && id.size() <= 128 && std::all_of(id.begin(), id.end(), [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' ||
           c == '_' || c == '.' || c == ':';
  });
}

std::string NewRequestId() {
  static constexpr char kHex[] = "0123456789abcdef";
  std::array<unsigned char, 16> bytes{};
  RAND_bytes(bytes.data(), static_cast<int>(bytes.size()));
  std::string id = "req-";
  for (const unsigned char byte : bytes) {
    id += kHex[byte >> 4];
    id += kHex[byte & 15];
  }
  return id;
}

}  // namespace

Connection::Connection(ConnectionHost* host, std::unique_ptr<Stream> stream,
                       std::string remote_address, bool beyond_limit)
    : host_(host),
      stream_(std::move(stream)),
      remote_address_(std::move(remote_address)),
      beyond_limit_(beyond_limit),
      timer_(stream_->socket().get_executor()),
      reader_(host->options().limits) {}

template <typename Work>
bool Connection::Attempt(const Work& work) {
  try {
    work();
    return true;
  } catch (const std::exception& error) {
    host_->OnFailure(error);
    return false;
  }
}

template <typename Work>
auto Connection::Guarded(Work work) {
  return [self = shared_from_this(), work = std::move(work)](auto... results) {
    if (self->closed_) return;
    if (!self->Attempt([&] { work(results...); })) self->Close();
  };
}

void Connection::Start() {
  asio::post(timer_.get_executor(), Guarded([this] {
               SetDeadline(Waiting::kHandshake, host_->options().read_timeout);
               stream_->Handshake(Guarded([this](error_code code) {
                 if (code) return Close();
                 SetDeadline(Waiting::kIdle, host_->options().idle_timeout);
                 ReadMore();
               }));
             }));
}

void Connection::Stop() {
  asio::post(timer_.get_executor(), Guarded([this] { Close(); }));
}

void Connection::Wake() {
  asio::post(timer_.get_executor(), Guarded([this] { Send(); }));
}

void Connection::Drop() { Stop(); }

// --- Reading -------------------------------------------------------------------------------------

// Also while a request is being handled: an end of the stream then means that nobody waits for the
// answer. A client that sends so far ahead that its end could not be seen is not served.
void Connection::ReadMore() {
  if (reading_ || closed_ || saw_end_) return;
  if (in_.size() >= kMaxReadAhead) {
    if (exchange_ && !exchange_->answered()) Close();
    return;
  }
  reading_ = true;
  stream_->ReadSome(asio::buffer(chunk_),
                    Guarded([this](error_code code, size_t bytes) { OnRead(code, bytes); }));
}

void Connection::OnRead(error_code code, size_t bytes) {
  reading_ = false;
  if (code) return OnReadEnd(code);
  if (waiting_ == Waiting::kLinger) {
    lingered_ += static_cast<int64_t>(bytes);
    if (lingered_ > kLingerBytes) return Close();
    return ReadMore();
  }
  in_.append(chunk_.data(), bytes);
  if (exchange_) return ReadMore();
  Parse();
}

void Connection::OnReadEnd(error_code code) {
  saw_end_ = true;
  // One that has shut down its sending side may still read the answers that are ready, also to
  // requests that it has sent ahead; but nobody is taken to wait for one that is being made.
  const bool orderly = code == asio::error::eof;
  if (orderly && exchange_ && exchange_->answered()) return;
  Close();
}

void Connection::Parse() {
  while (!exchange_ && !closed_) {
    size_t used = 0;
    const bool had_started = reader_.started();
    const RequestReader::Event event = reader_.Feed(in_, &used);
    in_.erase(0, used);
    if (reader_.started() && !had_started) {
      arrival_ = NowSeconds();
      SetDeadline(Waiting::kHead, host_->options().read_timeout);
    }
    if (event != RequestReader::Event::kError && !HoldBody()) return;
    switch (event) {
      case RequestReader::Event::kNeedMore:
        if (saw_end_) return Linger();
        if (reader_.head_done()) {
          const double allowance =
              static_cast<double>(reader_.body_received()) / kBodyBytesPerSecond;
          SetDeadline(Waiting::kBody,
                      arrival_ + 2 * host_->options().read_timeout + allowance - NowSeconds());
        }
        return ReadMore();
      case RequestReader::Event::kHead:
        if (!OnHead()) return;
        break;
      case RequestReader::Event::kDone:
        OnRequest();
        return;
      case RequestReader::Event::kError:
        FillRequest();
        return Refuse(ErrorResponse(reader_.error()), /*close=*/true);
    }
  }
}

void Connection::FillRequest() {
  HttpRequest& request = reader_.request();
  const std::string_view id = request.headers.Get("X-Request-Id");
  request.request_id = SoundRequestId(id) ? std::string(id) : NewRequestId();
  request.remote_address = remote_address_;
  request.arrival = arrival_;
}

bool Connection::OnHead() {
  FillRequest();
  BeginRequest();
  dispatched_ = host_->dispatcher().Dispatch(reader_.request(), reader_.has_body(), beyond_limit_);
  if (dispatched_.refusal) {
    HttpResponse refusal = std::move(*dispatched_.refusal);
    Refuse(std::move(refusal), /*close=*/reader_.has_body());
    return false;
  }
  if (reader_.expects_continue() && reader_.has_body() && in_.empty()) SendContinue();
  return true;
}

bool Connection::HoldBody() {
  const int64_t more = reader_.body_received() - held_;
  if (more <= 0) return true;
  if (host_->HoldBodyBytes(more)) {
    held_ += more;
    return true;
  }
  FillRequest();
  Refuse(ErrorResponse(TooManyBodyBytesError()), /*close=*/true);
  return false;
}

void Connection::ReleaseBody() { *host_->body_bytes() -= std::exchange(held_, 0); }

void Connection::SendContinue() {
  continue_ = "HTTP/1.1 100 Continue\r\n\r\n";
  Send();
}

std::shared_ptr<Exchange> Connection::NewExchange(bool keep_alive, std::string* body) {
  ExchangeOptions options;
  options.stream_buffer = host_->options().stream_buffer;
  options.keep_alive = keep_alive && reader_.keep_alive() && !beyond_limit_;
  options.http10 = reader_.http10();
  options.extra = std::move(dispatched_.extra);
  if (dispatched_.route) options.route = dispatched_.route->pattern;
  HttpRequest request = std::move(reader_.request());
  const auto body_bytes = static_cast<int64_t>(request.body.size());
  if (body) *body = std::move(request.body);
  std::string().swap(request.body);
  request.admin = dispatched_.admin;
  request.path_params = std::move(dispatched_.params);
  BeginRequest();
  SetDeadline(Waiting::kHandler, 0);
  exchange_ = std::make_shared<Exchange>(std::move(request), body_bytes, weak_from_this(),
                                         host_->closing(), std::move(options));
  host_->observer().OnRequestStarted();
  return exchange_;
}

// The request as its handler gets it. Its body counts until nobody holds it any more, which may be
// on another thread, and after the server.
std::shared_ptr<const HttpRequest> Connection::WithBody(const HttpRequest& head, std::string body) {
  struct Counted {
    HttpRequest request;
    std::shared_ptr<std::atomic<int64_t>> total;
    int64_t bytes;
    ~Counted() { *total -= bytes; }
  };
  auto counted = std::make_shared<Counted>(head, host_->body_bytes(), 0);
  counted->bytes = std::exchange(held_, 0);
  counted->request.body = std::move(body);
  return {counted, &counted->request};
}

void Connection::BeginRequest() {
  if (!std::exchange(counted_, true)) host_->RequestStarted();
}

void Connection::EndRequest() {
  if (std::exchange(counted_, false)) host_->RequestFinished();
}

void Connection::Refuse(HttpResponse response, bool close) {
  Exchange::NewResponder(NewExchange(!close))->Respond(std::move(response));
  if (!close) ReadMore();
}

void Connection::OnRequest() {
  std::string body;
  const std::shared_ptr<Exchange> exchange = NewExchange(true, &body);
  const std::shared_ptr<Responder> responder = Exchange::NewResponder(exchange);
  const Dispatched dispatched = std::move(dispatched_);
  dispatched_ = Dispatched();
  try {
    dispatched.route->handler(WithBody(exchange->head(), std::move(body)), responder);
  } catch (const std::bad_alloc&) {
    host_->observer().OnTrouble("out of memory in a request's handler");
    responder->Respond(ErrorResponse(OutOfMemoryError()));
  } catch (const std::exception& error) {
    host_->observer().OnTrouble(std::string("a request's handler failed: ") + error.what());
    responder->Respond(ErrorResponse(InternalError()));
  }
  if (saw_end_ && !exchange->answered()) return Close();
  AwaitAnswer();
  ReadMore();
}

// Without a time limit, but a stream's next comment may be due.
void Connection::AwaitAnswer() {
  if (exchange_->takes_comments()) {
    SetDeadline(Waiting::kComment, host_->options().comment_seconds);
  } else {
    SetDeadline(Waiting::kHandler, 0);
  }
}

// --- Writing -------------------------------------------------------------------------------------

void Connection::Send() {
  if (writing_) return;
  if (!continue_.empty()) {
    write_.swap(continue_);
    continue_.clear();
  } else if (exchange_) {
    write_ = exchange_->Take();
    if (write_.empty()) {
      if (exchange_->complete())
        FinishExchange();
      else if (waiting_ == Waiting::kHandler)
        AwaitAnswer();
      return;
    }
  } else {
    return;
  }
  written_ = 0;
  writing_ = true;
  WriteSome();
}

void Connection::WriteSome() {
  if (exchange_) SetDeadline(Waiting::kHandler, host_->options().write_timeout);
  stream_->WriteSome(asio::buffer(write_) + written_,
                     Guarded([this](error_code code, size_t bytes) { OnWritten(code, bytes); }));
}

void Connection::OnWritten(error_code code, size_t bytes) {
  if (code) {
    writing_ = false;
    return Close();
  }
  written_ += bytes;
  if (written_ < write_.size()) return WriteSome();
  writing_ = false;
  write_.clear();
  if (exchange_) {
    exchange_->Sent();
    AwaitAnswer();
  }
  Send();
}

void Connection::FinishExchange() {
  host_->observer().OnRequestFinished(exchange_->Record());
  const bool keep = exchange_->keep_alive();
  exchange_.reset();
  EndRequest();
  dispatched_ = Dispatched();
  reader_.Reset();
  ReleaseBody();
  if (!keep) return Linger();
  SetDeadline(Waiting::kIdle, host_->options().idle_timeout);
  Parse();
}

// --- Ends ----------------------------------------------------------------------------------------

// The timer is only set anew where it would fire too late, so that a deadline that moves on with
// every token costs nothing.
void Connection::SetDeadline(Waiting waiting, double seconds) {
  waiting_ = waiting;
  deadline_ = waiting == Waiting::kHandler && seconds <= 0 ? 0 : NowSeconds() + seconds;
  if (deadline_ > 0 && (armed_for_ == 0 || deadline_ < armed_for_)) ArmTimer();
}

void Connection::ArmTimer() {
  armed_for_ = deadline_;
  timer_.expires_after(std::chrono::duration_cast<std::chrono::steady_clock::duration>(
      std::chrono::duration<double>(std::max(0.0, deadline_ - NowSeconds()))));
  timer_.async_wait(Guarded([this](error_code code) {
    if (!code) OnTimer();
  }));
}

void Connection::OnTimer() {
  armed_for_ = 0;
  if (deadline_ == 0) return;
  if (deadline_ > NowSeconds()) return ArmTimer();
  OnTimeout();
}

void Connection::OnTimeout() {
  if (waiting_ == Waiting::kComment) return exchange_->Comment();
  if (exchange_ || (waiting_ != Waiting::kHead && waiting_ != Waiting::kBody)) return Close();
  FillRequest();
  Refuse(ErrorResponse(RequestTimeoutError()), /*close=*/true);
}

// Closing with unread bytes would reset the connection and might destroy the response before the
// client has read it, so what still comes is thrown away for a while.
void Connection::Linger() {
  SetDeadline(Waiting::kLinger, kLingerSeconds);
  in_.clear();
  const bool client_done = saw_end_;
  stream_->ShutdownSend(Guarded([this, client_done](error_code) {
    if (client_done) Close();
  }));
  ReadMore();
}

void Connection::Close() {
  if (closed_) return;
  closed_ = true;
  if (exchange_) {
    Attempt([this] { exchange_->Disconnect(); });
    Attempt([this] { host_->observer().OnRequestFinished(exchange_->Record()); });
    exchange_.reset();
  }
  EndRequest();
  ReleaseBody();
  error_code ignored;
  stream_->socket().close(ignored);
  timer_.cancel();
  host_->Remove(shared_from_this());
}

}  // namespace dsla
