// A server without a model: requests arrive, are admitted while memory lasts, prefill in chunks,
// decode, fold and finish, every step taking the time that a cost model says. Discrete and pure: a
// trace and a policy give one outcome.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "adapt/cost_model.h"
#include "adapt/policy.h"

namespace dsla {

struct SimRequest {
  double arrival = 0;
  int prompt = 1;
  int reply = 1;      // tokens it will generate
  int max_level = 0;  // of its tier; level 0 throughout with 0
};

struct SimOptions {
  CostModel cost;
  int64_t budget_bytes = 0;
  BlockSizes sizes;
  int chunk = 512;  // prompt tokens of one step
  int max_running = 256;
  double end = 0;  // goes on until then, idle or not; 0 = until the last request is done
  int64_t max_steps = 1 << 20;
};

struct SimResult {
  struct Done {
    double ttft = 0;  // seconds
    double end = 0;   // when
    int level = 0;    // at its end
  };
  std::vector<Done> requests;  // in the order of the trace
  double end = 0;
  double fold_seconds = 0;
  int64_t preemptions = 0;
  int64_t raises = 0;
  bool finished = false;  // all requests, within max_steps
  // Every change of the target: when, to what.
  std::vector<std::pair<double, int>> targets;
};

// Called with every snapshot and the decision on it.
using SimObserver = std::function<void(const LoadSnapshot&, const LevelDecision&)>;

// `trace` by arrival. Each request must fit the memory alone at level 0.
SimResult Simulate(const SimOptions& options, const std::vector<SimRequest>& trace,
                   LevelPolicy& policy, const SimObserver& observer = {});

}  // namespace dsla
