// CostModel: seconds of a prefill chunk, a decode step and a fold on this machine, by level and
// length. A pure value: linear in a few features whose coefficients cannot be negative, fitted to
// measurements by least squares of relative errors.
//
//   prefill of n tokens after c cached ones at level k of L:
//     p0 + n ((L-k) p1 + k p2) + (L-k) n (c + n/2) p3
//   decode step of rows r with k_r, and length_r cached:
//     d0 + sum_r [ (L-k_r) d1 + k_r d2 + (L-k_r) length_r d3 ]
//   fold of m layers of a sequence with c cached tokens: m (f0 + c f1)
//
// p0 and d0 hold what a step costs whatever it does (weights read once, launches); p1, p2, d1 and
// d2 a layer's work per token, by kind; p3 and d3 exact attention, the only part that grows with
// the context.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace dsla {

struct DecodeRow {
  int level = 0;
  int64_t length = 0;  // tokens cached
};

// Points at which to measure, or that were measured.
struct PrefillPoint {
  int level = 0;
  int64_t tokens = 0;   // in one chunk
  int64_t context = 0;  // cached before
  double seconds = 0;
};
struct DecodePoint {
  std::vector<DecodeRow> rows;
  double seconds = 0;
};
struct FoldPoint {
  int from = 0, to = 0;  // levels
  int64_t length = 0;
  double seconds = 0;
};
struct CostMeasurements {
  std::vector<PrefillPoint> prefill;
  std::vector<DecodePoint> decode;
  std::vector<FoldPoint> fold;
};

// Measured time by predicted time, of each kind of work.
struct CostFactors {
  double prefill = 1, decode = 1, fold = 1;
};

class CostModel {
 public:
  CostModel() = default;  // everything costs nothing: layers() is 0

  // kInvalidArgument when there are too few points or a time is not positive. Without an adapter
  // there are no fold points and every level is 0; folds then cost nothing.
  static Expected<CostModel> Fit(int layers, const CostMeasurements& measured);
  static CostModel FromCoefficients(int layers, const std::array<double, 4>& prefill,
                                    const std::array<double, 4>& decode,
                                    const std::array<double, 2>& fold);

  int layers() const { return layers_; }

  double PrefillSeconds(int level, int64_t tokens, int64_t context) const;  // one chunk
  // A prompt in chunks of `chunk` tokens.
  double PromptSeconds(int level, int64_t tokens, int64_t context, int64_t chunk) const;
  double DecodeSeconds(std::span<const DecodeRow> rows) const;  // one step
  double FoldSeconds(int from, int to, int64_t length) const;

  // Parts, for sums over many sequences: what a step costs whatever it does (one of decodes alone,
  // one with prefill), and what one decode row adds.
  double step_seconds() const { return decode_[0]; }
  double prefill_step_seconds() const { return prefill_[0]; }
  double RowSeconds(int level, int64_t length) const;

  // The same with every time multiplied by its kind's factor.
  CostModel Scaled(const CostFactors& factors) const;

  // Largest relative error over the points it was fitted to.
  double max_error() const { return max_error_; }

  std::string ToJson() const;
  static Expected<CostModel> FromJson(std::string_view text);

  // One line with the figures that matter, for the log.
  std::string Summary() const;

 private:
  int layers_ = 0;
  std::array<double, 4> prefill_{}, decode_{};
  std::array<double, 2> fold_{};
  double max_error_ = 0;
};

// Those by `model` of work that had `factors` by another one.
CostFactors FactorsBy(const CostModel& model, const CostModel& other, const CostFactors& factors);

enum class CostSource { kNone, kMeasured, kKept, kFile };
const char* Name(CostSource source);

// A cost model that is served with, and where it comes from.
struct MeasuredCost {
  CostModel model;
  // Of the work for which a measurement before this one was doubted, by this one. If they come back
  // it is the work that differs from what is measured, and measuring again is no use.
  CostFactors usual;
  int64_t measured_at = 0;  // Unix seconds; 0: not known
  // Measured by this start; by an earlier one, and kept by it; read from a file that was named.
  CostSource source = CostSource::kNone;
};

// What to measure at start-up: levels 0 and the top, short and long contexts, one row and several.
// A few seconds' work: `tokens_per_second` is a rough prefill rate that scales the chunks, so that
// a slow machine measures less.
struct CalibrationLimits {
  int layers = 0;
  int top_level = 0;          // 0 = there is no adapter
  int64_t max_positions = 0;  // longest sequence
  int64_t memory_tokens = 0;  // tokens at level 0 that fit the cache memory
  double tokens_per_second = 0;
};
CostMeasurements CalibrationPlan(const CalibrationLimits& limits);

}  // namespace dsla
