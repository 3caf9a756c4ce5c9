#include "adapt/slo_policy.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dsla {
namespace {

// What levels can gain must be at least this share of the figure, or quality is not spent on it.
constexpr double kWorthwhile = 0.05;
// Of what levels can gain, so much is enough where the target itself is out of reach.
constexpr double kMostOfGain = 0.9;
// A fold must save at least this multiple of its own time.
constexpr double kPayback = 1.2;
// Estimates this near a target defer to what was measured.
constexpr double kNearTarget = 0.5;
// By so much chunks beside replies may slow prompts down, against whole ones: in any case, and for
// the sake of the target per token.
constexpr double kChunkLoss = 0.03;
constexpr double kMostChunkLoss = 0.1;
// What was measured is the p95 of so many seconds: long enough to hold a few requests, short enough
// to notice a burst.
constexpr double kFeedbackSeconds = 10;
// Steps from 0 to the top when measurements, not estimates, drive the target.
constexpr int kFeedbackSteps = 8;
// And from the top to 0 at most.
constexpr int kDownSteps = 4;

constexpr double kNever = -std::numeric_limits<double>::infinity();

// The lowest level whose figure is within `limit`; where there is none, the lowest that takes most
// of the gain that levels offer, or 0 where that is not worth it.
template <typename Figure>
int LowestMeeting(int levels, double limit, Figure figure) {
  double best = figure(0);
  for (int k = 0; k < levels; ++k) {
    if (figure(k) <= limit) return k;
    best = std::min(best, figure(k));
  }
  const double gain = figure(0) - best;
  if (gain < kWorthwhile * figure(0)) return 0;
  for (int k = 0; k < levels; ++k) {
    if (figure(k) <= figure(0) - kMostOfGain * gain) return k;
  }
  return levels - 1;
}

}  // namespace

SloPolicy::SloPolicy(const SloOptions& options, MeasuredCost cost, int max_level)
    : options_(options),
      measured_(std::move(cost.model)),
      correction_(cost.usual),
      cost_(measured_),
      max_level_(max_level),
      ttft_(kFeedbackSeconds),
      tpot_(kFeedbackSeconds),
      last_rise_(kNever),
      last_look_(kNever),
      last_change_(kNever) {}

void SloPolicy::ObserveFirstToken(const FirstToken& token) {
  if (token.now - token.seconds < last_rise_) return;
  const double alone = cost_.PromptSeconds(0, token.prompt_tokens - token.cached_tokens,
                                           token.cached_tokens, options_.prefill_chunk);
  ttft_.Add(token.now, token.seconds - alone);
}

void SloPolicy::ObserveToken(double now, double seconds) {
  if (now - seconds >= last_rise_) tpot_.Add(now, seconds);
}

LevelDecision SloPolicy::Decide(const LoadSnapshot& load) {
  LevelDecision decision;
  decision.target = target_;
  decision.prefill_limit = prefill_limit_;
  decision.short_prompt = BreakEvenTokens(load.sizes);
  const double elapsed = load.now - last_look_;
  if (elapsed < options_.evaluate_interval) return decision;
  // Not asked for so long: there was nothing to do.
  if (elapsed >= options_.calm_seconds) {
    calm_ = true;
    calm_since_ = last_look_;
    calm_level_ = 0;
  }
  fold_credit_ = std::min(options_.raise_seconds, fold_credit_ + options_.raise_share * elapsed);
  preempted_ = std::isfinite(last_look_) && load.preemptions > preemptions_;
  preemptions_ = load.preemptions;
  last_look_ = load.now;
  ttft_p95_ = ttft_.Quantile(load.now, 0.95);
  tpot_p95_ = tpot_.Quantile(load.now, 0.95);
  cost_ = measured_.Scaled(correction_.factors());

  decision.prefill_limit = prefill_limit_ = PrefillLimit(load);
  estimates_.resize(max_level_ + 1);
  const EstimateOptions options{prefill_limit_, options_.growth_tokens};
  for (int k = 0; k <= max_level_; ++k) {
    estimates_[k] = EstimateLoad(load, cost_, options, k, /*raise_running=*/true);
  }
  Want want = WantedLevel(load, 1.0);
  ApplyFeedback(load, want);
  MoveTarget(load, want, decision);
  ChooseRaises(load, want, decision);
  return decision;
}

void SloPolicy::SetMaxLevel(int level) {
  max_level_ = level;
  if (target_ <= level) return;
  target_ = level;
  calm_ = false;
}

