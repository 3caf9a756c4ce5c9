// The JSON of /v1/dsla: what the ladder and the controller are doing (GET), and the changes that
// an operator asks for (POST, behind the admin key).
#pragma once

#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "adapt/make_policy.h"
#include "base/status.h"
#include "engine/engine.h"

namespace dsla {

// What does not change while the server runs.
struct LadderInfo {
  std::string model;
  std::string adapter;      // its name or id; empty without one
  std::vector<int> ladder;  // layer indices, first to convert first; [L]
  int top_level = 0;        // highest rung recommended, tier economy
  int max_level = 0;        // highest there is: L with an adapter, 0 without
};

// What POST /v1/dsla asks for; at least one is there.
struct DslaCommand {
  std::optional<std::string> policy;  // "slo", "paper", "fixed"
  std::optional<int> level;           // with "fixed", which it implies
  std::optional<int> max_level;       // of tier auto
};

// Holds the options of the policy in force, so that a change keeps what it does not name.
// Thread-safe.
class DslaControl {
 public:
  // `options`: those that the engine's first policy was made from; `costs`: of several replicas,
  // each one's cost model in place of the options'. The engine must outlive this.
  DslaControl(Engine* engine, LadderInfo ladder, PolicyOptions options,
              std::vector<MeasuredCost> costs = {});

  std::string StateJson() const;  // of the engine's state now
  Status Apply(const DslaCommand& command);

  PolicyOptions options() const;

 private:
  Engine* const engine_;
  const LadderInfo ladder_;
  const std::vector<MeasuredCost> costs_;
  mutable std::mutex mutex_;  // of options_
  PolicyOptions options_;
};

// The body of GET /v1/dsla. Times in it are seconds before `state.now`, but for those of cost
// models. costs: DslaControl's.
std::string DslaStateJson(const EngineState& state, const LadderInfo& ladder,
                          const PolicyOptions& options,
                          const std::vector<MeasuredCost>& costs = {});

}  // namespace dsla
