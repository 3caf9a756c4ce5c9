#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "engine/scheduler_sequence.h"

namespace dsla {

StepTime StepTimeOf(const StepPlan& plan) {
  StepTime time;
  for (const PlannedRows& rows : plan.rows) {
    const int level = rows.cache->level();
    const int length = rows.cache->length();
    if (rows.phase == Phase::kDecode) {
      time.decode.push_back({.level = level, .length = length});
    } else {
      time.prefill.push_back(
          {.level = level, .tokens = static_cast<int64_t>(rows.tokens.size()), .context = length});
    }
  }
  return time;
}

Scheduler::Scheduler(Ledger* ledger, CacheOps* ops, const SchedulerOptions& options)
    : ledger_(ledger),
      ops_(ops),
      options_(options),
      sizes_{.layers = options.layers,
             .page_size = options.page_size,
             .page_bytes = ledger->config().page_bytes,
             .slot_bytes = ledger->config().slot_bytes} {
  const int page = options.page_size;
  DSLA_CHECK(options.layers > 0 && page > 0 && options.max_batch_tokens >= 2 * page);
  DSLA_CHECK(options.max_running > 0 && options.snapshot_stride % page == 0);
  DSLA_CHECK(options.top_level <= options.max_level && options.max_level <= options.layers);
  int chunk = page;
  if (options.deterministic) {
    chunk = options.deterministic_chunk;
    if (chunk == 0) chunk = std::max(page, std::min(256, options.max_batch_tokens / 2));
    chunk -= chunk % page;
    DSLA_CHECK(chunk > 0 && chunk < options.max_batch_tokens);
    options_.deterministic_chunk = chunk;
  }
  // Decodes go first; the rows they leave hold a chunk, so that prompts always go on too.
  options_.max_running = std::min(options.max_running, options.max_batch_tokens - chunk);
  if (options.prefix_cache) {
    prefix_cache_ = std::make_unique<PrefixCache>(
        ledger, ops,
        PrefixCacheOptions{
            .layers = options.layers, .page_size = page, .adapter_id = options.adapter_id});
  }
}

Scheduler::~Scheduler() = default;

Scheduler::Bounds Scheduler::BoundsOf(Tier tier, int level) const {
  switch (tier) {
    case Tier::kFull:
      return {0, 0};
    case Tier::kEconomy:
      return {options_.top_level, options_.top_level};
    case Tier::kExact:
      return {level, level};
    case Tier::kAuto:
      break;
  }
  return {0, std::min(auto_max_level_.load(), options_.max_level)};
}

// Of prompt and reply at their end.
int64_t Scheduler::LeastBytes(int64_t prompt_tokens, int64_t max_tokens, Bounds bounds) const {
  const int64_t tokens = prompt_tokens + std::max<int64_t>(0, max_tokens - 1);
  // Bytes are linear in the level, so the least is at one of the ends.
  return std::min(SequenceBytes(sizes_, bounds.min, tokens),
                  SequenceBytes(sizes_, bounds.max, tokens));
}

Status Scheduler::CanEverFit(int64_t prompt_tokens, int64_t max_tokens, Tier tier,
                             int level) const {
  const Bounds bounds = BoundsOf(tier, level);
  const int64_t needed = LeastBytes(prompt_tokens, max_tokens, bounds);
  const int64_t budget = ledger_->config().budget_bytes;
  if (needed <= budget) return Status::Ok();
  return ResourceExhausted(
      "{} prompt tokens and {} new ones need at least {} bytes of cache at levels {} to {}; the "
      "whole cache has {}",
      prompt_tokens, max_tokens, needed, bounds.min, bounds.max, budget);
}

int64_t Scheduler::LongestReply(int64_t prompt_tokens, int64_t most, Tier tier, int level) const {
  const Bounds bounds = BoundsOf(tier, level);
  int64_t fits = 0, above = most + 1;  // bisection: what fits, fits with fewer tokens, too
  while (fits + 1 < above) {
    const int64_t middle = fits + (above - fits) / 2;
    const bool room = LeastBytes(prompt_tokens, middle, bounds) <= ledger_->config().budget_bytes;
    (room ? fits : above) = middle;
  }
  return fits;
}

// The policy's target within the tier's bounds, the lowest for short prompts, and not below the
// lowest level at which the whole request fits the cache.
int Scheduler::StartLevel(const Sequence& sequence) const {
  const Bounds bounds = BoundsOf(sequence.request.tier, sequence.request.level);
  const int64_t budget = ledger_->config().budget_bytes;
  const auto fits = [&](int level) {
    return SequenceBytes(sizes_, level, sequence.final_length()) <= budget;
  };
  const bool is_short = sequence.prompt_tokens < short_prompt_;
  const int target = is_short ? bounds.min : std::clamp(target_level_, bounds.min, bounds.max);
  for (int level = target; level <= bounds.max; ++level) {
    if (fits(level)) return level;
  }
  // Below the break-even length a higher level takes more.
  for (int level = target; level >= bounds.min; --level) {
    if (fits(level)) return level;
  }
  return target;
}

// The highest level that a prefix may have been computed at. Under load, one of a higher level than
// the target serves a request whose bounds allow it: computing it again would be load.
int Scheduler::PrefixLevel(const Sequence& sequence) const {
  const int start = StartLevel(sequence);
  if (sequence.request.tier != Tier::kAuto || target_level_ == 0 || options_.deterministic)
    return start;
  return std::max(start, BoundsOf(sequence.request.tier, sequence.request.level).max);
}

int64_t Scheduler::Add(ScheduledRequest request) {
  DSLA_CHECK(!request.prompt.empty() && request.max_tokens >= 0);
  auto sequence = std::make_unique<Sequence>();
  sequence->id = next_id_++;
  sequence->tokens = std::move(request.prompt);
  sequence->prompt_tokens = sequence->size();
  sequence->request = std::move(request);
  const int64_t id = sequence->id;
  waiting_.emplace(id, std::move(sequence));
  return id;
}

std::optional<EndedSequence> Scheduler::Cancel(int64_t id) {
  if (const auto found = waiting_.find(id); found != waiting_.end())
    return End(*found->second, Status(StatusCode::kCancelled, "cancelled"));
  Sequence* sequence = FindRunning(id);
  if (sequence == nullptr) return std::nullopt;
  if (in_step_) {
    sequence->cancelled = true;
    return std::nullopt;
  }
  return End(*sequence, Status(StatusCode::kCancelled, "cancelled"));
}

Scheduler::Sequence* Scheduler::FindRunning(int64_t id) const {
  const auto found = running_.find(id);
  return found == running_.end() ? nullptr : found->second.get();
}

EndedSequence Scheduler::End(Sequence& sequence, Status status) {
  EndedSequence ended{.id = sequence.id,
                      .status = std::move(status),
                      .prompt_tokens = sequence.prompt_tokens,
                      .cached_tokens = sequence.cached_tokens,
                      .preemptions = sequence.preemptions,
                      .levels = {}};
  ended.levels = sequence.history.size() < sequence.preempted_history.size()
                     ? sequence.preempted_history
                     : sequence.history;
  std::erase(reading_, &sequence);
  if (sequence.ahead) {
    surplus_.push_back(std::move(running_.extract(ended.id).mapped()));
  } else if (running_.erase(ended.id) == 0) {
    waiting_.erase(ended.id);
  }
  return ended;
}

std::vector<EndedSequence> Scheduler::Commit(std::span<const RowResult> results) {
  DSLA_CHECK(in_step_ && results.size() == plan_.rows.size());
  const auto done = std::exchange(surplus_, {});    // they had their last row in this step
  std::vector<EndedSequence>& ended = next_.ended;  // where Clear finds them if a copy throws
  for (size_t i = 0; i < results.size(); ++i) {
    const PlannedRows& rows = plan_.rows[i];
    Sequence* const running = FindRunning(rows.id);
    if (running == nullptr) continue;  // surplus rows
    Sequence& sequence = *running;
    if (sequence.in_flight == 0) sequence.cache->Commit(static_cast<int>(rows.tokens.size()));
    sequence.ran = true;
    if (rows.logits == RowLogits::kAll)
      sequence.logits_done = std::max(sequence.logits_done, sequence.length());
    if (!results[i].failed) {
      RecordInPrefixCache(sequence);
    } else if (prefix_cache_ != nullptr && sequence.entered > sequence.computed()) {
      prefix_cache_->Clear();  // its rows were entered when the next step was planned
    }
    if (sequence.cancelled) continue;
    if (results[i].finish) {
      ended.push_back(End(sequence, Status::Ok()));
    } else if (rows.samples) {
      DSLA_CHECK(results[i].token >= 0);
      sequence.tokens.push_back(results[i].token);
    }
  }
  for (auto it = running_.begin(); it != running_.end();) {
    Sequence& sequence = *(it++)->second;
    sequence.in_flight = 0;
    sequence.feed = -1;
    if (sequence.cancelled)
      ended.push_back(End(sequence, Status(StatusCode::kCancelled, "cancelled")));
    else
      sequence.ahead = false;
  }
  plan_ = std::exchange(ahead_, {});
  in_step_ = !plan_.rows.empty();
  return std::exchange(ended, {});
}

PrefixTokens Scheduler::Tokens(Sequence& sequence, int count) {
  return {std::span(sequence.tokens).first(count), sequence.request.cache_salt, &sequence.path};
}

void Scheduler::RecordInPrefixCache(Sequence& sequence) {
  if (prefix_cache_ == nullptr) return;
  // Deterministic: what a prefill in fixed chunks would compute, so not the rows of the reply.
  const int unit = PrefillUnit();
  const int length = sequence.length();
  const int prompt_end = sequence.prompt_tokens / unit * unit;
  const int usable =
      options_.deterministic ? std::min(length / unit * unit, prompt_end) : length / unit * unit;
  if (usable <= sequence.entered) return;
  sequence.entered = usable;
  const bool snapshot = sequence.cache->level() > 0 && length == usable &&
                        (length % options_.snapshot_stride == 0 || length == prompt_end);
  prefix_cache_->Insert(Tokens(sequence, usable), sequence.history, *sequence.cache, snapshot);
}

void Scheduler::NoteLevel(Sequence& sequence) {
  const LevelSpan now{sequence.length(), sequence.cache->level()};
  if (now.level == sequence.history.back().level) return;
  // Two raises at one position are one.
  if (sequence.history.back().position == now.position) {
    sequence.history.back() = now;
  } else {
    sequence.history.push_back(now);
  }
}

Status Scheduler::Raise(int64_t id, int level) {
  DSLA_CHECK(!in_step_);
  Sequence* sequence = FindRunning(id);
  if (sequence == nullptr) return InvalidArgument("request {} is not running", id);
  const int from = sequence->cache->level();
  const int highest = BoundsOf(sequence->request.tier, sequence->request.level).max;
  if (level <= from || level > highest || sequence->replaying()) {
    return InvalidArgument("request {} cannot be raised from level {} to {}: {}", id, from, level,
                           sequence->replaying() ? std::string("it is being recomputed")
                                                 : fmt::format("its highest is {}", highest));
  }
  const int64_t final_bytes = SequenceBytes(sizes_, level, sequence->final_length());
  if (final_bytes > ledger_->config().budget_bytes) {
    return ResourceExhausted("request {} would need {} bytes at level {}; the cache has {}", id,
                             final_bytes, level, ledger_->config().budget_bytes);
  }
  // One that is promised all of its reply must still have it afterwards. Pages that another
  // sequence holds, too, are no room for it.
  const int64_t rest = final_bytes - SequenceBytes(sizes_, level, sequence->length());
  const bool keeps_promise =
      !IsSettled(*sequence) || BytesToRaise(*sequence->cache, level, true).end + rest <=
                                   ObtainableBytes() - ReservedBytes(*sequence);
  if (!keeps_promise || !MakeRaiseRoom(*sequence, level, false)) {
    return ResourceExhausted("no room to raise request {} from level {} to {}: {} bytes are free",
                             id, from, level, ObtainableBytes());
  }
  const Status status = ops_->Raise(*sequence->cache, level);
  NoteLevel(*sequence);
  return status;
}

LoadSnapshot Scheduler::Snapshot() const {
  LoadSnapshot load;
  const auto add = [&](const Sequence& sequence, std::vector<SequenceLoad>* list) {
    const Bounds bounds = BoundsOf(sequence.request.tier, sequence.request.level);
    SequenceLoad entry{.id = sequence.id,
                       .cached_tokens = sequence.length(),
                       .pending_tokens = sequence.size() - sequence.length(),
                       .remaining_tokens = 0,
                       .level = bounds.min,
                       .max_level = bounds.max,
                       .arrival = sequence.request.arrival,
                       .has_first_token = sequence.size() > sequence.prompt_tokens};
    if (!sequence.cache && sequence.leader != 0) {  // it will find those cached
      entry.cached_tokens = sequence.shared;
      entry.pending_tokens -= sequence.shared;
    }
    entry.remaining_tokens =
        sequence.request.max_tokens - (sequence.size() - sequence.prompt_tokens);
    if (sequence.cache) {
      if (IsDecode(sequence)) entry.pending_tokens = 0;
      entry.level = sequence.cache->level();
      entry.max_level = std::max(bounds.max, entry.level);
      if (sequence.replaying()) entry.level = entry.max_level = sequence.recorded.back().level;
    } else if (!sequence.preempted_history.empty()) {
      entry.level = entry.max_level = sequence.preempted_history.back().level;
    }
    list->push_back(entry);
  };
  for (const auto& [id, sequence] : running_) add(*sequence, &load.running);
  for (const auto& [id, sequence] : waiting_) add(*sequence, &load.waiting);
  load.budget_bytes = ledger_->config().budget_bytes;
  load.sizes = sizes_;
  load.preemptions = preemptions_;
  return load;
}

double Scheduler::oldest_arrival() const {
  return waiting_.empty() ? 0 : waiting_.begin()->second->request.arrival;
}

int Scheduler::level(int64_t id) const {
  const Sequence* sequence = FindRunning(id);
  return sequence == nullptr ? 0 : sequence->cache->level();
}

int Scheduler::cached_tokens(int64_t id) const {
  const Sequence* sequence = FindRunning(id);
  return sequence == nullptr ? 0 : sequence->cached_tokens;
}

std::vector<int> Scheduler::rows_per_level() const {
  std::vector<int> rows(options_.layers + 1, 0);
  for (const auto& [id, sequence] : running_) ++rows[sequence->cache->level()];
  return rows;
}

std::vector<const SequenceCache*> Scheduler::caches() const {
  std::vector<const SequenceCache*> caches;
  for (const auto& [id, sequence] : running_) caches.push_back(&*sequence->cache);
  for (const auto& sequence : surplus_) caches.push_back(&*sequence->cache);
  return caches;
}

std::vector<EndedSequence> Scheduler::Clear() {
  std::vector<EndedSequence> ended = std::move(next_.ended);
  for (Sequences* all : {&running_, &waiting_}) {
    while (!all->empty()) ended.push_back(End(*all->begin()->second, Status::Ok()));
  }
  if (prefix_cache_ != nullptr) prefix_cache_->Clear();
  surplus_.clear();
  in_step_ = pause_due_ = false;
  next_ = plan_ = ahead_ = {};
  return ended;
}

}  // namespace dsla
