// Engine: continuous batching over one HybridModel. One worker thread owns the cache pool, the
// scheduler, the prefix cache and the policy and runs step after step; everything public is
// thread-safe and never waits for a step.
//
// Under pressure the engine first raises levels (the policy), then pre-empts and recomputes, then
// refuses at Submit. Every accepted request ends with exactly one OnFinish.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "adapt/policy.h"
#include "base/exec.h"
#include "base/status.h"
#include "engine/request.h"
#include "format/tokenizer/tokenizer.h"
#include "model/hybrid_model.h"

namespace dsla {

class QueueBound;  // engine/queue_bound.h

struct EngineOptions {
  int64_t memory_bytes = 0;       // cache budget: pages, slots and prefix-cache entries together
  int max_batch_tokens = 512;     // rows of one step; decodes first, the rest prefill
  int max_running = 256;          // sequences in the batch
  int max_queued = 1024;          // requests waiting
  int64_t max_queued_tokens = 0;  // prompt tokens waiting; 0 = no bound of its own
  // In place of these two, of several engines together: who submits has entered it before.
  std::shared_ptr<QueueBound> queue = nullptr;
  int max_preemptions = 4;  // of one request, after which it waits for room to its end
  bool prefix_cache = true;
  int snapshot_stride = 512;  // least tokens between state snapshots; a multiple of the page size
  // Replies do not depend on batch, chunking, pre-emption or prefix-cache hits, bit for bit.
  bool deterministic = false;
  int default_max_level = 0;  // highest level for Tier::kAuto
};

// What Engine::Create refuses, for who does long work before it. kInvalidArgument, naming the
// option.
Status CheckOptions(const EngineOptions& options, int max_level, int page_size);

// Why a request was not accepted.
struct Rejection {
  enum class Kind {
    kInvalid,           // a field is wrong: `param` names it
    kContextLength,     // prompt + max_tokens exceed the context
    kTooLargeForCache,  // can never fit the cache memory
    kQueueFull,         // see retry_after_seconds
    kUnavailable,       // draining
  };
  Kind kind = Kind::kInvalid;
  std::string message = {};  // one line with the figures
  std::string param = {};
  double retry_after_seconds = 0;  // from the measured drain rate
  size_t index = 0;                // of the request in its group
};

// A request and who gets its events.
struct Submission {
  Request request;
  std::shared_ptr<RequestSink> sink;
};

// One change of level, of the target or of a running sequence, newest last.
struct LevelEvent {
  int64_t sequence = 0;         // 1, 2, ...: without a gap
  double time = 0;              // NowSeconds()
  std::string request_id = {};  // empty: the target for new sequences
  int position = 0;             // tokens cached when a running sequence was raised
  int from = 0;
  int to = 0;
  double seconds = 0;  // spent folding
  std::string reason = {};
  int replica = -1;  // of several engines: whose
};

// What the engine looked like after its last step. A copy. An end is counted before its OnFinish.
struct EngineState {
  double now = 0;
  double last_progress = 0;  // NowSeconds() of the last step's plan or end, or of going idle
  bool idle = true;          // nothing to do, and every OnFinish has been called
  bool draining = false;
  std::string policy;
  int target_level = 0;
  int max_level = 0;                // of Tier::kAuto
  CostFactors cost_factors;         // measured steps and folds by what the policy's cost model said
  bool cost_doubtful = false;       // LevelPolicy's
  std::vector<int> rows_per_level;  // [L + 1] running sequences by level
  int running = 0;
  int max_running = 0;  // the most there may be: no more than the option, less for small steps
  int queued = 0;       // before their first step, and the pre-empted
  int64_t queued_tokens = 0;       // prompts of those before their first step
  double oldest_wait_seconds = 0;  // since the Submit of the oldest queued one, as of the last step
  int64_t budget_bytes = 0;
  int64_t page_bytes = 0;          // held by sequences
  int64_t state_bytes = 0;         // held by sequences
  int64_t prefix_cache_bytes = 0;  // held by the prefix cache alone
  // Since the start.
  int64_t steps = 0;
  int64_t prompt_tokens = 0;   // asked for
  int64_t cached_tokens = 0;   // of them, from the prefix cache
  int64_t prefill_tokens = 0;  // computed, recomputation included
  int64_t generated_tokens = 0;
  int64_t finished = 0;  // whatever the end
  int64_t preemptions = 0;
  int64_t raises = 0;  // of running sequences
  int64_t target_changes = 0;
  int64_t numerical_errors = 0;
  std::string device_error;  // what a GPU failed with: nothing works from then on; empty: it works
  double busy_seconds = 0;   // in steps
  double model_seconds = 0;  // of them, in Forward, folds and sampling
  double prefill_tokens_per_second = 0;  // over the last seconds
  double decode_tokens_per_second = 0;
  std::vector<LevelEvent> events;  // the last 64
  // Of several engines (engine/replicas.h) the figures above are of all together, and these each
  // one's; else none.
  std::vector<EngineState> replicas;
  std::string device;  // of each of these, where it runs
};

// A finished request's times, for histograms; called on the engine's thread before OnFinish, must
// not block.
using FinishObserver = std::function<void(const RequestResult&)>;

// A policy for an engine: of several, each has its own, and `replica` is its number; else it is 0.
using PolicyMaker = std::function<std::unique_ptr<LevelPolicy>(int replica)>;

class Engine {
 public:
  // The model and the tokenizer must outlive the engine. ctx.workspace becomes the worker's alone.
  static Expected<std::unique_ptr<Engine>> Create(const HybridModel* model,
                                                  const Tokenizer* tokenizer,
                                                  const ExecContext& ctx,
                                                  const EngineOptions& options,
                                                  std::unique_ptr<LevelPolicy> policy);
  virtual ~Engine() = default;  // cancels what is left and joins the worker

  // Takes all of the requests, of which there is at least one, or none and says why; takes no work
  // before every check has passed.
  virtual std::optional<Rejection> SubmitAll(std::vector<Submission> group) = 0;
  std::optional<Rejection> Submit(Request request, std::shared_ptr<RequestSink> sink) {
    std::vector<Submission> group;
    group.push_back({std::move(request), std::move(sink)});
    return SubmitAll(std::move(group));
  }

  // What SubmitAll would say of it by itself: a field that is wrong, or more than the cache holds.
  virtual std::optional<Rejection> Check(const Request& request) const = 0;

  // The largest max_tokens with which a prompt of so many tokens fits the context and, with nothing
  // else there, the cache at some level of the tier's bounds; 0: there is none. `level`: with
  // Tier::kExact.
  virtual int LongestReply(int64_t prompt_tokens, Tier tier, int level) const = 0;

  // Why Submit would refuse every request now: the queue is full, or the engine drains. Cheap, for
  // who would otherwise prepare a request in vain.
  virtual std::optional<Rejection> RefusesAll() const = 0;

  // Ends the request within one step; nothing if there is none of that id.
  virtual void Cancel(const std::string& id) = 0;
  virtual void CancelAll() = 0;  // likewise, whatever is accepted

  virtual EngineState state() const = 0;
  virtual bool device_failed() const = 0;  // EngineState::device_error says with what; cheap
  virtual void SetFinishObserver(FinishObserver observer) = 0;  // before the first Submit

  // From the next step on.
  virtual void SetPolicy(const PolicyMaker& make) = 0;
  virtual void SetMaxLevel(int level) = 0;  // of Tier::kAuto

  // Refuses new requests from now on; those accepted go on.
  virtual void Drain() = 0;
};

}  // namespace dsla
