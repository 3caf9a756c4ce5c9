#include "engine/replicas.h"

#include <algorithm>
#include <limits>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>

#include "base/check.h"

namespace dsla {
namespace {

constexpr size_t kEventsKept = 64;

constexpr int EngineState::*kCounts[] = {&EngineState::running, &EngineState::max_running,
                                         &EngineState::queued};
constexpr int64_t EngineState::*kTotals[] = {&EngineState::queued_tokens,
                                             &EngineState::budget_bytes,
                                             &EngineState::page_bytes,
                                             &EngineState::state_bytes,
                                             &EngineState::prefix_cache_bytes,
                                             &EngineState::steps,
                                             &EngineState::prompt_tokens,
                                             &EngineState::cached_tokens,
                                             &EngineState::prefill_tokens,
                                             &EngineState::generated_tokens,
                                             &EngineState::finished,
                                             &EngineState::preemptions,
                                             &EngineState::raises,
                                             &EngineState::target_changes,
                                             &EngineState::numerical_errors};
constexpr double EngineState::*kRates[] = {&EngineState::busy_seconds, &EngineState::model_seconds,
                                           &EngineState::prefill_tokens_per_second,
                                           &EngineState::decode_tokens_per_second};
constexpr double CostFactors::*kFactors[] = {&CostFactors::prefill, &CostFactors::decode,
                                             &CostFactors::fold};

class Replicas : public Engine {
 public:
  Replicas(std::vector<Replica> replicas, std::shared_ptr<QueueBound> queue,
           const RouterOptions& router)
      : block_tokens_(router.block_tokens),
        queue_(std::move(queue)),
        router_(router),
        replicas_(std::move(replicas)) {}

  std::optional<Rejection> SubmitAll(std::vector<Submission> group) override;
  std::optional<Rejection> Check(const Request& request) const override {
    return first().Check(request);
  }
  int LongestReply(int64_t prompt_tokens, Tier tier, int level) const override {
    return first().LongestReply(prompt_tokens, tier, level);
  }
  std::optional<Rejection> RefusesAll() const override {
    if (const std::vector<bool> may = Available(); std::count(may.begin(), may.end(), true) == 0)
      return first().RefusesAll();
    return queue_->RefusesAll();
  }

  void Cancel(const std::string& id) override;
  void CancelAll() override {
    for (const Replica& replica : replicas_) replica.engine->CancelAll();
  }

  EngineState state() const override;
  bool device_failed() const override {
    return std::all_of(replicas_.begin(), replicas_.end(),
                       [](const Replica& replica) { return replica.engine->device_failed(); });
  }
  void SetFinishObserver(FinishObserver observer) override;
  void SetPolicy(const PolicyMaker& make) override {
    for (size_t r = 0; r < replicas_.size(); ++r)
      replicas_[r].engine->SetPolicy([&](int) { return make(static_cast<int>(r)); });
  }
  void SetMaxLevel(int level) override {
    for (const Replica& replica : replicas_) replica.engine->SetMaxLevel(level);
  }
  void Drain() override {
    for (const Replica& replica : replicas_) replica.engine->Drain();
  }

 private:
  class PlacedSink;
  using SinkPtr = std::shared_ptr<PlacedSink>;

  const Engine& first() const { return *replicas_.front().engine; }
  std::vector<bool> Available() const;
  std::vector<RoutedPrompt> PromptsOf(const std::vector<Submission>& group) const;
  std::optional<Rejection> PlaceAll(const std::vector<SinkPtr>& sinks,
                                    const std::vector<RoutedPrompt>& prompts,
                                    const std::vector<bool>& may);
  std::optional<Rejection> Hand(std::vector<Submission> group, const std::vector<SinkPtr>& sinks);

  const int block_tokens_;
  const std::shared_ptr<QueueBound> queue_;
  std::mutex mutex_;  // of the next two; no engine is called with it held
  ReplicaRouter router_;
  std::unordered_map<std::string, int> placed_;  // accepted, not ended: at which replica
  const std::vector<Replica> replicas_;          // the last: their ends need the others
};

// A request's stay: it counts in the queue until an engine has taken it, which counts it from then
// on, and has its id and its place from PlaceAll to its end. What it still has at its destruction
// it gives back.
class Replicas::PlacedSink : public RequestSink {
 public:
  PlacedSink(Replicas* owner, const Request& request, std::shared_ptr<RequestSink> sink)
      : owner_(owner),
        id_(request.id),
        tokens_(static_cast<int64_t>(request.prompt.size())),
        sink_(std::move(sink)) {}
  ~PlacedSink() override {
    if (queued_) owner_->queue_->Withdraw(1, tokens_);
    Leave();
  }

  const std::string& id() const { return id_; }
  int replica() const { return place_->replica; }
  void Entered() { queued_ = true; }
  void Taken() { queued_ = false; }
  void Place(const ReplicaRouter::Place& place) { place_ = place; }
  void TellPlace() { sink_->OnPlaced(replica()); }

