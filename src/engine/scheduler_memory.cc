// Who gets memory: admission, pre-emption, and room for rows and raises.
#include <algorithm>
#include <utility>

#include "base/check.h"
#include "engine/scheduler.h"
#include "engine/scheduler_sequence.h"

namespace dsla {
namespace {

// Who is pre-empted first.
int RankOf(Tier tier) {
  switch (tier) {
    case Tier::kEconomy:
      return 0;
    case Tier::kAuto:
      return 1;
    case Tier::kFull:
    case Tier::kExact:
      break;
  }
  return 2;
}

}  // namespace

bool Scheduler::IsSettled(const Sequence& sequence) const {
  return sequence.preemptions >= options_.max_preemptions;
}

// The newest of the lowest tier, never one older than the one in need: so the oldest of all is
// never pre-empted.
Scheduler::Sequence* Scheduler::Victim(const Sequence& in_need) const {
  Sequence* victim = nullptr;
  for (const auto& [id, sequence] : running_) {
    if (id <= in_need.id || IsSettled(*sequence)) continue;
    if (victim == nullptr || RankOf(sequence->request.tier) <= RankOf(victim->request.tier))
      victim = sequence.get();
  }
  return victim;
}

void Scheduler::Preempt(Sequence& victim) {
  std::erase_if(next_.rows, [&](const PlannedRows& rows) {
    if (rows.id != victim.id) return false;
    (rows.phase == Phase::kDecode ? next_.decode_rows : next_.prefill_rows) -=
        static_cast<int>(rows.tokens.size());
    return true;
  });
  if (victim.ran) {
    if (!victim.replaying()) {
      victim.preempted_history = victim.history;
      victim.replay_until = victim.length();
    }
    ++victim.preemptions;
    ++preemptions_;
    next_.preempted.push_back(victim.id);
  }
  std::erase(reading_, &victim);
  victim.cache.reset();
  victim.history.clear();
  victim.recorded.clear();
  victim.ran = false;
  victim.entered = 0;
  auto node = running_.extract(victim.id);
  waiting_.insert(std::move(node));
}

bool Scheduler::MakeRoom(const Sequence& in_need, int64_t bytes, bool may_preempt) {
  if (bytes == 0) return true;
  const int64_t reserved = ReservedBytes(in_need);
  while (true) {
    if (ObtainableBytes() - reserved >= bytes) {
      if (ledger_->free_bytes() >= bytes) return true;
      if (prefix_cache_ != nullptr && prefix_cache_->Reclaim(bytes)) return true;
    }
    Sequence* victim = may_preempt ? Victim(in_need) : nullptr;
    if (victim == nullptr) return false;
    Preempt(*victim);
  }
}

// What a raise takes that goes layer by layer: a slot is taken before the pages are given back, and
// pages that others hold, too, do not come free. count_retained: pages that only the prefix cache
// holds besides do, because it is emptied first, or can be.
Scheduler::RaiseBytes Scheduler::BytesToRaise(const SequenceCache& cache, int level,
                                              bool count_retained) const {
  int64_t balance = 0, peak = 0;
  for (int rank = cache.level(); rank < level; ++rank) {
    balance += ledger_->config().slot_bytes;
    peak = std::max(peak, balance);
    for (const int32_t page : cache.pages(cache.layer_of_rank(rank))) {
      int holders = ledger_->references(BlockKind::kPage, page);
      if (count_retained && ledger_->is_retained(BlockKind::kPage, page)) --holders;
      if (holders == 1) balance -= ledger_->config().page_bytes;
    }
  }
  return {.peak = peak, .end = balance};
}

bool Scheduler::MakeRaiseRoom(const Sequence& in_need, int level, bool may_preempt) {
  while (true) {
    if (MakeRoom(in_need, BytesToRaise(*in_need.cache, level, false).peak, false)) return true;
    if (prefix_cache_ != nullptr && BytesToRaise(*in_need.cache, level, true).peak <=
                                        ObtainableBytes() - ReservedBytes(in_need)) {
      prefix_cache_->Clear();
      continue;
    }
    Sequence* victim = may_preempt ? Victim(in_need) : nullptr;
    if (victim == nullptr) return false;
    Preempt(*victim);
  }
}

bool Scheduler::ReplayRaises(Sequence& sequence, bool may_preempt) {
  while (sequence.history.size() < sequence.recorded.size()) {
    const LevelSpan& next = sequence.recorded[sequence.history.size()];
    if (next.position > sequence.length()) return true;
    DSLA_CHECK(next.position == sequence.length());
    if (!MakeRaiseRoom(sequence, next.level, may_preempt)) return false;
    // There is room, but the machine's memory may fail; part of the way is made up for next time.
    if (!ops_->Raise(*sequence.cache, next.level).ok()) return false;
    sequence.history.push_back(next);
  }
  return true;
}

PrefixCache::Hit Scheduler::LookUp(Sequence& sequence, int level) {
  if (prefix_cache_ == nullptr) return {};
  // The logits of every prompt row are wanted, so every one is computed.
  if (sequence.request.prompt_logprobs && sequence.logits_done < sequence.prompt_tokens) return {};
  // Of the reply only what a prefill would compute may be had, see RecordInPrefixCache.
  const int count = options_.deterministic ? sequence.prompt_tokens : sequence.size();
  const PrefixTokens of = Tokens(sequence, count);
  return prefix_cache_->Lookup(
      {.tokens = of.tokens,
       .salt = of.salt,
       .path = of.path,
       .level = level,
       .may_fold = sequence.request.tier != Tier::kExact && !options_.deterministic,
       .history = sequence.preempted_history,
       .multiple = options_.deterministic ? options_.deterministic_chunk : 0});
}

// The prefix to start from, and the level to start at in `level`: that of a longer prefix where one
// of a higher level may serve.
PrefixCache::Hit Scheduler::BestPrefix(Sequence& sequence, int* level) {
  const int highest = sequence.preempted_history.empty() ? PrefixLevel(sequence) : 0;
  if (highest <= *level) return LookUp(sequence, *level);
  const PrefixCache::Hit high = LookUp(sequence, highest);
  const int high_level = high.tokens == 0 ? 0 : high.history.back().level;
  if (high_level <= *level) return high;
  const PrefixCache::Hit low = LookUp(sequence, *level);
  if (high.tokens <= low.tokens) return low;
  *level = high_level;
  return LookUp(sequence, high_level);  // the same, which counts as used after the other
}

// Puts the sequence where it goes on from: at the start, or behind a prefix.
bool Scheduler::Start(Sequence& sequence, int level, const PrefixCache::Hit& hit) {
  sequence.recorded = sequence.preempted_history;
  if (hit.tokens > 0) {
    const int at = hit.history.back().level;
    sequence.cache.emplace(ops_->NewSequence(at));
    sequence.history = hit.history;
    if (sequence.recorded.empty() && at < level) {
      sequence.recorded = hit.history;
      sequence.recorded.push_back({hit.tokens, level});
    }
    if (!prefix_cache_->Adopt(hit, &*sequence.cache).ok() || !ReplayRaises(sequence, false)) {
      sequence.cache.reset();
      sequence.history.clear();
      sequence.recorded.clear();
      return false;
    }
  } else {
    sequence.cache.emplace(ops_->NewSequence(level));
    sequence.history = {{0, level}};
  }
  if (!sequence.started) sequence.cached_tokens = hit.tokens;
  return true;
}

// What a running sequence will still take: the rest of its tokens and the page after, or, where it
// cannot be pre-empted any more, all of its longest reply and the states of levels to be repeated.
int64_t Scheduler::RestBytes(const Sequence& sequence) const {
  const SequenceCache& cache = *sequence.cache;
  const LedgerConfig& config = ledger_->config();
  if (!IsSettled(sequence)) {
    return cache.BytesToReserve(sequence.size() - sequence.length()) +
           (options_.layers - cache.level()) * config.page_bytes;
  }
  const int level = sequence.recorded.empty()
                        ? cache.level()
                        : std::max(cache.level(), sequence.recorded.back().level);
  return cache.BytesToReserve(static_cast<int>(sequence.final_length()) - sequence.length()) +
         (level - cache.level()) * config.slot_bytes;
}

int64_t Scheduler::PromisedBytes() const {
  int64_t bytes = 0;
  for (const auto& [id, sequence] : running_)
    bytes += RestBytes(*sequence) + SnapshotBytes(*sequence, sequence->cache->level());
  return bytes;
}

// What nobody but those that cannot be pre-empted any more may take. So these always come to their
// end, and whoever they keep waiting goes on then.
int64_t Scheduler::ReservedBytes(const Sequence& in_need) const {
  int64_t bytes = 0;
  for (const auto& [id, sequence] : running_) {
    if (id != in_need.id && IsSettled(*sequence)) bytes += RestBytes(*sequence);
  }
  return bytes;
}

// Of the states that a prompt will leave in the prefix cache: who waits for them computes it all
// again without.
int64_t Scheduler::SnapshotBytes(const Sequence& sequence, int level) const {
  const int prompt_end = sequence.prompt_tokens / options_.page_size * options_.page_size;
  if (prefix_cache_ == nullptr || sequence.length() >= prompt_end) return 0;
  return level * ledger_->config().slot_bytes;
}

// Admits a waiting sequence if its whole prompt, or, where it will not be pre-empted any more, its
// longest reply, too, fits beside what the running ones were promised; a first one always, because
// it was checked to fit alone.
bool Scheduler::TryAdmit(Sequence& sequence) {
  if (running() >= options_.max_running) return false;
  const bool first = running_.empty();
  int level = sequence.preempted_history.empty() ? StartLevel(sequence)
                                                 : sequence.preempted_history.front().level;
  const int64_t promised = PromisedBytes();
  // No use in looking again while there is no more room than when it did not fit.
  const int64_t room = ObtainableBytes() - promised;
  if (!first && level == sequence.blocked_level && room <= sequence.blocked_room) return false;
  sequence.blocked_level = level;
  sequence.blocked_room = room;
  const PrefixCache::Hit hit = BestPrefix(sequence, &level);
  if (!first) {
    const int last_level =
        sequence.preempted_history.empty() ? level : sequence.preempted_history.back().level;
    const int64_t shared = (options_.layers - last_level) * int64_t{hit.tokens} /
                           options_.page_size * ledger_->config().page_bytes;
    const int64_t tokens = IsSettled(sequence) ? sequence.final_length() : sequence.size();
    if (SequenceBytes(sizes_, last_level, tokens) - shared > room) return false;
  }
  if (in_step_ && !MayStartAhead(sequence, level, hit)) {
    sequence.blocked_level = -1;
    pause_due_ = true;
    return false;
  }
  if (!Start(sequence, level, hit)) {
    if (!first) return false;
    // Beside the prefix there is no room for the states; without it there is.
    if (!Start(sequence, level, {})) return false;
  }
  const int64_t rest = IsSettled(sequence)
                           ? RestBytes(sequence)
                           : sequence.cache->BytesToReserve(sequence.size() - sequence.length());
  const int64_t snapshot = SnapshotBytes(sequence, sequence.cache->level());
  // Of the prefix there may be less than there was when the queue was looked at.
  if ((!first && rest + snapshot + promised > ObtainableBytes()) || !MayOvertake(sequence)) {
    sequence.cache.reset();
    sequence.history.clear();
    sequence.recorded.clear();
    return false;
  }
  for (auto& [id, other] : waiting_) {
    if (id >= sequence.id) break;
    if (other->leader == 0)
      other->overtaken += sequence.size() - sequence.length();  // else it waits for its own good
  }
  sequence.blocked_level = -1;
  auto node = waiting_.extract(sequence.id);
  running_.insert(std::move(node));
  if (sequence.reads())
    reading_.insert(std::ranges::upper_bound(reading_, sequence.id, {}, &Sequence::id), &sequence);
  return true;
}

}  // namespace dsla
