// Worker: the engine's thread. It owns the cache pool, the scheduler, the prefix cache and the
// policy, and runs step after step: mail, policy, plan, forward, sampling, text, sinks, commit.
// Internal to the engine (engine.h is the public face).
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "adapt/policy.h"
#include "base/exec.h"
#include "cache/cache_pool.h"
#include "engine/engine.h"
#include "engine/engine_inbox.h"
#include "engine/engine_stats.h"
#include "engine/request.h"
#include "engine/scheduler.h"
#include "model/hybrid_model.h"

namespace dsla {

// What the status of a request whose logits are not numbers begins with.
inline constexpr char kNumericalError[] = "numerical_error";

// Called before each Forward, for tests that let it fail: what it throws is as if the model had.
using FaultInjector = std::function<void(int64_t step)>;

class Worker : private CacheOps {
 public:
  // The model and the inbox must outlive the worker; ctx.workspace is the worker's alone.
  static Expected<std::unique_ptr<Worker>> Create(const HybridModel* model, const ExecContext& ctx,
                                                  const EngineOptions& options,
                                                  std::unique_ptr<LevelPolicy> policy, Inbox* inbox,
                                                  FaultInjector fault_injector);

  void Run();  // until the inbox says stop; then ends what is left

  // From any thread.
  EngineState state() const;
  Status CanEverFit(const Request& request) const;

  void SetFinishObserver(FinishObserver observer);  // before the first request

 private:
  // What sampling left of one row of the plan.
  struct Outcome {
    Status status;
    Sampler::Choice choice;
    std::vector<TokenLogprob> top;
  };

  Worker(const HybridModel* model, const ExecContext& ctx, const EngineOptions& options,
         std::unique_ptr<LevelPolicy> policy, Inbox* inbox, FaultInjector fault_injector,
         CachePool pool);

  // CacheOps
  SequenceCache NewSequence(int level) override;
  Status Raise(SequenceCache& cache, int level) override;
  void CopySlot(int32_t from, int32_t to) override;

  // worker.cc
  void ReadMail(Inbox::Mail& mail);
  void Admit(std::unique_ptr<ActiveRequest> active);
  void Decide();
  void NoteEvent(LevelEvent event);
  Status NoteDeviceFailure(const std::string& what);  // as requests get it
  void Step();
  bool RunModel(const StepPlan& plan);      // false: it failed, as the outcomes say
  void DescribeStep(const StepPlan& plan);  // into step_time_, while the caches are as before it
  void Finish(const EndedSequence& ended);
  void Deliver(ActiveRequest& active);
  void EndAll();
  void SettleQueue();
  void Publish(double begin, double model_seconds, const StepPlan& plan, int generated);

  // worker_rows.cc
  void VisitLogits(const StepPlan& plan, std::span<const LogitsRow> rows, float* logits,
                   const TokenChoice* choices);
  // What a device needs in order to choose the token of `rows`, if their request needs no more of
  // the logits than it tells. Sampler::counts_output says whether that depends on the last token.
  static void LetDeviceChoose(const ActiveRequest& active, const PlannedRows& planned,
                              SequenceRows& rows);
  static std::span<const int32_t> RuledOut(const ActiveRequest& active);
  Status ReadPromptLogits(ActiveRequest& active, int position, std::span<const float> logits) const;
  Status Sample(const ActiveRequest& active, int position, std::span<float> logits,
                Outcome& outcome) const;
  int EmitRows(const StepPlan& plan, double now);  // returns the number of new tokens
  void EmitRow(const PlannedRows& rows, ActiveRequest& active, Outcome& outcome, RowResult& result,
               double now);
  void EmitPromptLogprobs(ActiveRequest& active);
  bool EmitToken(ActiveRequest& active, Outcome& outcome, int level, double now);
  void HandOn(ActiveRequest& active);
  void HandOnAll();

  const HybridModel* model_;
  const ExecContext ctx_;
  const EngineOptions options_;
  const FaultInjector fault_injector_;
  Inbox* inbox_;
  FinishObserver observer_;

  CachePool pool_;
  // Before the scheduler, whose sequences free their blocks at the end.
  std::unordered_map<int64_t, std::unique_ptr<ActiveRequest>> active_;  // by the scheduler's id
  std::unordered_map<std::string, int64_t> ids_;                        // by the request's
  Scheduler scheduler_;
  std::unique_ptr<LevelPolicy> policy_;
  double next_decision_ = 0;

  // Of the step in progress, kept for their memory.
  std::vector<ActiveRequest*> row_requests_;  // of each of plan.rows
  std::vector<SequenceRows> batch_;
  std::vector<Outcome> outcomes_;
  std::mutex failure_mutex_;  // of their statuses, while rows are sampled side by side
  std::vector<RowResult> results_;
  std::vector<ActiveRequest*> unsent_;  // whose last token waits for the next step to be under way
  double fold_seconds_ = 0;
  StepTime step_time_;  // for the policy
  SlidingQuantile ttft_, tpot_;

  // For the next SettleQueue.
  int left_queue_ = 0;
  int64_t left_queue_tokens_ = 0;
  int unstarted_ = 0;  // of the scheduler's waiting ones; the others were pre-empted
  int ended_ = 0;

  mutable std::mutex state_mutex_;  // what is below
  EngineState state_;
  double oldest_arrival_ = 0;  // of what is waiting; 0: nothing
  RateMeter prefill_rate_, decode_rate_;
};

// Engine::Create with faults.
Expected<std::unique_ptr<Engine>> CreateEngine(const HybridModel* model, const Tokenizer* tokenizer,
                                               const ExecContext& ctx, const EngineOptions& options,
                                               std::unique_ptr<LevelPolicy> policy,
                                               FaultInjector fault_injector);

}  // namespace dsla
