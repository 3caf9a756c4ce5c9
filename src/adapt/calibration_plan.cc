#include <algorithm>

#include "adapt/cost_model.h"

namespace dsla {
namespace {

// Of one chunk, about: large chunks are what the engine runs, and they cost less per token than
// small ones. With two a level and two levels, a round over all points takes 2 s.
constexpr double kChunkSeconds = 0.3;
constexpr int64_t kSmallChunk = 32;  // the tail of a prompt
constexpr int64_t kShortContext = 64;
constexpr int64_t kLongContext = 4096;
constexpr int kSeveralRows = 6;

}  // namespace

CostMeasurements CalibrationPlan(const CalibrationLimits& limits) {
  // Whole chunks of the operator where they are that large, whole tiles of it otherwise.
  const auto wanted = static_cast<int64_t>(kChunkSeconds * limits.tokens_per_second);
  const int64_t by_rate = wanted >= 128 ? wanted / 64 * 64 : wanted / 16 * 16;
  // A third of what fits at most, so that several short sequences fit beside the long one.
  const int64_t fits = std::min(limits.max_positions, limits.memory_tokens / 3);
  // Half of it at most, so that there is a long context for any rate.
  const int64_t chunk =
      std::max<int64_t>(1, std::min(std::clamp<int64_t>(by_rate, 64, 512), fits / 2));
  const int64_t small = std::max<int64_t>(1, std::min(kSmallChunk, chunk / 2));
  const int64_t long_context = std::clamp<int64_t>(fits - chunk, 0, kLongContext);
  const int64_t short_context = std::min(kShortContext, long_context);

  // The model is linear in the level: between the ends there is nothing to learn.
  std::vector<int> levels{0};
  if (limits.top_level > 0) levels.push_back(limits.top_level);

  CostMeasurements plan;
  for (const int level : levels) {
    plan.prefill.push_back({.level = level, .tokens = chunk, .context = 0});
    plan.prefill.push_back({.level = level, .tokens = small, .context = 0});
    plan.prefill.push_back({.level = level, .tokens = chunk, .context = long_context});
    plan.decode.push_back({.rows = {{level, short_context}}});
    plan.decode.push_back({.rows = {{level, long_context}}});
    plan.decode.push_back({.rows = std::vector<DecodeRow>(kSeveralRows, {level, short_context})});
  }
  // One with a long and one with a short context is enough: every layer folds alike.
  const int middle = limits.top_level / 2;
  const auto fold = [&](int from, int to, int64_t length) {
    if (to > from && length > 0) plan.fold.push_back({.from = from, .to = to, .length = length});
  };
  fold(0, std::max(middle, std::min(limits.top_level, 1)), long_context);
  if (middle > 0) fold(middle, limits.top_level, long_context / 4);
  return plan;
}

}  // namespace dsla
