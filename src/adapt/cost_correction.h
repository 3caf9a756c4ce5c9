// CostCorrection: how far the steps and folds that really ran are from what the cost model says of
// them, as one factor each for prefill, decode and folds.
//
// The model is measured once, perhaps while the machine was busy with something else, and the
// machine does not stay the same. What it says of levels against each other holds longer than its
// seconds do. So the seconds follow the measurements: a mean of the logarithms of measured by
// predicted time, whose weights fade with the time worked since. One step that was held up moves it
// little, as no single ratio counts for more than three times the mean so far.
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
  // `model`: as measured at the start, never a scaled one.
  void ObserveStep(const CostModel& model, const StepTime& step);
  void ObserveFold(const CostModel& model, const FoldPoint& fold);
  CostFactors factors() const { return {prefill_.value(), decode_.value(), fold_.value()}; }

 private:
  class Factor {
   public:
    double value() const;
    // ratio: measured by predicted. seconds: of such work, its weight.
    void Add(double ratio, double seconds);

   private:
    double log_ = 0;
    double weight_ = 0.05;  // seconds of work that the model itself is worth
  };

  Factor prefill_, decode_, fold_;
};

}  // namespace dsla
