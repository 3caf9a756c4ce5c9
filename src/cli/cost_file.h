// Cost models in files, each with what it was measured with: those that --cost-model names, and
// those that `dsla serve` keeps by itself.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "adapt/cost_model.h"
#include "base/status.h"

namespace dsla {

// What a file holds.
struct CostRecord {
  MeasuredCost cost;  // without its source
  // The factors for which a server found it doubtful: to be measured anew.
  std::optional<CostFactors> doubted = {};
};

struct CostFile {
  std::string path;
  std::string measured_with = {};

  // Errors, none with a line break: kNotFound where there is no file; kDataLoss where it is not one
  // that Write left; kInvalidArgument where it was measured with something else, naming both.
  Expected<CostRecord> Read() const;
  // Said before the time that measuring takes.
  Status CheckWritable() const;
  // Whole or not at all: a server that is started beside this one may read it.
  Status Write(const CostRecord& record) const;
  // Marks the record of this model. One that is marked already, or is of another model, stays: a
  // server beside this one has measured anew. So does what is no record. (One that is written
  // between the look and the mark is lost, and measured again: nothing worse.)
  Status Doubt(const CostModel& model, const CostFactors& factors) const;
};

// Where the model that was measured with this is kept: a file of its own in $XDG_CACHE_HOME/dsla,
// or ~/.cache/dsla. Empty where the environment names neither by an absolute path.
std::string KeptCostPath(const std::string& measured_with,
                         const std::function<const char*(const char*)>& environment);

}  // namespace dsla
