#include "engine/engine_inbox.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/clock.h"

namespace dsla {

ActiveRequest::ActiveRequest(Request r, std::shared_ptr<RequestSink> s, const Tokenizer& tokenizer,
                             int64_t V)
    : request(std::move(r)),
      sink(std::move(s)),
      sampler(request.sampling, V),
      text(tokenizer, request.stop, request.continues, request.shown_ids),
      submitted(NowSeconds()) {
  sampler.AddPrompt(request.prompt);
  if (request.prompt_logprobs) {
    prompt_logprobs.resize(request.prompt.size());
    prompt_logprobs[0].token = request.prompt[0];
    prompt_logprobs_known = 1;  // the first token has none
  }
}

std::optional<Rejection> Inbox::Put(std::vector<std::unique_ptr<ActiveRequest>> group) {
  DSLA_CHECK(!group.empty());
  int64_t tokens = 0;
  for (const auto& request : group) tokens += static_cast<int64_t>(request->request.prompt.size());
  {
    const std::lock_guard lock(mutex_);
    if (auto closed = Closed()) return closed;
    if (auto full = QueueFull(static_cast<int64_t>(group.size()), tokens)) return full;
    if (auto taken = TakeIds(group)) return taken;
    if (counts_.accepted == 0) counts_.busy_since = group.front()->submitted;
    const int count = static_cast<int>(group.size());
    counts_.accepted += count;
    counts_.queued += count;
    counts_.queued_tokens += tokens;
    std::move(group.begin(), group.end(), std::back_inserter(mail_.requests));
  }
  arrived_.notify_one();
  return std::nullopt;
}

std::optional<Rejection> Inbox::RefusesAll() const {
  const std::lock_guard lock(mutex_);
  if (auto closed = Closed()) return closed;
  return QueueFull(1, 1);
}

std::optional<Rejection> Inbox::Closed() const {
  if (!counts_.draining && !mail_.stop) return std::nullopt;
  return Rejection{.kind = Rejection::Kind::kUnavailable,
                   .message = "the server is shutting down and takes no new requests"};
}

std::optional<Rejection> Inbox::QueueFull(int64_t requests, int64_t tokens) const {
  // What is larger than a bound by itself is let into an empty queue, or it never could be.
  if (counts_.queued == 0) return std::nullopt;
  const bool too_many = counts_.queued + requests > limits_.max_queued;
  const bool too_long =
      limits_.max_queued_tokens > 0 && counts_.queued_tokens + tokens > limits_.max_queued_tokens;
  if (!too_many && !too_long) return std::nullopt;
  return Rejection{
      .kind = Rejection::Kind::kQueueFull,
      .message = too_many
                     ? fmt::format("the queue is full: {} requests wait and {} more come, {} may",
                                   counts_.queued, requests, limits_.max_queued)
                     : fmt::format("the queue is full: {} prompt tokens wait and {} more come, {} "
                                   "may",
                                   counts_.queued_tokens, tokens, limits_.max_queued_tokens),
      .retry_after_seconds = RetryAfter(NowSeconds())};
}

std::optional<Rejection> Inbox::TakeIds(std::span<const std::unique_ptr<ActiveRequest>> group) {
  for (size_t i = 0; i < group.size(); ++i) {
    const std::string& id = group[i]->request.id;
    if (ids_.insert(id).second) continue;
    for (size_t k = 0; k < i; ++k) ids_.erase(group[k]->request.id);
    return Rejection{.kind = Rejection::Kind::kInvalid,
                     .message = fmt::format("request id '{}' is in use by a running request", id),
                     .param = "request_id",
                     .index = i};
  }
  return std::nullopt;
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
