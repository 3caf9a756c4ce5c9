// dsla serve: the OpenAI-compatible server.
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <memory>

#include "cli/commands.h"
#include "cli/serve_args.h"
#include "cli/serve_program.h"
#include "server/config.h"
#include "server/signals.h"

namespace dsla {
namespace {

void LogConfig(Log& log, const std::vector<ConfigValue>& config) {
  std::vector<LogField> fields;
  for (const ConfigValue& value : config) {
    if (value.source == "default") {
      if (!value.value.empty()) fields.push_back({value.name, value.value});
      continue;
    }
    fields.push_back({value.name, fmt::format("{} ({})", value.value, value.source)});
  }
  log.Write(LogLevel::kInfo, "config", fields);
}

// Leaves at once, with the log written: destructors would wait for the loading or for requests.
[[noreturn]] void Leave(Log& log, int code) {
  log.Flush();
  std::fflush(nullptr);
  _exit(code);
}

int Serve(CLI::App& command, ServeArgs& args) {
  SignalQueue signals;  // before any thread
  RaiseFileLimit();
  Environment environment = ProcessEnvironment();
  const std::vector<std::string> dropped = DropServiceVariables(command, environment);
  const auto config = ResolveConfig(command, environment, kServeSecrets);
  if (!config.ok()) return Fail(config.status());
  if (const Status status = CheckArgs(command, args); !status.ok()) return Fail(status);
  const auto log_options = LogOptionsOf(args);
  if (!log_options.ok()) return Fail(log_options.status());
  auto opened = Log::Open(*log_options);
  if (!opened.ok()) return Fail(opened.status());
  const std::unique_ptr<Log> log = std::move(*opened);
  log->Write(LogLevel::kInfo, "start",
             {{"version", std::string(kServerVersion)}, {"pid", int64_t{getpid()}}});
  for (const std::string& name : dropped) {
    log->Write(LogLevel::kWarning, "variable_ignored",
               {{"name", name}, {"message", "it is what Kubernetes says of a Service"}});
  }
  LogConfig(*log, *config);

  ServeProgram program(args, log.get());
  if (const Status status = program.Listen(); !status.ok()) {
    log->Flush();
    return Fail(status);
  }
  bool checked = false;
  while (true) {
    const int signal = signals.Wait(1.0);
    if (signal == SIGHUP) {
      log->Reopen();
      log->Write(LogLevel::kInfo, "log_reopened");
    }
    if (program.loaded() && !checked) {
      checked = true;
      if (!program.load_status().ok()) {
        log->Flush();
        Leave(*log, Fail(program.load_status()));
      }
    }
    if (signal == SIGTERM || signal == SIGINT) break;
    program.Watch();
    if (program.DeviceFailed()) {
      // Every request fails from now on; a moment for their answers, then whoever watches restarts
      // the program.
      program.WaitIdle(signals, kLastAnswers);
      Leave(*log, 1);
    }
  }
  if (!program.loaded()) {
    log->Write(LogLevel::kInfo, "stopped_while_loading");
    Leave(*log, 0);
  }
  if (!program.Drain(signals)) {
    log->Write(LogLevel::kWarning, "stopped_at_once");
    Leave(*log, 1);
  }
  if (!program.WaitEngine()) {  // destructors would wait for it
    log->Write(LogLevel::kWarning, "stopped_in_a_step");
    Leave(*log, 1);
  }
  program.Watch();
  log->Write(LogLevel::kInfo, "stopped");
  if (program.ReplicaFailed()) Leave(*log, 0);  // destructors would use what it has lost
  return 0;
}

}  // namespace

void AddServe(CLI::App& app, Command& chosen) {
  CLI::App* command =
      app.add_subcommand("serve", "serve the model over an OpenAI-compatible API, with a web page");
  command->footer(
      "Examples:\n"
      "  dsla serve\n"
      "  dsla serve --model model.gguf --host 0.0.0.0 --api-key-file keys.txt\n"
      "  DSLA_PORT=8081 dsla serve --config dsla.toml\n"
      "  dsla serve --device cuda:all   (a replica on every GPU)");
  auto args = std::make_shared<ServeArgs>();
  args->AddTo(*command);
  command->callback(
      [command, args, &chosen] { chosen = [command, args] { return Serve(*command, *args); }; });
}

}  // namespace dsla
