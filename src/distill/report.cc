#include "distill/report.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/files.h"
#include "base/mapped_file.h"
#include "base/report_document.h"
#include "distill/run_log.h"
#include "format/json.h"

namespace dsla {
namespace {

using nlohmann::json;

Expected<std::optional<json>> ReadIfThere(const std::string& path) {
  if (!std::filesystem::exists(path)) return std::optional<json>();
  DSLA_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, 64 << 20));
  DSLA_ASSIGN_OR_RETURN(json value, ParseJson(text, path));
  return std::optional<json>(std::move(value));
}

void AddTraining(const std::vector<json>& log, ReportDocument& document) {
  // A resumed run logs some steps again: the last word counts.
  std::map<std::string, std::map<int64_t, json>> steps;
  std::map<std::string, json> done;
  for (const json& event : log) {
    if (event.at("event") == "step") steps[event.at("stage")][event.at("step")] = event;
    if (event.at("event") == "done") done[event.at("stage")] = event;
  }
  if (steps.empty()) return;
  document.Section("Training");
  std::vector<std::vector<std::string>> rows = {
      {"stage", "steps", "tokens", "time", "tokens/s", "last loss"}};
  for (const char* stage : {"align", "chain"}) {
    if (!steps.contains(stage)) continue;
    PlotSeries loss{"", {}, false};
    std::vector<double> rates;
    for (const auto& [step, event] : steps[stage]) {
      loss.points.emplace_back(event.at("tokens").get<double>(), event.at("loss").get<double>());
      rates.push_back(event.at("tokens_per_second"));
    }
    std::nth_element(rates.begin(), rates.begin() + static_cast<ptrdiff_t>(rates.size() / 2),
                     rates.end());
    const json& last = steps[stage].rbegin()->second;
    rows.push_back(
        {stage,
         fmt::format("{} of {}", last.at("step").get<int64_t>(), last.at("steps").get<int64_t>()),
         fmt::format("{}", last.at("tokens").get<int64_t>()),
         done.contains(stage) ? FormatDuration(done[stage].at("seconds")) : "",
         fmt::format("{:.0f}", rates[rates.size() / 2]),
         fmt::format("{:.4f}", last.at("loss").get<double>())});
    document.Plot({loss},
                  {.title = fmt::format("Loss of {}", stage),
                   .x_label = "tokens",
                   .y_label = std::string(stage) == "align" ? "normalised error" : "nats per token",
                   .log_y = true});
  }
  document.Table(rows);
}

void AddOrder(const json& order, ReportDocument& document) {
  document.Section("Order");
  const std::vector<int> ladder = order.at("ladder");
  document.Text(fmt::format("Method: {}. Least sensitive first: {}.",
                            order.at("method").get<std::string>(), fmt::join(ladder, " ")));
  if (order.at("single").empty()) return;
  PlotSeries single{"one layer alone", {}, true}, together{"the first k of the order", {}, true};
  const std::vector<double> alone = order.at("single"), cost = order.at("cost");
  for (size_t l = 0; l < alone.size(); ++l) single.points.emplace_back(l, alone[l]);
  for (size_t k = 0; k < cost.size(); ++k) together.points.emplace_back(k + 1, cost[k]);
  document.Plot({single}, {.title = "KL of each layer converted alone",
                           .x_label = "layer",
                           .y_label = "nats per token",
                           .log_y = true});
  document.Plot({together}, {.title = "KL along the order, before the chain",
                             .x_label = "converted layers",
                             .y_label = "nats per token",
                             .log_y = true});
}

