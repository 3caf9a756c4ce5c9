// The one comparator of all operator tests.
//
// got[i] is close to want[i] if |got[i] - want[i]| <= tolerance * max(|want[i]|, rms(want)).
// The root mean square of the reference is the scale a sum's rounding errors are made at: an
// element that is small because large terms cancel cannot be held to its own size. So compare what
// has one scale (one output tensor, or one sequence of it) in one call. A reference of zeros alone
// has scale 0 and must be met exactly.
//
// Fails on: different sizes, a NaN on either side (a reference with NaN is a broken test), an
// infinity that is not the same infinity on both sides. Infinities do not count in the rms.
//
// The tolerance is derived, not tuned: a count k of rounding errors times the dtype's unit roundoff
// u (fp32 2^-24, bf16 2^-8). For a sum of n terms rounded in the dtype use SumTolerance(n): the
// errors of n roundings add up like a random walk, sqrt(n) u, whose largest value over the elements
// of a test is below 4 standard deviations, plus 8 for the roundings outside of the sum.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <span>

#include "base/dtype.h"

namespace dsla {

struct Tolerance {
  double relative = 0;
};

constexpr double UnitRoundoff(DType dtype) { return dtype == DType::kF32 ? 0x1p-24 : 0x1p-8; }

// k rounding errors of `dtype`.
constexpr Tolerance RoundingTolerance(double k, DType dtype = DType::kF32) {
  return {k * UnitRoundoff(dtype)};
}
// A sum of n terms in `dtype` and a few operations around it.
inline Tolerance SumTolerance(int64_t n, DType dtype = DType::kF32) {
  return RoundingTolerance(8 + 4 * std::sqrt(static_cast<double>(n)), dtype);
}

// The predicate; a failure says how many elements are off and shows the worst one.
::testing::AssertionResult IsClose(std::span<const float> got, std::span<const float> want,
                                   Tolerance tolerance);
::testing::AssertionResult IsClose(std::span<const float> got, std::span<const double> want,
                                   Tolerance tolerance);
::testing::AssertionResult IsClose(std::span<const double> got, std::span<const double> want,
                                   Tolerance tolerance);

// Fails the running test, at the caller's line, if not close.
void ExpectClose(std::span<const float> got, std::span<const float> want, Tolerance tolerance,
                 const char* file = __builtin_FILE(), int line = __builtin_LINE());
void ExpectClose(std::span<const float> got, std::span<const double> want, Tolerance tolerance,
                 const char* file = __builtin_FILE(), int line = __builtin_LINE());
void ExpectClose(std::span<const double> got, std::span<const double> want, Tolerance tolerance,
                 const char* file = __builtin_FILE(), int line = __builtin_LINE());

}  // namespace dsla
