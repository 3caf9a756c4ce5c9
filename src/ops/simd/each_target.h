// For tests: runs a body once per Highway target that was compiled and that this CPU has.
#pragma once

#include <gtest/gtest.h>

#include "hwy/targets.h"

namespace dsla {

// Call it from the file that holds the HWY_EXPORT, so that the target list is that file's.
template <typename Body>
void ForEachTarget(Body&& body) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
}

}  // namespace dsla