void AddEvaluation(const json& evaluation, ReportDocument& document) {
  document.Section("Evaluation");
  document.Text(fmt::format(
      "{} {} of {} tokens{}; KL(teacher || hybrid) in nats per token with the 95% bootstrap "
      "interval over {}; 'switched' hands over from the teacher at token {} and stands beside the "
      "same tokens from the start.",
      evaluation.at("documents").get<int>(),
      evaluation.at("packed").get<bool>() ? "packed sequences" : "documents",
      evaluation.at("length").get<int>(),
      evaluation.at("held_out").get<bool>() ? "" : ", which were trained on too",
      evaluation.at("packed").get<bool>() ? "sequences" : "documents",
      evaluation.at("switched_at").get<int>()));
  std::vector<std::vector<std::string>> rows = {{"converted layers", "KL", "95%", "top-1 agreement",
                                                 "second half, from the start",
                                                 "second half, switched"}};
  PlotSeries kl{"from the start", {}, true}, switched{"switched half way", {}, true};
  for (const json& row : evaluation.at("levels")) {
    rows.push_back({fmt::format("{}", row.at("level").get<int>()),
                    fmt::format("{:.4f}", row.at("kl").get<double>()),
                    fmt::format("{:.4f} to {:.4f}", row.at("kl_low").get<double>(),
                                row.at("kl_high").get<double>()),
                    fmt::format("{:.3f}", row.at("agreement").get<double>()),
                    fmt::format("{:.4f}", row.at("kl_suffix").get<double>()),
                    row.at("kl_switched").is_null()
                        ? "-"
                        : fmt::format("{:.4f}", row.at("kl_switched").get<double>())});
    kl.points.emplace_back(row.at("level").get<double>(), row.at("kl").get<double>());
    if (!row.at("kl_switched").is_null())
      switched.points.emplace_back(row.at("level").get<double>(),
                                   row.at("kl_switched").get<double>());
  }
  document.Table(rows);
  document.Plot({kl, switched}, {.title = "KL against converted layers",
                                 .x_label = "converted layers",
                                 .y_label = "nats per token",
                                 .log_y = true});
  if (evaluation.at("recall").empty()) return;
  document.Text("Recall: the share of asked tokens that are the most likely one.");
  rows = {{"what", "tokens", "teacher"}};
  for (const json& level : evaluation.at("levels"))
    rows[0].push_back(fmt::format("level {}", level.at("level").get<int>()));
  for (const json& row : evaluation.at("recall")) {
    const int gap = row.at("gap");
    rows.push_back(
        {row.at("kind").get<std::string>() + (gap > 0 ? fmt::format(", gap {}", gap) : ""),
         fmt::format("{}", row.at("length").get<int>()),
         fmt::format("{:.3f}", row.at("teacher").get<double>())});
    for (const json& level : row.at("levels"))
      rows.back().push_back(fmt::format("{:.3f}", level.at("accuracy").get<double>()));
  }
  document.Table(rows);
}

}  // namespace

Status WriteReport(const std::string& folder) {
  DSLA_ASSIGN_OR_RETURN(const std::vector<json> log, ReadLog(folder + "/log.jsonl"));
  DSLA_ASSIGN_OR_RETURN(const auto order, ReadIfThere(folder + "/order.json"));
  DSLA_ASSIGN_OR_RETURN(const auto evaluation, ReadIfThere(folder + "/evaluate.json"));
  ReportDocument document;
  const std::string title = "Distillation report";
  document.Title(title);
  try {
    for (const json& event : log) {
      if (event.at("event") != "run") continue;
      document.Text(fmt::format("Model: {} (fingerprint {}); {} trained parameters.",
                                event.at("model").get<std::string>(),
                                event.at("fingerprint").get<std::string>().substr(0, 16),
                                event.at("parameters").get<int64_t>()));
      break;
    }
    if (evaluation) AddEvaluation(*evaluation, document);
    AddTraining(log, document);
    if (order) AddOrder(*order, document);
  } catch (const json::exception& error) {
    return DataLoss("'{}': {}", folder, Printable(error.what()));
  }
  if (const auto config = ReadTextFile(folder + "/config.toml", 1 << 20); config.ok()) {
    document.Section("Settings");
    document.Code(*config);
  }
  DSLA_RETURN_IF_ERROR(WriteFileAtomically(folder + "/report.md", document.markdown()));
  return WriteFileAtomically(folder + "/report.html", document.html(title));
}

}  // namespace dsla
