// Writes .safetensors files.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/status.h"

namespace dsla {

struct TensorToWrite {
  std::string name;
  std::vector<int64_t> shape;
  std::span<const float> values;  // row-major, alive until the file is written
};

// Stores every tensor as `dtype`, in the order given. The file appears whole or not at all: it is
// written to `path`.tmp.<process id>, synced and renamed over `path`. Errors: kInternal with the
// system's reason.
Status WriteSafetensors(const std::string& path, const std::map<std::string, std::string>& metadata,
                        const std::vector<TensorToWrite>& tensors, DType dtype);

}  // namespace dsla
