// Cost models in files, each with what it was measured with: those that --cost-model names, and
// those that `dsla serve` keeps by itself.
#pragma once

#include <functional>
#include <string>

#include "adapt/cost_model.h"
#include "base/status.h"

namespace dsla {

struct CostFile {
  std::string path;
  std::string measured_with = {};

  // Errors, none with a line break: kNotFound where there is no file; kDataLoss where it is not one
  // that Write left; kInvalidArgument where it was measured with something else, naming both.
  Expected<CostModel> Read() const;
  // Said before the time that measuring takes.
  Status CheckWritable() const;
  // Whole or not at all: a server that is started beside this one may read it.
  Status Write(const CostModel& model) const;
};

// Where the model that was measured with this is kept: a file of its own in $XDG_CACHE_HOME/dsla,
// or ~/.cache/dsla. Empty where the environment names neither by an absolute path.
std::string KeptCostPath(const std::string& measured_with,
                         const std::function<const char*(const char*)>& environment);

}  // namespace dsla
