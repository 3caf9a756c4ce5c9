// Which rows a step runs.
#include <algorithm>
#include <utility>

#include "base/check.h"
#include "engine/scheduler.h"
#include "engine/scheduler_sequence.h"

namespace dsla {

// Rows given to a sequence's prefill: up to position `end`.
struct Scheduler::Grant {
  Sequence* sequence;
  int end;
};

StepPlan Scheduler::Plan(double now) {
  DSLA_CHECK(!in_step_);
  pause_due_ = false;
  Expire(now);
  NoteReading();
  while (true) {
    PlanDecodes();
    PlanPrefills();
    if (!next_.rows.empty() || idle()) break;
    FailOldest();  // nothing is in flight, so nothing would ever change
  }
  plan_ = TakePlan();
  in_step_ = !plan_.rows.empty();
  return plan_;
}

StepPlan Scheduler::TakePlan() {
  for (const PlannedRows& rows : next_.rows) {
    Sequence& sequence = *FindRunning(rows.id);
    if (!std::exchange(sequence.started, true)) next_.started.push_back(rows.id);
  }
  return std::exchange(next_, {});
}

void Scheduler::Expire(double now) {
  for (Sequences* all : {&running_, &waiting_}) {
    for (auto it = all->begin(); it != all->end();) {
      Sequence& sequence = *(it++)->second;
      const double deadline = sequence.request.deadline;
      if (deadline <= 0 || now < deadline) continue;
      next_.ended.push_back(End(
          sequence, Error(StatusCode::kDeadlineExceeded,
                          "the deadline passed {:.3f} s after arrival, with {} of at most {} "
                          "tokens made",
                          now - sequence.request.arrival, sequence.size() - sequence.prompt_tokens,
                          sequence.request.max_tokens)));
    }
  }
}

// The reply's rows: one by one, but a reply that is recomputed may go in chunks, except where its
// bits must be those of the first time.
bool Scheduler::IsDecode(const Sequence& sequence) const {
  return sequence.length() >= sequence.prompt_tokens &&
         (options_.deterministic || sequence.size() - sequence.length() == 1);
}

// Where rows from the cached length on must end, given that `rows` more than `from` may be had:
// at a page's end, or where the sequence's tokens, a recorded level or a snapshot end them.
int Scheduler::ChunkEnd(const Sequence& sequence, int from, int rows) const {
  const int length = sequence.length();
  const int page = options_.page_size;
  int last = sequence.size();
  for (const LevelSpan& span : sequence.recorded) {
    if (span.position > length) last = std::min(last, span.position);
  }
  if (options_.deterministic) {
    const int chunk = options_.deterministic_chunk;
    last = std::min({last, sequence.prompt_tokens, (length / chunk + 1) * chunk});
    return from == length && last - length <= rows ? last : from;
  }
  if (prefix_cache_ != nullptr && sequence.cache->level() > 0) {
    last = std::min(last, SnapshotAfter(length));
    const int prompt_end = sequence.prompt_tokens / page * page;
    if (prompt_end > length) last = std::min(last, prompt_end);
  }
  if (from + rows >= last) return std::max(from, last);
  return std::max(from, (from + rows) / page * page);
}

// A prompt above level 0 is cut where it leaves a snapshot: at multiples of the widest distance, a
// quarter of a step, and at doubling ones before the first of those, where prompts share the most.
// At every stride a long prompt would take many steps; a step's other rows are for others.
int Scheduler::WidestSnapshotDistance() const {
  int distance = options_.snapshot_stride;
  while (2 * distance <= options_.max_batch_tokens / 4) distance *= 2;
  return distance;
}

int Scheduler::SnapshotUpTo(int length) const {
  const int widest = WidestSnapshotDistance();
  if (length >= widest) return length / widest * widest;
  int place = options_.snapshot_stride;
  if (place > length) return 0;
  while (2 * place <= length) place *= 2;
  return place;
}

int Scheduler::SnapshotAfter(int length) const {
  const int place = SnapshotUpTo(length);
  return place == 0 ? options_.snapshot_stride : place + std::min(place, WidestSnapshotDistance());
}

// Whose prompts are being computed, oldest first, for whoever waits for a prefix: a long queue must
// not go through all replies for each request in it.
void Scheduler::NoteReading() {
  reading_.clear();
  for (const auto& [id, sequence] : running_)
    if (sequence->reads()) reading_.push_back(sequence.get());
}

void Scheduler::PlanDecodes() {
  std::vector<Sequence*> order;
  for (const auto& [id, sequence] : running_) order.push_back(sequence.get());
  for (Sequence* sequence : order) {
    // May have been pre-empted for an older one.
    if (!sequence->cache || !IsDecode(*sequence) || !sequence->goes_on()) continue;
    if (ReplayRaises(*sequence, MayPreempt())) PlanRows(*sequence, sequence->length() + 1);
  }
}

// Half of the rows goes to prompts by age, so that a long one always advances; the other half to
// those with the least left, so that a short one does not wait for the long; what is left over, by
// age again, now also to those whose turn it is not. Of rows that cannot be halved, those of every
// other step.
void Scheduler::PlanPrefills() {
  std::vector<Sequence*> prefills, by_age;
  for (const auto& [id, sequence] : running_) {
    if (!IsDecode(*sequence) && sequence->goes_on()) prefills.push_back(sequence.get());
  }
  for (Sequence* sequence : prefills) {
    if (sequence->cache && ReplayRaises(*sequence, MayPreempt())) by_age.push_back(sequence);
  }
  // An older one's raise may have pre-empted one that was looked at before.
  std::erase_if(by_age, [](const Sequence* sequence) { return !sequence->cache; });
  for (const auto& [id, sequence] : waiting_) {
    AwaitsPrefix(*sequence);
    // Whoever was pre-empted for this step would only take the memory back.
    if (std::ranges::find(next_.preempted, id) == next_.preempted.end())
      by_age.push_back(sequence.get());
  }
  std::ranges::sort(by_age, {}, &Sequence::id);
  std::vector<Sequence*> by_rest = by_age;
  NoteReadyPrefixes();
  std::ranges::stable_sort(by_rest, {}, [](const Sequence* s) { return s->to_compute(); });

  int left = options_.max_batch_tokens - next_.decode_rows;
  int oldest = std::max(left / 2, PrefillUnit());
  const int limit = std::max(prefill_limit_, options_.page_size);
  if (next_.decode_rows > 0 && prefill_limit_ > 0 && limit < left && !options_.deterministic) {
    left = limit;
    oldest = left / 2;
    if (left < 2 * options_.page_size) {
      by_age_next_ = !by_age_next_;
      oldest = by_age_next_ ? left : 0;
    }
  }
  AdmitReady(by_rest);
  std::vector<Grant> grants;
  const bool may_admit = GrantInOrder(by_age, oldest, true, true, &left, &grants);
  GrantInOrder(by_rest, left, true, true, &left, &grants);
  // In steps of no more than a stride a snapshot cuts off little, and a short step is soon over.
  const bool in_turn = options_.max_batch_tokens <= options_.snapshot_stride;
  GrantInOrder(by_age, left, may_admit, in_turn, &left, &grants);
  std::ranges::sort(grants, {}, [](const Grant& grant) { return grant.sequence->id; });
  for (const Grant& grant : grants) {
    if (grant.sequence->cache) PlanRows(*grant.sequence, grant.end);
  }
}

// What is cached of those that wait. Looking makes it recently used, the oldest one's most of all,
// so that what somebody waits to use is given up last.
void Scheduler::NoteReadyPrefixes() {
  if (prefix_cache_ == nullptr) return;
  constexpr int kLookAhead = 64;
  std::vector<Sequence*> next;
  for (const auto& [id, sequence] : waiting_) {
    if (sequence->leader == 0 && std::ssize(next) < kLookAhead) next.push_back(sequence.get());
  }
  const int64_t changes = prefix_cache_->changes();
  for (auto it = next.rbegin(); it != next.rend(); ++it) {
    Sequence& sequence = **it;
    if (sequence.ready_at == changes) continue;
    int level = sequence.preempted_history.empty() ? StartLevel(sequence)
                                                   : sequence.preempted_history.front().level;
    const int ready = BestPrefix(sequence, &level).tokens;
    if (ready != sequence.ready) sequence.blocked_level = -1;
    sequence.ready = ready;
    sequence.ready_at = changes;
  }
}

// Those whose prompt is cached but for what one step reads come in before the oldest one: the
// memory that it waits for would often be that of their prefix, which they would then compute
// again. As with every overtaking the oldest one's loss is bounded.
void Scheduler::AdmitReady(std::span<Sequence* const> order) {
  for (Sequence* sequence : order) {
    if (sequence->to_compute() > options_.max_batch_tokens) break;
    if (sequence->cache || 2 * sequence->ready < sequence->size()) continue;
    if (!AwaitsPrefix(*sequence) && MayOvertake(*sequence) && !TryAdmit(*sequence)) break;
  }
}

int Scheduler::PrefillUnit() const {
  return options_.deterministic ? options_.deterministic_chunk : options_.page_size;
}

// With in_turn only to those whose turn it is. False once an admission failed: then nobody later in
// that order was admitted either.
bool Scheduler::GrantInOrder(std::span<Sequence* const> order, int rows, bool may_admit,
                             bool in_turn, int* left, std::vector<Grant>* grants) {
  rows = std::min(rows, *left);
  for (Sequence* sequence : order) {
    if (rows <= 0) break;
    const bool waits = !sequence->cache.has_value();
    if (waits && (!may_admit || rows < std::min(PrefillUnit(), sequence->size()))) continue;
    if (in_turn && AwaitsTurn(*sequence)) continue;
    if (waits) {
      if (AwaitsPrefix(*sequence) || !MayOvertake(*sequence)) continue;
      if (!TryAdmit(*sequence)) {
        may_admit = false;
        continue;
      }
    }
    auto grant = std::ranges::find(*grants, sequence, &Grant::sequence);
    const int from = grant == grants->end() ? sequence->length() : grant->end;
    const int end = ChunkEnd(*sequence, from, rows);
    if (end == from) continue;
    if (grant == grants->end()) {
      grants->push_back({sequence, end});
    } else {
      grant->end = end;
    }
    rows -= end - from;
    *left -= end - from;
  }
  return may_admit;
}

// Whether all of it fits a step, or it is much shorter: two that are read by turns both take
// longer, and hold their memory longer, than one after the other.
bool Scheduler::MayPass(const Sequence& sequence, const Sequence& older) const {
  const int tokens = sequence.to_compute();
  return tokens <= options_.max_batch_tokens || 2 * tokens <= older.to_compute();
}

// Whether an older prompt is being read that it may not pass, so that it has the rows which that
// one has no use for: the last step's rest, or what a snapshot cuts off.
bool Scheduler::AwaitsTurn(const Sequence& sequence) const {
  if (sequence.to_compute() <= options_.max_batch_tokens) return false;
  return std::ranges::any_of(running_, [&](const auto& entry) {
    const auto& [id, other] = entry;
    return id < sequence.id && !IsDecode(*other) && !MayPass(sequence, *other);
  });
}

// Whether it may start before those that wait longer.
bool Scheduler::MayOvertake(const Sequence& sequence) const {
  for (const auto& [id, other] : waiting_) {
    if (id >= sequence.id) break;
    if (other->leader != 0) continue;
    if (!MayPass(sequence, *other)) return false;
    if (other->overtaken + sequence.to_compute() > options_.max_overtaken_tokens) return false;
  }
  return true;
}

// Whether a running prompt is computing a prefix of this one that it can start from, so that it
// does best to wait: it will have its first token sooner than by computing the same beside it.
bool Scheduler::AwaitsPrefix(Sequence& sequence) const {
  if (prefix_cache_ == nullptr || !sequence.preempted_history.empty()) return false;
  if (sequence.request.prompt_logprobs) return false;
  const Sequence* leader = FindRunning(sequence.leader);
  if (leader != nullptr && Leads(*leader, sequence, sequence.shared)) return true;
  sequence.leader = 0;
  for (Sequence* const other : reading_) {
    const int shared = PrefixFrom(*other, sequence);
    if (!Leads(*other, sequence, shared)) continue;
    sequence.leader = other->id;
    sequence.shared = shared;
    return true;
  }
  return false;
}

// Whether `leader` will leave a prefix of `shared` tokens at a level that serves `sequence`, and
// has more than a page of it still to compute.
bool Scheduler::Leads(const Sequence& leader, const Sequence& sequence, int shared) const {
  if (shared - leader.computed() <= options_.page_size || leader.replaying()) return false;
  if (sequence.request.tier == Tier::kExact || options_.deterministic)
    return leader.history == LevelHistory{{0, StartLevel(sequence)}};
  return leader.cache->level() <= PrefixLevel(sequence);
}

// How much of `sequence` can start from what `leader` will have entered with the end of its prompt.
int Scheduler::PrefixFrom(Sequence& leader, Sequence& sequence) const {
  // At least one token is left to compute.
  const int same = prefix_cache_->CommonTokens(Tokens(sequence, sequence.size() - 1),
                                               Tokens(leader, leader.prompt_tokens));
  const int prompt_end = leader.prompt_tokens / PrefillUnit() * PrefillUnit();
  if (same >= prompt_end) return prompt_end;
  if (leader.cache->level() == 0 || options_.deterministic)
    return same / PrefillUnit() * PrefillUnit();
  return SnapshotUpTo(same);  // above level 0 a sequence resumes at snapshots only
}

// Plans the rows up to `end`, or up to an earlier page's end where memory does not reach; false if
// there is none for a single page.
bool Scheduler::PlanRows(Sequence& sequence, int end) {
  SequenceCache& cache = *sequence.cache;
  const int length = cache.length();
  const bool decode = IsDecode(sequence);
  if (!decode && !options_.deterministic) {
    const int64_t bytes = ObtainableBytes() - ReservedBytes(sequence);
    while (cache.BytesToReserve(end - length) > bytes) {
      const int shorter = (end - 1) / options_.page_size * options_.page_size;
      if (shorter <= length) break;
      end = shorter;
    }
  }
  const int count = end - length;
  if (!MakeRoom(sequence, cache.BytesToReserve(count), MayPreempt())) return false;
  const Status reserved = cache.Reserve(count);
  DSLA_CHECK(reserved.ok());
  static constexpr int32_t kNotKnown[1] = {0};
  const std::span<const int32_t> known = sequence.tokens;
  PlannedRows rows{.id = sequence.id,
                   .phase = decode ? Phase::kDecode : Phase::kPrefill,
                   .cache = &cache,
                   .tokens = sequence.feed >= 0 ? kNotKnown : known.subspan(length, count),
                   .samples = end == sequence.size(),
                   .feed = sequence.feed};
  if (rows.samples) rows.logits = RowLogits::kLast;
  if (sequence.request.prompt_logprobs && length < sequence.prompt_tokens &&
      end > sequence.logits_done) {
    rows.logits = RowLogits::kAll;
  }
  (decode ? next_.decode_rows : next_.prefill_rows) += count;
  next_.rows.push_back(rows);
  return true;
}

// Of those that run: one that waits holds nothing, so its end would help nobody.
void Scheduler::FailOldest() {
  Sequence& oldest = *(running_.empty() ? waiting_ : running_).begin()->second;
  const LedgerConfig& config = ledger_->config();
  Status status = ResourceExhausted(
      "cache memory: no room to go on from token {} of {}: {} of {} bytes can be had, {} requests "
      "hold the rest and none of them can be pre-empted",
      oldest.length(), oldest.size(), ObtainableBytes(), config.budget_bytes, running_.size());
  next_.ended.push_back(End(oldest, std::move(status)));
}

}  // namespace dsla
