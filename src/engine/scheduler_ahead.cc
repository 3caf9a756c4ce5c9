// The decode step after the one in flight, planned before that one's tokens are known.
#include <algorithm>
#include <utility>
#include <vector>

#include "base/check.h"
#include "engine/scheduler.h"
#include "engine/scheduler_sequence.h"

namespace dsla {

// Whatever changes more than the rows' positions is for Plan, when nothing is in flight.
bool Scheduler::MayPlanAhead(double now) const {
  if (!in_step_ || !ahead_.rows.empty() || plan_.prefill_rows > 0) return false;
  if (!waiting_.empty() && !queue_settled_) return false;
  for (const Sequences* all : {&running_, &waiting_}) {
    for (const auto& [id, sequence] : *all) {
      const double deadline = sequence->request.deadline;
      if (deadline > 0 && now >= deadline) return false;
    }
  }
  size_t with_rows = 0;
  for (const PlannedRows& rows : plan_.rows) {
    const Sequence* sequence = FindRunning(rows.id);
    if (sequence == nullptr) continue;  // a surplus row
    if (!rows.samples || sequence->replaying()) return false;
    ++with_rows;
  }
  return with_rows == running_.size();  // else one waits for memory
}

StepPlan Scheduler::PlanAhead(double now) {
  if (!MayPlanAhead(now)) return {};
  std::vector<std::pair<Sequence*, int>> order;  // who goes on, and from which row
  int64_t bytes = 0;
  for (size_t i = 0; i < plan_.rows.size(); ++i) {
    Sequence* const sequence = FindRunning(plan_.rows[i].id);
    if (sequence == nullptr || sequence->cancelled) continue;
    const int generated = sequence->size() + 1 - sequence->prompt_tokens;
    if (generated >= sequence->request.max_tokens) continue;
    order.emplace_back(sequence, static_cast<int>(i));
    bytes += sequence->cache->BytesToReserve(2);
  }
  if (order.empty() || !MakeRoom(*order.front().first, bytes, false)) return {};

  static constexpr int32_t kNotKnown[1] = {0};
  for (const auto& [sequence, row] : order) {
    SequenceCache& cache = *sequence->cache;
    cache.Commit(1);
    const Status reserved = cache.Reserve(1);
    DSLA_CHECK(reserved.ok());
    sequence->ahead = true;
    ahead_.rows.push_back({.id = sequence->id,
                           .phase = Phase::kDecode,
                           .cache = &cache,
                           .tokens = kNotKnown,
                           .logits = RowLogits::kLast,
                           .samples = true,
                           .feed = row});
  }
  ahead_.decode_rows = static_cast<int>(ahead_.rows.size());
  // The states go on with the next row, so what is to be kept of them is copied before it. Nobody
  // reads it before the row that it ends with is known to be sound, see Commit.
  for (const auto& [sequence, row] : order) {
    if (sequence->cache->level() > 0) RecordInPrefixCache(*sequence);
  }
  return ahead_;
}

}  // namespace dsla
