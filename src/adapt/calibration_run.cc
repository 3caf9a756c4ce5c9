#include "adapt/calibration_run.h"

#include <algorithm>
#include <vector>

namespace dsla {
namespace {

constexpr double kAgreement = 1.1;   // the second fastest run by the fastest, where both are sound
constexpr double kLeastTime = 1e-9;  // a clock's tick: a time of 0 could not be fitted

// A point, its fastest run in `point.seconds`.
template <typename Point>
struct Measured {
  Point point;
  double second = 0;  // time of the second fastest run; 0: none
  bool fits = true;   // the memory

  bool Confirmed() const { return !fits || (second > 0 && second <= kAgreement * point.seconds); }
  void Add(double seconds) {
    seconds = std::max(seconds, kLeastTime);
    if (point.seconds == 0 || seconds < point.seconds) std::swap(point.seconds, seconds);
    if (seconds > 0 && (second == 0 || seconds < second)) second = seconds;
  }
};

template <typename Point>
std::vector<Measured<Point>> Begin(const std::vector<Point>& points) {
  std::vector<Measured<Point>> measured;
  for (const Point& point : points) measured.push_back({.point = point});
  return measured;
}

// What could be measured.
template <typename Point>
std::vector<Point> End(const std::vector<Measured<Point>>& measured) {
  std::vector<Point> points;
  for (const Measured<Point>& m : measured) {
    if (m.point.seconds > 0) points.push_back(m.point);
  }
  return points;
}

// One run of each point, with `again` of those alone that no second run has confirmed, as long as
// there is time. done: left as it is unless there was something to run.
template <typename Point>
Status Round(CostProbe& probe, std::vector<Measured<Point>>& points, bool again, double deadline,
             bool& done) {
  for (Measured<Point>& m : points) {
    if (again && (m.Confirmed() || probe.Now() >= deadline)) continue;
    done = false;
    const Expected<double> seconds = probe.Run(m.point);
    if (seconds.ok()) {
      m.Add(*seconds);
    } else if (seconds.status().code() == StatusCode::kResourceExhausted) {
      m.fits = false;
    } else {
      return seconds.status();
    }
  }
  return Status::Ok();
}

}  // namespace

Expected<CostModel> RunCalibration(CostProbe& probe, int layers, int top_level,
                                   const CostMeasurements& plan, double deadline) {
  auto prefill = Begin(plan.prefill);
  auto decode = Begin(plan.decode);
  auto fold = Begin(plan.fold);
  bool again = false;
  for (bool done = false; !done; again = true) {
    done = true;
    DSLA_RETURN_IF_ERROR(Round(probe, prefill, again, deadline, done));
    DSLA_RETURN_IF_ERROR(Round(probe, decode, again, deadline, done));
    DSLA_RETURN_IF_ERROR(Round(probe, fold, again, deadline, done));
  }
  const CostMeasurements measured{
      .prefill = End(prefill), .decode = End(decode), .fold = End(fold)};
  // Without a measured point a kind of layer would seem to cost nothing.
  const auto has_top = [&](const auto& points, auto level) {
    return std::any_of(points.begin(), points.end(),
                       [&](const auto& p) { return level(p) == top_level; });
  };
  if (measured.prefill.size() < 2 || measured.decode.size() < 2 ||
      !has_top(measured.prefill, [](const PrefillPoint& p) { return p.level; }) ||
      !has_top(measured.decode, [](const DecodePoint& p) { return p.rows[0].level; })) {
    return ResourceExhausted("the cache memory is too small to measure the cost model in");
  }
  return CostModel::Fit(layers, measured);
}

}  // namespace dsla