  void OnPromptLogprobs(std::vector<PromptLogprob> logprobs) override {
    sink_->OnPromptLogprobs(std::move(logprobs));
  }
  void OnToken(TokenOutput token) override {
    if (place_->computes > 0) {
      const std::lock_guard lock(owner_->mutex_);
      owner_->router_.Begin(*place_);
    }
    sink_->OnToken(std::move(token));
  }
  void OnFinish(const RequestResult& result) override {
    RequestResult placed = result;
    placed.replica = replica();
    Leave();  // the id is free before the client learns of the end
    sink_->OnFinish(placed);
  }
  void Refuse(const Status& why) {
    RequestResult result;
    result.id = id_;
    result.status = why;
    OnFinish(result);
  }

 private:
  void Leave() {
    if (!place_) return;
    const std::lock_guard lock(owner_->mutex_);
    owner_->router_.End(*place_);
    owner_->placed_.erase(id_);
    place_.reset();
  }

  Replicas* const owner_;
  const std::string id_;
  const int64_t tokens_;  // of the prompt
  const std::shared_ptr<RequestSink> sink_;
  bool queued_ = false;
  std::optional<ReplicaRouter::Place> place_;
};

// Those that work and take requests. Where none works, all that take some: they say what is wrong.
std::vector<bool> Replicas::Available() const {
  std::vector<bool> open(replicas_.size()), works(replicas_.size());
  bool any = false;
  for (size_t r = 0; r < replicas_.size(); ++r) {
    const Engine& engine = *replicas_[r].engine;
    open[r] = !engine.RefusesAll();  // the queue is bounded here
    works[r] = open[r] && !engine.device_failed();
    any = any || works[r];
  }
  return any ? works : open;
}

std::vector<RoutedPrompt> Replicas::PromptsOf(const std::vector<Submission>& group) const {
  std::vector<RoutedPrompt> prompts;
  for (size_t i = 0; i < group.size(); ++i) {
    const Request& request = group[i].request;
    const bool again = i > 0 && request.prompt == group[i - 1].request.prompt &&
                       request.cache_salt == group[i - 1].request.cache_salt;
    prompts.push_back({.blocks = again
                                     ? prompts.back().blocks
                                     : BlocksOf(request.prompt, request.cache_salt, block_tokens_),
                       .tokens = static_cast<int64_t>(request.prompt.size()),
                       .reads_prefixes = !request.prompt_logprobs});
  }
  return prompts;
}

std::optional<Rejection> Replicas::SubmitAll(std::vector<Submission> group) {
  DSLA_CHECK(!group.empty());
  int64_t tokens = 0;
  for (size_t i = 0; i < group.size(); ++i) {
    if (auto wrong = Check(group[i].request)) {
      wrong->index = i;
      return wrong;
    }
    tokens += static_cast<int64_t>(group[i].request.prompt.size());
  }
  const std::vector<bool> may = Available();
  if (std::count(may.begin(), may.end(), true) == 0) return first().RefusesAll();
  std::vector<SinkPtr> sinks;
  for (Submission& of : group)
    sinks.push_back(std::make_shared<PlacedSink>(this, of.request, std::move(of.sink)));
  if (auto full = queue_->Enter(static_cast<int64_t>(group.size()), tokens)) return full;
  for (const SinkPtr& sink : sinks) sink->Entered();
  if (auto taken = PlaceAll(sinks, PromptsOf(group), may)) return taken;
  return Hand(std::move(group), sinks);
}

std::optional<Rejection> Replicas::PlaceAll(const std::vector<SinkPtr>& sinks,
                                            const std::vector<RoutedPrompt>& prompts,
                                            const std::vector<bool>& may) {
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < sinks.size(); ++i) {
    const std::string& id = sinks[i]->id();
    if (placed_.contains(id)) {
      return Rejection{.kind = Rejection::Kind::kInvalid,
                       .message = fmt::format("request id '{}' is in use by a running request", id),
                       .param = "request_id",
                       .index = i};
    }
    sinks[i]->Place(router_.Take(prompts[i], may));
    placed_.emplace(id, sinks[i]->replica());
  }
  return std::nullopt;
}

// An engine refuses what has come this far only if it has begun to drain meanwhile, if memory is
// short, or if a grammar has no place for another reply. Then nobody is taken, or, where others of
// the group were, its part ends with that error.
std::optional<Rejection> Replicas::Hand(std::vector<Submission> group,
                                        const std::vector<SinkPtr>& sinks) {
  struct Part {
    std::vector<Submission> submissions;
    std::vector<SinkPtr> sinks;
    std::vector<size_t> indices;  // of them in the group
  };
  std::vector<Part> parts(replicas_.size());
  for (size_t i = 0; i < group.size(); ++i) {
    sinks[i]->TellPlace();
    Part& part = parts[static_cast<size_t>(sinks[i]->replica())];
    part.submissions.push_back({std::move(group[i].request), sinks[i]});
    part.sinks.push_back(sinks[i]);
    part.indices.push_back(i);
  }
  bool taken = false;
  std::optional<Rejection> refusal;
  std::vector<std::pair<SinkPtr, Status>> refused;
  for (size_t r = 0; r < parts.size(); ++r) {
    if (parts[r].submissions.empty()) continue;
    Status why;
    try {
      refusal = replicas_[r].engine->SubmitAll(std::move(parts[r].submissions));
      if (refusal) {
        why = Status(StatusCode::kUnavailable, refusal->message);
        refusal->index = parts[r].indices[refusal->index];
      }
    } catch (const std::bad_alloc&) {
      if (!taken) throw;
      why = ResourceExhausted("out of memory for a request");
    }
    taken = taken || why.ok();
    for (const SinkPtr& sink : parts[r].sinks) {
      if (why.ok()) {
        sink->Taken();
      } else {
        refused.emplace_back(sink, why);
      }
    }
  }
  if (!taken) return refusal;
  for (const auto& [sink, why] : refused) sink->Refuse(why);
  return std::nullopt;
}

void Replicas::Cancel(const std::string& id) {
  int replica = 0;
  {
    const std::lock_guard lock(mutex_);
    const auto found = placed_.find(id);
    if (found == placed_.end()) return;
    replica = found->second;
  }
  replicas_[static_cast<size_t>(replica)].engine->Cancel(id);
}

void Replicas::SetFinishObserver(FinishObserver observer) {
  for (size_t r = 0; r < replicas_.size(); ++r) {
    replicas_[r].engine->SetFinishObserver(
        [observer, replica = static_cast<int>(r)](const RequestResult& result) {
          RequestResult placed = result;
          placed.replica = replica;
          observer(placed);
        });
  }
}

EngineState Replicas::state() const {
  std::vector<EngineState> states;
  for (const Replica& replica : replicas_) {
    states.push_back(replica.engine->state());
    states.back().device = replica.device;
  }
  return Together(std::move(states));
}

}  // namespace

