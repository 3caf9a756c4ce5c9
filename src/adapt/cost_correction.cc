#include "adapt/cost_correction.h"

#include <algorithm>
#include <cmath>

namespace dsla {
namespace {

constexpr double kMemorySeconds = 5;    // of work, after which an observation counts for 1/e
constexpr double kMostOfOne = 3;        // a ratio counts as at most so many times the mean, or 1/so
constexpr double kMostInAll = 64;       // beyond it, what is wrong is not the machine's speed
constexpr double kLeastSeconds = 1e-7;  // less than this is the clock, not the work
constexpr double kFar = 2;              // times, or 1/so
constexpr double kDoubtSeconds = 20;    // of work, which outlasts what one disturbance does

}  // namespace

StepParts PredictStep(const CostModel& model, const StepTime& step) {
  StepParts parts;
  for (const PrefillPoint& chunk : step.prefill) {
    // A step of several chunks reads the weights once.
    parts.prefill += model.PrefillSeconds(chunk.level, chunk.tokens, chunk.context) -
                     model.prefill_step_seconds();
  }
  for (const DecodeRow& row : step.decode) parts.decode += model.RowSeconds(row.level, row.length);
  if (!step.prefill.empty()) {
    parts.prefill += model.prefill_step_seconds();
  } else if (!step.decode.empty()) {
    parts.decode += model.step_seconds();
  }
  return parts;
}

CostCorrection::Factor::Factor(double usual) : usual_log_(std::log(usual)) {}

bool CostCorrection::Factor::doubtful() const { return far_seconds_ >= kDoubtSeconds; }

double CostCorrection::Factor::value() const { return std::exp(log_); }

void CostCorrection::Factor::Add(double ratio, double seconds) {
  if (!std::isfinite(ratio) || ratio <= 0 || seconds <= 0) return;
  const double most = std::log(kMostOfOne);
  const double log = std::clamp(std::log(ratio), log_ - most, log_ + most);
  const double old = weight_ * std::exp(-seconds / kMemorySeconds);
  weight_ = old + seconds;
  log_ = (old * log_ + seconds * log) / weight_;
  log_ = std::clamp(log_, -std::log(kMostInAll), std::log(kMostInAll));
  const double distance = std::min(std::abs(log_), std::abs(log_ - usual_log_));
  far_seconds_ = distance > std::log(kFar) ? far_seconds_ + seconds : 0;
}

void CostCorrection::ObserveStep(const CostModel& model, const StepTime& step) {
  const StepParts parts = PredictStep(model, step);
  const double prefill = prefill_.value() * parts.prefill;
  const double decode = decode_.value() * parts.decode;
  const double expected = prefill + decode;
  if (expected < kLeastSeconds || step.seconds < kLeastSeconds) return;
  // A step of both kinds says nothing of either alone: each takes its share of what was unexpected.
  const double ratio = step.seconds / expected;
  // The shorter of both: a step that was held up must not weigh more for it.
  const double weight = std::min(step.seconds, expected);
  prefill_.Add(prefill_.value() * ratio, weight * prefill / expected);
  decode_.Add(decode_.value() * ratio, weight * decode / expected);
}

void CostCorrection::ObserveFold(const CostModel& model, const FoldPoint& fold) {
  const double predicted = model.FoldSeconds(fold.from, fold.to, fold.length);
  if (predicted < kLeastSeconds || fold.seconds < kLeastSeconds) return;
  fold_.Add(fold.seconds / predicted, std::min(fold.seconds, fold_.value() * predicted));
}

}  // namespace dsla
