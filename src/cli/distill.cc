// dsla distill: trains an adapter for a model.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string_view>

#include "cli/commands.h"
#include "cli/model_args.h"
#include "distill/config.h"
#include "distill/controls.h"
#include "distill/trainer.h"

namespace dsla {
namespace {

// Set by the first interrupt: the run leaves a checkpoint and ends. The second ends it at once.
std::atomic<bool> interrupted{false};

// A step may take minutes on a CPU, in which nothing else is to be seen of it.
constexpr std::string_view kInterrupted =
    "\ndsla: ends after this step, with what is done; once more ends it at once\n";

void OnInterrupt(int signal) {
  interrupted = true;
  std::signal(signal, SIG_DFL);
  [[maybe_unused]] const ssize_t written =
      ::write(STDERR_FILENO, kInterrupted.data(), kInterrupted.size());
}

struct DistillArgs {
  std::string model, config, recipe = "default";
  std::vector<std::string> controls;
  DistillJob job;
  bool print_config = false;
  DistillConfig shown;                                 // what the table of flags is bound to
  std::vector<std::pair<size_t, std::string>> values;  // flags given, by their place in the table
};

struct WriteArgs {
  std::string model;
  WriteJob job;
};

// What a command needs of its model and the machine.
struct Setting {
  std::unique_ptr<ModelFile> model;
  Workspace workspace;
  ExecContext ctx;
};

Status Prepare(const std::string& model, int threads, Setting& setting) {
  std::string path = model;
  if (path.empty()) {
    DSLA_ASSIGN_OR_RETURN(path, DefaultModelPath());
  }
  DSLA_ASSIGN_OR_RETURN(setting.model, ModelFile::Open(path));
  setting.ctx.workspace = &setting.workspace;
  setting.ctx.threads = ThreadCount(threads);
  std::signal(SIGINT, OnInterrupt);
  std::signal(SIGTERM, OnInterrupt);
  return Status::Ok();
}

Status RunWrite(WriteArgs& args) {
  if (args.job.out.empty()) return InvalidArgument("--out is required");
  Setting setting;
  DSLA_RETURN_IF_ERROR(Prepare(args.model, args.job.threads, setting));
  args.job.interrupted = [] { return interrupted.load(); };
  DSLA_ASSIGN_OR_RETURN(const Trainer* const trainer, LoadTrainer());
  DSLA_ASSIGN_OR_RETURN(const WriteOutcome outcome,
                        trainer->write_texts(setting.ctx, *setting.model, args.job));
  if (!outcome.finished)
    return Error(StatusCode::kCancelled,
                 "interrupted after {} texts; the same command goes on from here",
                 outcome.documents);
  return Status::Ok();
}

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
  DSLA_ASSIGN_OR_RETURN(args.job.ranks, CompleteRanks(args.job.ranks, std::getenv));
  Setting setting;
  DSLA_RETURN_IF_ERROR(Prepare(args.model, config.threads, setting));
  args.job.interrupted = [] { return interrupted.load(); };
  const bool controls = !args.controls.empty();
  if (args.controls == std::vector<std::string>{"all"}) args.controls = {};
  DSLA_ASSIGN_OR_RETURN(const Trainer* const trainer, LoadTrainer());
  DSLA_ASSIGN_OR_RETURN(
      const DistillOutcome outcome,
      controls ? trainer->run_controls(setting.ctx, *setting.model, args.job, args.controls)
               : trainer->distill(setting.ctx, *setting.model, args.job));
  if (!outcome.finished && interrupted)
    return Error(StatusCode::kCancelled, "interrupted in {}; the same command goes on from here",
                 outcome.stage);
  return Status::Ok();
}

// `write` under `distill`: its command is chosen after that of distill itself.
void AddWrite(CLI::App& distill, Command& chosen) {
  auto args = std::make_shared<WriteArgs>();
  WriteJob& job = args->job;
  CLI::App& command = *distill.add_subcommand(
      "write", "let the model write texts, one JSON line each, to train on");
  command.footer(
      "Example:\n"
      "  dsla distill write --prompts text.jsonl --documents 20000 --out own.jsonl --device cuda\n"
      "Cut short, it goes on when the same command is given again.");
  const auto add = [&](const char* name, auto& value, const char* help, const char* type) {
    return command.add_option(name, value, help)->type_name(type)->capture_default_str();
  };
  command
      .add_option("-m,--model", args->model,
                  "GGUF file or Hugging Face directory [default: SmolLM2-135M-Instruct]")
      ->type_name("PATH");
  command.add_option("-o,--out", job.out, "JSON lines with a field \"text\"")->type_name("PATH");
  command
      .add_option(
          "--prompts", job.prompts,
          "text (JSONL, plain, or one token file) whose documents' openings begin the texts "
          "[the BOS token does]")
      ->type_name("PATH");
  add("--prompt-tokens", job.prompt_tokens, "of an opening", "tokens");
  add("--documents", job.documents, "texts to write", "N");
  add("--length", job.length, "of a text at most, its opening included", "tokens");
  add("--batch", job.batch, "texts at a time", "N");
  add("--temperature", job.temperature, "0: always the most likely token", "VALUE");
  add("--top-p", job.top_p, "draw from the likeliest tokens that hold so much", "VALUE");
  add("--seed", job.seed, "of openings and draws", "N");
  add("--device", job.device, "cpu, cuda or cuda:N", "DEVICE");
  add("--dtype", job.dtype, "of products: auto (bf16 on a GPU), fp32 or bf16", "TYPE");
  add("--threads", job.threads, "CPU threads, 0: all cores", "N");
  command.add_flag("-q,--quiet", job.quiet, "no progress on standard error");
  command.callback([args, &chosen] {
    chosen = [args] {
      const Status status = RunWrite(*args);
      return status.ok() ? 0 : Fail(status);
    };
  });
}

}  // namespace

