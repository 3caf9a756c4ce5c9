// Inbox: what submitters leave for the engine's worker. One short lock on either side: a submitter
// never waits for a step, the worker takes all mail at once between two. Also the bounds of the
// queue (QueueBound) and the ids in use, since they decide whether a request is accepted.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "adapt/policy.h"
#include "engine/engine.h"
#include "engine/queue_bound.h"
#include "engine/reply_mask.h"
#include "engine/request.h"
#include "engine/text_stream.h"

namespace dsla {

// A request from Submit to OnFinish. Made on the submitter's thread, the worker's from then on.
struct ActiveRequest {
  ActiveRequest(Request r, std::shared_ptr<RequestSink> s, const Tokenizer& tokenizer, int64_t V);

  Request request;
  std::shared_ptr<RequestSink> sink;
  Sampler sampler;
  TextStream text;
  std::vector<int32_t> end_ids;   // tokens that end the reply
  std::optional<ReplyMask> mask;  // of a reply that follows a grammar
  bool empty_reply = false;       // all that its grammar allows
  double submitted = 0;

  // The worker's notes.
  int64_t id = 0;  // the scheduler's; 0 before Add
  double started = 0, first_token = 0, last_token = 0;
  int generated = 0;
  std::vector<PromptLogprob> prompt_logprobs;
  size_t prompt_logprobs_known = 0;  // of its entries, from the first on
  std::optional<TokenOutput>
      unsent;            // the last token, while it has neither text nor reached `sink`
  RequestResult result;  // as far as it is known
};

struct InboxLimits {
  int max_queued = 1024;
  int64_t max_queued_tokens = 0;  // 0: no bound
  // Of several inboxes together, which whoever puts has entered before; null: one of its own.
  std::shared_ptr<QueueBound> shared = nullptr;
};

class Inbox {
 public:
  explicit Inbox(const InboxLimits& limits);

  // Submitters' side. Put takes all of a group, which is not empty, or none: it refuses when the
  // queue has no room for them, an id is in use, or after Drain. An empty queue takes any group.
  // None, too, where it throws std::bad_alloc.
  std::optional<Rejection> Put(std::vector<std::unique_ptr<ActiveRequest>> group);
  std::optional<Rejection> RefusesAll() const;  // what Put says of any request now
  void Cancel(const std::string& id);           // nothing if no accepted request has that id
  void CancelAll();
  void SetPolicy(std::unique_ptr<LevelPolicy> policy);
  void SetMaxLevel(int level);
  void Drain();
  void Stop();  // the worker's Take returns a mail with `stop`

  // The worker's side.
  struct Mail {
    std::vector<std::unique_ptr<ActiveRequest>> requests;
    std::vector<std::string> cancels;  // after `requests`
    std::unique_ptr<LevelPolicy> policy;
    std::optional<int> max_level;
    bool stop = false;

    bool empty() const {
      return requests.empty() && cancels.empty() && policy == nullptr && !max_level && !stop;
    }
  };
  // What has come since the last call. Without mail it returns at once, or, with `wait`, when some
  // comes or that time has passed (infinite: only then).
  void Take(Mail& mail, std::optional<std::chrono::duration<double>> wait);
  // The id is free again: to be called before the client learns of the end, for it may use the id
  // anew at once.
  void Release(const std::string& id);
  // Requests that were accepted and have left the queue for good (their first step, or their end
  // before it), with their prompts' tokens, and those that have ended, the client's call included.
  void Settle(int left, int64_t left_tokens, int ended);

  struct Counts {
    int queued = 0;  // accepted, before their first step
    int64_t queued_tokens = 0;
    int accepted = 0;       // and not ended
    double busy_since = 0;  // NowSeconds() when the first of them came
    bool draining = false;
  };
  Counts counts() const;

 private:
  // With the mutex held.
  std::optional<Rejection> Closed() const;
  std::optional<Rejection> InUse(std::span<const std::unique_ptr<ActiveRequest>> group) const;

  const bool enters_;  // the bound is its own
  const std::shared_ptr<QueueBound> queue_;
  mutable std::mutex mutex_;
  std::condition_variable arrived_;
  Mail mail_;
  std::unordered_set<std::string> ids_;  // accepted, not ended
  Counts counts_;
};

}  // namespace dsla
