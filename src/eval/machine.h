// What this machine can do at best, measured: the limits that speeds are stated as shares of.
#pragma once

#include "base/exec.h"

namespace dsla {

struct MachineLimits {
  double read_bytes_per_second = 0;  // all threads reading a buffer far larger than the caches
  double gemm_flops =
      0;  // fp32 product of 512 rows through the linear operator: its largest shape in use
};

// Takes about a second.
MachineLimits MeasureMachine(const ExecContext& ctx);

}  // namespace dsla
