// For tests: how near panel_kernels.cc comes to the product of what was rounded to the weight's
// format.
#pragma once

#include "ops/testing/expect_close.h"

namespace dsla {

// Beside the largest of a segment a weight is off by up to half a 2,047th, an activation by half a
// 5,461st. The largest of normal numbers is below 3.5 deviations: 5.3e-4 of a term (rms, of uniform
// errors), and the same share of the sum. Under 5 deviations of that.
inline constexpr Tolerance kPanelTolerance = {2.7e-3};

}  // namespace dsla
