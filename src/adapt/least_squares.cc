#include "adapt/least_squares.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace dsla {
namespace {

using Vector = std::array<double, kMaxFeatures>;

// Normal equations of the relative errors, columns scaled to a largest entry of 1.
struct Normal {
  Vector scale{};  // 0: the feature is 0 everywhere
  std::array<Vector, kMaxFeatures> gram{};
  Vector right{};
};

Normal MakeNormal(const std::vector<Observation>& observations) {
  Normal normal;
  for (const Observation& o : observations) {
    for (int i = 0; i < kMaxFeatures; ++i) {
      normal.scale[i] = std::max(normal.scale[i], std::abs(o.features[i] / o.value));
    }
  }
  for (const Observation& o : observations) {
    Vector row{};
    for (int i = 0; i < kMaxFeatures; ++i) {
      if (normal.scale[i] > 0) row[i] = o.features[i] / o.value / normal.scale[i];
    }
    for (int i = 0; i < kMaxFeatures; ++i) {
      for (int j = 0; j < kMaxFeatures; ++j) normal.gram[i][j] += row[i] * row[j];
      normal.right[i] += row[i];  // the value divided by itself is 1
    }
  }
  return normal;
}

// Solves for the features in `set`, the others 0; false where they are linearly dependent.
bool Solve(const Normal& normal, unsigned set, Vector& x) {
  std::array<int, kMaxFeatures> index{};
  int n = 0;
  for (int i = 0; i < kMaxFeatures; ++i) {
    if (set >> i & 1) index[n++] = i;
  }
  std::array<std::array<double, kMaxFeatures + 1>, kMaxFeatures> a{};
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) a[i][j] = normal.gram[index[i]][index[j]];
    a[i][n] = normal.right[index[i]];
  }
  for (int i = 0; i < n; ++i) {
    int pivot = i;
    for (int j = i + 1; j < n; ++j) {
      if (std::abs(a[j][i]) > std::abs(a[pivot][i])) pivot = j;
    }
    // Columns were scaled to 1, so that this is relative.
    if (std::abs(a[pivot][i]) < 1e-12) return false;
    std::swap(a[i], a[pivot]);
    for (int j = i + 1; j < n; ++j) {
      const double factor = a[j][i] / a[i][i];
      for (int c = i; c <= n; ++c) a[j][c] -= factor * a[i][c];
    }
  }
  x = {};
  for (int i = n - 1; i >= 0; --i) {
    double sum = a[i][n];
    for (int j = i + 1; j < n; ++j) sum -= a[i][j] * x[index[j]];
    x[index[i]] = sum / a[i][i];
  }
  return true;
}

double ErrorOf(const std::vector<Observation>& observations, const Vector& x) {
  double sum = 0;
  for (const Observation& o : observations) {
    double predicted = 0;
    for (int i = 0; i < kMaxFeatures; ++i) predicted += o.features[i] * x[i];
    const double error = predicted / o.value - 1;
    sum += error * error;
  }
  return sum;
}

}  // namespace

Vector FitNonNegative(const std::vector<Observation>& observations) {
  const Normal normal = MakeNormal(observations);
  unsigned present = 0;
  for (int i = 0; i < kMaxFeatures; ++i) {
    if (normal.scale[i] > 0) present |= 1u << i;
  }
  Vector best{};
  double best_error = ErrorOf(observations, best);
  for (unsigned set = 1; set < 1u << kMaxFeatures; ++set) {
    Vector x;
    if ((set & ~present) != 0 || !Solve(normal, set, x)) continue;
    for (int i = 0; i < kMaxFeatures; ++i) {
      if (set >> i & 1) x[i] /= normal.scale[i];
    }
    if (*std::min_element(x.begin(), x.end()) < 0) continue;
    if (const double error = ErrorOf(observations, x); error < best_error) {
      best_error = error;
      best = x;
    }
  }
  return best;
}

}  // namespace dsla
