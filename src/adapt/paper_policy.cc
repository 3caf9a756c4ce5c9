#include "adapt/paper_policy.h"

#include <algorithm>
#include <limits>

#include "adapt/load_estimate.h"

namespace dsla {
namespace {

// The paper's server runs one request at a time, so a prompt is in its queue until its turn has
// come whole; here prompts are taken in chunks, and one is queued until its last chunk is done.
int LongestQueuedPrompt(const LoadSnapshot& load) {
  int longest = 0;
  for (const SequenceLoad& s : load.waiting) {
    longest = std::max(longest, s.cached_tokens + s.pending_tokens);
  }
  for (const SequenceLoad& s : load.running) {
    if (s.pending_tokens > 0) longest = std::max(longest, s.cached_tokens + s.pending_tokens);
  }
  return longest;
}

}  // namespace

PaperPolicy::PaperPolicy(const PaperOptions& options, int layers, int max_level)
    : options_(options),
      max_share_(static_cast<int>(options.max_share * layers)),
      max_level_(std::min(max_level, max_share_)),
      last_change_(-std::numeric_limits<double>::infinity()) {}

void PaperPolicy::SetMaxLevel(int level) {
  max_level_ = std::min(level, max_share_);
  target_ = std::min(target_, max_level_);
}

LevelDecision PaperPolicy::Decide(const LoadSnapshot& load) {
  LevelDecision decision;
  const int queue = static_cast<int>(load.waiting.size());
  const int prompt = LongestQueuedPrompt(load);
  if (load.now - last_change_ >= options_.cooldown) {
    const bool long_prompt = prompt >= options_.prompt_tokens;
    const bool calm = queue <= options_.queue_back * options_.queue &&
                      prompt <= options_.prompt_back * options_.prompt_tokens;
    if ((queue >= options_.queue || long_prompt) && target_ < max_level_) {
      ++target_;
      decision.reason = queue >= options_.queue
                            ? fmt::format("queue: {} waiting, threshold {}", queue, options_.queue)
                            : fmt::format("prompt: {} tokens queued, threshold {}", prompt,
                                          options_.prompt_tokens);
    } else if (calm && target_ > 0) {
      --target_;
      decision.reason =
          fmt::format("calm: {} waiting, longest queued prompt {} tokens", queue, prompt);
    }
    if (!decision.reason.empty()) last_change_ = load.now;
  }
  decision.target = target_;
  if (!options_.raise_running) return decision;
  for (const SequenceLoad& s : load.running) {
    const int level = LevelAt(s, target_);
    if (level > s.level && s.cached_tokens > 0) decision.raises.push_back({s.id, level});
  }
  if (!decision.raises.empty() && decision.reason.empty()) {
    decision.reason = fmt::format("queue: running sequences follow the target {}", target_);
  }
  return decision;
}

}  // namespace dsla
