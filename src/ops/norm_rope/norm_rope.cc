#include "ops/norm_rope/norm_rope.h"

#include <cmath>

#include "base/check.h"
#include "ops/norm_rope/norm_rope_kernels.h"

namespace dsla {
void RmsNorm(const ExecContext& ctx, const float* x, const float* weight, float eps, int64_t T,
             int64_t C, float* out) {
  ForRows(ctx, T, C, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t)
      RmsNormRow(nullptr, x + t * C, nullptr, weight, eps, C, out + t * C);
  });
}

void AddRmsNormRow(float* x, const float* delta, const float* weight, float eps, int64_t C,
                   float* out) {
  RmsNormRow(x, x, delta, weight, eps, C, out);
}

RopeTable::RopeTable(std::span<const double> frequencies, int64_t positions)
    : positions_(positions), half_(static_cast<int>(frequencies.size())) {
  cos_.Resize(positions * half_);
  sin_.Resize(positions * half_);
  for (int64_t p = 0; p < positions; ++p) {
    for (int i = 0; i < half_; ++i) {
      // The reduction modulo 2 pi is the library's, in fp64: in fp32 the angle of position 100,000
      // would be off by 0.004.
      const double angle = static_cast<double>(p) * frequencies[static_cast<size_t>(i)];
      cos_[p * half_ + i] = static_cast<float>(std::cos(angle));
      sin_[p * half_ + i] = static_cast<float>(std::sin(angle));
    }
  }
}

void NormRope(const ExecContext& ctx, const RopeArgs& args) {
  DSLA_CHECK(args.table != nullptr);
  const int64_t width = static_cast<int64_t>(args.heads) * args.table->D();
  DSLA_CHECK(args.T <= 1 || args.stride >= width);
  for (int64_t t = 0; t < args.T; ++t)
    DSLA_CHECK(args.positions[t] >= 0 && args.positions[t] < args.table->positions());
  ForRows(ctx, args.T, width,
          [&](int64_t begin, int64_t end, int) { NormRopeRows(args, begin, end); });
}

}  // namespace dsla
