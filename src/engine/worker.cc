#include "engine/worker.h"

#include <algorithm>
#include <ctime>
#include <exception>
#include <limits>
#include <new>
#include <utility>

#include "base/clock.h"
#include "engine/engine_checks.h"

namespace dsla {
namespace {

// What the metrics see as "now".
constexpr double kRateWindowSeconds = 5;
// The policy may take this share of the thread's time.
constexpr double kDecisionShare = 0.02;
// An idle engine above level 0 looks at its policy so often, for the level to come down in calm.
constexpr double kIdleDecisionSeconds = 0.25;
constexpr size_t kEventsKept = 64;

// What this thread has computed, without the time in which others had its processor.
double ThreadSeconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

SchedulerOptions SchedulerOptionsOf(const HybridModel& model, const EngineOptions& options) {
  const AdapterInfo* adapter = model.adapter();
  return {.layers = model.config().L,
          .max_level = model.max_level(),
          .top_level = adapter == nullptr ? 0 : adapter->top_level,
          .page_size = model.options().page_size,
          .max_batch_tokens = options.max_batch_tokens,
          .max_running = options.max_running,
          .max_preemptions = options.max_preemptions,
          .prefix_cache = options.prefix_cache,
          .snapshot_stride = options.snapshot_stride,
          .deterministic = options.deterministic,
          .deterministic_chunk = DeterministicChunk(model.options().page_size),
          .adapter_id = adapter == nullptr ? std::string() : adapter->id};
}

}  // namespace

Expected<std::unique_ptr<Worker>> Worker::Create(const HybridModel* model, const ExecContext& ctx,
                                                 const EngineOptions& options,
                                                 std::unique_ptr<LevelPolicy> policy, Inbox* inbox,
                                                 FaultInjector fault_injector) {
  DSLA_CHECK(policy != nullptr && inbox != nullptr && ctx.workspace != nullptr);
  DSLA_RETURN_IF_ERROR(CheckOptions(options, model->max_level(), model->options().page_size));
  DSLA_ASSIGN_OR_RETURN(CachePool pool, CachePool::Create(model->cache_geometry(),
                                                          options.memory_bytes, model->memory()));
  return std::unique_ptr<Worker>(new Worker(model, ctx, options, std::move(policy), inbox,
                                            std::move(fault_injector), std::move(pool)));
}

Worker::Worker(const HybridModel* model, const ExecContext& ctx, const EngineOptions& options,
               std::unique_ptr<LevelPolicy> policy, Inbox* inbox, FaultInjector fault_injector,
               CachePool pool)
    : model_(model),
      ctx_(ctx),
      options_(options),
      fault_injector_(std::move(fault_injector)),
      inbox_(inbox),
      pool_(std::move(pool)),
      scheduler_(&pool_.ledger(), this, SchedulerOptionsOf(*model, options)),
      begins_steps_(scheduler_.max_running() <= model->most_choices()),
      policy_(std::move(policy)),
      prefill_rate_(kRateWindowSeconds),
      decode_rate_(kRateWindowSeconds) {
  scheduler_.set_auto_max_level(options.default_max_level);
  state_.last_progress = NowSeconds();
  state_.policy = policy_->name();
  state_.max_level = options.default_max_level;
  state_.rows_per_level = scheduler_.rows_per_level();
  state_.max_running = scheduler_.max_running();
  state_.budget_bytes = options.memory_bytes;
}

void Worker::SetFinishObserver(FinishObserver observer) { observer_ = std::move(observer); }

Status Worker::CanEverFit(const Request& request) const {
  return scheduler_.CanEverFit(static_cast<int64_t>(request.prompt.size()), request.max_tokens,
                               request.tier, request.level);
}

SequenceCache Worker::NewSequence(int level) { return model_->NewSequence(pool_, level); }

Status Worker::Raise(SequenceCache& cache, int level) {
  const double begin = NowSeconds();
  const int from = cache.level();
  Status status;
  try {
    status = model_->Raise(ctx_, pool_, cache, level);
  } catch (const std::bad_alloc&) {
    cache.AbortRaise();
    status = ResourceExhausted("out of memory while folding {} tokens", cache.length());
  } catch (const DeviceError& error) {
    cache.AbortRaise();
    status = NoteDeviceFailure(error.what());
  }
  const double seconds = NowSeconds() - begin;
  fold_seconds_ += seconds;
  if (status.ok())
    policy_->ObserveFold({.from = from, .to = level, .length = cache.length(), .seconds = seconds});
  return status;
}

Status Worker::CopySlots(std::span<const int32_t> from, std::span<const int32_t> to) {
  try {
    pool_.CopyBlocks(BlockKind::kSlot, from, to);
  } catch (const std::bad_alloc&) {
    return ResourceExhausted("out of memory for a copy of states");
  }
  return Status::Ok();
}

void Worker::Run() {
  while (!mail_.stop) {
    std::optional<std::chrono::duration<double>> wait;
    if (scheduler_.idle()) {
      const bool settled = scheduler_.target_level() == 0;
      wait.emplace(settled ? std::numeric_limits<double>::infinity() : kIdleDecisionSeconds);
    }
    if (!TakeMail(wait)) break;
    try {
      Step();
    } catch (const DeviceError& error) {  // where cache blocks are copied
      EndAll(NoteDeviceFailure(error.what()));
    }
  }
  for (auto& request : mail_.requests) Admit(std::move(request));
  EndAll(Status(StatusCode::kCancelled, "cancelled: the server is shutting down"));
}

// False if it is to stop: what has come with that is for the end.
bool Worker::TakeMail(std::optional<std::chrono::duration<double>> wait) {
  inbox_->Take(mail_, wait);
  if (mail_.stop) return false;
  ReadMail();
  return true;
}

void Worker::ReadMail() {
  if (mail_.policy != nullptr) {
    policy_ = std::move(mail_.policy);
    next_decision_ = 0;
    admin_change_ = fmt::format("admin: policy {}", policy_->name());
    const std::lock_guard lock(state_mutex_);
    state_.policy = policy_->name();
  }
  if (mail_.max_level.has_value()) {
    const int highest = *mail_.max_level;
    policy_->SetMaxLevel(highest);
    scheduler_.set_auto_max_level(highest);
    next_decision_ = 0;
    admin_change_ +=
        fmt::format("{}max level {}", admin_change_.empty() ? "admin: " : ", ", highest);
    if (scheduler_.target_level() > highest)
      SetTarget(highest, NowSeconds(), std::exchange(admin_change_, {}));
    const std::lock_guard lock(state_mutex_);
    state_.max_level = highest;
  }
  for (auto& request : mail_.requests) Admit(std::move(request));
  for (const std::string& id : mail_.cancels) {
    const auto found = ids_.find(id);
    if (found == ids_.end()) continue;
    if (const auto ended = scheduler_.Cancel(found->second); ended.has_value()) Finish(*ended);
  }
  if (!ended_.empty()) TellEnds();
}

void Worker::Admit(std::unique_ptr<ActiveRequest> active) {
  // An end must not need memory.
  if (const size_t most = ended_.size() + active_.size() + 1; most > ended_.capacity())
    ended_.reserve(2 * most);
  const Request& request = active->request;
  const Status fits = CanEverFit(request);  // its bounds may have changed since Submit
  if (!fits.ok()) {
    active->result.status = fits;
    End(std::move(active));
    return;
  }
  active->id = scheduler_.Add({.prompt = request.prompt,
                               .max_tokens = request.max_tokens,
                               .tier = request.tier,
                               .level = request.level,
                               .prompt_logprobs = request.prompt_logprobs,
                               .host_tokens = HostTokens(*active),
                               .cache_salt = request.cache_salt,
                               .arrival = active->submitted,
                               .deadline = request.deadline});
  ids_.emplace(request.id, active->id);
  const int64_t id = active->id;
  active_.emplace(id, std::move(active));
  ++unstarted_;
}

void Worker::Decide() {
  const double now = NowSeconds();
  if (now < next_decision_ || !due_.raises.empty()) return;
  const double begin = ThreadSeconds();
  LoadSnapshot load = scheduler_.Snapshot();
  load.now = now;
  LevelDecision decision = policy_->Decide(load);
  if (!admin_change_.empty()) {
    decision.reason = decision.reason.empty()
                          ? admin_change_
                          : fmt::format("{}; {}", admin_change_, decision.reason);
    admin_change_.clear();
  }
  next_decision_ = NowSeconds() + (ThreadSeconds() - begin) / kDecisionShare;

  scheduler_.set_prefill_limit(decision.prefill_limit);
  scheduler_.set_short_prompt(decision.short_prompt);
  SetTarget(std::clamp(decision.target, 0, scheduler_.auto_max_level()), now, decision.reason);
  due_ = std::move(decision);
}

void Worker::SetTarget(int level, double now, const std::string& reason) {
  const int from = scheduler_.target_level();
  if (level == from) return;
  scheduler_.set_target_level(level);
  NoteEvent({.time = now, .from = from, .to = level, .reason = reason});
}

void Worker::RaiseSequences() {
  if (due_.raises.empty()) return;
  const LoadSnapshot load = scheduler_.Snapshot();
  const double now = NowSeconds();
  for (const LevelDecision::Raise& raise : due_.raises) {
    const auto active = active_.find(raise.id);
    const auto sequence =
        std::find_if(load.running.begin(), load.running.end(),
                     [&](const SequenceLoad& running) { return running.id == raise.id; });
    if (active == active_.end() || sequence == load.running.end()) continue;
    const double begin = fold_seconds_;
    // No room is a reason to go on as things are; the policy sees it in the next snapshot.
    const Status status = scheduler_.Raise(raise.id, raise.level);
    const int level = scheduler_.level(raise.id);
    if (level == sequence->level) continue;
    NoteEvent(
        {.time = now,
         .request_id = active->second->request.id,
         .position = sequence->cached_tokens,
         .from = sequence->level,
         .to = level,
         .seconds = fold_seconds_ - begin,
         .reason = status.ok() ? due_.reason : due_.reason + "; stopped: " + status.message()});
  }
  due_.raises.clear();
}

Status Worker::NoteDeviceFailure(const std::string& what) {
  const std::lock_guard lock(state_mutex_);
  if (state_.device_error.empty()) state_.device_error = what;
  return Error(StatusCode::kInternal, "the device failed: {}", what);
}

void Worker::NoteEvent(LevelEvent event) {
  const std::lock_guard lock(state_mutex_);
  ++(event.request_id.empty() ? state_.target_changes : state_.raises);
  event.sequence = state_.target_changes + state_.raises;
  if (state_.events.size() == kEventsKept) state_.events.erase(state_.events.begin());
  state_.events.push_back(std::move(event));
}

void Worker::Finish(const EndedSequence& ended) {
  const auto found = active_.find(ended.id);
  DSLA_CHECK(found != active_.end());
  std::unique_ptr<ActiveRequest> active = std::move(found->second);
  active_.erase(found);
  if (active->started == 0) --unstarted_;
  ids_.erase(active->request.id);
  RequestResult& result = active->result;
  if (active->unsent.has_value()) {
    std::erase(unsent_, active.get());
    HandOn(*active);
  }
  if (!ended.status.ok()) {
    result.status = ended.status;
    result.finish = FinishReason::kCancelled;
    // Where its last token was in the same step it has some already.
    if (!active->text.stop_string().has_value()) result.tail_text += active->text.Finish();
  }
  result.cached_tokens = ended.cached_tokens;
  result.preemptions = ended.preemptions;
  result.levels = ended.levels;
  End(std::move(active));
}

// The one place where a request ends. Its client is told by TellEnds.
void Worker::End(std::unique_ptr<ActiveRequest> active) {
  const double now = NowSeconds();
  RequestResult& result = active->result;
  result.id = active->request.id;
  result.tier = active->request.tier;
  result.prompt_tokens = static_cast<int>(active->request.prompt.size());
  result.generated_tokens = active->generated;
  const bool ran = active->started > 0;
  result.queue_seconds = (ran ? active->started : now) - active->submitted;
  if (active->first_token > 0) result.first_token_seconds = active->first_token - active->submitted;
  result.total_seconds = now - active->submitted;
  if (!ran) {
    ++left_queue_;
    left_queue_tokens_ += result.prompt_tokens;
  }
  inbox_->Release(active->request.id);
  ended_.push_back(std::move(active));
}

// Who has its reply finds it counted: the state and the observer know of an end before the client.
void Worker::TellEnds() {
  Publish(ended_);
  // What they throw, as where there is no memory for an answer, costs this request its end and
  // nobody else anything: a client learns of it when its sink is let go of.
  const auto shield = [](const auto& call) {
    try {
      call();
    } catch (const std::exception&) {
    }
  };
  for (const std::unique_ptr<ActiveRequest>& active : ended_) {
    shield([&] {
      if (observer_) observer_(active->result);
    });
    shield([&] { active->sink->OnFinish(active->result); });
  }
  const int ended = static_cast<int>(ended_.size());
  ended_.clear();
  inbox_->Settle(0, 0, ended);
}

void Worker::EndAll(const Status& why) {
  Abandon();
  for (EndedSequence& ended : scheduler_.Clear()) {
    ended.status = why;
    Finish(ended);
  }
  TellEnds();
}

// What the scheduler and the ledger look like now, and who has ended.
void Worker::Publish(std::span<const std::unique_ptr<ActiveRequest>> ended) {
  const Ledger& ledger = pool_.ledger();
  const auto held = [&](BlockKind kind) {
    return (ledger.used(kind) - ledger.idle(kind)) * ledger.config().bytes(kind);
  };
  std::vector<int> rows_per_level = scheduler_.rows_per_level();
  const double oldest = scheduler_.oldest_arrival();
  const double now = NowSeconds();
  {
    const std::lock_guard lock(state_mutex_);
    state_.last_progress = now;
    state_.rows_per_level = std::move(rows_per_level);
    state_.running = scheduler_.running();
    state_.queued = scheduler_.waiting() - unstarted_;  // state() adds the others
    state_.target_level = std::min(scheduler_.target_level(), state_.max_level);
    oldest_arrival_ = oldest;
    state_.page_bytes = held(BlockKind::kPage);
    state_.state_bytes = held(BlockKind::kSlot);
    state_.prefix_cache_bytes = ledger.idle_bytes();
    state_.preemptions = scheduler_.preemptions();
    state_.cost_factors = policy_->cost_factors();
    state_.cost_doubtful = policy_->cost_doubtful();
    for (const std::unique_ptr<ActiveRequest>& active : ended) {
      const RequestResult& result = active->result;
      ++state_.finished;
      state_.prompt_tokens += result.prompt_tokens;
      state_.cached_tokens += result.cached_tokens;
      state_.numerical_errors += result.status.message().starts_with(kNumericalError) ? 1 : 0;
    }
  }
  inbox_->Settle(std::exchange(left_queue_, 0), std::exchange(left_queue_tokens_, 0), 0);
}

void Worker::CountStep(double begin, const StepPlan& plan, int generated) {
  if (plan.rows.empty()) return;
  const double now = NowSeconds();
  const std::lock_guard lock(state_mutex_);
  ++state_.steps;
  state_.prefill_tokens += plan.prefill_rows;
  state_.generated_tokens += generated;
  state_.busy_seconds += now - begin;
  state_.model_seconds += model_seconds_ + fold_seconds_;
  if (plan.prefill_rows > 0) prefill_rate_.Add(now, plan.prefill_rows);
  if (generated > 0) decode_rate_.Add(now, generated);
}

bool Worker::device_failed() const {
  const std::lock_guard lock(state_mutex_);
  return !state_.device_error.empty();
}

EngineState Worker::state() const {
  const Inbox::Counts inbox = inbox_->counts();
  const double now = NowSeconds();
  const std::lock_guard lock(state_mutex_);
  EngineState state = state_;
  state.now = now;
  state.draining = inbox.draining;
  state.queued = std::max(0, state.queued + inbox.queued);  // the two are of different moments
  state.queued_tokens = inbox.queued_tokens;
  state.idle = inbox.accepted == 0;
  state.last_progress = std::max(state.last_progress, inbox.busy_since);
  if (oldest_arrival_ > 0) state.oldest_wait_seconds = now - oldest_arrival_;
  state.prefill_tokens_per_second = prefill_rate_.PerSecond(now);
  state.decode_tokens_per_second = decode_rate_.PerSecond(now);
  return state;
}

}  // namespace dsla
