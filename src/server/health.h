// Is the server alive, ready, and getting on? The routes that probes ask, and the program's
// version.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "engine/engine.h"
#include "server/http/dispatch.h"
#include "server/http/router.h"

namespace dsla {

// What the probes look at. Thread-safe; shared by the routers of loading and of serving.
class Health {
 public:
  // stall_seconds: with work to do and no step finished for so long, the engine counts as stalled.
  // clock: NowSeconds where empty.
  explicit Health(double stall_seconds, std::function<double()> clock = {});

  void SetPhase(Phase phase) { phase_.store(phase); }
  // The engine must outlive all requests; set before kServing.
  void SetEngine(const Engine* engine) { engine_.store(engine); }

  // Seconds without progress where they are too many.
  std::optional<double> Stalled() const;
  // What the engine's device failed with; empty while it works, or one of several does.
  std::string DeviceFailure() const;

  // Some of several replicas failed, and others work.
  bool Degraded() const;

  // GET, open to everybody and while draining. Each answers 200 {"status":"ok"}, with
  // {"status":"degraded","failed_replicas":[1]} where some of several replicas failed, or 503:
  //   /live                  when the engine is stalled or the device failed: a restart helps
  //   /health /ready /ping   then, and while loading and draining
  // GET /version: {"version": ...}; needs a key where keys are set.
  void AddRoutes(Router& router, std::string version) const;

 private:
  std::optional<double> StalledFor(const EngineState& state) const;
  HttpResponse Answer(bool ready) const;

  const double stall_seconds_;
  const std::function<double()> clock_;
  std::atomic<Phase> phase_{Phase::kLoading};
  std::atomic<const Engine*> engine_{nullptr};
};

}  // namespace dsla
