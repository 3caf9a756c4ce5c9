// What this machine can do at best, measured: the limits that speeds are stated as shares of.
#pragma once

#include "base/exec.h"
#include "base/status.h"
#include "model/device.h"

namespace dsla {

struct MachineLimits {
  double read_bytes_per_second = 0;  // all threads reading a buffer far larger than the caches
  double gemm_flops =
      0;  // fp32 product of 512 rows through the linear operator: its largest shape in use
};

// Of the device where there is one: of a copy, and of a large product in bf16. Takes about a
// second. Error: PrepareLinear's.
Expected<MachineLimits> MeasureMachine(const ExecContext& ctx, Device* device);

}  // namespace dsla
