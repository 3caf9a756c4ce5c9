#include "server/health.h"

#include "base/clock.h"
#include "server/http/errors.h"

namespace dsla {

Health::Health(double stall_seconds, std::function<double()> clock)
    : stall_seconds_(stall_seconds), clock_(clock ? std::move(clock) : NowSeconds) {}

std::string Health::DeviceFailure() const {
  const Engine* engine = engine_.load();
  return engine == nullptr ? "" : engine->state().device_error;
}

std::optional<double> Health::Stalled() const {
  const Engine* engine = engine_.load();
  if (!engine) return std::nullopt;
  const EngineState state = engine->state();
  const double still = clock_() - state.last_progress;
  if (state.idle || still <= stall_seconds_) return std::nullopt;
  return still;
}

HttpResponse Health::Answer(bool ready) const {
  if (const std::string failure = DeviceFailure(); !failure.empty()) {
    HttpError error;
    error.status = 503;
    error.type = "server_error";
    error.code = "device_failed";
    error.message = fmt::format("the device failed: {}", failure);
    return ErrorResponse(error);
  }
  if (const auto still = Stalled()) {
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
  return JsonResponse(200, R"({"status":"ok"})");
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
