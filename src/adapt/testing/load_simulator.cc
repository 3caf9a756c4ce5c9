#include "adapt/testing/load_simulator.h"

#include <algorithm>
#include <deque>

#include "adapt/cost_correction.h"
#include "adapt/load_estimate.h"
#include "base/check.h"

namespace dsla {
namespace {

constexpr double kIdleTick = 0.5;

struct Sequence {
  SequenceLoad load;
  double last_token = 0;
};

class Simulator {
 public:
  Simulator(const SimOptions& options, const std::vector<SimRequest>& trace, LevelPolicy& policy,
            const SimObserver& observer)
      : o_(options), trace_(trace), policy_(policy), observer_(observer) {
    result_.requests.resize(trace.size());
  }

  SimResult Run() {
    for (int64_t step = 0; step < o_.max_steps; ++step) {
      Arrive();
      const LoadSnapshot snapshot = Snapshot();
      const LevelDecision decision = policy_.Decide(snapshot);
      if (observer_) observer_(snapshot, decision);
      if (result_.targets.empty() || decision.target != result_.targets.back().second) {
        result_.targets.push_back({now_, decision.target});
      }
      target_ = decision.target;
      prefill_limit_ = decision.prefill_limit;
      short_prompt_ = decision.short_prompt;
      Raise(decision);
      Admit();
      if (running_.empty()) {
        DSLA_CHECK(waiting_.empty());  // an empty server admits any request that fits alone
        if (next_ == trace_.size() && now_ >= o_.end) break;
        const double tick = now_ + kIdleTick;
        now_ = next_ < trace_.size() ? std::min(tick, std::max(now_, trace_[next_].arrival)) : tick;
        continue;
      }
      Step();
    }
    result_.finished = done_ == trace_.size();
    result_.end = now_;
    return result_;
  }

 private:
  int64_t Bytes(const SequenceLoad& s, int64_t tokens) const {
    return SequenceBytes(o_.sizes, s.level, tokens);
  }
  int64_t Used() const {
    int64_t bytes = 0;
    for (const Sequence& s : running_) bytes += Bytes(s.load, s.load.cached_tokens + 1);
    return bytes;
  }

  void Arrive() {
    for (; next_ < trace_.size() && trace_[next_].arrival <= now_; ++next_) {
      const SimRequest& r = trace_[next_];
      waiting_.push_back({.load = {.id = static_cast<int64_t>(next_),
                                   .cached_tokens = 0,
                                   .pending_tokens = r.prompt,
                                   .remaining_tokens = r.reply,
                                   .level = 0,
                                   .max_level = r.max_level,
                                   .arrival = r.arrival}});
    }
  }

  LoadSnapshot Snapshot() {
    LoadSnapshot s;
    s.now = now_;
    s.sizes = o_.sizes;
    for (const Sequence& q : running_) s.running.push_back(q.load);
    for (const Sequence& q : waiting_) s.waiting.push_back(q.load);
    s.budget_bytes = o_.budget_bytes;
    s.preemptions = result_.preemptions;
    return s;
  }

  void Raise(const LevelDecision& decision) {
    for (const LevelDecision::Raise& raise : decision.raises) {
      const auto s = std::find_if(running_.begin(), running_.end(),
                                  [&](const Sequence& q) { return q.load.id == raise.id; });
      DSLA_CHECK(s != running_.end());
      const double seconds = o_.cost.FoldSeconds(s->load.level, raise.level, s->load.cached_tokens);
      now_ += seconds;
      result_.fold_seconds += seconds;
      ++result_.raises;
      policy_.ObserveFold({.from = s->load.level,
                           .to = raise.level,
                           .length = s->load.cached_tokens,
                           .seconds = seconds});
      s->load.level = raise.level;
    }
  }

  void Admit() {
    while (!waiting_.empty() && static_cast<int>(running_.size()) < o_.max_running) {
      Sequence s = waiting_.front();
      if (s.load.pending_tokens >= short_prompt_) s.load.level = LevelAt(s.load, target_);
      const int64_t need = Bytes(s.load, s.load.pending_tokens + 1);
      if (!running_.empty() && Committed() + need > o_.budget_bytes) return;
      waiting_.pop_front();
      running_.push_back(s);
    }
  }

  // What those running hold once their prompts are through.
  int64_t Committed() const {
    int64_t bytes = 0;
    for (const Sequence& s : running_) {
      bytes += Bytes(s.load, s.load.cached_tokens + s.load.pending_tokens + 1);
    }
    return bytes;
  }

  // One decode row for each that can, prompt tokens up to the chunk, oldest first.
  void Step() {
    // The newest goes back to the queue while the step does not fit.
    while (running_.size() > 1 && Used() > o_.budget_bytes) {
      Sequence s = running_.back();
      running_.pop_back();
      s.load.pending_tokens += s.load.cached_tokens;
      s.load.cached_tokens = 0;
      waiting_.push_front(s);
      ++result_.preemptions;
    }
    StepTime step;
    const bool replies =
        std::ranges::any_of(running_, [](const Sequence& s) { return s.load.pending_tokens == 0; });
    int left = replies && prefill_limit_ > 0 ? std::min(prefill_limit_, o_.chunk) : o_.chunk;
    std::vector<int> takes(running_.size(), 0);
    for (size_t i = 0; i < running_.size(); ++i) {
      const SequenceLoad& s = running_[i].load;
      if (s.pending_tokens == 0) {
        step.decode.push_back({.level = s.level, .length = s.cached_tokens});
      } else if (left > 0) {
        takes[i] = std::min(left, s.pending_tokens);
        left -= takes[i];
        step.prefill.push_back({.level = s.level, .tokens = takes[i], .context = s.cached_tokens});
      }
    }
    const StepParts parts = PredictStep(o_.cost, step);
    step.seconds = std::max(parts.prefill + parts.decode, 1e-6);
    now_ += step.seconds;
    policy_.ObserveStep(step);
    for (size_t i = 0; i < running_.size(); ++i) Advance(running_[i], takes[i]);
    std::erase_if(running_, [&](const Sequence& s) {
      return s.load.has_first_token && s.load.remaining_tokens == 0;
    });
  }

  void Advance(Sequence& s, int take) {
    if (s.load.pending_tokens > 0) {
      s.load.pending_tokens -= take;
      s.load.cached_tokens += take;
      if (s.load.pending_tokens > 0) return;
    } else {
      ++s.load.cached_tokens;
    }
    SimResult::Done& done = result_.requests[s.load.id];
    if (!s.load.has_first_token) {
      s.load.has_first_token = true;
      done.ttft = now_ - s.load.arrival;
      policy_.ObserveFirstToken(
          {.now = now_, .seconds = done.ttft, .prompt_tokens = s.load.cached_tokens});
    } else {
      policy_.ObserveToken(now_, now_ - s.last_token);
    }
    s.last_token = now_;
    if (--s.load.remaining_tokens > 0) return;
    done.end = now_;
    done.level = s.load.level;
    ++done_;
  }

  const SimOptions& o_;
  const std::vector<SimRequest>& trace_;
  LevelPolicy& policy_;
  const SimObserver& observer_;
  SimResult result_;
  double now_ = 0;
  int target_ = 0, prefill_limit_ = 0, short_prompt_ = 0;
  size_t next_ = 0, done_ = 0;
  std::deque<Sequence> waiting_;
  std::vector<Sequence> running_;
};

}  // namespace

SimResult Simulate(const SimOptions& options, const std::vector<SimRequest>& trace,
                   LevelPolicy& policy, const SimObserver& observer) {
  return Simulator(options, trace, policy, observer).Run();
}

}  // namespace dsla
