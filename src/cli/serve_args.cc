#include "cli/serve_args.h"

#include <algorithm>

#include "cli/commands.h"
#include "cli/device_choice.h"
#include "engine/replica_router.h"
#include "format/chat/chat_template.h"
#include "format/chat/tool_dialect.h"
#include "ops/sampling/sampling.h"

namespace dsla {
namespace {

void AddAddress(CLI::App& command, ServeArgs& args) {
  const auto group = "Address and access";
  HttpServerOptions& http = args.http;
  command.add_option("--host", http.host, "address or name to listen on")
      ->type_name("ADDRESS")
      ->capture_default_str()
      ->group(group);
  command.add_option("-p,--port", http.port, "port to listen on; 0 = any free one")
      ->type_name("N")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str()
      ->group(group);
  command.add_option("--tls-cert", http.tls_cert, "certificate chain (PEM); serves HTTPS alone")
      ->type_name("FILE")
      ->group(group);
  command.add_option("--tls-key", http.tls_key, "its private key (PEM)")
      ->type_name("FILE")
      ->group(group);
  command
      .add_option("--api-key", args.api_keys,
                  "a key that clients must send (may be given again). Other users of the machine "
                  "can see it here: DSLA_API_KEY or --api-key-file hide it")
      ->type_name("KEY")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->group(group);
  command.add_option("--api-key-file", args.api_key_file, "file of such keys, one a line")
      ->type_name("FILE")
      ->group(group);
  command
      .add_option("--admin-key", args.admin_keys,
                  "key for changes of policy and bounds; without one they are refused")
      ->type_name("KEY")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->group(group);
  command.add_option("--admin-key-file", args.admin_key_file, "file of such keys, one a line")
      ->type_name("FILE")
      ->group(group);
  command
      .add_option(
          "--cors-origin", http.cors_origins,
          "origin whose pages may call the API, or '*' (may be given again) [default: none]")
      ->type_name("ORIGIN")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->group(group);
  command.add_flag("--no-ui", args.no_ui, "do not serve the web page at /")->group(group);
  command
      .add_flag(
          "--open-metrics", args.open_metrics,
          "let /metrics be read without a key. With keys set, all else but the page, /health, "
          "/live, /ready and /ping needs one")
      ->group(group);
}

void AddHttpLimits(CLI::App& command, ServeArgs& args) {
  const auto group = "HTTP limits";
  HttpServerOptions& http = args.http;
  const auto seconds = [&](const char* name, double& value, const char* help) {
    command.add_option(name, value, help)
        ->type_name("SECONDS")
        ->check(CLI::Range(0.001, 86400.0))
        ->capture_default_str()
        ->group(group);
  };
  command.add_option("--max-body", args.max_body, "largest request body")
      ->type_name("SIZE")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--max-body-total", args.max_body_total,
                  "request bodies of all connections together; more are refused with 503")
      ->type_name("SIZE")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--max-connections", http.max_connections,
                  "connections at once; probes are answered on 64 more")
      ->type_name("N")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str()
      ->group(group);
  command.add_option("--io-threads", http.io_threads, "threads for HTTP")
      ->type_name("N")
      ->check(CLI::Range(1, 256))
      ->capture_default_str()
      ->group(group);
  seconds("--read-timeout", http.read_timeout,
          "for a request's head, and as long again for its body");
  seconds("--keep-alive", http.idle_timeout, "for a connection's next request");
  seconds("--write-timeout", http.write_timeout, "that a client may take no bytes");
  seconds("--drain-timeout", args.drain_timeout, "for running requests after SIGTERM");
  seconds("--stall-seconds", args.stall_seconds,
          "without progress until /health and /live say 503");
}

void AddEngine(CLI::App& command, ServeArgs& args) {
  const auto group = "Engine";
  EngineOptions& engine = args.engine;
  const auto count = [&](const char* name, int& value, int low, const char* help) {
    command.add_option(name, value, help)
        ->type_name("N")
        ->check(CLI::Range(low, 1 << 24))
        ->capture_default_str()
        ->group(group);
  };
  count("--max-batch-tokens", args.max_batch_tokens, 0,
        "tokens of one step; 0: 512, on a GPU 4096");
  count("--max-running", engine.max_running, 1, "replies in the batch");
  count("--max-queued", engine.max_queued, 1, "replies waiting; more are refused with 429");
  command
      .add_option("--max-queued-tokens", engine.max_queued_tokens,
                  "prompt tokens waiting; 0 = no bound")
      ->type_name("N")
      ->check(NotNegative())
      ->capture_default_str()
      ->group(group);
  count("--max-preemptions", engine.max_preemptions, 0,
        "of one reply, after which it has room to its end");
  count("--max-in-flight", args.max_in_flight, 1, "HTTP requests being worked on");
  command.add_flag("--no-prefix-cache", args.no_prefix_cache, "do not reuse prompts' beginnings")
      ->group(group);
  count("--snapshot-stride", engine.snapshot_stride, 64,
        "least tokens between states kept for reuse, a multiple of 64");
  command
      .add_flag(
          "--deterministic", engine.deterministic,
          "the same reply bit for bit, whatever else is running (slower, and on the CPU alone)")
      ->group(group);
  command
      .add_option("--request-timeout", args.request_timeout,
                  "seconds until a request is given up; 0 = none. A request may ask for less")
      ->type_name("SECONDS")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str()
      ->group(group);
}

