#include <cmath>
#include <vector>

#include "ops/norm_rope/norm_rope.h"

namespace dsla {
namespace {

double InverseRms(const float* x, int64_t n, float eps) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * x[i];
  return 1 / std::sqrt(squares / static_cast<double>(n) + eps);
}

}  // namespace

void RmsNormRef(const float* x, const float* weight, float eps, int64_t T, int64_t C, float* out) {
  for (int64_t t = 0; t < T; ++t) {
    const double scale = InverseRms(x + t * C, C, eps);
    for (int64_t i = 0; i < C; ++i)
      out[t * C + i] = static_cast<float>(x[t * C + i] * scale * weight[i]);
  }
}

void SiluMulRef(const float* gate_up, int64_t T, int64_t ffn, float* out) {
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t i = 0; i < ffn; ++i) {
      const double gate = gate_up[t * 2 * ffn + i], up = gate_up[t * 2 * ffn + ffn + i];
      out[t * ffn + i] = static_cast<float>(gate / (1 + std::exp(-gate)) * up);
    }
  }
}

void NormRopeRef(const RopeArgs& a) {
  const int D = a.table->D(), half = D / 2;
  std::vector<double> u(static_cast<size_t>(D));
  for (int64_t t = 0; t < a.T; ++t) {
    for (int h = 0; h < a.heads; ++h) {
      float* x = a.x + t * a.stride + h * D;
      const double scale = a.norm_weight != nullptr ? InverseRms(x, D, a.norm_eps) : 1;
      for (int d = 0; d < D; ++d)
        u[static_cast<size_t>(d)] =
            x[d] * scale * (a.norm_weight != nullptr ? a.norm_weight[d] : 1);
      for (int d = 0; d < half; ++d) {
        const double cos = a.table->cos()[static_cast<int64_t>(a.positions[t]) * half + d];
        const double sin = a.table->sin()[static_cast<int64_t>(a.positions[t]) * half + d];
        const double first = u[static_cast<size_t>(d)], second = u[static_cast<size_t>(d + half)];
        x[d] = static_cast<float>(first * cos - second * sin);
        x[d + half] = static_cast<float>(second * cos + first * sin);
      }
    }
  }
}

}  // namespace dsla
