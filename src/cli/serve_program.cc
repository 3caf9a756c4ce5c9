#include "cli/serve_program.h"

#include <chrono>
#include <csignal>

#include "base/clock.h"
#include "server/ui_assets.h"

namespace dsla {
ServeProgram::ServeProgram(const ServeArgs& args, Log* log)
    : args_(args), log_(log), access_log_(log), engine_log_(log), health_(args.stall_seconds) {}

ServeProgram::~ServeProgram() {
  if (loader_.joinable()) loader_.join();
  server_.reset();  // every client is gone, and with it what it had running
  text_pool_.reset();
  grammar_pool_.reset();
  access_log_.SetMetrics(nullptr);
  engine_.reset();
}

std::shared_ptr<Router> ServeProgram::NewRouter() const {
  auto router = std::make_shared<Router>();
  health_.AddRoutes(*router, kServerVersion);
  if (!args_.no_ui) AddUiRoutes(*router);
  return router;
}

std::string ServeProgram::Url() const {
  const std::string& host = args_.http.host;
  const bool v6 = host.find(':') != std::string::npos;
  return fmt::format("{}://{}:{}/", scheme_, v6 ? "[" + host + "]" : host, server_->port());
}

Status ServeProgram::Listen() {
  DSLA_ASSIGN_OR_RETURN(const HttpServerOptions options, HttpOptionsOf(args_));
  DSLA_ASSIGN_OR_RETURN(KeyRing keys, KeysOf(args_));
  if (!options.tls_cert.empty()) scheme_ = "https";
  const bool needs_key = keys.needs_key();
  DSLA_ASSIGN_OR_RETURN(server_,
                        HttpServer::Start(options, NewRouter(), std::move(keys), &access_log_));
  log_->Write(LogLevel::kInfo, "listening", {{"url", Url()}});
  if (!needs_key && !server_->local()) {
    log_->Write(LogLevel::kWarning, "no_api_keys",
                {{"message", "whoever reaches this address may use it (see --api-key-file)"}});
  }
  loader_ = std::thread([this] { Load(); });
  return Status::Ok();
}

void ServeProgram::Watch() {
  if (!loaded() || !engine_) return;
  const EngineState state = engine_->state();
  engine_log_.LogChanges(state);
  if (state.replicas.empty()) WatchCost(state, 0);
  for (size_t r = 0; r < state.replicas.size(); ++r) WatchCost(state.replicas[r], r);
  const auto still = health_.Stalled();
  if (still && !stalled_) log_->Write(LogLevel::kError, "stalled", {{"seconds", *still}});
  stalled_ = still.has_value();
}

// Once of each replica: those of one kind share a file.
void ServeProgram::WatchCost(const EngineState& state, size_t replica) {
  if (!state.cost_doubtful || !doubted_.insert(replica).second) return;
  const CostFactors& factors = state.cost_factors;
  std::vector<LogField> fields;
  if (models_.size() > 1) fields.push_back({"replica", static_cast<int64_t>(replica)});
  fields.insert(fields.end(), {{"prefill", factors.prefill},
                               {"decode", factors.decode},
                               {"fold", factors.fold},
                               {"message", DoubtCost(costs_.at(replica), factors)}});
  log_->Write(LogLevel::kWarning, "cost_model_doubtful", fields);
}

bool ServeProgram::DeviceFailed() {
  const std::string failure = loaded() ? health_.DeviceFailure() : "";
  if (!failure.empty()) log_->Write(LogLevel::kError, "device_failed", {{"message", failure}});
  return !failure.empty();
}

bool ServeProgram::WaitIdle(SignalQueue& signals, double seconds) {
  const double deadline = NowSeconds() + seconds;
  while (!server_->WaitIdle(0.05) && NowSeconds() < deadline) {
    const int signal = signals.Wait(0.05);
    if (signal == SIGHUP) log_->Reopen();
    if (signal == SIGTERM || signal == SIGINT) return false;
  }
  return true;
}

bool ServeProgram::Drain(SignalQueue& signals) {
  log_->Write(LogLevel::kInfo, "draining",
              {{"requests", int64_t{server_->requests()}}, {"timeout", args_.drain_timeout}});
  health_.SetPhase(Phase::kDraining);
  server_->SetPhase(Phase::kDraining);
  if (loaded() && engine_) engine_->Drain();
  // Probes count as requests too, but they come and go.
  if (!WaitIdle(signals, args_.drain_timeout)) return false;
  const int left = server_->requests();
  if (left == 0) return true;
  log_->Write(LogLevel::kWarning, "drain_timeout", {{"cancelled", int64_t{left}}});
  if (engine_) engine_->CancelAll();
  return WaitIdle(signals, kLastAnswers);
}

bool ServeProgram::WaitEngine() const {
  const double deadline = NowSeconds() + kLastAnswers;
  while (engine_ != nullptr && !engine_->state().idle) {
    if (NowSeconds() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return true;
}

}  // namespace dsla
