// CostCorrection: how far the steps and folds that really ran are from what the cost model says of
// them, as one factor each for prefill, decode and folds.
//
// The model is measured once, perhaps while the machine was busy with something else, and the
// machine does not stay the same. What it says of levels against each other holds longer than its
// seconds do. So the seconds follow the measurements: a mean of the logarithms of measured by
// predicted time, whose weights fade with the time worked since. One step that was held up moves it
// little, as no single ratio counts for more than three times the mean so far.
//
// Factors cannot mend what a busy machine did to the measured points against each other. So where
// one stays far from 1 for long, the measurement is doubtful, and somebody should take it again.
#pragma once

#include <span>

#include "adapt/cost_model.h"
#include "adapt/policy.h"

namespace dsla {

// What `model` says of a step, by kind; together they are the step's time.
struct StepParts {
  double prefill = 0;  // chunks, and what a step with prefill costs whatever it does
  double decode = 0;   // rows, and, in a step of decodes alone, the step itself
};
StepParts PredictStep(const CostModel& model, const StepTime& step);

class CostCorrection {
 public:
  // usual: MeasuredCost's.
  explicit CostCorrection(const CostFactors& usual = {})
      : prefill_(usual.prefill), decode_(usual.decode), fold_(usual.fold) {}
  // `model`: as measured at the start, never a scaled one.
  void ObserveStep(const CostModel& model, const StepTime& step);
  void ObserveFold(const CostModel& model, const FoldPoint& fold);
  CostFactors factors() const { return {prefill_.value(), decode_.value(), fold_.value()}; }
  // For the last 20 seconds of a kind's work its factor has been more than twice, or less than
  // half, of both 1 and its usual one.
  bool doubtful() const { return prefill_.doubtful() || decode_.doubtful() || fold_.doubtful(); }

 private:
  class Factor {
   public:
    explicit Factor(double usual);
    double value() const;
    bool doubtful() const;
    // ratio: measured by predicted. seconds: of such work, its weight.
    void Add(double ratio, double seconds);

   private:
    double usual_log_;
    double log_ = 0;
    double weight_ = 0.05;    // seconds of work that the model itself is worth
    double far_seconds_ = 0;  // of work since it was last near 1 or its usual value
  };

  Factor prefill_, decode_, fold_;
};

}  // namespace dsla
