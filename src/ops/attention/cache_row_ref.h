// What a cache holds of one head's row of K or V, for oracles and tests: scalar.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "base/dtype.h"
#include "base/half.h"

namespace dsla {

// x [D] to element `at` of `base`. scale: the row's, written for kI8 alone.
inline void PutCacheRowRef(DType type, const float* x, int D, void* base, int64_t at,
                           float* scale) {
  float most = 0;
  for (int d = 0; d < D; ++d) most = std::max(most, std::abs(x[d]));
  for (int d = 0; d < D; ++d) {
    switch (type) {
      case DType::kF32:
        static_cast<float*>(base)[at + d] = x[d];
        break;
      case DType::kBF16:
        static_cast<bf16*>(base)[at + d] = ToBf16(x[d]);
        break;
      case DType::kI8:
        static_cast<int8_t*>(base)[at + d] =
            most > 0 ? static_cast<int8_t>(std::nearbyint(x[d] * (127.f / most))) : int8_t{0};
        break;
    }
  }
  if (type == DType::kI8) *scale = most / 127.f;
}

}  // namespace dsla
