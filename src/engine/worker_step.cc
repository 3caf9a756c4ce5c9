// A step from its plan to its commit, and the one that is begun behind it.
#include <algorithm>
#include <exception>
#include <new>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "engine/worker.h"

namespace dsla {
// Each call commits one step. What changes more than the next rows, such as a raise or a new
// prompt, waits until nothing is in flight.
void Worker::Step() {
  const double begin = NowSeconds();
  fold_seconds_ = model_seconds_ = 0;
  Decide();
  if (!scheduler_.in_step()) PlanStep();
  LaunchAhead();
  HandOnAll();  // while the device is busy
  int generated = 0;
  if (scheduler_.in_step()) {
    Await(current_);
    generated = EmitRows(current_, NowSeconds());
    for (const EndedSequence& ended : scheduler_.Commit(results_)) Finish(ended);
    current_.time.seconds = NowSeconds() - begin - fold_seconds_;
    if (current_.failed.ok()) policy_->ObserveStep(current_.time);
  }
  CountStep(begin, current_.plan, generated);
  TellEnds();
  std::swap(current_, ahead_);
  ahead_.plan = {};
}

void Worker::PlanStep() {
  RaiseSequences();
  current_.plan = scheduler_.Plan(NowSeconds());
  for (const EndedSequence& ended : current_.plan.ended) Finish(ended);
  if (!ended_.empty()) TellEnds();
  NoteStarted(current_.plan);
  if (!current_.plan.rows.empty()) Launch(current_);
}

void Worker::NoteStarted(const StepPlan& plan) {
  for (const int64_t id : plan.started) {
    ActiveRequest& active = *active_.at(id);
    active.started = NowSeconds();
    --unstarted_;
    ++left_queue_;
    left_queue_tokens_ += static_cast<int64_t>(active.request.prompt.size());
  }
  Publish();
}

// The device goes on with the next step when it has done this one; the host reads this one's tokens
// meanwhile. Who ends by them has had rows for nothing. Steps with prompts may be long: the one
// behind is planned as late as that takes, so that new requests still come into it.
void Worker::LaunchAhead() {
  if (!current_.begun || !due_.raises.empty()) return;
  if (current_.plan.prefill_rows > 0) {
    HandOnAll();
    const auto wait = [&] { model_->AwaitNearlyDone(lead_seconds_); };
    if (!Try(current_.plan, wait).ok() || !TakeMail(std::nullopt)) return;
  }
  const double begin = NowSeconds();
  ahead_.plan = scheduler_.PlanAhead(begin);
  NoteStarted(ahead_.plan);
  if (ahead_.plan.rows.empty()) return;
  Launch(ahead_);
  if (ahead_.plan.prefill_rows == 0) return;
  const double seconds = NowSeconds() - begin;
  lead_seconds_ = std::max(seconds, 0.5 * (lead_seconds_ + seconds));
}

// Steps in which the device chooses all tokens from the logits as they are are begun. Those with
// rows whose penalties count the token before, with biases, other tokens' probabilities or those of
// prompts, are run to their end.
void Worker::Launch(Flight& step) {
  const StepPlan& plan = step.plan;
  step.time = StepTimeOf(plan);
  step.outcomes.assign(plan.rows.size(), {});
  step.begun = false;
  step.batch.clear();
  ResolveRequests(plan);
  bool chosen = begins_steps_;
  for (size_t i = 0; i < plan.rows.size(); ++i) {
    const PlannedRows& rows = plan.rows[i];
    const int logits = rows.logits == RowLogits::kNone   ? 0
                       : rows.logits == RowLogits::kLast ? 1
                                                         : static_cast<int>(rows.tokens.size());
    step.batch.push_back(
        {.cache = rows.cache, .tokens = rows.tokens, .logits_rows = logits, .feed = rows.feed});
    SequenceRows& row = step.batch.back();
    const ActiveRequest& active = *row_requests_[i];
    LetDeviceChoose(active, rows, row);
    chosen &= rows.logits == RowLogits::kNone ||
              (rows.logits == RowLogits::kLast && active.generated >= HostTokens(active));
  }
  DSLA_CHECK(chosen || &step == &current_);
  const int64_t number = launched_++;
  step.failed = Try(plan, [&] {
    if (fault_injector_) fault_injector_(number);
    BackBlocks(step.batch);
    if (chosen) return model_->Begin(ctx_, pool_, step.batch);
    model_->Forward(
        ctx_, pool_, step.batch, options_.deterministic ? Products::kInvariant : Products::kFastest,
        [&](std::span<const LogitsRow> rows, float* logits, const TokenChoice* choices) {
          VisitLogits(step, rows, logits, choices);
        },
        [&] { HandOnAll(); });
  });
  step.begun = chosen && step.failed.ok();
}

// A device's memory comes in units, which blocks of either kind may keep, so there may be none left
// where the ledger has room. Then entries of the prefix cache go until there is.
void Worker::BackBlocks(std::span<const SequenceRows> batch) {
  const Ledger& ledger = pool_.ledger();
  for (int64_t more = ledger.config().budget_bytes / 64 + 1;; more *= 2) {
    try {
      return model_->Back(pool_, batch);
    } catch (const std::bad_alloc&) {
      PrefixCache* const cache = scheduler_.prefix_cache();
      if (cache == nullptr || cache->entries() == 0) throw;
      if (!cache->Reclaim(ledger.free_bytes() + more)) cache->Clear();
    }
  }
}

// Its outcomes are known.
void Worker::Await(Flight& step) {
  if (std::exchange(step.begun, false)) {
    choices_.assign(step.plan.rows.size(), {});
    step.failed = Try(step.plan, [&] { model_->End(choices_); });
    for (size_t i = 0; i < choices_.size() && step.failed.ok(); ++i)
      SetChoice(choices_[i], step.outcomes[i]);
  }
  if (step.failed.ok()) return;
  for (Outcome& outcome : step.outcomes) outcome.status = step.failed;
}

void Worker::Abandon() {
  for (Flight* step : {&current_, &ahead_}) {
    if (step->begun) Await(*step);
    *step = {};
  }
}

// What the model throws, as the status that requests get.
Status Worker::Try(const StepPlan& plan, const std::function<void()>& work) {
  const double begin = NowSeconds();
  Status status;
  try {
    work();
  } catch (const std::bad_alloc&) {
    status = ResourceExhausted("out of memory in a step of {} tokens",
                               plan.prefill_rows + plan.decode_rows);
  } catch (const DeviceError& error) {
    status = NoteDeviceFailure(error.what());
  } catch (const std::exception& error) {
    std::string what = error.what();
    what.resize(std::min(what.find('\n'), what.size()));  // the rest is a stack trace
    status = Error(StatusCode::kInternal, "a step failed: {}", what);
  }
  model_seconds_ += NowSeconds() - begin;
  return status;
}

void Worker::ResolveRequests(const StepPlan& plan) {
  row_requests_.clear();
  for (const PlannedRows& rows : plan.rows) {
    const auto found = active_.find(rows.id);
    row_requests_.push_back(found == active_.end() ? nullptr : found->second.get());
  }
}

}  // namespace dsla
