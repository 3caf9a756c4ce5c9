// The cost model of `dsla serve`: measured at the start, or read from the file that an earlier
// start left.
#pragma once

#include <string>

#include "adapt/cost_model.h"
#include "base/status.h"
#include "cli/cost_file.h"
#include "cli/model_args.h"

namespace dsla {

struct CostOptions {
  int top_level = 0;    // the highest that a policy may choose
  std::string file;     // of --cost-model; empty: none
  bool keep = false;    // without one: for later starts, and taken from an earlier one
  std::string version;  // of the program
  std::string simd;     // of --simd
};

struct ServeCost {
  MeasuredCost cost;
  CostFile file = {};        // that it was read from or written to; its path empty: none
  bool named = false;        // by --cost-model
  std::string problem = {};  // why a kept one was not taken, or this one is not kept
};

// A file of --cost-model is taken only for the model, adapter, formats and threads that it was
// measured with: kInvalidArgument names both. One that was not there is written. A kept one belongs
// to all of that, the top level, the longest context measured, the processor and this build of the
// program; whatever is wrong with it, or where a server found it doubtful, it is measured anew.
Expected<ServeCost> CostForServing(const LoadedModel& loaded, const CostOptions& options);

// To be called where the work's factors say that `cost` is doubtful: of a kept one, later starts
// measure anew. What comes of it, for the log. A file that was named is its owner's, and stays.
std::string DoubtCost(const ServeCost& cost, const CostFactors& factors);

}  // namespace dsla
