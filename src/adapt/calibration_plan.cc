#include <algorithm>
#include <utility>

#include "adapt/cost_model.h"

namespace dsla {
namespace {

// Of one chunk, about: large chunks are what the engine runs, and they cost less per token than
// small ones. With two a level and three levels, 3 s in all.
constexpr double kChunkSeconds = 0.6;
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

  std::vector<int> levels{0};
  if (limits.top_level > 1) levels.push_back(limits.top_level / 2);
  if (limits.top_level > 0) levels.push_back(limits.top_level);

  CostMeasurements plan;
  // The mid level last: without it the fit is less sure, but whole.
  std::vector<int> order = levels;
  if (order.size() == 3) std::swap(order[1], order[2]);
  for (const int level : order) {
    plan.prefill.push_back({.level = level, .tokens = chunk, .context = 0});
    plan.prefill.push_back({.level = level, .tokens = small, .context = 0});
    plan.prefill.push_back({.level = level, .tokens = chunk, .context = long_context});
    plan.decode.push_back({.rows = {{level, short_context}}});
    plan.decode.push_back({.rows = {{level, long_context}}});
    plan.decode.push_back({.rows = std::vector<DecodeRow>(kSeveralRows, {level, short_context})});
  }
  for (size_t i = 1; i < levels.size(); ++i) {
    // One with long and one with short contexts is enough: every layer folds alike.
    const int64_t length = i == 1 ? long_context : long_context / 4;
    if (length > 0) plan.fold.push_back({.from = levels[i - 1], .to = levels[i], .length = length});
  }
  return plan;
}

}  // namespace dsla
