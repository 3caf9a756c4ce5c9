#include "server/http/exchange.h"

#include "base/clock.h"
#include "server/http/errors.h"
#include "server/http/wire.h"

namespace dsla {

class Exchange::Handle : public Responder {
 public:
  explicit Handle(std::shared_ptr<Exchange> exchange) : exchange_(std::move(exchange)) {}
  ~Handle() override { exchange_->Abandon(); }
  bool Respond(HttpResponse response) override { return exchange_->Respond(std::move(response)); }
  void ExpectStream(HttpResponse head) override { exchange_->ExpectStream(std::move(head)); }
  bool StartStream(HttpResponse head) override { return exchange_->StartStream(std::move(head)); }
  bool Write(std::string_view chunk) override { return exchange_->Write(chunk); }
  void End() override { exchange_->End(); }
  void OnDisconnect(std::function<void()> callback) override {
    exchange_->OnDisconnect(std::move(callback));
  }
  bool gone() const override { return exchange_->gone(); }
  void Note(std::string name, std::string value) override {
    exchange_->Note(std::move(name), std::move(value));
  }

 private:
  const std::shared_ptr<Exchange> exchange_;
};

Exchange::Exchange(HttpRequest head, int64_t body_bytes, std::weak_ptr<ConnectionLink> link,
                   std::shared_ptr<const std::atomic<bool>> closing, ExchangeOptions options)
    : head_(std::make_shared<const HttpRequest>(std::move(head))),
      body_bytes_(body_bytes),
      link_(std::move(link)),
      closing_(std::move(closing)),
      options_(std::move(options)),
      keep_alive_(options_.keep_alive) {}

std::shared_ptr<Responder> Exchange::NewResponder(std::shared_ptr<Exchange> exchange) {
  return std::make_shared<Handle>(std::move(exchange));
}

void Exchange::BeginHead(const HttpResponse& response, bool stream, std::string& bytes) {
  status_ = response.status;
  if (closing_->load()) keep_alive_ = false;
  BodyFraming framing = BodyFraming::kLength;
  if (response.status == 204 || response.status == 304) {
    framing = BodyFraming::kNone;
  } else if (stream) {
    framing = options_.http10 ? BodyFraming::kUntilClose : BodyFraming::kChunked;
  }
  chunked_ = framing == BodyFraming::kChunked;
  HttpHeaders extra = options_.extra;
  extra.Add("X-Request-Id", head_->request_id);
  bytes += ResponseHeadBytes(response.status, response.headers, extra, framing,
                             static_cast<int64_t>(response.body.size()), keep_alive_);
}

void Exchange::AppendBody(std::string_view chunk, std::string& bytes) const {
  if (head_->method == "HEAD" || status_ == 204 || status_ == 304) return;
  if (chunked_) {
    AppendChunk(chunk, bytes);
  } else {
    bytes += chunk;
  }
}

void Exchange::Enqueue(std::string bytes) {
  bytes_ += static_cast<int64_t>(bytes.size());
  if (out_.empty()) {
    out_ = std::move(bytes);
  } else {
    out_ += bytes;
  }
  WakeLocked();
}

// With the mutex held, so that no call reaches the connection once Disconnect has returned.
void Exchange::WakeLocked() {
  if (woken_ || in_write_ > 0) return;  // a running write looks for more when it ends
  if (const auto link = link_.lock()) {
    woken_ = true;
    link->Wake();
  }
}

bool Exchange::Respond(HttpResponse response) {
  std::function<void()> released;
  const std::lock_guard lock(mutex_);
  if (state_ != State::kPending) return false;
  std::string bytes;
  BeginHead(response, /*stream=*/false, bytes);
  AppendBody(response.body, bytes);
  state_ = State::kEnded;
  released.swap(on_disconnect_);
  Enqueue(std::move(bytes));
  return true;
}

void Exchange::ExpectStream(HttpResponse head) {
  const std::lock_guard lock(mutex_);
  early_head_ = std::move(head);
  WakeLocked();  // the connection knows of no comment that is due yet
}

bool Exchange::StartStream(HttpResponse head) {
  const std::lock_guard lock(mutex_);
  std::string bytes;
  if (state_ == State::kPending) {
    BeginHead(head, /*stream=*/true, bytes);
    state_ = State::kStreaming;
  } else if (state_ != State::kStreaming || !std::exchange(opened_early_, false)) {
    return false;
  }
  AppendBody(head.body, bytes);
  if (!bytes.empty()) Enqueue(std::move(bytes));
  return true;
}

bool Exchange::takes_comments() const {
  const std::lock_guard lock(mutex_);
  return early_head_ && (state_ == State::kPending || state_ == State::kStreaming);
}

void Exchange::Comment() {
  const std::lock_guard lock(mutex_);
  std::string bytes;
  if (state_ == State::kPending) {
    BeginHead(*early_head_, /*stream=*/true, bytes);
    state_ = State::kStreaming;
    opened_early_ = true;
  }
  // What is due goes out without one.
  if (state_ != State::kStreaming || !out_.empty()) return;
  AppendBody(kSseComment, bytes);
  Enqueue(std::move(bytes));
}

bool Exchange::Write(std::string_view chunk) {
  const std::lock_guard lock(mutex_);
  if (state_ != State::kStreaming || dropped_) return false;
  const size_t waiting = out_.size() + in_write_;
  // One chunk of any size may wait alone.
  if (waiting > 0 && waiting + chunk.size() > static_cast<size_t>(options_.stream_buffer)) {
    dropped_ = true;
    notes_.emplace_back("dropped", "slow_reader");
    if (const auto link = link_.lock()) link->Drop();
    return false;
  }
  std::string bytes;
  AppendBody(chunk, bytes);
  if (!bytes.empty()) Enqueue(std::move(bytes));
  return true;
}

void Exchange::End() {
  std::function<void()> released;
  const std::lock_guard lock(mutex_);
  if (state_ != State::kStreaming) return;
  state_ = State::kEnded;
  released.swap(on_disconnect_);
  std::string bytes;
  if (chunked_ && head_->method != "HEAD") AppendLastChunk(bytes);
  if (bytes.empty()) {
    WakeLocked();
  } else {
    Enqueue(std::move(bytes));
  }
}

// The handler has let go of its Responder.
void Exchange::Abandon() {
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::kEnded || state_ == State::kGone) return;
    if (state_ == State::kStreaming) {  // without its last chunk the client sees that it broke off
      dropped_ = true;
      notes_.emplace_back("dropped", "handler_gave_up");
      if (const auto link = link_.lock()) link->Drop();
      return;
    }
  }
  Respond(ErrorResponse(InternalError()));
}

