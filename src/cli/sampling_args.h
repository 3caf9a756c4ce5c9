// Command-line options of how tokens are drawn, as `dsla run` and `dsla serve` have them.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "format/config.h"
#include "ops/sampling/sampling_params.h"

namespace dsla {

struct SamplingArgs {
  SamplingParams params;                   // as given, else what is set here before AddTo
  std::string generation_config = "auto";  // or "none"

  // All but the seed and the bias of single tokens. `command` is kept.
  void AddTo(CLI::App& command, const char* group);
  // With the model's advice in place of what was not given, unless it is not wanted.
  SamplingParams With(const SamplingAdvice& advice) const;

 private:
  const CLI::App* command_ = nullptr;
};

}  // namespace dsla
