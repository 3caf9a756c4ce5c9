// dsla bench: speed and cache of each level on one text, or speed at given depths of context,
// beside the machine's limits.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <nlohmann/json.hpp>

#include "cli/bench_report.h"
#include "cli/commands.h"
#include "cli/model_args.h"
#include "eval/cost.h"
#include "eval/divergence.h"
#include "eval/documents.h"
#include "eval/machine.h"
#include "eval/speed.h"

namespace dsla {
namespace {

struct BenchArgs {
  ModelArgs model;
  std::string text;
  SpeedOptions speed;
  int max_tokens = 0;
  std::vector<int> depths, batches = {1};
  int prefill_tokens = 512, requests = 0;
  bool kl = false, stages = false;
  std::string format = "text";
};

// One level's row: what was measured, what it had to move or compute, and the share of the
// machine's limit.
struct Row {
  LevelSpeed speed;
  double prefill_rate, decode_rate;   // tokens/s
  double prefill_flops, gemm_share;   // whole text; of the GEMM rate
  double decode_bytes, memory_share;  // one step; of the read bandwidth
  double kl = 0;                      // against level 0 on the same text
};

std::vector<Row> MakeRows(const LoadedModel& loaded, const MachineLimits& machine, int64_t tokens,
                          const std::vector<LevelSpeed>& speeds, const SpeedOptions& options) {
  std::vector<Row> rows;
  for (const LevelSpeed& speed : speeds) {
    const auto n = static_cast<double>(tokens);
    Row row{.speed = speed,
            .prefill_rate = n / speed.prefill_seconds,
            .decode_rate = 1 / speed.decode_seconds,
            .prefill_flops = PrefillFlops(*loaded.model, speed.level, tokens),
            .gemm_share = 0,
            .decode_bytes = static_cast<double>(
                DecodeBytes(*loaded.model, speed.level, tokens + options.decode_tokens / 2)),
            .memory_share = 0};
    row.gemm_share = row.prefill_flops / speed.prefill_seconds / machine.gemm_flops;
    row.memory_share = row.decode_bytes / speed.decode_seconds / machine.read_bytes_per_second;
    rows.push_back(row);
  }
  return rows;
}

nlohmann::json ToJson(const LoadedModel& loaded, const MachineLimits& machine, int64_t tokens,
                      const std::vector<Row>& rows, bool kl) {
  nlohmann::json levels = nlohmann::json::array();
  for (const Row& row : rows) {
    nlohmann::json level = {{"level", row.speed.level},
                            {"prefill_seconds", row.speed.prefill_seconds},
                            {"prefill_tokens_per_second", row.prefill_rate},
                            {"prefill_flops", row.prefill_flops},
                            {"prefill_share_of_gemm", row.gemm_share},
                            {"decode_seconds", row.speed.decode_seconds},
                            {"decode_tokens_per_second", row.decode_rate},
                            {"decode_bytes", row.decode_bytes},
                            {"decode_share_of_bandwidth", row.memory_share},
                            {"fold_seconds", row.speed.fold_seconds},
                            {"cache_bytes", row.speed.cache_bytes}};
    if (kl) level["kl"] = row.kl;
    levels.push_back(std::move(level));
  }
  return {{"model", loaded.model->config().name},
          {"tokens", tokens},
          {"threads", loaded.ctx.threads},
          {"device", loaded.where()},
          {"read_bytes_per_second", machine.read_bytes_per_second},
          {"gemm_flops", machine.gemm_flops},
          {"levels", std::move(levels)}};
}

// The first row is what the others are compared with.
void PrintLevels(const std::vector<Row>& rows, bool kl, bool markdown) {
  const std::vector<std::string> names = {
      "level", "prefill tok/s", "x",         "GFLOP",   "of GEMM rate", "decode tok/s",
      "x",     "MB per step",   "of memory", "fold ms", "cache MB",     "of level 0"};
  std::vector<std::vector<std::string>> cells = {names};
  if (kl) cells[0].push_back("KL");
  const Row& base = rows.front();
  for (const Row& row : rows) {
    cells.push_back({fmt::format("{}", row.speed.level), fmt::format("{:.0f}", row.prefill_rate),
                     fmt::format("{:.2f}", row.prefill_rate / base.prefill_rate),
                     fmt::format("{:.0f}", row.prefill_flops / 1e9),
                     fmt::format("{:.0f}%", row.gemm_share * 100),
                     fmt::format("{:.1f}", row.decode_rate),
                     fmt::format("{:.2f}", row.decode_rate / base.decode_rate),
                     fmt::format("{:.0f}", row.decode_bytes / 1e6),
                     fmt::format("{:.0f}%", row.memory_share * 100),
                     fmt::format("{:.0f}", row.speed.fold_seconds * 1e3),
                     fmt::format("{:.1f}", static_cast<double>(row.speed.cache_bytes) / 1e6),
                     fmt::format("{:.0f}%", 100.0 * static_cast<double>(row.speed.cache_bytes) /
                                                static_cast<double>(base.speed.cache_bytes))});
    if (kl) cells.back().push_back(fmt::format("{:.4f}", row.kl));
  }
  PrintTable(cells, markdown);
}

Status MeasureKl(const LoadedModel& loaded, CachePool& pool,
                 const std::vector<std::vector<int32_t>>& text, std::vector<Row>& rows) {
  DivergenceOptions options;
  options.measure_switched = false;
  for (const Row& row : rows) {
    if (row.speed.level > 0)
      options.levels.push_back(row.speed.level);  // level 0 is the reference: 0
  }
  DSLA_ASSIGN_OR_RETURN(const DivergenceReport report,
                        MeasureDivergence(loaded.ctx, *loaded.model, pool, text, options));
  auto measured = report.levels.begin();
  for (Row& row : rows) {
    if (row.speed.level > 0) row.kl = (measured++)->kl;
  }
  return Status::Ok();
}

Status CheckArgs(const BenchArgs& args) {
  const auto& formats = {"text", "markdown", "csv", "json"};
  if (std::find(formats.begin(), formats.end(), args.format) == formats.end()) {
    return InvalidArgument("--format: '{}' is not one of text, markdown, csv, json", args.format);
  }
  if (args.speed.repetitions < 1)
    return InvalidArgument("--repetitions: {} is not positive", args.speed.repetitions);
  if (args.speed.decode_tokens < 1)
    return InvalidArgument("--decode: {} is not positive", args.speed.decode_tokens);
  if (args.speed.prefill_chunk < 1)
    return InvalidArgument("--prefill-chunk: {} is not positive", args.speed.prefill_chunk);
  if (args.prefill_tokens < 0)
    return InvalidArgument("--prefill: {} is negative", args.prefill_tokens);
  if (args.requests < 0) return InvalidArgument("--serve: {} is negative", args.requests);
  if (args.depths.empty() && args.requests > 0)
    return InvalidArgument("--serve goes with --depths");
  for (const int sequences : args.batches) {
    if (sequences < 1) return InvalidArgument("--batch: {} is not positive", sequences);
  }
  if (args.depths.empty() && args.batches != std::vector<int>{1})
    return InvalidArgument("--batch goes with --depths");
  if (args.depths.empty() && args.stages) return InvalidArgument("--stages goes with --depths");
  if (!args.depths.empty() && args.kl)
    return InvalidArgument("--kl is measured on the whole text, without --depths");
  return Status::Ok();
}

class Progress {
 public:
  void Show(const std::string& what) const {
    if (shown_) fmt::print(stderr, "\r{}\033[K", what);
  }
  void Clear() const { Show(""); }