void AddPolicy(CLI::App& command, ServeArgs& args) {
  const auto group = "Levels";
  PolicyOptions& policy = args.policy;
  command
      .add_option("--policy", policy.policy,
                  "how levels are chosen: slo (lowest that meets the targets), paper (queue and "
                  "prompt-length thresholds), fixed")
      ->type_name("NAME")
      ->check(CLI::IsMember({"slo", "paper", "fixed"}))
      ->capture_default_str()
      ->group(group);
  const auto level = [&](const char* name, int& value, const char* help) {
    command.add_option(name, value, help)->type_name("N")->check(CLI::Range(0, 1000))->group(group);
  };
  level("--level", policy.fixed_level, "level of --policy fixed [default: 0]");
  level("--max-level", args.max_level,
        "highest level of tier auto [default: the adapter's recommendation]");
  command
      .add_option("--default-tier", args.default_tier,
                  "tier of requests that name none: auto, full, economy")
      ->type_name("TIER")
      ->check(CLI::IsMember({"auto", "full", "economy"}))
      ->capture_default_str()
      ->group(group);
  const auto target = [&](const char* name, double& value, const char* help) {
    command.add_option(name, value, help)
        ->type_name("SECONDS")
        ->check(CLI::Range(0.0001, 3600.0))
        ->capture_default_str()
        ->group(group);
  };
  target("--slo-ttft", policy.slo.ttft, "target of the time to the first token");
  target("--slo-tpot", policy.slo.tpot, "target of the time per token after it");
  target("--slo-cooldown", policy.slo.up_cooldown, "least time between two rises");
  command
      .add_option("--cost-model", args.cost_model,
                  "file of the cost model: read where it is there, else measured and written "
                  "[default: see --calibration]")
      ->type_name("FILE")
      ->group(group);
  command
      .add_option("--calibration", args.calibration,
                  "the cost model without such a file: auto (measured at the first start with a "
                  "model on this machine, and kept in $XDG_CACHE_HOME/dsla) or measure (at each "
                  "start, and not kept)")
      ->type_name("auto|measure")
      ->check(CLI::IsMember({"auto", "measure"}))
      ->capture_default_str()
      ->group(group);
  target("--slo-calm", policy.slo.calm_seconds, "calm before the level goes down");
  command
      .add_option("--paper-queue", policy.paper.queue, "waiting requests at which paper converts")
      ->type_name("N")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--paper-prompt", policy.paper.prompt_tokens,
                  "waiting prompt's tokens at which paper converts")
      ->type_name("N")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str()
      ->group(group);
  target("--paper-cooldown", policy.paper.cooldown, "paper's least time between two changes");
}

void AddLog(CLI::App& command, ServeArgs& args) {
  const auto group = "Log and metrics";
  command
      .add_option("--log-file", args.log_file,
                  "append to this file; SIGHUP reopens it [default: "
                  "standard error]")
      ->type_name("FILE")
      ->group(group);
  command.add_option("--log-format", args.log_format, "text or json")
      ->type_name("FORMAT")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str()
      ->group(group);
  command.add_option("--log-level", args.log_level, "debug, info, warning or error")
      ->type_name("LEVEL")
      ->check(CLI::IsMember({"debug", "info", "warning", "error"}))
      ->capture_default_str()
      ->group(group);
  command.add_option("--metrics-compat", args.metrics_compat, "also metrics by the names of: vllm")
      ->type_name("NAME")
      ->check(CLI::IsMember({"vllm"}))
      ->group(group);
}

// As it stands in a browser's Origin header: without a path, not even "/".
bool IsOrigin(const std::string& text) {
  const size_t scheme = text.find("://");
  if (scheme == std::string::npos) return text == "*" || text == "null";
  return scheme > 0 && scheme + 3 < text.size() && text.find('/', scheme + 3) == std::string::npos;
}

// Those given, then those of the file.
Status AppendKeyFile(const std::string& path, std::vector<std::string>& keys) {
  if (path.empty()) return Status::Ok();
  DSLA_ASSIGN_OR_RETURN(const std::vector<std::string> read, ReadKeyFile(path));
  keys.insert(keys.end(), read.begin(), read.end());
  return Status::Ok();
}

}  // namespace

const std::vector<std::string> kServeSecrets = {"api-key", "admin-key"};

