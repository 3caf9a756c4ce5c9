#include "engine/engine_inbox.h"

#include <algorithm>
#include <utility>

#include "base/clock.h"

namespace dsla {

ActiveRequest::ActiveRequest(Request r, std::shared_ptr<RequestSink> s, const Tokenizer& tokenizer,
                             int64_t V)
    : request(std::move(r)),
      sink(std::move(s)),
      sampler(request.sampling, V),
      text(tokenizer, request.stop, request.continues),
      submitted(NowSeconds()) {
  sampler.AddPrompt(request.prompt);
  if (request.prompt_logprobs) {
    prompt_logprobs.resize(request.prompt.size());
    prompt_logprobs[0].token = request.prompt[0];
    prompt_logprobs_known = 1;  // the first token has none
  }
}

std::optional<Rejection> Inbox::Put(std::unique_ptr<ActiveRequest> request) {
  const auto tokens = static_cast<int64_t>(request->request.prompt.size());
  {
    const std::lock_guard lock(mutex_);
    if (auto refusal = RefusesAllLocked()) return refusal;
    // A prompt larger than the bound by itself is let into an empty queue, or it never could be.
    if (limits_.max_queued_tokens > 0 && counts_.queued > 0 &&
        counts_.queued_tokens + tokens > limits_.max_queued_tokens) {
      return QueueFull(
          fmt::format("the queue is full: {} prompt tokens wait and this one has {}, {} may",
                      counts_.queued_tokens, tokens, limits_.max_queued_tokens));
    }
    if (!ids_.insert(request->request.id).second) {
      return Rejection{.kind = Rejection::Kind::kInvalid,
                       .message = fmt::format("request id '{}' is in use by a running request",
                                              request->request.id),
                       .param = "request_id"};
    }
    ++counts_.queued;
    counts_.queued_tokens += tokens;
    if (++counts_.accepted == 1) counts_.busy_since = request->submitted;
    mail_.requests.push_back(std::move(request));
  }
  arrived_.notify_one();
  return std::nullopt;
}

std::optional<Rejection> Inbox::RefusesAll() const {
  const std::lock_guard lock(mutex_);
  return RefusesAllLocked();
}

std::optional<Rejection> Inbox::RefusesAllLocked() const {
  if (counts_.draining || mail_.stop) {
    return Rejection{.kind = Rejection::Kind::kUnavailable,
                     .message = "the server is shutting down and takes no new requests"};
  }
  if (counts_.queued >= limits_.max_queued) {
    return QueueFull(fmt::format("the queue is full: {} requests wait, {} may", counts_.queued,
                                 limits_.max_queued));
  }
  if (limits_.max_queued_tokens > 0 && counts_.queued > 0 &&
      counts_.queued_tokens >= limits_.max_queued_tokens) {
    return QueueFull(fmt::format("the queue is full: {} prompt tokens wait, {} may",
                                 counts_.queued_tokens, limits_.max_queued_tokens));
  }
  return std::nullopt;
}

Rejection Inbox::QueueFull(std::string message) const {
  return {.kind = Rejection::Kind::kQueueFull,
          .message = std::move(message),
          .retry_after_seconds = RetryAfter(NowSeconds())};
}

// The time in which half of the queue drains at the rate of late: by then a place is free unless
// others took it.
double Inbox::RetryAfter(double now) const {
  constexpr double kLeast = 1, kMost = 60;
  const double rate = starts_.PerSecond(now);
  if (rate <= 0) return kMost;
  return std::clamp(counts_.queued / 2.0 / rate, kLeast, kMost);
}

void Inbox::Cancel(const std::string& id) {
  {
    const std::lock_guard lock(mutex_);
    if (!ids_.contains(id)) return;
    mail_.cancels.push_back(id);
  }
  arrived_.notify_one();
}

void Inbox::CancelAll() {
  {
    const std::lock_guard lock(mutex_);
    mail_.cancels.insert(mail_.cancels.end(), ids_.begin(), ids_.end());
  }
  arrived_.notify_one();
}

void Inbox::SetPolicy(std::unique_ptr<LevelPolicy> policy) {
  {
    const std::lock_guard lock(mutex_);
    mail_.policy = std::move(policy);
  }
  arrived_.notify_one();
}

void Inbox::SetMaxLevel(int level) {
  {
    const std::lock_guard lock(mutex_);
    mail_.max_level = level;
  }
  arrived_.notify_one();
}

void Inbox::Drain() {
  const std::lock_guard lock(mutex_);
  counts_.draining = true;
}

void Inbox::Stop() {
  {
    const std::lock_guard lock(mutex_);
    mail_.stop = true;
  }
  arrived_.notify_one();
}

void Inbox::Take(Mail& mail, std::optional<std::chrono::duration<double>> wait) {
  mail = {};
  std::unique_lock lock(mutex_);
  if (wait.has_value() && mail_.empty()) {
    const auto has_mail = [this] { return !mail_.empty(); };
    constexpr double kLongest = 3600;  // more than the clock's range would overflow it
    if (wait->count() < kLongest)
      arrived_.wait_for(lock, *wait, has_mail);
    else
      arrived_.wait(lock, has_mail);
  }
  const bool stop = mail_.stop;
  std::swap(mail, mail_);
  mail_.stop = stop;  // for good
}

void Inbox::Release(const std::string& id) {
  const std::lock_guard lock(mutex_);
  ids_.erase(id);
}

void Inbox::Settle(int left, int64_t left_tokens, int ended) {
  if (left == 0 && ended == 0) return;
  const std::lock_guard lock(mutex_);
  counts_.queued -= left;
  counts_.queued_tokens -= left_tokens;
  counts_.accepted -= ended;
  DSLA_CHECK(counts_.queued >= 0 && counts_.queued_tokens >= 0 && counts_.accepted >= 0);
  if (left > 0) starts_.Add(NowSeconds(), left);
}

Inbox::Counts Inbox::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

}  // namespace dsla
