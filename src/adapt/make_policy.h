// The policies by name, and all their options in one value.
#pragma once

#include <memory>
#include <string>

#include "adapt/cost_model.h"
#include "adapt/policy.h"
#include "base/status.h"

namespace dsla {

struct SloOptions {
  double ttft = 2.0;                // seconds to the first token that most requests should see
  double tpot = 0.2;                // seconds per token after it
  int prefill_chunk = 512;          // tokens of prompt that one step takes
  double memory_share = 0.95;       // of the budget that sequences may come to hold
  int growth_tokens = 256;          // of each reply that memory is kept for
  double up_cooldown = 2.0;         // seconds between two rises of the target
  double calm_seconds = 10.0;       // a lower target must have sufficed for so long
  double down_margin = 0.7;         // "sufficed": with so much of targets and memory
  double raise_share = 0.5;         // of time that may go into folds
  double raise_seconds = 0.25;      // the longest pause by folds between two steps
  double evaluate_interval = 0.05;  // seconds between two looks at the load
};

// Ro et al., ICML 2025, and the thresholds of its published server.
struct PaperOptions {
  int queue = 50;              // waiting requests from which a layer is converted
  int prompt_tokens = 1024;    // or a waiting prompt of so many tokens
  double queue_back = 0.5;     // a layer goes back at so much of both thresholds
  double prompt_back = 0.8;    //
  double cooldown = 60;        // seconds between two changes
  double max_share = 0.75;     // of all layers
  bool raise_running = false;  // fold running sequences too; the paper only has new ones
};

struct PolicyOptions {
  std::string policy = "slo";  // "slo", "paper", "fixed"
  int layers = 0;              // of the model
  int max_level = 0;           // of tier auto
  int fixed_level = 0;         // of "fixed"
  MeasuredCost cost;           // "slo" needs its model
  SloOptions slo;
  PaperOptions paper;
};

// kInvalidArgument names the option.
Expected<std::unique_ptr<LevelPolicy>> MakePolicy(const PolicyOptions& options);

}  // namespace dsla
