// The options of `dsla serve`.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "adapt/make_policy.h"
#include "cli/model_args.h"
#include "cli/sampling_args.h"
#include "engine/engine.h"
#include "server/auth.h"
#include "server/http/server.h"
#include "server/log.h"

namespace dsla {

struct ServeArgs {
  ModelArgs model;
  std::vector<std::string> model_names;  // empty: the model's own
  std::string chat_template;             // empty: the model file's
  std::string tool_parser = "auto";      // or "none", or a dialect's name
  std::string config;

  HttpServerOptions http;
  std::string max_body = "16M", max_body_total = "256M";
  std::vector<std::string> api_keys, admin_keys;
  std::string api_key_file, admin_key_file;
  bool no_ui = false, open_metrics = false;
  double drain_timeout = 30;  // seconds
  double stall_seconds = 60;

  int replicas = 0;  // 0: one on each of the devices
  EngineOptions engine;
  int max_batch_tokens = 0;  // 0: what suits the device
  bool no_prefix_cache = false;
  std::string default_tier = "auto";
  SamplingArgs sampling;       // of requests that say nothing of theirs
  double request_timeout = 0;  // seconds; 0 = none
  int max_in_flight = 4096;

  PolicyOptions policy;
  int max_level = -1;                // -1: the adapter's top level
  std::string cost_model;            // file of the cost model; empty: as `calibration` says
  std::string calibration = "auto";  // or "measure"

  std::string log_file, log_format = "text", log_level = "info";
  std::string metrics_compat;

  void AddTo(CLI::App& command);
};

// Options whose values are never shown.
extern const std::vector<std::string> kServeSecrets;

// What can be said before the model is loaded, of `args` as `command` has read them.
Status CheckArgs(const CLI::App& command, const ServeArgs& args);
Expected<LogOptions> LogOptionsOf(const ServeArgs& args);
Expected<HttpServerOptions> HttpOptionsOf(const ServeArgs& args);
Expected<KeyRing> KeysOf(const ServeArgs& args);
Expected<Tier> TierOf(const std::string& name);  // --default-tier

}  // namespace dsla
