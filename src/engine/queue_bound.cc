#include "engine/queue_bound.h"

#include <algorithm>

#include "base/check.h"
#include "base/clock.h"

namespace dsla {

std::optional<Rejection> QueueBound::Enter(int64_t requests, int64_t tokens) {
  const std::lock_guard lock(mutex_);
  if (auto full = Full(requests, tokens)) return full;
  queued_ += requests;
  queued_tokens_ += tokens;
  return std::nullopt;
}

std::optional<Rejection> QueueBound::RefusesAll() const {
  const std::lock_guard lock(mutex_);
  return Full(1, 1);
}

void QueueBound::Leave(int64_t requests, int64_t tokens) {
  const std::lock_guard lock(mutex_);
  Subtract(requests, tokens);
  if (requests > 0) starts_.Add(NowSeconds(), static_cast<double>(requests));
}

void QueueBound::Withdraw(int64_t requests, int64_t tokens) {
  const std::lock_guard lock(mutex_);
  Subtract(requests, tokens);
}

void QueueBound::Subtract(int64_t requests, int64_t tokens) {
  queued_ -= requests;
  queued_tokens_ -= tokens;
  DSLA_CHECK(queued_ >= 0 && queued_tokens_ >= 0);
}

std::optional<Rejection> QueueBound::Full(int64_t requests, int64_t tokens) const {
  // What is larger than a bound by itself is let into an empty queue, or it never could be.
  if (queued_ == 0) return std::nullopt;
  const bool too_many = queued_ + requests > max_queued_;
  const bool too_long = max_queued_tokens_ > 0 && queued_tokens_ + tokens > max_queued_tokens_;
  if (!too_many && !too_long) return std::nullopt;
  return Rejection{
      .kind = Rejection::Kind::kQueueFull,
      .message =
          too_many
              ? fmt::format("the queue is full: {} of at most {} requests wait, and {} more came",
                            queued_, max_queued_, requests)
              : fmt::format("the queue is full: {} of at most {} prompt tokens wait, and {} "
                            "more came",
                            queued_tokens_, max_queued_tokens_, tokens),
      .retry_after_seconds = RetryAfter(NowSeconds())};
}

// The time in which half of the queue drains at the rate of late: by then a place is free unless
// others took it.
double QueueBound::RetryAfter(double now) const {
  constexpr double kLeast = 1, kMost = 60;
  const double rate = starts_.PerSecond(now);
  if (rate <= 0) return kMost;
  return std::clamp(static_cast<double>(queued_) / 2.0 / rate, kLeast, kMost);
}

}  // namespace dsla
