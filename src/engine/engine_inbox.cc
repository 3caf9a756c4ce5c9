#include "engine/engine_inbox.h"

#include <algorithm>
#include <iterator>
#include <string_view>
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

Inbox::Inbox(const InboxLimits& limits)
    : enters_(limits.shared == nullptr),
      queue_(enters_ ? std::make_shared<QueueBound>(limits.max_queued, limits.max_queued_tokens)
                     : limits.shared) {}

std::optional<Rejection> Inbox::Put(std::vector<std::unique_ptr<ActiveRequest>> group) {
  DSLA_CHECK(!group.empty());
  int64_t tokens = 0;
  std::unordered_set<std::string> ids;
  for (const auto& request : group) {
    tokens += static_cast<int64_t>(request->request.prompt.size());
    ids.insert(request->request.id);
  }
  {
    const std::lock_guard lock(mutex_);
    if (auto closed = Closed()) return closed;
    if (auto taken = InUse(group)) return taken;
    const size_t mail = mail_.requests.size() + group.size();
    if (mail > mail_.requests.capacity()) mail_.requests.reserve(2 * mail);
    ids_.reserve(ids_.size() + group.size());
    const int count = static_cast<int>(group.size());
    if (enters_) {
      if (auto full = queue_->Enter(count, tokens)) return full;
    }
    // From here on nothing needs memory: whoever is counted is in the mail.
    ids_.merge(ids);
    if (counts_.accepted == 0) counts_.busy_since = group.front()->submitted;
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
  return enters_ ? queue_->RefusesAll() : std::nullopt;
}

std::optional<Rejection> Inbox::Closed() const {
  if (!counts_.draining && !mail_.stop) return std::nullopt;
  return Rejection{.kind = Rejection::Kind::kUnavailable,
                   .message = "the server is shutting down and takes no new requests"};
}

std::optional<Rejection> Inbox::InUse(std::span<const std::unique_ptr<ActiveRequest>> group) const {
  std::unordered_set<std::string_view> before;  // in the group
  for (size_t i = 0; i < group.size(); ++i) {
    const std::string& id = group[i]->request.id;
    if (!ids_.contains(id) && before.insert(id).second) continue;
    return Rejection{.kind = Rejection::Kind::kInvalid,
                     .message = fmt::format("request id '{}' is in use by a running request", id),
                     .param = "request_id",
                     .index = i};
  }
  return std::nullopt;
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
  std::erase(mail_.cancels, id);  // not for whoever uses it next
}

void Inbox::Settle(int left, int64_t left_tokens, int ended) {
  if (left == 0 && ended == 0) return;
  const std::lock_guard lock(mutex_);
  counts_.queued -= left;
  counts_.queued_tokens -= left_tokens;
  counts_.accepted -= ended;
  DSLA_CHECK(counts_.queued >= 0 && counts_.queued_tokens >= 0 && counts_.accepted >= 0);
  queue_->Leave(left, left_tokens);
}

Inbox::Counts Inbox::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

}  // namespace dsla
