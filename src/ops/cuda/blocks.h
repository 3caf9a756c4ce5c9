// Copies of blocks of memory within a GPU, many in one launch.
#pragma once

#include <cstdint>
#include <span>

#include "ops/cuda/stream.h"

namespace dsla::cuda {

// Multiples of 16 bytes, at such addresses. A null `from` stands for zeros.
struct DeviceCopy {
  void* to;
  const void* from;
};

// `bytes` bytes each, all at once: none writes what another one reads or writes.
DSLA_CUDA_EXPORT int CopyOnDevice(std::span<const DeviceCopy> copies, int64_t bytes, Stream stream);

}  // namespace dsla::cuda
