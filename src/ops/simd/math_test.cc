// The vector functions against fp64, on every target this CPU has.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/simd/math_test.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Must come after foreach_target.h.
#include "hwy/highway.h"
#include "ops/simd/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {

#define DSLA_DEFINE_ROW_FUNCTION(Name)                                                     \
  void Name##Row(const float* from, float* to, size_t n) {                                 \
    const hwy::HWY_NAMESPACE::ScalableTag<float> d;                                        \
    const size_t lanes = hwy::HWY_NAMESPACE::Lanes(d);                                     \
    size_t i = 0;                                                                          \
    for (; i + lanes <= n; i += lanes) StoreF32(d, Name(d, LoadF32(d, from + i)), to + i); \
    if (i < n) StorePart(d, Name(d, LoadPart(d, from + i, n - i)), to + i, n - i);         \
  }
DSLA_DEFINE_ROW_FUNCTION(Exp)
DSLA_DEFINE_ROW_FUNCTION(Expm1)
DSLA_DEFINE_ROW_FUNCTION(Log1p01)
DSLA_DEFINE_ROW_FUNCTION(LogSigmoid)
DSLA_DEFINE_ROW_FUNCTION(Sigmoid)
#undef DSLA_DEFINE_ROW_FUNCTION

void NarrowRow(const float* from, bf16* to, size_t n) { ConvertRow(from, to, n); }
void WidenRow(const bf16* from, float* to, size_t n) { ConvertRow(from, to, n); }

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/simd/each_target.h"

namespace dsla {
namespace {

HWY_EXPORT(ExpRow);
HWY_EXPORT(Expm1Row);
HWY_EXPORT(Log1p01Row);
HWY_EXPORT(LogSigmoidRow);
HWY_EXPORT(SigmoidRow);
HWY_EXPORT(NarrowRow);
HWY_EXPORT(WidenRow);

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Evenly spaced values and, towards 0, evenly spaced exponents.
std::vector<float> Range(double low, double high) {
  std::vector<float> x;
  constexpr int kSteps = 200003;
  for (int i = 0; i <= kSteps; ++i)
    x.push_back(static_cast<float>(low + (high - low) * i / kSteps));
  for (double m = 1; m > 1e-37; m *= 0.97) {
    if (-m >= low) x.push_back(static_cast<float>(-m));
    if (m <= high) x.push_back(static_cast<float>(m));
  }
  return x;
}

// The largest relative error; a result of the wrong class counts as infinite.
template <typename Function>
double WorstError(const std::vector<float>& x, const std::vector<float>& y, Function exact) {
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double want = exact(double{x[i]});
    if (!std::isfinite(y[i])) return kInf;
    if (want == 0 && y[i] == 0) continue;
    worst = std::max(worst, std::abs((y[i] - want) / want));
  }
  return worst;
}

double ExactLogSigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x))); }
double ExactSigmoid(double x) {
  return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
}

TEST(SimdMath, RelativeErrors) {
  ForEachTarget([] {
    const auto check = [](const char* name, auto row, double low, double high, auto exact,
                          double bound) {
      const std::vector<float> x = Range(low, high);
      std::vector<float> y(x.size(), kNaN);
      row(x.data(), y.data(), x.size());
      const double worst = WorstError(x, y, exact);
      EXPECT_LT(worst, bound) << name;
      ::testing::Test::RecordProperty(name, std::to_string(worst * 0x1p24));
    };
    check(
        "exp", HWY_DYNAMIC_DISPATCH(ExpRow), -87.3, 88.7, [](double v) { return std::exp(v); },
        1.2e-7);
    check(
        "expm1", HWY_DYNAMIC_DISPATCH(Expm1Row), -87, 0, [](double v) { return std::expm1(v); },
        3e-7);
    check(
        "log1p", HWY_DYNAMIC_DISPATCH(Log1p01Row), 0, 1, [](double v) { return std::log1p(v); },
        3e-7);
    check("logsigmoid", HWY_DYNAMIC_DISPATCH(LogSigmoidRow), -500, 87, ExactLogSigmoid, 6e-7);
    check("logsigmoid", HWY_DYNAMIC_DISPATCH(LogSigmoidRow), -20, 20, ExactLogSigmoid, 6e-7);
    check("sigmoid", HWY_DYNAMIC_DISPATCH(SigmoidRow), -87, 100, ExactSigmoid, 4e-7);
  });
}

