// Runs a calibration plan on a machine that may be busy with other things, within a bound of time.
//
// What disturbs a run only makes it longer, and hardly twice by the same amount. So of several runs
// of a point the fastest counts, and it is run again until another run comes close to it. Rounds go
// over all points, so that a disturbance of some seconds does not hit all runs of one.
#pragma once

#include "adapt/cost_model.h"
#include "base/status.h"

namespace dsla {

// What runs the points: the model on this machine, or a simulation in tests.
class CostProbe {
 public:
  virtual ~CostProbe() = default;
  virtual double Now() = 0;  // seconds, monotonic
  // Seconds of one run, or kResourceExhausted where the point does not fit the memory.
  virtual Expected<double> Run(const PrefillPoint& point) = 0;
  virtual Expected<double> Run(const DecodePoint& point) = 0;
  virtual Expected<double> Run(const FoldPoint& point) = 0;
};

// Each point of `plan` (of CalibrationPlan) once, then as long as there is time those that are not
// confirmed yet. deadline: on the probe's clock. Points that do not fit the memory are left out;
// kResourceExhausted where too few are left, or none at `top_level`.
Expected<CostModel> RunCalibration(CostProbe& probe, int layers, int top_level,
                                   const CostMeasurements& plan, double deadline);

}  // namespace dsla