// Whole pages of prompt for a step that writes replies, too. As few as cost next to nothing: the
// work stays the same, but replies end sooner and give back their memory, in which prefixes can
// stay. Fewer where the target per token asks for it and the loss is bounded.
int SloPolicy::PrefillLimit(const LoadSnapshot& load) const {
  const int page = load.sizes.page_size;
  const int most = std::max(1, options_.prefill_chunk / page);
  double seconds = options_.tpot;
  int level = target_;
  int64_t context = 0;
  for (const SequenceLoad& s : load.running) {
    if (s.pending_tokens == 0) {
      seconds -= cost_.RowSeconds(s.level, s.cached_tokens);
    } else if (s.cached_tokens >= context) {
      level = s.level;
      context = s.cached_tokens;
    }
  }
  const int whole = most * page;
  const auto fewest = [&](double loss) {
    const double bound = (1 + loss) * cost_.PrefillSeconds(level, whole, context);
    int pages = 1;
    while (pages < most && cost_.PromptSeconds(level, whole, context, pages * page) > bound)
      ++pages;
    return pages;
  };
  int pages = fewest(kChunkLoss);
  const int least = fewest(kMostChunkLoss);
  while (pages > least && cost_.PrefillSeconds(level, pages * page, context) > seconds) --pages;
  return pages * page;
}

SloPolicy::Want SloPolicy::WantedLevel(const LoadSnapshot& load, double margin) const {
  const int levels = max_level_ + 1;
  const double room = static_cast<double>(load.budget_bytes) * options_.memory_share * margin;
  const auto bytes = [&](int k) { return static_cast<double>(estimates_[k].memory_bytes); };
  Want want;
  want.ttft =
      LowestMeeting(levels, options_.ttft * margin, [&](int k) { return estimates_[k].ttft; });
  want.tpot =
      LowestMeeting(levels, options_.tpot * margin, [&](int k) { return estimates_[k].tpot; });
  const int time = std::max(want.ttft, want.tpot);
  want.word = want.ttft >= want.tpot ? "ttft" : "tpot";

  // Where nothing fits, what comes close to the least that there is.
  double allowed = bytes(0);
  for (int k = 0; k < levels; ++k) allowed = std::min(allowed, bytes(k));
  allowed = std::max(room, allowed * (1 + kWorthwhile));
  int below = -1;
  for (int k = 0; k < levels; ++k) {
    if (bytes(k) > allowed) continue;
    if (k >= time) {
      if (k > time) want.word = "memory";
      want.level = k;
      return want;
    }
    below = k;
  }
  want.level = below;  // what the times ask for does not fit: some level does
  return want;
}

// Estimates may be wrong. Where one is near its target and the measurement is over it, the target
// goes up a step, provided that levels help at all; so it does when sequences were pre-empted.
void SloPolicy::ApplyFeedback(const LoadSnapshot& load, Want& want) const {
  const int step = std::max(1, max_level_ / kFeedbackSteps);
  const int next = std::min(max_level_, target_ + step);
  if (next <= want.level) return;
  const LoadEstimate &here = estimates_[target_], &there = estimates_[max_level_];
  const auto missed = [&](double measured, double goal, double now, double then) {
    return measured > goal && now > kNearTarget * goal && then < (1 - kWorthwhile) * now;
  };
  if (preempted_ && estimates_[next].memory_bytes < here.memory_bytes) {
    want.level = next;
    want.word = "memory";
  } else if (!load.waiting.empty() && missed(ttft_p95_, options_.ttft, here.ttft, there.ttft)) {
    want.level = want.ttft = next;
    want.word = "ttft";
  } else if (!load.running.empty() && missed(tpot_p95_, options_.tpot, here.tpot, there.tpot)) {
    want.level = want.tpot = next;
    want.word = "tpot";
  }
}

std::string SloPolicy::UpReason(const LoadSnapshot& load, const Want& want) const {
  const LoadEstimate &from = estimates_[target_], &to = estimates_[want.level];
  const std::string word = want.word;
  if (word == "memory") {
    constexpr double kMB = 1e6;
    return fmt::format(
        "memory: {} running, {} waiting need {:.0f} MB at level {}, {:.0f} MB at {}, budget {:.0f} "
        "MB{}",
        load.running.size(), load.waiting.size(), from.memory_bytes / kMB, target_,
        to.memory_bytes / kMB, want.level, load.budget_bytes / kMB,
        preempted_ ? ", sequences were pre-empted" : "");
  }
  if (word == "tpot") {
    return fmt::format(
        "tpot: {} running, {} waiting, {:.3f} s a token at level {}, {:.3f} s at {}, target {:.3f} "
        "s, measured p95 {:.3f} s",
        load.running.size(), load.waiting.size(), from.tpot, target_, to.tpot, want.level,
        options_.tpot, tpot_p95_);
  }
  return fmt::format(
      "ttft: {} running, {} waiting, delay {:.1f} s at level {}, {:.1f} s at {}, target {:.1f} s, "
      "measured p95 {:.1f} s",
      load.running.size(), load.waiting.size(), from.ttft, target_, to.ttft, want.level,
      options_.ttft, ttft_p95_);
}