void ServeArgs::AddTo(CLI::App& command) {
  model.AddTo(command);
  command.get_option("--memory")
      ->description(
          "cache memory, such as 512M or 2G [default: eight whole contexts, at most a quarter of "
          "the memory that the machine or the container's limit gives; on a GPU at most 85% of "
          "what is free there]. Replicas on the CPU share it; of several GPUs each has so much");
  command.get_option("--device")
      ->description(
          "where the model runs: cpu, cuda, cuda:N, auto (a GPU that can hold it, where there is "
          "one), or, a replica on each, several GPUs (cuda:0,cuda:1) or all (cuda:all)");
  command
      .add_option("--replicas", replicas,
                  "engines that share the requests, on the CPU each with its part of --threads and "
                  "--memory; 0: one on each device")
      ->type_name("N")
      ->check(CLI::Range(0, ReplicaRouter::kMostReplicas))
      ->capture_default_str()
      ->group("Model");
  command
      .add_option("--model-name", model_names,
                  "name by which clients ask for the model (may be given again) [default: its own]")
      ->type_name("NAME")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->group("Model");
  command
      .add_option("--chat-template", chat_template,
                  "template by name [default: the one of the model file]")
      ->type_name("NAME")
      ->group("Model");
  command
      .add_option("--tool-parser", tool_parser,
                  fmt::format("how the model writes calls of tools: auto, none or {} [default: "
                              "auto, what the model file's chat template shows]",
                              fmt::join(ToolDialectNames(), ", ")))
      ->type_name("NAME")
      ->group("Model");
  command
      .add_option("--config", config,
                  "TOML file with any of these options; the command line and DSLA_* variables "
                  "(DSLA_PORT) go before it")
      ->type_name("FILE");
  AddAddress(command, *this);
  AddHttpLimits(command, *this);
  AddEngine(command, *this);
  AddPolicy(command, *this);
  sampling.AddTo(command, "Sampling, of requests that do not say theirs");
  AddLog(command, *this);
}

Status CheckArgs(const CLI::App& command, const ServeArgs& args) {
  const std::string& device = args.model.device;
  if (args.replicas > 1 && device.starts_with("cuda") && !NamesSeveralDevices(device)) {
    return InvalidArgument(
        "--replicas: {} on --device {}: a GPU has one; name several (cuda:0,cuda:1 or cuda:all)",
        args.replicas, device);
  }
  if (args.policy.policy != "fixed" && command.get_option("--level")->count() > 0) {
    return InvalidArgument("--level: {} is the level of --policy fixed; the policy is {}",
                           args.policy.fixed_level, args.policy.policy);
  }
  if (std::find(args.model_names.begin(), args.model_names.end(), "") != args.model_names.end())
    return InvalidArgument("--model-name: is empty");
  DSLA_RETURN_IF_ERROR(Validate(args.sampling.params, 0));
  if (args.tool_parser != "auto" && args.tool_parser != "none" &&
      !ToolDialectByName(args.tool_parser)) {
    return InvalidArgument("--tool-parser: must be auto, none or one of {}, not '{}'",
                           fmt::join(ToolDialectNames(), ", "), args.tool_parser);
  }
  if (args.chat_template.empty()) return Status::Ok();
  return ChatTemplateByName(args.chat_template).status();
}

Expected<LogOptions> LogOptionsOf(const ServeArgs& args) {
  LogOptions options;
  options.file = args.log_file;
  options.json = args.log_format == "json";
  DSLA_ASSIGN_OR_RETURN(options.level, ParseLogLevel(args.log_level));
  return options;
}

Expected<HttpServerOptions> HttpOptionsOf(const ServeArgs& args) {
  HttpServerOptions options = args.http;
  // To the resolver it means every address, which is more than one who left a variable empty wants.
  if (options.host.empty())
    return InvalidArgument("--host: is empty; every address of this machine is 0.0.0.0 or ::");
  for (const std::string& origin : options.cors_origins) {
    if (!IsOrigin(origin)) {
      return InvalidArgument(
          "--cors-origin: '{}' is neither '*' nor an origin such as https://example.org, as "
          "browsers send it",
          origin);
    }
  }
  const auto bytes = ParseBytes(args.max_body);
  if (!bytes.ok()) return InvalidArgument("--max-body: {}", bytes.status().message());
  options.limits.body_bytes = *bytes;
  const auto total = ParseBytes(args.max_body_total);
  if (!total.ok()) return InvalidArgument("--max-body-total: {}", total.status().message());
  if (*total < *bytes) {
    return InvalidArgument("--max-body-total: {} is less than one body may have, --max-body {}",
                           args.max_body_total, args.max_body);
  }
  options.max_body_total = *total;
  return options;
}

Expected<KeyRing> KeysOf(const ServeArgs& args) {
  std::vector<std::string> api = args.api_keys, admin = args.admin_keys;
  DSLA_RETURN_IF_ERROR(AppendKeyFile(args.api_key_file, api));
  DSLA_RETURN_IF_ERROR(AppendKeyFile(args.admin_key_file, admin));
  return KeyRing::Create(api, admin);
}

Expected<Tier> TierOf(const std::string& name) {
  for (const Tier tier : {Tier::kFull, Tier::kAuto, Tier::kEconomy}) {
    if (name == Name(tier)) return tier;
  }
  return InvalidArgument("--default-tier: '{}' is not one of auto, full, economy", name);
}

}  // namespace dsla