EngineState Together(std::vector<EngineState> replicas) {
  DSLA_CHECK(!replicas.empty());
  for (size_t r = 0; r < replicas.size(); ++r)
    for (LevelEvent& event : replicas[r].events) event.replica = static_cast<int>(r);
  const auto all = [&](const auto& of) {
    return std::all_of(replicas.begin(), replicas.end(), of);
  };
  EngineState together;
  const EngineState& first = replicas.front();
  together.policy = first.policy;
  together.max_level = first.max_level;
  together.idle = all([](const EngineState& s) { return s.idle; });
  together.draining = all([](const EngineState& s) { return s.draining; });
  if (all([](const EngineState& s) { return !s.device_error.empty(); }))
    together.device_error = first.device_error;
  together.rows_per_level.resize(first.rows_per_level.size());
  together.last_progress = std::numeric_limits<double>::infinity();
  for (double CostFactors::*const factor : kFactors) together.cost_factors.*factor = 0;
  for (const EngineState& s : replicas) {
    together.now = std::max(together.now, s.now);
    if (!s.idle || together.idle)
      together.last_progress = std::min(together.last_progress, s.last_progress);
    together.target_level = std::max(together.target_level, s.target_level);
    together.cost_doubtful = together.cost_doubtful || s.cost_doubtful;
    together.oldest_wait_seconds = std::max(together.oldest_wait_seconds, s.oldest_wait_seconds);
    for (int EngineState::*const member : kCounts) together.*member += s.*member;
    for (int64_t EngineState::*const member : kTotals) together.*member += s.*member;
    for (double EngineState::*const member : kRates) together.*member += s.*member;
    for (double CostFactors::*const factor : kFactors)
      together.cost_factors.*factor +=
          s.cost_factors.*factor / static_cast<double>(replicas.size());
    for (size_t level = 0; level < s.rows_per_level.size(); ++level)
      together.rows_per_level[level] += s.rows_per_level[level];
    together.events.insert(together.events.end(), s.events.begin(), s.events.end());
  }
  std::stable_sort(together.events.begin(), together.events.end(),
                   [](const LevelEvent& a, const LevelEvent& b) { return a.time < b.time; });
  if (together.events.size() > kEventsKept)
    together.events.erase(together.events.begin(), together.events.end() - kEventsKept);
  together.replicas = std::move(replicas);
  return together;
}

std::unique_ptr<Engine> JoinReplicas(std::vector<Replica> replicas,
                                     std::shared_ptr<QueueBound> queue, RouterOptions router) {
  DSLA_CHECK(replicas.size() >= 2 && queue != nullptr);
  router.replicas = static_cast<int>(replicas.size());
  return std::make_unique<Replicas>(std::move(replicas), std::move(queue), router);
}

}  // namespace dsla
