#include <algorithm>
#include <cmath>
#include <vector>

#include "base/half.h"
#include "ops/linear/linear.h"

namespace dsla {
namespace {

constexpr int64_t kGroup = 32;

// The choice of an integer is part of what is specified, in fp32, so that a value half-way between
// two falls the same way everywhere; the sums are fp64.
float RoundF16(float x) { return ToFloat(ToF16(x)); }
float Inverse(float step) { return step > 0 ? 1.f / step : 0.f; }

// The values that w gets with scale d, minimum m and integers in [low, high].
std::vector<double> Values(const float* w, int64_t count, float d, float m, float low, float high) {
  std::vector<double> values;
  for (int64_t i = 0; i < count; ++i) {
    const float q = std::clamp(std::nearbyint((w[i] - m) * Inverse(d)), low, high);
    values.push_back(double{m} + double{d} * q);
  }
  return values;
}
double SquaredError(const float* w, const std::vector<double>& values) {
  double error = 0;
  for (const double value : values) error += (value - *w) * (value - *w), ++w;
  return error;
}

// One group of 32 inputs, in place.
void RoundGroup(WeightFormat format, float* w, int64_t count) {
  const auto [low, high] = std::minmax_element(w, w + count);
  std::vector<double> values;
  if (format == WeightFormat::kInt4) {
    const float m = RoundF16(*low);
    values = Values(w, count, RoundF16((*high - m) / 15.f), m, 0, 15);
  } else {
    values = Values(w, count, RoundF16(std::max(-*low, *high) / 127.f), 0, -127, 127);
    const auto centred = Values(w, count, RoundF16((*high - *low) / 240.f),
                                RoundF16(*low + (*high - *low) / 2), -120, 120);
    if (SquaredError(w, centred) < SquaredError(w, values)) values = centred;
  }
  for (int64_t i = 0; i < count; ++i) w[i] = static_cast<float>(values[static_cast<size_t>(i)]);
}

std::vector<float> RoundWeight(std::span<const float> weight, int64_t out, int64_t in,
                               WeightFormat format) {
  std::vector<float> w(weight.begin(), weight.end());
  for (int64_t o = 0; o < out; ++o) {
    float* row = w.data() + o * in;
    if (format == WeightFormat::kBF16) {
      for (int64_t k = 0; k < in; ++k) row[k] = ToFloat(ToBf16(row[k]));
    } else if (format != WeightFormat::kF32) {
      for (int64_t k = 0; k < in; k += kGroup)
        RoundGroup(format, row + k, std::min(kGroup, in - k));
    }
  }
  return w;
}

std::vector<double> RoundRow(const float* x, int64_t in) {
  std::vector<double> row(x, x + in);
  for (int64_t k = 0; k < in; k += kGroup) {
    const int64_t end = std::min(k + kGroup, in);
    float largest = 0;
    for (int64_t i = k; i < end; ++i) largest = std::max(largest, std::abs(x[i]));
    const float inverse = largest > 0 ? 16256.f / largest : 0.f;
    for (int64_t i = k; i < end; ++i)
      row[i] = double{largest} / 16256. * std::nearbyint(x[i] * inverse);
  }
  return row;
}

}  // namespace

void LinearRef(std::span<const float> weight, int64_t out, int64_t in, WeightFormat format,
               std::span<const float> bias, const float* x, int64_t x_stride, int64_t T, float* y,
               int64_t y_stride, bool round_activations) {
  const std::vector<float> rounded = RoundWeight(weight, out, in, format);
  for (int64_t t = 0; t < T; ++t) {
    const float* from = x + t * x_stride;
    const std::vector<double> row =
        round_activations ? RoundRow(from, in) : std::vector<double>(from, from + in);
    for (int64_t o = 0; o < out; ++o) {
      double sum = bias.empty() ? 0. : bias[static_cast<size_t>(o)];
      for (int64_t k = 0; k < in; ++k) sum += rounded[static_cast<size_t>(o * in + k)] * row[k];
      y[t * y_stride + o] = static_cast<float>(sum);
    }
  }
}

}  // namespace dsla
