// Command-line options of how tokens are drawn, as `dsla run` and `dsla serve` have them.
#pragma once

#include <CLI/CLI.hpp>

#include "ops/sampling/sampling_params.h"

namespace dsla {

// All but the seed and the bias of single tokens; what `sampling` holds is their default.
void AddSamplingArgs(CLI::App& command, SamplingParams& sampling, const char* group);

}  // namespace dsla
