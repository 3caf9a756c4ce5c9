// The step after the one in flight, planned before that one's results are known.
#include <algorithm>
#include <utility>

#include "base/check.h"
#include "engine/scheduler.h"
#include "engine/scheduler_sequence.h"

namespace dsla {

StepPlan Scheduler::PlanAhead(double now) {
  if (!in_step_ || !ahead_.rows.empty()) return {};
  CountRowsInFlight();
  NoteReading();
  if (!MayPlanAhead(now)) return {};
  PlanDecodes();
  PlanPrefills();
  ahead_ = TakePlan();
  // The states go on with the next rows, so what is to be kept of them is copied before those.
  // Nobody reads it before the rows that it ends with are known to be sound, see Commit.
  for (const PlannedRows& rows : ahead_.rows) {
    Sequence& sequence = *FindRunning(rows.id);
    sequence.ahead = true;
    if (sequence.in_flight > 0 && sequence.cache->level() > 0) RecordInPrefixCache(sequence);
  }
  return ahead_;
}

// Everybody's rows in flight count as cached from here on, and their results as tokens.
void Scheduler::CountRowsInFlight() {
  for (size_t i = 0; i < plan_.rows.size(); ++i) {
    const PlannedRows& rows = plan_.rows[i];
    Sequence* const sequence = FindRunning(rows.id);
    if (sequence == nullptr || sequence->in_flight > 0) continue;
    sequence->in_flight = static_cast<int>(rows.tokens.size());
    sequence->cache->Commit(sequence->in_flight);
    if (rows.samples) sequence->feed = static_cast<int>(i);
  }
}

// Whatever needs results, or memory that only they can free, is for Plan.
bool Scheduler::MayPlanAhead(double now) const {
  if (pause_due_ || running_.empty()) return false;
  for (const Sequences* all : {&running_, &waiting_}) {
    for (const auto& [id, sequence] : *all) {
      const double deadline = sequence->request.deadline;
      if (deadline > 0 && now >= deadline) return false;
    }
  }
  int64_t bytes = 0;  // with these nobody has to be pre-empted
  for (const auto& [id, sequence] : running_) {
    if (IsSettled(*sequence)) bytes += RestBytes(*sequence);
    if (!sequence->goes_on()) continue;
    if (sequence->replaying() || HostChooses(*sequence)) return false;
    bytes += LeastBytesAhead(*sequence);
  }
  if (bytes > ObtainableBytes()) return false;
  return std::ranges::none_of(
      waiting_, [&](const auto& waiting) { return AwaitsRowsInFlight(*waiting.second); });
}

// Whether the next token, or logits of the prompt, are the host's.
bool Scheduler::HostChooses(const Sequence& sequence) const {
  return sequence.size() - sequence.prompt_tokens < sequence.request.host_tokens ||
         (sequence.request.prompt_logprobs && sequence.length() < sequence.prompt_tokens);
}

// Whether the prefix that it has been found to wait for will be there with the results of the step
// in flight. Whom somebody new waits for is found when rows are planned.
bool Scheduler::AwaitsRowsInFlight(Sequence& sequence) const {
  if (sequence.leader == 0 || !AwaitsPrefix(sequence)) return false;
  return sequence.shared - FindRunning(sequence.leader)->length() <= options_.page_size;
}

// Of the fewest rows that a step has of it.
int64_t Scheduler::LeastBytesAhead(const Sequence& sequence) const {
  const int rest = sequence.size() - sequence.length();
  return sequence.cache->BytesToReserve(IsDecode(sequence) ? 1 : std::min(rest, PrefillUnit()));
}

// A fold waits for the device, and one that was pre-empted may have some to repeat.
bool Scheduler::MayStartAhead(const Sequence& sequence, int level,
                              const PrefixCache::Hit& hit) const {
  const bool folds = hit.tokens > 0 && hit.history.back().level < level;
  return sequence.preempted_history.empty() && !folds && !HostChooses(sequence);
}

}  // namespace dsla
