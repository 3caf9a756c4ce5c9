// dsla distill: trains an adapter for a model.
#include "distill/distill.h"

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <memory>

#include "cli/commands.h"
#include "cli/model_args.h"
#include "distill/config.h"

namespace dsla {
namespace {

// Set by the first interrupt: the run leaves a checkpoint and ends. The second ends it at once.
std::atomic<bool> interrupted{false};

void OnInterrupt(int signal) {
  interrupted = true;
  std::signal(signal, SIG_DFL);
}

struct DistillArgs {
  std::string model, config, recipe = "default";
  DistillJob job;
  bool print_config = false;
  DistillConfig shown;                                 // what the table of flags is bound to
  std::vector<std::pair<size_t, std::string>> values;  // flags given, by their place in the table
};

Status RunDistill(DistillArgs& args) {
  DistillConfig& config = args.job.config;
  // Recipe, file, flags: the later one counts.
  DSLA_RETURN_IF_ERROR(ApplyRecipe(args.recipe, &config));
  if (!args.config.empty()) DSLA_RETURN_IF_ERROR(ReadToml(args.config, &config));
  const std::vector<ConfigKey> keys = ConfigKeys(config);
  for (const auto& [place, text] : args.values)
    DSLA_RETURN_IF_ERROR(SetFromText(keys[place], text));
  if (args.print_config) {
    fmt::print("{}", WriteToml(config));
    return Status::Ok();
  }
  if (args.job.out.empty()) return InvalidArgument("--out is required");
  if (args.job.data.empty()) return InvalidArgument("--data is required");
  std::string path = args.model;
  if (path.empty()) {
    DSLA_ASSIGN_OR_RETURN(path, DefaultModelPath());
  }
  DSLA_ASSIGN_OR_RETURN(const std::unique_ptr<ModelFile> model, ModelFile::Open(path));
  Workspace workspace;
  ExecContext ctx;
  ctx.workspace = &workspace;
  ctx.threads = ThreadCount(config.threads);
  std::signal(SIGINT, OnInterrupt);
  std::signal(SIGTERM, OnInterrupt);
  args.job.interrupted = [] { return interrupted.load(); };
  DSLA_ASSIGN_OR_RETURN(const DistillOutcome outcome, Distill(ctx, *model, args.job));
  if (!outcome.finished && interrupted)
    return Error(StatusCode::kCancelled, "interrupted in {}; the same command goes on from here",
                 outcome.stage);
  return Status::Ok();
}

}  // namespace

void AddDistill(CLI::App& app, Command& chosen) {
  auto args = std::make_shared<DistillArgs>();
  CLI::App& command = *app.add_subcommand("distill", "train an adapter for a model");
  command.footer(
      "Examples:\n"
      "  dsla distill --data text.jsonl --out adapter.dsla.safetensors --device cuda\n"
      "  dsla distill --data text.jsonl --out a.safetensors --stage align --stop-after 500\n"
      "A run that was cut short goes on when the same command is given again.");
  const auto group = "Distillation";
  command
      .add_option("-m,--model", args->model,
                  "GGUF file or Hugging Face directory [default: SmolLM2-135M-Instruct]")
      ->type_name("PATH")
      ->group(group);
  command
      .add_option("-d,--data", args->job.data,
                  "training text: JSONL with a field \"text\" per line, plain text, or one token "
                  "file")
      ->type_name("PATH")
      ->group(group);
  command
      .add_option("--valid", args->job.valid,
                  "text to measure on [default: the last documents of --data]")
      ->type_name("PATH")
      ->group(group);
  command.add_option("-o,--out", args->job.out, "the adapter file")
      ->type_name("PATH")
      ->group(group);
  command.add_option("--work", args->job.work, "folder of checkpoints, log and report [OUT.work]")
      ->type_name("PATH")
      ->group(group);
  command.add_option("--start", args->job.start, "an adapter of the same settings to go on from")
      ->type_name("PATH")
      ->group(group);
  command
      .add_option("--stage", args->job.stage,
                  "one alone: prepare, init, align, order, chain, evaluate or export")
      ->type_name("STAGE")
      ->group(group);
  command
      .add_option("--stop-after", args->job.stop_after, "leave a checkpoint and end after so long")
      ->type_name("SECONDS")
      ->group(group);
  command.add_option("--config", args->config, "TOML file of the settings below")
      ->type_name("PATH")
      ->group(group);
  command.add_option("--recipe", args->recipe, "default or paper")
      ->type_name("NAME")
      ->capture_default_str()
      ->group(group);
  command.add_flag("--print-config", args->print_config, "print the settings as TOML and end")
      ->group(group);
  command.add_flag("-q,--quiet", args->job.quiet, "no progress on standard error")->group(group);
  const std::vector<ConfigKey> keys = ConfigKeys(args->shown);
  // Where training runs is asked for most, so it has a short name too.
  const auto flag = [](const ConfigKey& key) {
    return key.name == "run.device" ? "--device," + key.flag() : key.flag();
  };
  for (size_t i = 0; i < keys.size(); ++i) {
    command
        .add_option_function<std::string>(
            flag(keys[i]),
            [args, i](const std::string& text) { args->values.emplace_back(i, text); },
            fmt::format("{} [{}]", keys[i].help, ValueText(keys[i])))
        ->type_name(keys[i].unit.empty() ? "VALUE" : keys[i].unit)
        ->group("Settings");
  }
  command.callback([args, &chosen] {
    chosen = [args] {
      const Status status = RunDistill(*args);
      return status.ok() ? 0 : Fail(status);
    };
  });
}

}  // namespace dsla
