// dsla eval: how far each level is from level 0 on given text, on recall and on what it writes, and
// how far its controls are.
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "cli/commands.h"
#include "cli/model_args.h"
#include "eval/documents.h"
#include "eval/evaluation.h"
#include "eval/evaluation_report.h"

namespace dsla {
namespace {

struct EvalArgs {
  ModelArgs model;
  std::vector<std::string> data;
  DocumentOptions documents;
  std::vector<std::string> controls;
  EvaluationOptions evaluation;
  EvaluationReportOptions report;
  std::string html;
  bool json = false;
};

// The controls named, "all" for what the adapter allows.
Status ReadControls(const EvalArgs& args, const Adapter& adapter, EvaluationOptions& options) {
  for (const std::string& name : args.controls) {
    if (name == "all") {
      for (const Control control : ControlsOf(adapter)) options.controls.push_back(control);
      continue;
    }
    DSLA_ASSIGN_OR_RETURN(const Control control, ParseControl(name));
    if (control == Control::kGivenOrder)
      return InvalidArgument("control given-order: name the layers with --order");
    options.controls.push_back(control);
  }
  if (!options.order.empty()) options.controls.push_back(Control::kGivenOrder);
  return Status::Ok();
}

// Of all files together, at most max_docs.
Expected<std::vector<std::vector<int32_t>>> ReadData(const EvalArgs& args,
                                                     const Tokenizer& tokenizer, int context) {
  DocumentOptions options = args.documents;
  if (options.max_tokens == 0 || options.max_tokens > context) options.max_tokens = context;
  if (options.min_tokens < 2)
    return InvalidArgument("--min-tokens: {} is under 2", options.min_tokens);
  std::vector<std::vector<int32_t>> documents;
  for (const std::string& path : args.data) {
    DSLA_ASSIGN_OR_RETURN(auto more, ReadDocuments(path, tokenizer, options));
    std::move(more.begin(), more.end(), std::back_inserter(documents));
    if (args.documents.max_docs <= 0) continue;
    options.max_docs = args.documents.max_docs - static_cast<int>(documents.size());
    if (options.max_docs == 0) break;
  }
  return documents;
}

// Said at the start: what is measured may take hours.
Status CheckReport(const std::string& path) {
  std::filesystem::path folder = std::filesystem::path(path).parent_path();
  if (folder.empty()) folder = ".";
  if (::access(folder.c_str(), W_OK) == 0) return Status::Ok();
  return InvalidArgument("--report: cannot write '{}': {}", path, std::strerror(errno));
}

Status Eval(const EvalArgs& args) {
  if (!args.html.empty()) DSLA_RETURN_IF_ERROR(CheckReport(args.html));
  EvaluationOptions options = args.evaluation;
  // Beside level 0, each level is in memory from the start and once for each switch; recall forks
  // what it reads.
  const size_t levels = std::max<size_t>(1, options.levels.size());
  const int sequences = 4 + static_cast<int>(levels * (1 + options.switches.size()));
  DSLA_ASSIGN_OR_RETURN(const LoadedModel loaded, LoadModel(args.model, sequences));
  // Once more, for its tensors: the controls change them.
  DSLA_ASSIGN_OR_RETURN(const auto adapter, OpenAdapter(args.model, *loaded.file));
  if (adapter == nullptr)
    return InvalidArgument("'{}' has no adapter: there is only level 0", loaded.file->path());
  if (options.levels.empty()) options.levels = {adapter->top_level};
  options.control_memory_bytes = loaded.memory_bytes;
  DSLA_RETURN_IF_ERROR(ReadControls(args, *adapter, options));
  DSLA_ASSIGN_OR_RETURN(const auto documents,
                        ReadData(args, *loaded.tokenizer, loaded.model->max_positions()));
  DSLA_ASSIGN_OR_RETURN(CachePool pool, loaded.NewPool());
  const bool progress = ::isatty(STDERR_FILENO) != 0;
  DSLA_ASSIGN_OR_RETURN(const Evaluation evaluation,
                        Evaluate(loaded.ctx, *loaded.model, *adapter, pool, documents, options,
                                 [&](const std::string& line) {
                                   if (progress) fmt::print(stderr, "\r{}\033[K", line);
                                 }));
  if (progress) fmt::print(stderr, "\r\033[K");
  EvaluationReportOptions report = args.report;
  report.data = fmt::format("{}", fmt::join(args.data, ", "));
  if (!args.html.empty()) {
    const ReportDocument document = EvaluationDocument(evaluation, options, report);
    DSLA_RETURN_IF_ERROR(WriteFileAtomically(args.html, document.html("Evaluation")));
  }
  if (args.json)
    fmt::print("{}\n", EvaluationJson(evaluation, options, report).dump(2));
  else
    fmt::print("{}", EvaluationDocument(evaluation, options, report).markdown());
  return Status::Ok();
}

// A list of numbers or names.
template <typename T>
CLI::Option* AddList(CLI::App& command, const std::string& name, T& to, const std::string& text,
                     const std::string& type) {
  return command.add_option(name, to, text)
      ->type_name(type)
      ->allow_extra_args(false)
      ->delimiter(',')
      ->group("Evaluation");
}

void AddParts(CLI::App& command, EvalArgs& args) {
  const auto group = "Parts";
  command.add_flag("--by-position", args.report.by_position, "figures by position in the document")
      ->group(group);
  command
      .add_flag("--recall", args.evaluation.measure_recall,
                "copies, key-value tables and needles: what was said is said again")
      ->group(group);
  command
      .add_flag("--generate", args.evaluation.measure_generation,
                "greedy continuations of the documents; with --recall answers written freely too")
      ->group(group);
  AddList(command, "--controls", args.controls,
          "window, zeroed, history, recency, bypass, random-order, entropy-order or all: the same\n"
          "figures for the adapter with one thing changed",
          "NAME,NAME,...")
      ->group(group);
  AddList(command, "--order", args.evaluation.order,
          "a control whose layers convert in this order, those left out after them", "N,N,...")
      ->group(group);
  RecallOptions& recall = args.evaluation.recall;
  AddList(command, "--recall-gaps", recall.gaps, "distances of copies, tokens", "N,N,...")
      ->capture_default_str()
      ->group(group);
  AddList(command, "--recall-lengths", recall.lengths, "lengths of tables and needles, tokens",
          "N,N,...")
      ->capture_default_str()
      ->group(group);
  AddList(command, "--recall-depths", recall.depths, "depths of needles, 0 to 1", "N,N,...")
      ->capture_default_str()
      ->group(group);
  command.add_option("--recall-texts", recall.texts, "texts of each task")
      ->type_name("N")
      ->capture_default_str()
      ->group(group);
  GenerationOptions& generation = args.evaluation.generation;
  command
      .add_option("--generate-prompt", generation.prompt, "tokens of each document to go on from")
      ->type_name("N")
      ->capture_default_str()
      ->group(group);
  command.add_option("--generate-tokens", generation.tokens, "tokens to write")
      ->type_name("N")
      ->capture_default_str()
      ->group(group);
  command.add_option("--seed", args.evaluation.seed, "of recall's tokens, orders and intervals")
      ->type_name("N")
      ->capture_default_str()
      ->group(group);
}

}  // namespace

void AddEval(CLI::App& app, Command& chosen) {
  auto args = std::make_shared<EvalArgs>();
  CLI::App& command =
      *app.add_subcommand("eval", "measure how far each level is from level 0 on given text");
  command.footer(
      "Examples:\n  dsla eval --data documents.jsonl --levels 8,15,22 --max-docs 8 --max-tokens "
      "1024\n  dsla eval --data documents.jsonl --levels 15,22 --by-position --switch-at "
      "0.5,0.25,0.75 --recall --generate --controls all --report report.html");
  const auto group = "Evaluation";
  command
      .add_option("-d,--data", args->data,
                  "JSONL with a field \"text\" per line, or plain text, one document a file")
      ->type_name("PATH")
      ->required()
      ->group(group);
  AddList(command, "--levels", args->evaluation.levels,
          "levels to measure, as 8,15,22 [default: the adapter's top level]", "N,N,...");
  command.add_option("--min-tokens", args->documents.min_tokens, "leave out shorter documents")
      ->type_name("N")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--max-tokens", args->documents.max_tokens,
                  "cut longer documents [default: the context]")
      ->type_name("N")
      ->group(group);
  command
      .add_option("--max-docs", args->documents.max_docs,
                  "stop after so many documents [default: all]")
      ->type_name("N")
      ->group(group);
  AddList(command, "--switch-at", args->evaluation.switches,
          "where the switched runs fold, as shares of the document; the first is the one in the\n"
          "JSON's kl_switched",
          "SHARE,...")
      ->capture_default_str();
  command.add_flag("--json", args->json, "print one JSON object instead of Markdown")->group(group);
  command.add_option("--report", args->html, "also write an HTML page with plots")
      ->type_name("FILE")
      ->group(group);
  AddParts(command, *args);
  args->model.AddTo(command);
  command.callback([args, &chosen] {
    chosen = [args] {
      args->evaluation.recall.write = args->evaluation.measure_generation;
      args->evaluation.recall.seed = args->evaluation.generation.seed = args->evaluation.seed;
      const Status status = Eval(*args);
      return status.ok() ? 0 : Fail(status);
    };
  });
}

}  // namespace dsla