void SloPolicy::MoveTarget(const LoadSnapshot& load, const Want& want, LevelDecision& decision) {
  const bool cool = load.now - last_change_ >= options_.up_cooldown;
  if (want.level > target_) {
    calm_ = false;
    if (!cool) return;
    decision.reason = UpReason(load, want);
    target_ = want.level;
    last_rise_ = load.now;
    ttft_.Clear();
    tpot_.Clear();
  } else {
    const int low = std::max(want.level, WantedLevel(load, options_.down_margin).level);
    if (low >= target_ || (low > 0 && target_ - low < max_level_ / kDownSteps)) {
      calm_ = false;
      return;
    }
    if (!calm_) {
      calm_ = true;
      calm_since_ = load.now;
      calm_level_ = low;
    }
    calm_level_ = std::max(calm_level_, low);
    if (!cool || load.now - calm_since_ < options_.calm_seconds) return;
    decision.reason =
        fmt::format("calm: level {} has sufficed for {:.0f} s; {} running, {} waiting", calm_level_,
                    load.now - calm_since_, load.running.size(), load.waiting.size());
    target_ = calm_level_;
    calm_ = false;
  }
  last_change_ = load.now;
  decision.target = target_;
}

// The raises to the target that pay: in bytes while memory is short, otherwise in seconds.
std::vector<SloPolicy::Candidate> SloPolicy::Candidates(const LoadSnapshot& load,
                                                        bool memory) const {
  std::vector<Candidate> candidates;
  for (const SequenceLoad& s : load.running) {
    const int to = LevelAt(s, target_);
    if (to <= s.level || s.cached_tokens <= 0) continue;
    const int length = s.cached_tokens + s.pending_tokens;
    const int64_t bytes =
        SequenceBytes(load.sizes, s.level, length) - SequenceBytes(load.sizes, to, length);
    if (bytes <= 0) continue;  // short of its break-even length: a raise would cost memory
    const double fold = std::max(1e-9, cost_.FoldSeconds(s.level, to, s.cached_tokens));
    Candidate candidate{.id = s.id,
                        .from = s.level,
                        .to = to,
                        .layer_seconds = fold / (to - s.level),
                        .bytes = static_cast<double>(bytes),
                        .value = static_cast<double>(bytes) / fold};
    if (!memory) {
      const int chunk = prefill_limit_;
      const int more = std::min(s.remaining_tokens, options_.growth_tokens);
      const double saved =
          cost_.PromptSeconds(s.level, s.pending_tokens, s.cached_tokens, chunk) -
          cost_.PromptSeconds(to, s.pending_tokens, s.cached_tokens, chunk) +
          more * (cost_.RowSeconds(s.level, length) - cost_.RowSeconds(to, length));
      if (saved < kPayback * fold) continue;
      candidate.value = saved / fold;
    }
    candidates.push_back(candidate);
  }
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return a.value != b.value ? a.value > b.value : a.id < b.id;
  });
  return candidates;
}

void SloPolicy::ChooseRaises(const LoadSnapshot& load, const Want& want, LevelDecision& decision) {
  if (target_ == 0 || fold_credit_ <= 0) return;
  const LoadEstimate unraised =
      EstimateLoad(load, cost_, {prefill_limit_, options_.growth_tokens}, target_,
                   /*raise_running=*/false);
  double excess = static_cast<double>(unraised.memory_bytes) -
                  static_cast<double>(load.budget_bytes) * options_.memory_share;
  const bool memory = excess > 0;
  if (!memory && want.ttft == 0 && want.tpot == 0) return;
  double seconds = 0, freed = 0;
  for (const Candidate& c : Candidates(load, memory)) {
    if (fold_credit_ <= 0 || (memory && excess <= 0)) break;
    // As many layers as the credit pays for, one at least: a long sequence rises in several steps.
    const int rungs = static_cast<int>(
        std::clamp(fold_credit_ / c.layer_seconds, 1.0, static_cast<double>(c.to - c.from)));
    const double share = static_cast<double>(rungs) / (c.to - c.from);
    decision.raises.push_back({c.id, c.from + rungs});
    fold_credit_ -= rungs * c.layer_seconds;
    seconds += rungs * c.layer_seconds;
    freed += share * c.bytes;
    excess -= share * c.bytes;
  }
  if (decision.raises.empty() || !decision.reason.empty()) return;
  decision.reason =
      memory ? fmt::format("memory: folding {} running for {:.1f} MB, {:.0f} ms",
                           decision.raises.size(), freed / 1e6, 1e3 * seconds)
             : fmt::format("{}: folding {} running that save more than {:.1f} times the {:.0f} ms",
                           want.ttft >= want.tpot ? "ttft" : "tpot", decision.raises.size(),
                           kPayback, 1e3 * seconds);
}

}  // namespace dsla
