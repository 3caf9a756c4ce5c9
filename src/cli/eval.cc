// dsla eval: how far each level is from level 0 on given text.
#include <unistd.h>

#include <cstdio>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/model_args.h"
#include "eval/divergence.h"
#include "eval/documents.h"

namespace dsla {
namespace {

struct EvalArgs {
  ModelArgs model;
  std::string data;
  std::vector<int> levels;
  DocumentOptions documents;
  double switch_at = 0.5;
  bool json = false;
};

nlohmann::json ToJson(const DivergenceReport& report, const EvalArgs& args) {
  nlohmann::json levels = nlohmann::json::array();
  for (const LevelDivergence& row : report.levels) {
    levels.push_back({{"level", row.level},
                      {"kl", row.kl},
                      {"agreement", row.agreement},
                      {"kl_suffix", row.kl_suffix},
                      {"kl_switched", row.kl_switched},
                      {"tokens", row.tokens},
                      {"suffix_tokens", row.suffix_tokens}});
  }
  return {{"data", args.data},
          {"documents", report.documents},
          {"switch_at", args.switch_at},
          {"teacher_loss", report.teacher_loss},
          {"levels", std::move(levels)}};
}

Status Eval(const EvalArgs& args) {
  // Beside level 0, one run per level is in memory from the start and one switched.
  DSLA_ASSIGN_OR_RETURN(const LoadedModel loaded,
                        LoadModel(args.model, 1 + 2 * static_cast<int>(args.levels.size())));
  if (loaded.adapter == nullptr)
    return InvalidArgument("'{}' has no adapter: there is only level 0", loaded.file->path());
  DivergenceOptions options;
  options.switch_at = args.switch_at;
  options.levels = args.levels;
  if (options.levels.empty()) options.levels = {loaded.adapter->top_level};
  DocumentOptions documents_options = args.documents;
  const int context = loaded.model->max_positions();
  if (documents_options.max_tokens == 0 || documents_options.max_tokens > context)
    documents_options.max_tokens = context;
  if (documents_options.min_tokens < 2)
    return InvalidArgument("--min-tokens: {} is under 2", documents_options.min_tokens);
  DSLA_ASSIGN_OR_RETURN(const auto documents,
                        ReadDocuments(args.data, *loaded.tokenizer, documents_options));
  DSLA_ASSIGN_OR_RETURN(CachePool pool, loaded.NewPool());
  const bool progress = ::isatty(STDERR_FILENO) != 0;
  DSLA_ASSIGN_OR_RETURN(
      const DivergenceReport report,
      MeasureDivergence(loaded.ctx, *loaded.model, pool, documents, options, [&](int64_t done) {
        if (progress) fmt::print(stderr, "\rdocument {} of {}\033[K", done, documents.size());
      }));
  if (progress) fmt::print(stderr, "\r\033[K");
  if (args.json) {
    fmt::print("{}\n", ToJson(report, args).dump(2));
    return Status::Ok();
  }
  fmt::print("{} documents, {} tokens of {}; level 0: {:.4f} nats per token\n\n", report.documents,
             report.levels.front().tokens, args.data, report.teacher_loss);
  fmt::print("           from the start        after {:.0f}% of the document\n",
             args.switch_at * 100);
  fmt::print("level      KL    top-1    KL from the start   KL switched\n");
  for (const LevelDivergence& row : report.levels) {
    fmt::print("{:5} {:7.4f}  {:6.1f}%   {:17.4f} {:13.4f}\n", row.level, row.kl,
               row.agreement * 100, row.kl_suffix, row.kl_switched);
  }
  return Status::Ok();
}

}  // namespace

void AddEval(CLI::App& app, Command& chosen) {
  auto args = std::make_shared<EvalArgs>();
  CLI::App& command =
      *app.add_subcommand("eval", "measure how far each level is from level 0 on given text");
  command.footer(
      "Example:\n  dsla eval --data documents.jsonl --levels 8,15,22 --max-docs 8 --max-tokens "
      "1024");
  const auto group = "Evaluation";
  command
      .add_option("-d,--data", args->data,
                  "JSONL with a field \"text\" per line, or one plain text")
      ->type_name("PATH")
      ->required()
      ->group(group);
  command
      .add_option("--levels", args->levels,
                  "levels to measure, as 8,15,22 [default: the adapter's top level]")
      ->type_name("N,N,...")
      ->allow_extra_args(false)
      ->delimiter(',')
      ->group(group);
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
  command
      .add_option("--switch-at", args->switch_at,
                  "where the switched run folds, as a share of the document")
      ->type_name("SHARE")
      ->capture_default_str()
      ->group(group);
  command.add_flag("--json", args->json, "print one JSON object")->group(group);
  args->model.AddTo(command);
  command.callback([args, &chosen] {
    chosen = [args] {
      const Status status = Eval(*args);
      return status.ok() ? 0 : Fail(status);
    };
  });
}

}  // namespace dsla
