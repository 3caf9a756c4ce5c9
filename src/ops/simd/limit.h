// Which of the vector extensions that the CPU has are used.
#pragma once

#include <string>

#include "base/status.h"
#include "hwy/targets.h"

namespace dsla {

// "auto": the widest; "avx2": none of AVX-512, for measuring what a CPU without it does. For the
// whole process, before the first kernel runs. kInvalidArgument for another name.
inline Status LimitSimd(const std::string& name) {
  if (name == "avx2") {
    hwy::DisableTargets(HWY_AVX2 - 1);  // better targets have lower bits
    return Status::Ok();
  }
  return name == "auto" ? Status::Ok()
                        : InvalidArgument("--simd: '{}' is not one of auto, avx2", name);
}

}  // namespace dsla
