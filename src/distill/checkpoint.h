// Checkpoints of a training stage: a manifest `NAME.json` and safetensors shards of at most 15 MiB
// beside it. The manifest appears last, by renaming, and names its shards with their hashes: a
// checkpoint is the old one or the new one, whenever the process ends.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "base/status.h"
#include "distill/network.h"

namespace dsla {

struct Checkpoint {
  std::string stage;     // init, align, chain
  std::string settings;  // what its contents depend on, as text (StageSettings and the inputs)
  int64_t step = 0, steps = 0;
  int64_t tokens = 0;
  double seconds = 0;  // of training, all pieces together
  bool done = false;
  OptimizerState state;
};

// Replaces the checkpoint `name` in `folder`, then removes the old one's shards. Errors: kInternal
// with the system's reason (a full disk); the old checkpoint then stands.
Status SaveCheckpoint(const Checkpoint& checkpoint, const std::string& folder,
                      const std::string& name);

// None if there is no manifest. kDataLoss naming the file for anything that does not fit together.
Expected<std::optional<Checkpoint>> LoadCheckpoint(const std::string& folder,
                                                   const std::string& name);

}  // namespace dsla
