#include "base/half.h"
#include "ops/linear/linear.h"

namespace dsla {

void LinearRef(std::span<const float> weight, int64_t out, int64_t in, DType dtype,
               std::span<const float> bias, const float* x, int64_t x_stride, int64_t T, float* y,
               int64_t y_stride) {
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t o = 0; o < out; ++o) {
      double sum = bias.empty() ? 0. : bias[static_cast<size_t>(o)];
      for (int64_t k = 0; k < in; ++k) {
        float w = weight[static_cast<size_t>(o * in + k)];
        if (dtype == DType::kBF16) w = ToFloat(ToBf16(w));
        sum += static_cast<double>(w) * x[t * x_stride + k];
      }
      y[t * y_stride + o] = static_cast<float>(sum);
    }
  }
}

}  // namespace dsla
