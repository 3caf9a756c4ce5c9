// The trainer as programs load it: it needs libtorch, which is large and slow to start, so it is a
// library of its own, libdsla_trainer.so, that only training loads.
#pragma once

#include <string>
#include <vector>

#include "base/exec.h"
#include "base/status.h"
#include "distill/distill.h"
#include "distill/write.h"
#include "format/model_file.h"

namespace dsla {

// Distill, RunControls (controls.h) and WriteTexts (write.h).
struct Trainer {
  Expected<DistillOutcome> (*distill)(const ExecContext& ctx, const ModelFile& model,
                                      const DistillJob& job);
  Expected<DistillOutcome> (*run_controls)(const ExecContext& ctx, const ModelFile& model,
                                           const DistillJob& job,
                                           const std::vector<std::string>& names);
  Expected<WriteOutcome> (*write_texts)(const ExecContext& ctx, const ModelFile& model,
                                        const WriteJob& job);
};

// Stays loaded. kUnavailable, naming the file, if the library cannot be loaded.
Expected<const Trainer*> LoadTrainer();

}  // namespace dsla
