#include "ops/testing/expect_close.h"

#include <gtest/gtest-spi.h>

#include <limits>
#include <vector>

namespace dsla {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

using Floats = std::vector<float>;

TEST(ExpectClose, AcceptsEqualAndAlmostEqual) {
  EXPECT_TRUE(IsClose(Floats{1, -2, 3}, Floats{1, -2, 3}, Tolerance{0}));
  EXPECT_TRUE(IsClose(Floats{1.0005f, -2, 3}, Floats{1, -2, 3}, Tolerance{1e-3}));
  EXPECT_TRUE(IsClose(Floats{}, Floats{}, Tolerance{0}));
}

TEST(ExpectClose, RefusesAnErrorInEitherDirectionAndSign) {
  EXPECT_FALSE(IsClose(Floats{1.1f}, Floats{1}, Tolerance{1e-3}));
  EXPECT_FALSE(IsClose(Floats{0.9f}, Floats{1}, Tolerance{1e-3}));
  EXPECT_FALSE(IsClose(Floats{-1.1f}, Floats{-1}, Tolerance{1e-3}));
  EXPECT_FALSE(IsClose(Floats{-0.9f}, Floats{-1}, Tolerance{1e-3}));
  EXPECT_FALSE(IsClose(Floats{-1}, Floats{1}, Tolerance{1e-3}));
  EXPECT_FALSE(IsClose(Floats{-2}, Floats{-1}, Tolerance{1e-3}));
}

TEST(ExpectClose, OneWrongElementAmongManyFails) {
  Floats want(1000, 1.f), got = want;
  got[777] = 1.01f;
  EXPECT_FALSE(IsClose(got, want, Tolerance{1e-3}));
}

TEST(ExpectClose, RefusesNaNOnEitherSide) {
  EXPECT_FALSE(IsClose(Floats{kNaN, 1}, Floats{1, 1}, Tolerance{0.5}));
  EXPECT_FALSE(IsClose(Floats{1, 1}, Floats{kNaN, 1}, Tolerance{0.5}));
  EXPECT_FALSE(IsClose(Floats{kNaN}, Floats{kNaN}, Tolerance{0.5}));
  EXPECT_FALSE(IsClose(Floats{1}, Floats{1}, Tolerance{kNaN}));
}

TEST(ExpectClose, InfinityOnlyEqualsItself) {
  EXPECT_TRUE(IsClose(Floats{kInf, 1}, Floats{kInf, 1}, Tolerance{0}));
  EXPECT_FALSE(IsClose(Floats{kInf, 1}, Floats{-kInf, 1}, Tolerance{0.5}));
  EXPECT_FALSE(IsClose(Floats{kInf, 1}, Floats{1, 1}, Tolerance{0.5}));
  EXPECT_FALSE(IsClose(Floats{1, 1}, Floats{kInf, 1}, Tolerance{0.5}));
  // An infinity in the reference must not widen what the others are held to.
  EXPECT_FALSE(IsClose(Floats{kInf, 2}, Floats{kInf, 1}, Tolerance{1e-3}));
}

TEST(ExpectClose, AZeroReferenceMustBeMet) {
  EXPECT_TRUE(IsClose(Floats{0, -0.f}, Floats{0, 0}, Tolerance{1e-3}));
  EXPECT_FALSE(IsClose(Floats{0, 1e-30f}, Floats{0, 0}, Tolerance{1e-3}));
  // A zero among others is held to their scale.
  EXPECT_TRUE(IsClose(Floats{1e-6f, 1}, Floats{0, 1}, Tolerance{1e-5}));
  EXPECT_FALSE(IsClose(Floats{1e-4f, 1}, Floats{0, 1}, Tolerance{1e-5}));
}

TEST(ExpectClose, RefusesAnotherSize) {
  EXPECT_FALSE(IsClose(Floats{1}, Floats{1, 1}, Tolerance{0.5}));
  EXPECT_FALSE(IsClose(Floats{1, 1}, Floats{1}, Tolerance{0.5}));
  EXPECT_FALSE(IsClose(Floats{}, Floats{1}, Tolerance{0.5}));
}

TEST(ExpectClose, ComparesAgainstDoubles) {
  const std::vector<double> want = {1.0, 2.0};
  EXPECT_TRUE(IsClose(Floats{1, 2}, want, Tolerance{0}));
  EXPECT_FALSE(IsClose(Floats{1, 2.1f}, want, Tolerance{1e-3}));
  EXPECT_TRUE(IsClose(std::vector<double>{1.0, 2.0 + 1e-12}, want, Tolerance{1e-11}));
  EXPECT_FALSE(IsClose(std::vector<double>{1.0, 2.0 + 1e-10}, want, Tolerance{1e-11}));
}

TEST(ExpectClose, FailsTheTestItRunsIn) {
  EXPECT_NONFATAL_FAILURE(ExpectClose(Floats{kNaN}, Floats{1}, Tolerance{0.5}), "1 of 1 elements");
  EXPECT_NONFATAL_FAILURE(ExpectClose(Floats{1}, Floats{1, 2}, Tolerance{0.5}), "sizes differ");
}

TEST(Tolerance, FollowsTheDtypeAndTheLength) {
  EXPECT_EQ(RoundingTolerance(1).relative, 0x1p-24);
  EXPECT_EQ(RoundingTolerance(3, DType::kBF16).relative, 3 * 0x1p-8);
  EXPECT_EQ(SumTolerance(16).relative, 24 * 0x1p-24);
}

}  // namespace
}  // namespace dsla
