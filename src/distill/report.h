// The report of a run, from what its folder holds: the log, the order and the evaluation.
#pragma once

#include <string>

#include "base/status.h"

namespace dsla {

// Writes report.md and report.html (with plots, self-contained) into the run's folder. What a stage
// has not made yet is left out. Errors: those of reading the files; kInternal.
Status WriteReport(const std::string& folder);

}  // namespace dsla