void Exchange::OnDisconnect(std::function<void()> callback) {
  std::function<void()> released;
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::kPending || state_ == State::kStreaming) {
      released.swap(on_disconnect_);
      on_disconnect_ = std::move(callback);
      return;
    }
    if (state_ == State::kEnded) return;
  }
  callback();
}

bool Exchange::gone() const {
  const std::lock_guard lock(mutex_);
  return state_ == State::kGone || state_ == State::kEnded || dropped_;
}

void Exchange::Note(std::string name, std::string value) {
  const std::lock_guard lock(mutex_);
  notes_.emplace_back(std::move(name), std::move(value));
}

std::string Exchange::Take() {
  const std::lock_guard lock(mutex_);
  woken_ = false;
  std::string taken;
  taken.swap(out_);
  in_write_ = taken.size();
  return taken;
}

void Exchange::Sent() {
  const std::lock_guard lock(mutex_);
  in_write_ = 0;
}

bool Exchange::complete() const {
  const std::lock_guard lock(mutex_);
  return state_ == State::kEnded && out_.empty() && in_write_ == 0;
}

bool Exchange::answered() const {
  const std::lock_guard lock(mutex_);
  return state_ == State::kEnded;
}

bool Exchange::keep_alive() const {
  const std::lock_guard lock(mutex_);
  return keep_alive_;
}

void Exchange::Disconnect() {
  std::function<void()> callback;
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::kGone) return;
    const bool sent = state_ == State::kEnded && out_.empty() && in_write_ == 0;
    if (!sent) status_ = 499;
    state_ = State::kGone;
    callback.swap(on_disconnect_);
    out_.clear();
  }
  if (callback) callback();
}

AccessRecord Exchange::Record() const {
  const std::lock_guard lock(mutex_);
  AccessRecord record;
  record.request = head_;
  record.route = options_.route;
  record.status = status_;
  record.body_bytes = body_bytes_;
  record.bytes = bytes_;
  record.seconds = NowSeconds() - head_->arrival;
  record.notes = notes_;
  return record;
}

}  // namespace dsla
