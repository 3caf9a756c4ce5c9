// Scheduler: which rows the next step runs, out of which memory, and whom it costs. The pure host
// side of continuous batching: no clock, no threads, no torch; the engine's worker owns it, and
// fakes of CacheOps and of the model simulate it by the thousand steps. The contract in full is
// engine/README.md.
//
// One step:
//   for (raise : policy.Decide(snapshot)) scheduler.Raise(id, level);   // between steps only
//   plan = scheduler.Plan(now);          // reserves all memory that the rows need
//   run the model on plan.rows, sample a token where a row's logits are wanted
//   ended = scheduler.Commit(results);   // cannot fail
// Add, Cancel and the setters may be called at any time between Plan/Commit pairs; Cancel and Add
// also between Plan and Commit (Cancel then takes effect at the Commit).
//
// On a device that takes a step's tokens over from the one before, a step may follow before the
// results of the one in flight are known:
//   next = scheduler.PlanAhead(now);     // where it is not empty, begin it
//   ended = scheduler.Commit(results);   // of the first of the two; the other is then in flight
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "adapt/policy.h"
#include "base/status.h"
#include "cache/block_sizes.h"
#include "cache/ledger.h"
#include "cache/level_history.h"
#include "cache/prefix_cache.h"
#include "cache/sequence_cache.h"
#include "engine/request.h"

namespace dsla {

// What the scheduler needs done to cache memory, at once and in the order asked; the worker
// implements it over CachePool and HybridModel.
class CacheOps : public SlotCopier {
 public:
  // An empty sequence at `level` (HybridModel::NewSequence).
  virtual SequenceCache NewSequence(int level) = 0;
  // HybridModel::Raise: folds layer after layer. The scheduler has made room for it.
  virtual Status Raise(SequenceCache& cache, int level) = 0;
};

struct SchedulerOptions {
  int layers = 0;              // L
  int max_level = 0;           // of the model: 0 without an adapter
  int top_level = 0;           // Tier::kEconomy's (Adapter::top_level)
  int page_size = 64;          // tokens
  int max_batch_tokens = 512;  // rows of a step; at least twice the page size
  int max_running = 256;       // clamped so that decodes leave rows for one prefill chunk
  // Of one request. Afterwards it is admitted only with room for its longest reply.
  int max_preemptions = 4;
  bool prefix_cache = true;
  int snapshot_stride = 512;  // tokens, at least; a multiple of the page size
  bool deterministic = false;
  int deterministic_chunk =
      0;  // a multiple of the page size; 0 = max_batch_tokens / 2, at most 256
  // Prompt tokens that may be computed for younger requests that pass a waiting one.
  int max_overtaken_tokens = 8192;
  std::string adapter_id;  // identity of model and adapter, for the prefix cache
};

// What the scheduler must know of a request. Its fields were checked.
struct ScheduledRequest {
  std::vector<int32_t> prompt;  // at least one token
  int max_tokens = 0;
  Tier tier = Tier::kAuto;
  int level = 0;  // with Tier::kExact
  bool prompt_logprobs = false;
  int host_tokens = 0;  // so many first ones of its reply are chosen with the host's help
  std::string cache_salt;
  double arrival = 0;
  double deadline = 0;  // 0 = none
};

enum class Phase { kPrefill, kDecode };
enum class RowLogits { kNone, kLast, kAll };

// One sequence's rows in a step. Pointers and spans are valid until Commit.
struct PlannedRows {
  int64_t id = 0;
  Phase phase = Phase::kPrefill;    // kDecode: one row, the recurrent form; never told by shape
  SequenceCache* cache = nullptr;   // room for the tokens is reserved
  std::span<const int32_t> tokens;  // at positions cache->length(), ...
  RowLogits logits = RowLogits::kNone;
  // With kLast and kAll of a sequence's last known token the result carries the next token. kAll
  // without it: rows of the prompt whose log-probabilities are asked for.
  bool samples = false;
  // Planned ahead: the row of the step before whose result is this row's token. `tokens` then holds
  // one that is not to be read.
  int feed = -1;
};

// A request that is over: everything RequestResult wants to know from the scheduler.
struct EndedSequence {
  int64_t id = 0;
  Status status;  // kDeadlineExceeded, kResourceExhausted, kCancelled; ok where the caller ended it
  int prompt_tokens = 0;
  int cached_tokens = 0;
  int preemptions = 0;
  LevelHistory levels;
};

struct StepPlan {
  std::vector<PlannedRows> rows;  // decodes first, each group oldest first; empty: nothing to do
  std::vector<EndedSequence> ended;
  std::vector<int64_t> started;    // requests whose first step this is
  std::vector<int64_t> preempted;  // pre-empted to make room for it
  int prefill_rows = 0;            // recomputation included
  int decode_rows = 0;
};

// Of each of plan.rows, in their order.
struct RowResult {
  int32_t token = -1;   // the next token where rows.samples and the request goes on; it is run next
  bool finish = false;  // the request is over (stop, length, context, error)
  bool failed = false;  // with finish: what the step left in the caches is not to be trusted, so
                        // nothing of the sequence is entered in the prefix cache
};

// What the plan's rows do, by their caches as before the step; how long is for the caller to say.
StepTime StepTimeOf(const StepPlan& plan);

class Scheduler {
 public:
  // The ledger and ops must outlive the scheduler.
  Scheduler(Ledger* ledger, CacheOps* ops, const SchedulerOptions& options);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Whether prompt and reply fit the cache memory, with nothing else there, at some level of the
  // tier's bounds. kResourceExhausted with the figures. Pure arithmetic: safe from any thread.
  Status CanEverFit(int64_t prompt_tokens, int64_t max_tokens, Tier tier, int level) const;
  // The largest max_tokens up to `most` with which it does; 0: not even 1. Likewise.
  int64_t LongestReply(int64_t prompt_tokens, int64_t most, Tier tier, int level) const;