void AddDistill(CLI::App& app, Command& chosen) {
  auto args = std::make_shared<DistillArgs>();
  CLI::App& command = *app.add_subcommand("distill", "train an adapter for a model");
  command.footer(
      "Examples:\n"
      "  dsla distill --data text.jsonl --out adapter.dsla.safetensors --device cuda\n"
      "  dsla distill --data text.jsonl --out a.safetensors --stage align --stop-after 500\n"
      "  torchrun --no-python --nproc-per-node 4 dsla distill --data text.jsonl --out "
      "a.safetensors "
      "--device cuda\n"
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
  command
      .add_option("--ranks", args->job.ranks.ranks,
                  "processes that train together, each given this command with its --rank "
                  "[WORLD_SIZE, or 1]")
      ->type_name("N")
      ->group(group);
  command.add_option("--rank", args->job.ranks.rank, "which of them this is, from 0 [RANK]")
      ->type_name("N")
      ->group(group);
  command
      .add_option("--rendezvous", args->job.ranks.rendezvous,
                  "where they meet: HOST:PORT of rank 0, or file:PATH, a new file that all see "
                  "[MASTER_ADDR:MASTER_PORT]")
      ->type_name("WHERE")
      ->group(group);
  command.add_option("--config", args->config, "TOML file of the settings below")
      ->type_name("PATH")
      ->group(group);
  command.add_option("--recipe", args->recipe, "default, paper or paper-operator")
      ->type_name("NAME")
      ->capture_default_str()
      ->group(group);
  command.add_flag("--print-config", args->print_config, "print the settings as TOML and end")
      ->group(group);
  command.add_flag("-q,--quiet", args->job.quiet, "no progress on standard error")->group(group);
  std::string names = "all, or some of";
  for (const Control& control : Controls()) names += fmt::format(" {}", control.name);
  command
      .add_option("--controls", args->controls,
                  "train and measure these beside each other into one table (OUT.controls/"
                  "controls.md): " +
                      names)
      ->type_name("NAME,...")
      ->delimiter(',')
      ->group(group);
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
  AddWrite(command, chosen);
  command.callback([args, &command, &chosen] {
    if (!command.get_subcommands().empty()) return;  // that one was chosen already
    chosen = [args] {
      const Status status = RunDistill(*args);
      return status.ok() ? 0 : Fail(status);
    };
  });
}

}  // namespace dsla
