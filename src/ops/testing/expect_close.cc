#include "ops/testing/expect_close.h"

#include <algorithm>
#include <limits>

namespace dsla {
namespace {

template <typename T>
double RootMeanSquare(std::span<const T> x) {
  double sum = 0;
  int64_t count = 0;
  for (const T v : x) {
    if (!std::isfinite(v)) continue;
    sum += static_cast<double>(v) * static_cast<double>(v);
    ++count;
  }
  return count ? std::sqrt(sum / static_cast<double>(count)) : 0;
}

// The error in units of what is allowed at `scale`; infinite where no error is tolerable.
double Excess(double got, double want, double allowed) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (std::isnan(got) || std::isnan(want)) return kInfinity;
  if (got == want) return 0;
  if (std::isinf(got) || std::isinf(want)) return kInfinity;
  const double error = std::abs(got - want);
  return error > allowed && allowed == 0 ? kInfinity : error / allowed;
}

template <typename Got, typename Want>
::testing::AssertionResult Compare(std::span<const Got> got, std::span<const Want> want,
                                   Tolerance tolerance) {
  if (!(tolerance.relative >= 0 && tolerance.relative < 1))
    return ::testing::AssertionFailure() << "senseless tolerance " << tolerance.relative;
  if (got.size() != want.size())
    return ::testing::AssertionFailure()
           << "sizes differ: got " << got.size() << ", want " << want.size();
  const double rms = RootMeanSquare(want);
  size_t failures = 0, worst = 0;
  double worst_excess = 1;
  for (size_t i = 0; i < got.size(); ++i) {
    const double scale = std::max(std::abs(static_cast<double>(want[i])), rms);
    const double excess = Excess(got[i], want[i], tolerance.relative * scale);
    if (excess <= 1) continue;
    ++failures;
    if (excess > worst_excess) {
      worst_excess = excess;
      worst = i;
    }
  }
  if (failures == 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << failures << " of " << got.size() << " elements are off, the worst at " << worst
         << ": got " << ::testing::PrintToString(got[worst]) << ", want "
         << ::testing::PrintToString(want[worst]) << ", " << worst_excess << " times the tolerance "
         << tolerance.relative << " (rms of the reference " << rms << ")";
}

void Report(const ::testing::AssertionResult& result, const char* file, int line) {
  if (!result) ADD_FAILURE_AT(file, line) << result.message();
}

}  // namespace

::testing::AssertionResult IsClose(std::span<const float> got, std::span<const float> want,
                                   Tolerance tolerance) {
  return Compare(got, want, tolerance);
}
::testing::AssertionResult IsClose(std::span<const float> got, std::span<const double> want,
                                   Tolerance tolerance) {
  return Compare(got, want, tolerance);
}
::testing::AssertionResult IsClose(std::span<const double> got, std::span<const double> want,
                                   Tolerance tolerance) {
  return Compare(got, want, tolerance);
}

void ExpectClose(std::span<const float> got, std::span<const float> want, Tolerance tolerance,
                 const char* file, int line) {
  Report(Compare(got, want, tolerance), file, line);
}
void ExpectClose(std::span<const float> got, std::span<const double> want, Tolerance tolerance,
                 const char* file, int line) {
  Report(Compare(got, want, tolerance), file, line);
}
void ExpectClose(std::span<const double> got, std::span<const double> want, Tolerance tolerance,
                 const char* file, int line) {
  Report(Compare(got, want, tolerance), file, line);
}

}  // namespace dsla