  // Queues it; ids rise with every call and tell age. Needs CanEverFit.
  int64_t Add(ScheduledRequest request);

  // Ends it: at once, or at the Commit if a step is in flight (which then returns it). Nothing if
  // there is none of that id.
  std::optional<EndedSequence> Cancel(int64_t id);

  // The next step. Requests that ended on the way are in plan.ended. Without rows there is nothing
  // to run, and nothing to commit, before Add.
  StepPlan Plan(double now);

  // The step after the one in flight, before that one's results are known: as Plan would have it,
  // but without those whose reply will have all its tokens. Who ends with the step in flight for
  // another reason has surplus rows in this one. Without rows the Commit comes first: where a
  // reply is recomputed, the host has a part in a token, somebody waits for a prefix that is in
  // flight, a deadline has passed, or the rows do not fit beside all others. Pre-empts nobody.
  StepPlan PlanAhead(double now);

  // The rows of the step in flight are in the caches. Returns the requests that finished or were
  // cancelled. Those of them that have surplus rows give their memory back with the next Commit,
  // which ignores the rows' results.
  std::vector<EndedSequence> Commit(std::span<const RowResult> results);
  bool in_step() const { return in_step_; }  // there is something to commit

  // Raises a running sequence by folding, after reclaiming what that takes. kResourceExhausted: no
  // room, or the sequence could never finish at that level; kInvalidArgument: not running, or the
  // level is not above its own or above its tier's bound. Recorded in its history, even where it
  // got only part of the way.
  Status Raise(int64_t id, int level);

  void set_target_level(int level) { target_level_ = level; }  // new sequences start at, in bounds
  // Prompt tokens of a step that also writes replies, so that these do not wait long; 0 = as many
  // as max_batch_tokens leaves. Never less than a page; not if deterministic.
  void set_prefill_limit(int tokens) { prefill_limit_ = tokens; }
  // Prompts of fewer tokens start at the lowest level of tier auto, whatever the target.
  void set_short_prompt(int tokens) { short_prompt_ = tokens; }
  void set_auto_max_level(int level) { auto_max_level_ = level; }  // Tier::kAuto's highest
  int target_level() const { return target_level_; }
  int auto_max_level() const { return auto_max_level_; }

  // Fills everything but `now` and the times.
  LoadSnapshot Snapshot() const;

  int running() const { return static_cast<int>(running_.size()); }
  int max_running() const { return options_.max_running; }  // as clamped
  int waiting() const { return static_cast<int>(waiting_.size()); }
  double oldest_arrival() const;                     // of the waiting ones; 0: there are none
  std::vector<const SequenceCache*> caches() const;  // of all that is in memory, for checks
  bool idle() const { return running_.empty() && waiting_.empty() && !in_step_; }
  int level(int64_t id) const;          // of a running sequence, 0 for any other
  int cached_tokens(int64_t id) const;  // likewise: see EndedSequence
  int64_t preemptions() const { return preemptions_; }
  std::vector<int> rows_per_level() const;  // [L + 1] running sequences

  PrefixCache* prefix_cache() { return prefix_cache_.get(); }  // null when off

  // Ends everything without a status; for shutdown, or after a call in which `ops` threw. Returns
  // what was cut off, and the requests that had ended in that call.
  std::vector<EndedSequence> Clear();

 private:
  struct Sequence;
  struct Grant;
  struct Bounds {
    int min = 0, max = 0;
  };
  struct RaiseBytes {
    int64_t peak = 0, end = 0;  // the most on the way, and what it has taken afterwards
  };
  using Sequences = std::map<int64_t, std::unique_ptr<Sequence>>;  // oldest first

