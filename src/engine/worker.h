// Worker: the engine's thread. It owns the cache pool, the scheduler, the prefix cache and the
// policy, and runs step after step: mail, policy, plan, forward, sampling, text, sinks, commit. On
// a device that chooses a step's tokens, the next step is planned and begun before they are read.
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
  bool device_failed() const;
  Status CanEverFit(const Request& request) const;
  int64_t LongestReply(int64_t prompt_tokens, int64_t most, Tier tier, int level) const {
    return scheduler_.LongestReply(prompt_tokens, most, tier, level);
  }

  void SetFinishObserver(FinishObserver observer);  // before the first request

 private:
  // What sampling left of one row of the plan.
  struct Outcome {
    Status status;
    Sampler::Choice choice;
    std::vector<TokenLogprob> top;
  };

  // A step from its plan to its commit.
  struct Flight {
    StepPlan plan;
    std::vector<SequenceRows> batch;
    std::vector<Outcome> outcomes;  // of each of plan.rows
    Status failed;                  // all of it
    bool begun = false;             // on the device, which has the choices
    StepTime time;                  // for the policy
  };

  Worker(const HybridModel* model, const ExecContext& ctx, const EngineOptions& options,
         std::unique_ptr<LevelPolicy> policy, Inbox* inbox, FaultInjector fault_injector,
         CachePool pool);

  // CacheOps
  SequenceCache NewSequence(int level) override;
  Status Raise(SequenceCache& cache, int level) override;
  Status CopySlots(std::span<const int32_t> from, std::span<const int32_t> to) override;

  // worker.cc
  bool TakeMail(std::optional<std::chrono::duration<double>> wait);
  void ReadMail();
  void Admit(std::unique_ptr<ActiveRequest> active);
  void Decide();
  void RaiseSequences();  // as decided; nothing is in flight
  void SetTarget(int level, double now, const std::string& reason);
  void NoteEvent(LevelEvent event);
  Status NoteDeviceFailure(const std::string& what);  // as requests get it
  void Finish(const EndedSequence& ended);
  void End(std::unique_ptr<ActiveRequest> active);
  void TellEnds();
  void EndAll(const Status& why);
  void Publish(std::span<const std::unique_ptr<ActiveRequest>> ended = {});
  void CountStep(double begin, const StepPlan& plan, int generated);

  // worker_step.cc
  void Step();
  void PlanStep();
  void NoteStarted(const StepPlan& plan);
  void Launch(Flight& step);  // runs it, or begins it
  void BackBlocks(std::span<const SequenceRows> batch);
  void LaunchAhead();
  void Await(Flight& step);
  void Abandon();  // what is in flight: waits for it
  Status Try(const StepPlan& plan, const std::function<void()>& work);
  void ResolveRequests(const StepPlan& plan);

  // worker_rows.cc
  void VisitLogits(Flight& step, std::span<const LogitsRow> rows, float* logits,
                   const TokenChoice* choices);
  static void SetChoice(const TokenChoice& choice, Outcome& outcome);
  static int HostTokens(const ActiveRequest& active);
  // What a device needs in order to choose the token of `rows`, if their request needs no more of
  // the logits than it tells.
  static void LetDeviceChoose(const ActiveRequest& active, const PlannedRows& planned,
                              SequenceRows& rows);
  static std::span<const int32_t> RuledOut(const ActiveRequest& active);
  Status ReadPromptLogits(ActiveRequest& active, int position, std::span<const float> logits) const;
  Status Sample(const ActiveRequest& active, int position, std::span<float> logits,
                Outcome& outcome) const;
  int EmitRows(Flight& step, double now);  // returns the number of new tokens
  void AdvanceMasks(const Flight& step);
  static bool EndsReply(const ActiveRequest& active, int32_t token);
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
  Inbox::Mail mail_;

  CachePool pool_;
  // Before the scheduler, whose sequences free their blocks at the end.
  std::unordered_map<int64_t, std::unique_ptr<ActiveRequest>> active_;  // by the scheduler's id
  std::unordered_map<std::string, int64_t> ids_;                        // by the request's
  Scheduler scheduler_;
  const bool begins_steps_;  // the device can have all choices of a step
  std::unique_ptr<LevelPolicy> policy_;
  double next_decision_ = 0;
  LevelDecision due_;         // its raises wait until nothing is in flight
  std::string admin_change_;  // the reason of the next decision; empty: nobody has changed anything

  Flight current_, ahead_;  // the step to be committed next, and the one behind it
  int64_t launched_ = 0;
  double lead_seconds_ = 0;  // that late steps with prompts took to be planned and begun
  // Of the step that is looked at, kept for their memory.
  std::vector<ActiveRequest*> row_requests_;  // of each of plan.rows; null: it has ended
  std::mutex failure_mutex_;  // of outcomes' statuses, while rows are sampled side by side
  std::vector<RowResult> results_;
  std::vector<TokenChoice> choices_;
  std::vector<ActiveRequest*> unsent_;  // whose last token waits for the next step to be under way
  double fold_seconds_ = 0, model_seconds_ = 0;  // of this Step

  std::vector<std::unique_ptr<ActiveRequest>> ended_;  // whose clients are not told yet
  // For the next Publish.
  int left_queue_ = 0;
  int64_t left_queue_tokens_ = 0;
  int unstarted_ = 0;  // of the scheduler's waiting ones; the others were pre-empted

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
