// QueueBound: the bounds of the requests that wait, and how many do: of one engine, or of several
// together. Thread-safe.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>

#include "engine/engine.h"
#include "engine/engine_stats.h"

namespace dsla {

class QueueBound {
 public:
  QueueBound(int max_queued, int64_t max_queued_tokens)  // tokens: 0 = no bound
      : max_queued_(max_queued),
        max_queued_tokens_(max_queued_tokens),
        starts_(kDrainWindowSeconds) {}

  // Lets all of them in, or says why none. An empty queue takes any number.
  std::optional<Rejection> Enter(int64_t requests, int64_t tokens);
  std::optional<Rejection> RefusesAll() const;      // what Enter says of any request now
  void Leave(int64_t requests, int64_t tokens);     // their turn came, or their end
  void Withdraw(int64_t requests, int64_t tokens);  // let in, and then refused for another reason

 private:
  static constexpr double kDrainWindowSeconds = 30;
  // With the mutex held.
  std::optional<Rejection> Full(int64_t requests, int64_t tokens) const;
  double RetryAfter(double now) const;
  void Subtract(int64_t requests, int64_t tokens);

  const int max_queued_;
  const int64_t max_queued_tokens_;
  mutable std::mutex mutex_;
  int64_t queued_ = 0, queued_tokens_ = 0;
  RateMeter starts_;  // requests that left the queue
};

}  // namespace dsla
