// The server from its first socket to its last answer. It listens before the model is there and
// says so to whoever asks; the model loads in a thread of its own.
#pragma once

#include <atomic>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "adapt/make_policy.h"
#include "cli/model_args.h"
#include "cli/serve_args.h"
#include "cli/serve_cost.h"
#include "engine/engine.h"
#include "grammar/grammar.h"
#include "server/access_log.h"
#include "server/dsla_state.h"
#include "server/engine_log.h"
#include "server/health.h"
#include "server/http/server.h"
#include "server/log.h"
#include "server/metrics.h"
#include "server/openai/api.h"
#include "server/signals.h"

namespace dsla {

inline constexpr char kServerVersion[] = "0.1.0";
// Seconds in which clients are told that their requests have failed.
inline constexpr double kLastAnswers = 2;

class ServeProgram {
 public:
  // Both must outlive it.
  ServeProgram(const ServeArgs& args, Log* log);
  ~ServeProgram();

  Status Listen();  // and begins to load; then it serves, or load_status() says why not
  bool loaded() const { return loaded_.load(); }
  const Status& load_status() const { return load_status_; }  // after loaded()
  void Watch();         // to be called about once a second: logs what changed
  bool DeviceFailed();  // likewise; only a new process helps
  bool ReplicaFailed() const { return health_.Degraded(); }
  // Until no request is left, for so many seconds at most; false: a signal came to end at once.
  bool WaitIdle(SignalQueue& signals, double seconds);
  bool Drain(SignalQueue& signals);  // likewise
  bool WaitEngine() const;           // false: it is in a step that does not end

 private:
  const LoadedModel& model() const { return models_.front(); }

  // serve_load.cc, in the loader's thread
  void Load();
  Status LoadAll();
  Status SetPolicy();
  Status MakeEngine();
  Expected<std::vector<ServeCost>> MeasureCosts();
  Status MakeApi();
  void ChooseTools(openai::ApiContext* context);
  SamplingParams SamplingDefaults() const;
  void WarnOfSmallCache(Tier tier);

  // serve_program.cc
  std::shared_ptr<Router> NewRouter() const;
  std::string Url() const;
  void WatchCost(const EngineState& state, size_t replica);

  const ServeArgs& args_;
  Log* const log_;
  AccessLog access_log_;
  EngineLog engine_log_;
  Health health_;
  std::string scheme_ = "http";

  // In the order in which they depend on each other.
  std::vector<LoadedModel> models_;  // of each replica
  std::string model_name_;
  LadderInfo ladder_;
  PolicyOptions policy_;
  std::vector<ServeCost> costs_;  // [models]; none where there is nothing to decide
  std::unique_ptr<ServerMetrics> metrics_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<DslaControl> control_;
  std::unique_ptr<GrammarCompiler> grammars_;
  std::unique_ptr<openai::TaskPool> text_pool_, grammar_pool_;
  std::unique_ptr<HttpServer> server_;
  std::thread loader_;

  std::atomic<bool> loaded_{false};
  Status load_status_;
  bool stalled_ = false;
  std::set<size_t> doubted_;  // replicas whose cost model is known to be doubtful
};

}  // namespace dsla
