// Distillation: trains an adapter for a model, in stages that each leave their result in a folder.
//   prepare   text to a token file
//   init      the start: half-lives, claims from the window's mean log-sum-exp
//   align     all layers at once, each on the teacher's input to its output
//   order     the ladder
//   chain     hybrids of the ladder's levels to the teacher's logits
//   evaluate  the result on held-out text
//   export    the adapter file
// A stage that is done is not done again; one that was cut short, at any moment, goes on from its
// last checkpoint to the same result (on the CPU to the last bit).
//
// Method: docs/distillation.md.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "base/exec.h"
#include "base/status.h"
#include "distill/config.h"
#include "distill/ranks.h"
#include "format/model_file.h"

namespace dsla {

struct DistillJob {
  std::vector<std::string> data;   // text files (see prepare.h), or one token file
  std::vector<std::string> valid;  // likewise; empty: documents held out of `data`
  std::string out;                 // the adapter file
  std::string work;                // the folder of the run; empty: `out` with .work behind it
  std::string start;               // an adapter to go on from; empty: a fresh start
  std::string stage;               // one of the above; empty: all of them
  DistillConfig config;
  double stop_after = 0;  // seconds, then a checkpoint is left and the run ends; 0: no limit
  bool quiet = false;
  // The processes that train together. All are given the same job but for their rank, and see the
  // same files: rank 0 writes them, and does alone what is not align or chain. Rank r of a machine
  // takes its GPU r.
  RankOptions ranks;
  // Asked between steps, and in init between layers: whether to leave a checkpoint and end. One
  // rank's yes counts for all.
  std::function<bool()> interrupted;
};

struct DistillOutcome {
  bool finished = false;  // false: cut short by stop_after or `interrupted`
  std::string stage;      // the last one that ran
};

// Errors, each one line: kInvalidArgument for settings, too few tokens, a stage whose input is not
// there, a folder that holds the work of other settings; kDataLoss for data that are no text and
// damaged work; kInternal for files that cannot be written, and for a loss that is no number, which
// ends the run, names the batch and leaves the last good checkpoint; kUnavailable where other ranks
// do not come, have failed or are gone.
Expected<DistillOutcome> Distill(const ExecContext& ctx, const ModelFile& model,
                                 const DistillJob& job);

}  // namespace dsla