TEST(SimdMath, ExpUnderflowsGradually) {
  ForEachTarget([] {
    const std::vector<float> x = Range(-110, -87);
    std::vector<float> y(x.size());
    HWY_DYNAMIC_DISPATCH(ExpRow)(x.data(), y.data(), x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      if (x[i] > -87) continue;
      EXPECT_NEAR(y[i], std::exp(double{x[i]}), 0x1p-149 + 1.2e-7 * std::exp(double{x[i]})) << x[i];
    }
  });
}

TEST(SimdMath, SpecialValues) {
  ForEachTarget([] {
    const auto at = [](auto row, float x) {
      float y = 7;
      row(&x, &y, 1);
      return y;
    };
    const auto exp = HWY_DYNAMIC_DISPATCH(ExpRow);
    EXPECT_EQ(at(exp, -kInf), 0);
    EXPECT_EQ(at(exp, -1e30f), 0);
    EXPECT_EQ(at(exp, 0), 1);
    EXPECT_EQ(at(exp, kInf), kInf);
    EXPECT_EQ(at(exp, 89), kInf);
    EXPECT_TRUE(std::isnan(at(exp, kNaN)));
    const auto expm1 = HWY_DYNAMIC_DISPATCH(Expm1Row);
    EXPECT_EQ(at(expm1, -kInf), -1);
    EXPECT_EQ(at(expm1, 0), 0);
    EXPECT_TRUE(std::isnan(at(expm1, kNaN)));
    const auto log_sigmoid = HWY_DYNAMIC_DISPATCH(LogSigmoidRow);
    EXPECT_EQ(at(log_sigmoid, kInf), 0);
    EXPECT_EQ(at(log_sigmoid, -1e30f), -1e30f);
    EXPECT_EQ(at(log_sigmoid, -kInf), -kInf);
    EXPECT_TRUE(std::isnan(at(log_sigmoid, kNaN)));
    const auto sigmoid = HWY_DYNAMIC_DISPATCH(SigmoidRow);
    EXPECT_EQ(at(sigmoid, kInf), 1);
    EXPECT_EQ(at(sigmoid, -kInf), 0);
    EXPECT_EQ(at(sigmoid, 0), 0.5f);
    EXPECT_TRUE(std::isnan(at(sigmoid, kNaN)));
  });
}

TEST(SimdMath, PartsOfAVectorReadAndWriteNothingElse) {
  ForEachTarget([] {
    for (size_t n = 0; n <= 35; ++n) {
      std::vector<float> x(n, -1.f);  // exactly n: a longer read is seen by ASan
      std::vector<float> y(n + 1, 7.f);
      HWY_DYNAMIC_DISPATCH(ExpRow)(x.data(), y.data(), n);
      for (size_t i = 0; i < n; ++i) EXPECT_EQ(y[i], y[0]);
      EXPECT_EQ(y[n], 7.f);
    }
  });
}

TEST(SimdMath, Bf16MatchesTheScalarConversion) {
  ForEachTarget([] {
    std::vector<float> x = Range(-1000, 1000);
    for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 9973)
      x.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));  // NaNs and infinities too
    for (const size_t n : {x.size(), size_t{1}, size_t{15}, size_t{16}, size_t{33}}) {
      std::vector<bf16> narrow(n);
      HWY_DYNAMIC_DISPATCH(NarrowRow)(x.data(), narrow.data(), n);
      for (size_t i = 0; i < n; ++i)
        ASSERT_EQ(narrow[i].bits, ToBf16(x[i]).bits) << x[i] << " at " << i;
    }
    std::vector<bf16> all(65536);
    for (size_t i = 0; i < all.size(); ++i) all[i].bits = static_cast<uint16_t>(i);
    std::vector<float> wide(all.size());
    for (const size_t n : {all.size(), size_t{37}}) {
      HWY_DYNAMIC_DISPATCH(WidenRow)(all.data(), wide.data(), n);
      for (size_t i = 0; i < n; ++i)
        ASSERT_EQ(std::bit_cast<uint32_t>(wide[i]), static_cast<uint32_t>(i) << 16);
    }
  });
}

}  // namespace
}  // namespace dsla
#endif  // HWY_ONCE
