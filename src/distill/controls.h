// The control set: the same training on the same tokens with one thing changed, and one table that
// tells what each thing is worth.
#pragma once

#include <string>
#include <vector>

#include "distill/distill.h"

namespace dsla {

struct Control {
  const char* name;
  const char* what;  // for people
};

// "ours", the settings as given, comes first.
const std::vector<Control>& Controls();

// Whether the control differs from the settings in its one thing: of single-state and dual-state
// one does.
bool IsControlOf(const std::string& name, const DistillConfig& config);

// Changes `config` into that control's. Equal bytes means those of the given window, sinks and
// states. kInvalidArgument for an unknown name and where there are no equal bytes.
Status ApplyControl(const std::string& name, const ModelConfig& model, DistillConfig* config);

// What a converted layer keeps, in bytes, as tokens of a bf16 KV cache: a state of F features is F
// rows of D fp32 numbers for a KV head, a token 2 rows of D bf16 numbers.
int64_t TokenBytes(const DistillConfig& config, const ModelConfig& model);

// Runs the named controls (empty: all that are controls of these settings) one after another, each
// as Distill would, in `job.work` (else `job.out`.controls) / NAME, and after each writes
// controls.md, controls.json and controls.svg over all that is there. Data are tokenised once;
// controls of the order begin with the layers that "ours" has aligned. Cut short, the same call
// goes on. `stop_after` is for all together. Errors: Distill's, with the control's name;
// kInvalidArgument for several ranks.
Expected<DistillOutcome> RunControls(const ExecContext& ctx, const ModelFile& model,
                                     const DistillJob& job, const std::vector<std::string>& names);

}  // namespace dsla
