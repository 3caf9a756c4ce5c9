#include "adapt/calibration_run.h"

#include <gtest/gtest.h>

#include <random>

namespace dsla {
namespace {

constexpr int kLayers = 30, kTop = 22;
constexpr double kDeadline = 8;
constexpr int kSteps = 4;  // of one run of a decode point

// A 30-layer model on two cores, about.
CostModel Truth() {
  return CostModel::FromCoefficients(kLayers, {2e-2, 5e-5, 6e-5, 8e-9}, {8e-3, 4e-5, 5e-5, 2.5e-8},
                                     {2e-4, 3.5e-6});
}

CostMeasurements Plan() {
  return CalibrationPlan({.layers = kLayers,
                          .top_level = kTop,
                          .max_positions = 8192,
                          .memory_tokens = 100000,
                          .tokens_per_second = 500});
}

// A machine whose runs take what Truth says, but some share of them up to `worst` times as long.
class BusyMachine final : public CostProbe {
 public:
  BusyMachine(double share, double worst, unsigned seed)
      : share_(share), worst_(1, worst), random_(seed) {}

  double Now() override { return now_; }
  Expected<double> Run(const PrefillPoint& p) override {
    if (p.context + p.tokens > room_) return ResourceExhausted("no room");
    return Take(truth_.PrefillSeconds(p.level, p.tokens, p.context));
  }
  Expected<double> Run(const DecodePoint& p) override {
    if (p.rows[0].length > room_) return ResourceExhausted("no room");
    // A few steps, of which the fastest counts.
    double best = Take(truth_.DecodeSeconds(p.rows));
    for (int i = 1; i < kSteps; ++i) best = std::min(best, Take(truth_.DecodeSeconds(p.rows)));
    return best;
  }
  Expected<double> Run(const FoldPoint& p) override {
    return Take(truth_.FoldSeconds(p.from, p.to, p.length));
  }

  double longest() const { return longest_; }
  int runs() const { return runs_; }
  void set_room(int64_t tokens) { room_ = tokens; }

 private:
  double Take(double seconds) {
    if (std::uniform_real_distribution<double>(0, 1)(random_) < share_) seconds *= worst_(random_);
    now_ += seconds;
    longest_ = std::max(longest_, seconds);
    ++runs_;
    return seconds;
  }

  const CostModel truth_ = Truth();
  const double share_;
  std::uniform_real_distribution<double> worst_;
  std::mt19937 random_;
  double now_ = 0, longest_ = 0;
  int runs_ = 0;
  int64_t room_ = 1 << 20;
};

// Largest factor between the two over what an engine does: whole chunks and batches.
double Factor(const CostModel& a, const CostModel& b) {
  double worst = 1;
  const auto compare = [&](double x, double y) { worst = std::max({worst, x / y, y / x}); };
  for (const int level : {0, 11, 22}) {
    for (const int64_t length : {256, 1000, 4000}) {
      compare(a.PrefillSeconds(level, 256, length), b.PrefillSeconds(level, 256, length));
      const std::vector<DecodeRow> rows(4, {level, length});
      compare(a.DecodeSeconds(rows), b.DecodeSeconds(rows));
    }
  }
  return worst;
}

TEST(CalibrationRun, AQuietMachineIsMeasuredExactly) {
  BusyMachine machine(0, 1, 1);
  const auto model = RunCalibration(machine, kLayers, kTop, Plan(), kDeadline);
  ASSERT_TRUE(model.ok()) << model.status().message();
  EXPECT_LT(Factor(*model, Truth()), 1.001);
  EXPECT_EQ(machine.runs(), 2 * (6 + 6 * kSteps + 2))
      << "every point is confirmed by its second run";
}

TEST(CalibrationRun, ABusyMachineIsMeasuredNearlyAndInTime) {
  double worst = 1, worst_once = 1;
  int near = 0, near_once = 0;
  constexpr int kSeeds = 200;
  for (unsigned seed = 1; seed <= kSeeds; ++seed) {
    BusyMachine machine(0.3, 4, seed);
    const auto model = RunCalibration(machine, kLayers, kTop, Plan(), kDeadline);
    ASSERT_TRUE(model.ok()) << model.status().message();
    EXPECT_LT(machine.Now(), kDeadline + kSteps * machine.longest()) << "seed " << seed;
    const double factor = Factor(*model, Truth());
    worst = std::max(worst, factor);
    near += factor < 1.25;

    BusyMachine same(0.3, 4, seed);  // every point once, no more
    const auto once = RunCalibration(same, kLayers, kTop, Plan(), 0);
    ASSERT_TRUE(once.ok()) << once.status().message();
    const double factor_once = Factor(*once, Truth());
    worst_once = std::max(worst_once, factor_once);
    near_once += factor_once < 1.25;
  }
  std::printf(
      "seeds 1 to %d: %d within a quarter, %.2f times off at most; of single runs %d, %.2f\n",
      kSeeds, near, worst, near_once, worst_once);
  EXPECT_GE(near, kSeeds * 9 / 10);
  EXPECT_LT(near_once, kSeeds / 2);
  EXPECT_LT(worst, worst_once);
}

TEST(CalibrationRun, OutOfTimeEveryPointIsRunOnce) {
  BusyMachine machine(0, 1, 1);
  ASSERT_TRUE(RunCalibration(machine, kLayers, kTop, Plan(), -1).ok());
  EXPECT_EQ(machine.runs(), 6 + 6 * kSteps + 2);
}

TEST(CalibrationRun, PointsThatDoNotFitAreLeftOut) {
  BusyMachine machine(0, 1, 1);
  machine.set_room(1000);
  const auto model = RunCalibration(machine, kLayers, kTop, Plan(), kDeadline);
  ASSERT_TRUE(model.ok()) << model.status().message();
  EXPECT_NEAR(model->PrefillSeconds(0, 128, 0) / Truth().PrefillSeconds(0, 128, 0), 1, 0.02);
  machine.set_room(10);
  EXPECT_EQ(RunCalibration(machine, kLayers, kTop, Plan(), kDeadline).status().code(),
            StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace dsla