  // scheduler.cc
  Bounds BoundsOf(Tier tier, int level) const;
  int64_t LeastBytes(int64_t prompt_tokens, int64_t max_tokens, Bounds bounds) const;
  int StartLevel(const Sequence& sequence) const;
  int PrefixLevel(const Sequence& sequence) const;
  static PrefixTokens Tokens(Sequence& sequence, int count);  // the first ones
  void RecordInPrefixCache(Sequence& sequence);
  void NoteLevel(Sequence& sequence);
  EndedSequence End(Sequence& sequence, Status status);
  Sequence* FindRunning(int64_t id) const;

  // scheduler_plan.cc
  StepPlan TakePlan();
  void Expire(double now);
  void NoteReading();
  void PlanDecodes();
  void PlanPrefills();
  void NoteReadyPrefixes();
  void AdmitReady(std::span<Sequence* const> order);
  bool GrantInOrder(std::span<Sequence* const> order, int rows, bool may_admit, bool in_turn,
                    int* left, std::vector<Grant>* grants);
  int PrefillUnit() const;
  bool MayPass(const Sequence& sequence, const Sequence& older) const;
  bool AwaitsTurn(const Sequence& sequence) const;
  bool MayOvertake(const Sequence& sequence) const;
  bool AwaitsPrefix(Sequence& sequence) const;
  bool Leads(const Sequence& leader, const Sequence& sequence, int shared) const;
  int PrefixFrom(Sequence& leader, Sequence& sequence) const;
  bool PlanRows(Sequence& sequence, int end);
  int ChunkEnd(const Sequence& sequence, int from, int rows) const;
  int WidestSnapshotDistance() const;
  int SnapshotAfter(int length) const;
  int SnapshotUpTo(int length) const;
  bool IsDecode(const Sequence& sequence) const;
  void FailOldest();

  // scheduler_ahead.cc
  void CountRowsInFlight();
  bool MayPlanAhead(double now) const;
  bool HostChooses(const Sequence& sequence) const;
  bool AwaitsRowsInFlight(Sequence& sequence) const;
  int64_t LeastBytesAhead(const Sequence& sequence) const;
  bool MayStartAhead(const Sequence& sequence, int level, const PrefixCache::Hit& hit) const;

  // scheduler_memory.cc
  bool TryAdmit(Sequence& sequence);
  bool Start(Sequence& sequence, int level, const PrefixCache::Hit& hit);
  PrefixCache::Hit LookUp(Sequence& sequence, int level);
  PrefixCache::Hit BestPrefix(Sequence& sequence, int* level);
  bool ReplayRaises(Sequence& sequence, bool may_preempt);
  bool MakeRoom(const Sequence& in_need, int64_t bytes, bool may_preempt);
  bool MakeRaiseRoom(const Sequence& in_need, int level, bool may_preempt);
  RaiseBytes BytesToRaise(const SequenceCache& cache, int level, bool count_retained) const;
  bool IsSettled(const Sequence& sequence) const;  // not to be pre-empted any more
  int64_t RestBytes(const Sequence& sequence) const;
  int64_t PromisedBytes() const;
  int64_t ReservedBytes(const Sequence& in_need) const;
  int64_t SnapshotBytes(const Sequence& sequence, int level) const;
  int64_t ObtainableBytes() const { return ledger_->free_bytes() + ledger_->idle_bytes(); }
  bool MayPreempt() const { return !in_step_; }
  Sequence* Victim(const Sequence& in_need) const;
  void Preempt(Sequence& victim);

  Ledger* ledger_;
  CacheOps* ops_;
  SchedulerOptions options_;
  BlockSizes sizes_;
  std::unique_ptr<PrefixCache> prefix_cache_;
  int64_t next_id_ = 1;
  int target_level_ = 0;
  int prefill_limit_ = 0;
  bool by_age_next_ = false;
  int short_prompt_ = 0;
  std::atomic<int> auto_max_level_ = 0;  // other threads read it
  int64_t preemptions_ = 0;
  Sequences running_;
  Sequences waiting_;
  std::vector<Sequence*> reading_;  // of running_, while rows are planned: see NoteReading
  StepPlan next_;                   // being planned
  StepPlan plan_;                   // of the step in flight
  StepPlan ahead_;                  // of the one behind it, if it is planned
  bool in_step_ = false;
  bool pause_due_ = false;  // a request can only be admitted when nothing is in flight
  // Ended, but for rows of theirs in the step in flight.
  std::vector<std::unique_ptr<Sequence>> surplus_;
};

}  // namespace dsla
