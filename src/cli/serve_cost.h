// The cost model of `dsla serve`: measured at the start, or read from the file that an earlier
// start left.
#pragma once

#include <string>

#include "adapt/cost_model.h"
#include "base/status.h"
#include "cli/model_args.h"

namespace dsla {

struct ServeCost {
  CostModel model;
  bool measured = false;  // now; otherwise read
};

// `path`: of --cost-model; empty: measure, and keep nothing. A file is taken only for the model,
// adapter, formats and threads that it was measured with: kInvalidArgument names both. One that was
// not there is written. top_level: the highest that a policy may choose.
Expected<ServeCost> CostForServing(const LoadedModel& loaded, int top_level,
                                   const std::string& path);

}  // namespace dsla
