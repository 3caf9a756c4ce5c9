// Seconds by stage of some repeated work, for tables of where its time goes.
#pragma once

#include <string_view>
#include <utility>
#include <vector>

#include "base/clock.h"

namespace dsla {

class StageTimes {
 public:
  // In the order in which the stages were first seen. `stage` is a literal.
  void Add(const char* stage, double seconds) {
    for (auto& [name, sum] : stages_) {
      if (name == stage) {
        sum += seconds;
        return;
      }
    }
    stages_.emplace_back(stage, seconds);
  }
  const std::vector<std::pair<std::string_view, double>>& stages() const { return stages_; }

 private:
  std::vector<std::pair<std::string_view, double>> stages_;
};

// Gives the time since the last mark to a stage; without times it does nothing.
class StageClock {
 public:
  explicit StageClock(StageTimes* times) : times_(times) {
    if (times_ != nullptr) last_ = NowSeconds();
  }
  void Mark(const char* stage) {
    if (times_ == nullptr) return;
    const double now = NowSeconds();
    times_->Add(stage, now - last_);
    last_ = now;
  }

 private:
  StageTimes* times_;
  double last_ = 0;
};

}  // namespace dsla