 private:
  bool shown_ = ::isatty(STDERR_FILENO) != 0;
};

void PrintMachine(const LoadedModel& loaded, const std::string& kv, const MachineLimits& machine,
                  const std::string& what) {
  fmt::print("{}, {} weights, {} cache; {}; {}\n", loaded.model->config().name,
             Name(loaded.model->options().weights), kv, what, loaded.where());
  fmt::print("machine: memory {} {:.1f} GB/s, {} GEMM {:.0f} GFLOP/s\n\n",
             loaded.model->device() == nullptr ? "read" : "copy",
             machine.read_bytes_per_second / 1e9,
             loaded.model->device() == nullptr ? "fp32" : "bf16", machine.gemm_flops / 1e9);
}

Status BenchDepths(const BenchArgs& args, const std::vector<int>& levels, const LoadedModel& loaded,
                   CachePool& pool, const std::vector<int32_t>& text) {
  const DepthOptions options{.levels = levels,
                             .depths = args.depths,
                             .batches = args.batches,
                             .prefill_tokens = args.prefill_tokens,
                             .decode_tokens = args.speed.decode_tokens,
                             .repetitions = args.speed.repetitions,
                             .prefill_chunk = args.speed.prefill_chunk,
                             .stages = args.stages};
  if (args.stages && loaded.model->device() != nullptr)
    return Unsupported("--stages: {} runs a step as a whole", loaded.where());
  const Progress progress;
  progress.Show("measuring the machine");
  DSLA_ASSIGN_OR_RETURN(const MachineLimits machine,
                        MeasureMachine(loaded.ctx, loaded.model->device()));
  DSLA_ASSIGN_OR_RETURN(const auto speeds,
                        MeasureDepths(loaded.ctx, *loaded.model, pool, text, options,
                                      [&](const std::string& what) { progress.Show(what); }));
  auto tests = TestsOf(*loaded.model, machine, options, speeds);
  if (args.requests > 0) {
    const ServeOptions serve{.levels = levels,
                             .prompts = args.depths,
                             .requests = args.requests,
                             .reply_tokens = args.speed.decode_tokens,
                             .repetitions = args.speed.repetitions,
                             .memory_bytes = loaded.memory_bytes};
    DSLA_ASSIGN_OR_RETURN(const auto served,
                          MeasureServe(loaded.ctx, *loaded.model, *loaded.tokenizer, text, serve,
                                       [&](const std::string& what) { progress.Show(what); }));
    std::ranges::move(TestsOf(serve, served), std::back_inserter(tests));
  }
  progress.Clear();
  if (args.format == "csv") {
    PrintCsv(loaded, args.model.kv, tests);
  } else if (args.format == "json") {
    const nlohmann::json json = {{"model", loaded.model->config().name},
                                 {"weights", Name(loaded.model->options().weights)},
                                 {"threads", loaded.ctx.threads},
                                 {"read_bytes_per_second", machine.read_bytes_per_second},
                                 {"gemm_flops", machine.gemm_flops},
                                 {"tests", ToJson(tests)}};
    fmt::print("{}\n", json.dump(2));
  } else {
    PrintMachine(loaded, args.model.kv, machine,
                 fmt::format("medians of {} runs", options.repetitions));
    PrintTests(tests, args.format == "markdown");
    PrintStages(tests, args.format == "markdown");
  }
  return Status::Ok();
}

Status BenchText(const BenchArgs& args, const SpeedOptions& speed, const LoadedModel& loaded,
                 CachePool& pool, const std::vector<std::vector<int32_t>>& text) {
  const Progress progress;
  progress.Show("measuring the machine");
  DSLA_ASSIGN_OR_RETURN(const MachineLimits machine,
                        MeasureMachine(loaded.ctx, loaded.model->device()));
  DSLA_ASSIGN_OR_RETURN(const auto speeds,
                        MeasureSpeed(loaded.ctx, *loaded.model, pool, text.front(), speed,
                                     [&](const std::string& what) { progress.Show(what); }));
  const auto tokens = static_cast<int64_t>(text.front().size());
  std::vector<Row> rows = MakeRows(loaded, machine, tokens, speeds, speed);
  if (args.kl) {
    progress.Show("measuring the KL divergence from level 0");
    DSLA_RETURN_IF_ERROR(MeasureKl(loaded, pool, text, rows));
  }
  progress.Clear();
  if (args.format == "json") {
    fmt::print("{}\n", ToJson(loaded, machine, tokens, rows, args.kl).dump(2));
  } else if (args.format == "csv") {
    PrintCsv(loaded, args.model.kv, TestsOf(*loaded.model, machine, tokens, speed, speeds));
  } else {
    PrintMachine(
        loaded, args.model.kv, machine,
        fmt::format("{} tokens of {}, then {} decoded", tokens, args.text, speed.decode_tokens));
    PrintLevels(rows, args.kl, args.format == "markdown");
  }
  return Status::Ok();
}

Status Bench(const BenchArgs& args) {
  DSLA_RETURN_IF_ERROR(CheckArgs(args));
  // The text, and at depths copies of it for the largest batch, or all requests; else one context
  // for each level.
  const int most =
      std::max(args.requests, *std::max_element(args.batches.begin(), args.batches.end()));
  const int contexts =
      1 + (args.depths.empty() ? static_cast<int>(args.speed.levels.size()) : most);
  DSLA_ASSIGN_OR_RETURN(const LoadedModel loaded,
                        LoadModel(args.model, contexts, std::max(args.speed.prefill_chunk, most)));
  SpeedOptions speed = args.speed;
  if (speed.levels.empty()) {
    speed.levels = {0};
    if (const AdapterInfo* adapter = loaded.model->adapter())
      speed.levels.push_back(adapter->top_level);
  }
  DocumentOptions document;
  const int room = loaded.model->max_positions() - speed.decode_tokens;
  if (room < 2)
    return InvalidArgument("--decode {} leaves no room in the context", speed.decode_tokens);
  document.max_tokens = args.max_tokens > 0 ? std::min(args.max_tokens, room) : room;
  document.max_docs = 1;
  DSLA_ASSIGN_OR_RETURN(const auto text, ReadDocuments(args.text, *loaded.tokenizer, document));
  DSLA_ASSIGN_OR_RETURN(CachePool pool, loaded.NewPool());
  if (!args.depths.empty()) return BenchDepths(args, speed.levels, loaded, pool, text.front());
  return BenchText(args, speed, loaded, pool, text);
}

}  // namespace

void AddBench(CLI::App& app, Command& chosen) {
  auto args = std::make_shared<BenchArgs>();
  CLI::App& command = *app.add_subcommand(
      "bench", "measure speed and cache of each level, beside the machine's limits");
  command.footer(
      "Prefill counts every operation the shapes require, decode every byte; 'of GEMM rate' and "
      "'of memory' are the\n"
      "shares of what this machine was measured to do at best. 'x' compares with the first "
      "level. With --depths, --prefill tokens are read and --decode tokens decoded after so many "
      "tokens of context.\n\n"
      "Examples:\n  dsla bench --text /usr/share/common-licenses/GPL-3 --levels 0,8,15,22 --kl\n"
      "  dsla bench --text /usr/share/common-licenses/GPL-3 --depths 0,2000,7600 --batch 1,8\n"
      "  dsla bench --text /usr/share/common-licenses/GPL-3 --depths 2000 --serve 8");
  const auto group = "Bench";
  command.add_option("--text", args->text, "the text that is read")
      ->type_name("PATH")
      ->required()
      ->group(group);
  command
      .add_option("--levels", args->speed.levels,
                  "levels to compare [default: 0 and the adapter's top level]")
      ->type_name("N,N,...")
      ->allow_extra_args(false)
      ->delimiter(',')
      ->group(group);
  command
      .add_option("--max-tokens", args->max_tokens,
                  "cut the text [default: what the context holds]")
      ->type_name("N")
      ->group(group);
  command.add_option("--decode", args->speed.decode_tokens, "tokens to decode after the text")
      ->type_name("N")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--repetitions", args->speed.repetitions,
                  "runs per level, alternating; medians are shown")
      ->type_name("N")
      ->capture_default_str()
      ->group(group);
  command.add_option("--prefill-chunk", args->speed.prefill_chunk, "prompt tokens per step")
      ->type_name("N")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--depths", args->depths,
                  "measure after so many tokens of context each (the text, repeated if shorter)")
      ->type_name("N,N,...")
      ->allow_extra_args(false)
      ->delimiter(',')
      ->group(group);
  command.add_option("--batch", args->batches, "with --depths: sequences that decode together")
      ->type_name("N,N,...")
      ->allow_extra_args(false)
      ->delimiter(',')
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--prefill", args->prefill_tokens,
                  "with --depths: tokens that one sequence reads in one step; 0: none")
      ->type_name("N")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--serve", args->requests,
                  "with --depths: requests at once through the engine, prompts of that many tokens "
                  "and replies of --decode; 0: none")
      ->type_name("N")
      ->capture_default_str()
      ->group(group);
  command
      .add_flag("--stages", args->stages,
                "with --depths: the time of each stage of a step too (not in CSV)")
      ->group(group);
  command.add_flag("--kl", args->kl, "measure the KL divergence from level 0 too")->group(group);
  command.add_option("--format", args->format, "text, markdown, csv or json")
      ->type_name("NAME")
      ->capture_default_str()
      ->group(group);
  args->model.AddTo(command);
  command.callback([args, &chosen] {
    chosen = [args] {
      const Status status = Bench(*args);
      return status.ok() ? 0 : Fail(status);
    };
  });
}

}  // namespace dsla
