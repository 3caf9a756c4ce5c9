#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/clock.h"
#include "base/files.h"
#include "base/mapped_file.h"
#include "base/plot.h"
#include "distill/checkpoint.h"
#include "distill/controls.h"
#include "distill/token_file.h"
#include "format/json.h"

namespace dsla {
namespace {

namespace fs = std::filesystem;

// The files of a stage's checkpoint, the one that names the others last.
Status CopyCheckpoint(const std::string& from, const std::string& to, const std::string& stage) {
  if (fs::exists(fmt::format("{}/{}.json", to, stage))) return Status::Ok();
  DSLA_ASSIGN_OR_RETURN(const auto checkpoint, LoadCheckpoint(from, stage));
  if (!checkpoint || !checkpoint->done) return Status::Ok();
  return SaveCheckpoint(*checkpoint, to, stage);
}

struct Row {
  const Control* control;
  int64_t token_bytes;
  nlohmann::json evaluation;
};

Status WriteTable(const std::string& folder, const std::vector<Row>& rows) {
  std::string text =
      "# Controls\n\nKL(teacher || hybrid) in nats per token, with the 95% bootstrap interval over "
      "documents, by converted layers. Bytes: what a converted layer keeps, as tokens of bf16 KV "
      "cache.\n\n| control | what | bytes |";
  std::string rule = "| --- | --- | ---: |";
  for (const auto& level : rows.at(0).evaluation.at("levels")) {
    text += fmt::format(" {} |", level.at("level").get<int>());
    rule += " ---: |";
  }
  text += "\n" + rule + "\n";
  nlohmann::json all = nlohmann::json::array();
  std::vector<PlotSeries> series;
  for (const Row& row : rows) {
    text += fmt::format("| {} | {} | {} |", row.control->name, row.control->what, row.token_bytes);
    PlotSeries line{row.control->name, {}, true};
    for (const auto& level : row.evaluation.at("levels")) {
      const double kl = level.at("kl");
      text += fmt::format(" {:.4f} ({:.4f} to {:.4f}) |", kl, level.at("kl_low").get<double>(),
                          level.at("kl_high").get<double>());
      line.points.emplace_back(level.at("level").get<double>(), kl);
    }
    text += "\n";
    series.push_back(std::move(line));
    all.push_back({{"control", row.control->name},
                   {"token_bytes", row.token_bytes},
                   {"evaluation", row.evaluation}});
  }
  DSLA_RETURN_IF_ERROR(WriteFileAtomically(folder + "/controls.md", text));
  DSLA_RETURN_IF_ERROR(WriteFileAtomically(folder + "/controls.json", all.dump(1) + "\n"));
  return WriteFileAtomically(folder + "/controls.svg",
                             LinePlot(series, {.title = "KL against converted layers",
                                               .x_label = "converted layers",
                                               .y_label = "nats per token",
                                               .log_y = true}));
}

// Every control whose evaluation lies in the folder.
Status WriteTableOf(const std::string& folder, const ModelConfig& model,
                    const DistillConfig& ours) {
  std::vector<Row> rows;
  for (const Control& control : Controls()) {
    const std::string path = fmt::format("{}/{}/evaluate.json", folder, control.name);
    if (!fs::exists(path) || !IsControlOf(control.name, ours)) continue;
    DSLA_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, 64 << 20));
    DSLA_ASSIGN_OR_RETURN(nlohmann::json evaluation, ParseJson(text, path));
    DistillConfig config = ours;
    DSLA_RETURN_IF_ERROR(ApplyControl(control.name, model, &config));
    rows.push_back({&control, TokenBytes(config, model), std::move(evaluation)});
  }
  if (rows.empty()) return Status::Ok();
  try {
    return WriteTable(folder, rows);
  } catch (const nlohmann::json::exception& error) {
    return DataLoss("'{}': an evaluation of another form: {}", folder, Printable(error.what()));
  }
}

}  // namespace

Expected<DistillOutcome> RunControls(const ExecContext& ctx, const ModelFile& model,
                                     const DistillJob& job, const std::vector<std::string>& names) {
  if (job.out.empty()) return InvalidArgument("no adapter file is named (--out)");
  if (job.ranks.ranks > 1) return InvalidArgument("--controls run on one rank");
  for (const std::string& name : names) {
    DistillConfig config = job.config;
    DSLA_RETURN_IF_ERROR(ApplyControl(name, model.config(), &config));
  }
  const std::string folder = job.work.empty() ? job.out + ".controls" : job.work;
  const double begin = NowSeconds();
  DistillOutcome outcome;
  outcome.finished = true;
  for (const Control& control : Controls()) {
    if (names.empty() ? !IsControlOf(control.name, job.config)
                      : std::find(names.begin(), names.end(), control.name) == names.end())
      continue;
    DistillJob one = job;
    DSLA_RETURN_IF_ERROR(ApplyControl(control.name, model.config(), &one.config));
    one.work = folder + "/" + control.name;
    one.out = one.work + "/adapter.safetensors";
    DSLA_RETURN_IF_ERROR(MakeDirectories(one.work));
    // Tokenised once: by the first that ran.
    for (const Control& first : Controls()) {
      const std::string tokens = fmt::format("{}/{}/train.tokens", folder, first.name);
      if (!fs::exists(tokens) || &first == &control) continue;
      one.data = {tokens};
      const std::string valid = fmt::format("{}/{}/valid.tokens", folder, first.name);
      if (!one.valid.empty() && fs::exists(valid)) one.valid = {valid};
      break;
    }
    if (std::string(control.name).ends_with("-order"))
      for (const char* stage : {"init", "align"})
        DSLA_RETURN_IF_ERROR(CopyCheckpoint(folder + "/ours", one.work, stage));
    if (job.stop_after > 0)
      one.stop_after = std::max(1e-3, job.stop_after - (NowSeconds() - begin));
    auto result = Distill(ctx, model, one);
    if (!result.ok())
      return Status(result.status().code(),
                    fmt::format("{}: {}", control.name, result.status().message()));
    outcome.finished = result->finished;
    outcome.stage = fmt::format("{} of {}", result->stage, control.name);
    if (!outcome.finished) return outcome;
    DSLA_RETURN_IF_ERROR(WriteTableOf(folder, model.config(), job.config));
  }
  return outcome;
}

}  // namespace dsla
