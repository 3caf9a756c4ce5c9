#include "server/health.h"

#include <fmt/ranges.h>

#include "base/clock.h"
#include "server/http/errors.h"

namespace dsla {
namespace {

std::vector<int> FailedReplicas(const EngineState& state) {
  std::vector<int> failed;
  for (size_t r = 0; r < state.replicas.size(); ++r)
    if (!state.replicas[r].device_error.empty()) failed.push_back(static_cast<int>(r));
  return failed;
}

}  // namespace

Health::Health(double stall_seconds, std::function<double()> clock)
    : stall_seconds_(stall_seconds), clock_(clock ? std::move(clock) : NowSeconds) {}

std::string Health::DeviceFailure() const {
  const Engine* engine = engine_.load();
  return engine == nullptr ? "" : engine->state().device_error;
}

bool Health::Degraded() const {
  const Engine* engine = engine_.load();
  if (engine == nullptr) return false;
  const EngineState state = engine->state();
  return state.device_error.empty() && !FailedReplicas(state).empty();
}

std::optional<double> Health::Stalled() const {
  const Engine* engine = engine_.load();
  return engine == nullptr ? std::nullopt : StalledFor(engine->state());
}

std::optional<double> Health::StalledFor(const EngineState& state) const {
  const double still = clock_() - state.last_progress;
  if (state.idle || still <= stall_seconds_) return std::nullopt;
  return still;
}

HttpResponse Health::Answer(bool ready) const {
  const Engine* engine = engine_.load();
  EngineState state;
  if (engine != nullptr) state = engine->state();
  if (const std::string& failure = state.device_error; !failure.empty()) {
    HttpError error;
    error.status = 503;
    error.type = "server_error";
    error.code = "device_failed";
    error.message = fmt::format("the device failed: {}", failure);
    return ErrorResponse(error);
  }
  if (const auto still = StalledFor(state)) {
    HttpError error;
    error.status = 503;
    error.type = "server_error";
    error.code = "stalled";
    error.message =
        fmt::format("the engine has work and has finished no step for {:.0f} s", *still);
    return ErrorResponse(error);
  }
  const Phase phase = phase_.load();
  if (ready && phase == Phase::kLoading) return ErrorResponse(LoadingError());
  if (ready && phase == Phase::kDraining) return ErrorResponse(ShuttingDownError());
  const std::vector<int> failed = FailedReplicas(state);
  if (failed.empty()) return JsonResponse(200, R"({"status":"ok"})");
  return JsonResponse(200, fmt::format(R"({{"status":"degraded","failed_replicas":[{}]}})",
                                       fmt::join(failed, ",")));
}

void Health::AddRoutes(Router& router, std::string version) const {
  const RouteOptions probe{.access = Access::kOpen, .while_draining = true};
  for (const char* path : {"/health", "/ready", "/ping", "/live"}) {
    const bool ready = std::string_view(path) != "/live";
    router.Add(
        "GET", path, [this, ready](auto, auto responder) { responder->Respond(Answer(ready)); },
        probe);
  }
  const std::string body = fmt::format(R"({{"version":"{}"}})", version);
  router.Add("GET", "/version",
             [body](auto, auto responder) { responder->Respond(JsonResponse(200, body)); },
             {.while_draining = true});
}

}  // namespace dsla
