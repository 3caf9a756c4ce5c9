// The policy of Ro et al., "On-the-Fly Adaptive Distillation of Transformer to Dual-State Linear
// Attention for Long-Context LLM Serving", ICML 2025, as its published server does it: under load
// one layer more per cool-down, one layer back when both thresholds are well undercut.
#pragma once

#include "adapt/make_policy.h"
#include "adapt/policy.h"

namespace dsla {

class PaperPolicy final : public LevelPolicy {
 public:
  // max_level: of tier auto; the paper's share of all layers applies besides.
  PaperPolicy(const PaperOptions& options, int layers, int max_level);

  const char* name() const override { return "paper"; }
  LevelDecision Decide(const LoadSnapshot& load) override;
  void SetMaxLevel(int level) override;

 private:
  const PaperOptions options_;
  const int max_share_;  // levels that the paper's share of all layers allows
  int max_level_;
  int target_ = 0;
  double last_change_;
};

}  // namespace dsla
