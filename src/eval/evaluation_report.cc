#include "eval/evaluation_report.h"

#include <fmt/ranges.h>

#include <map>
#include <utility>

namespace dsla {
namespace {

using Rows = std::vector<std::vector<std::string>>;

std::string Interval(const Estimate& estimate, int digits) {
  return fmt::format("{:.{}f} to {:.{}f}", estimate.low, digits, estimate.high, digits);
}

std::string Range(const PositionResult& at) {
  return at.to > 0 ? fmt::format("{}-{}", at.from, at.to) : fmt::format("{}+", at.from);
}

// "adapter" or the control: one line of a plot over levels.
std::string Line(const SubjectResult& subject) {
  return subject.control.empty() ? "adapter" : subject.control;
}

// Plots with a line per subject show the adapter at every level, controls at the last one only.
bool InPlots(const Evaluation& evaluation, const SubjectResult& subject) {
  return subject.control.empty() || subject.level == evaluation.subjects.back().level;
}

void AddText(const Evaluation& evaluation, ReportDocument& document) {
  Rows rows = {{"", "KL", "95%", "loss beyond level 0's", "95%", "top-1 agreement", "95%"}};
  std::vector<PlotSeries> series;
  for (const SubjectResult& subject : evaluation.subjects) {
    rows.push_back({subject.Title(), fmt::format("{:.4f}", subject.kl.mean),
                    Interval(subject.kl, 4), fmt::format("{:.4f}", subject.loss_gap.mean),
                    Interval(subject.loss_gap, 4), fmt::format("{:.4f}", subject.agreement.mean),
                    Interval(subject.agreement, 4)});
    if (series.empty() || series.back().name != Line(subject))
      series.push_back({Line(subject), {}, true});
    series.back().points.emplace_back(subject.level, subject.kl.mean);
  }
  document.Table(rows);
  document.Plot(series, {.title = "KL from level 0",
                         .x_label = "converted layers",
                         .y_label = "nats per token",
                         .log_y = true});
  bool first = true;
  for (const SubjectResult& subject : evaluation.subjects) {
    if (subject.control.empty()) {
      if (std::exchange(first, false))
        document.Text(
            fmt::format("A converted layer keeps as many bytes as {} tokens of bf16 KV cache.",
                        subject.layer_tokens));
      continue;
    }
    if (!subject.order.empty())
      document.Text(
          fmt::format("{} converts layers {}.", subject.Title(), fmt::join(subject.order, " ")));
  }
}

void AddSwitches(const Evaluation& evaluation, ReportDocument& document) {
  Rows rows = {
      {"", "switched at", "tokens after it", "KL from the start", "95%", "KL switched", "95%"}};
  for (const SubjectResult& subject : evaluation.subjects)
    for (const SwitchResult& after : subject.switches)
      rows.push_back({subject.Title(), fmt::format("{:g}%", after.share * 100),
                      fmt::format("{}", after.tokens), fmt::format("{:.4f}", after.kl_start.mean),
                      Interval(after.kl_start, 4), fmt::format("{:.4f}", after.kl_switched.mean),
                      Interval(after.kl_switched, 4)});
  if (rows.size() == 1) return;
  document.Section("Switched in mid-document");
  document.Text("Level 0 up to the switch, then folded; both columns count the tokens after it.");
  document.Table(rows);
}

void AddPositions(const Evaluation& evaluation, ReportDocument& document) {
  document.Section("By position");
  const auto table = [&](const std::string& what, const Estimate PositionResult::*value) {
    document.Text(what);
    Rows rows = {{""}};
    for (const PositionResult& at : evaluation.subjects[0].positions) rows[0].push_back(Range(at));
    for (const SubjectResult& subject : evaluation.subjects) {
      rows.push_back({subject.Title()});
      for (const PositionResult& at : subject.positions)
        rows.back().push_back(fmt::format("{:.4f}", (at.*value).mean));
    }
    document.Table(rows);
  };
  table("KL, nats per token:", &PositionResult::kl);
  table("Cross-entropy beyond level 0's, nats per token:", &PositionResult::loss_gap);
  table("Top-1 agreement:", &PositionResult::agreement);
  std::vector<PlotSeries> series;
  for (const SubjectResult& subject : evaluation.subjects) {
    if (!InPlots(evaluation, subject)) continue;
    series.push_back({subject.Title(), {}, true});
    for (const PositionResult& at : subject.positions)
      series.back().points.emplace_back(at.from, at.kl.mean);
  }
  document.Plot(series, {.title = "KL by position",
                         .x_label = "from token",
                         .y_label = "nats per token",
                         .log_y = true});
}

// One table of a recall score: a row per cell, a column per subject.
template <typename Select>
void RecallTable(const Evaluation& evaluation, const std::string& what, bool by_depth,
                 Select&& select, ReportDocument& document) {
  Rows rows = {{"", "level 0"}};
  for (const SubjectResult& subject : evaluation.subjects) rows[0].push_back(subject.Title());
  for (const RecallCell& cell : evaluation.recall) {
    if ((cell.depth >= 0) != by_depth) continue;
    rows.push_back({cell.task.Title()});
    if (by_depth) rows.back()[0] += fmt::format(", depth {:g}", cell.depth);
    for (const RecallScore& score : cell.scores) rows.back().push_back(select(score));
  }
  if (rows.size() == 1) return;
  document.Text(what);
  document.Table(rows);
}

void PlotRecall(const Evaluation& evaluation, ReportDocument& document) {
  // Copies by gap in one plot, needles by depth in one for each length.
  std::map<std::string, std::vector<std::pair<double, const RecallCell*>>> plots;
  for (const RecallCell& cell : evaluation.recall) {
    if (cell.task.kind == RecallKind::kCopy)
      plots["Copies by gap, tokens"].emplace_back(cell.task.gap, &cell);
    else if (cell.depth >= 0)
      plots[fmt::format("Needles in {} tokens by depth", cell.task.length)].emplace_back(cell.depth,
                                                                                         &cell);
  }
  for (const auto& [title, cells] : plots) {
    std::vector<PlotSeries> series;
    for (size_t who = 0; who <= evaluation.subjects.size(); ++who) {
      if (who > 0 && !InPlots(evaluation, evaluation.subjects[who - 1])) continue;
      series.push_back({who == 0 ? "level 0" : evaluation.subjects[who - 1].Title(), {}, true});
      for (const auto& [x, cell] : cells)
        series.back().points.emplace_back(x, cell->scores[who].accuracy.mean);
    }
    document.Plot(series, {.title = title, .x_label = "", .y_label = "accuracy"});
  }
}

void AddRecall(const Evaluation& evaluation, ReportDocument& document) {
  if (evaluation.recall.empty()) return;
  document.Section("Recall");
  const auto mean = [](const Estimate& estimate) { return fmt::format("{:.3f}", estimate.mean); };
  const auto accuracy = [&](const RecallScore& score) {
    return fmt::format("{:.3f} ({:.2f}-{:.2f})", score.accuracy.mean, score.accuracy.low,
                       score.accuracy.high);
  };
  RecallTable(evaluation,
              fmt::format("Share of asked tokens that are the likeliest, {} texts a row, 95% "
                          "interval over texts:",
                          evaluation.recall[0].texts),
              false, accuracy, document);
  RecallTable(
      evaluation, "Needles by depth:", true,
      [&](const RecallScore& score) { return mean(score.accuracy); }, document);
  RecallTable(
      evaluation,
      "The same where level 0 read the context and was folded before the question:", false,
      [&](const RecallScore& score) {
        return score.has_switched ? mean(score.switched) : std::string();
      },
      document);
  RecallTable(
      evaluation, "Share of answers right to the last token:", false,
      [&](const RecallScore& score) { return mean(score.exact); }, document);
  if (evaluation.recall[0].scores[0].has_written)
    RecallTable(
        evaluation, "Share of texts whose first answer is written whole, freely:", false,
        [&](const RecallScore& score) { return mean(score.written); }, document);
  PlotRecall(evaluation, document);
}

void AddGeneration(const Evaluation& evaluation, const GenerationOptions& options,
                   ReportDocument& document) {
  const std::vector<GenerationScore>& scores = evaluation.generation.scores;
  if (scores.empty()) return;
  document.Section("Writing");
  document.Text(
      fmt::format("{} documents, the first {} tokens (at most half) continued greedily by {} "
                  "tokens. Repetition: the share of runs of four tokens that came before.",
                  evaluation.generation.documents, options.prompt, options.tokens));
  Rows rows = {{"", "tokens as level 0", "95%", "all the same", "repetition",
                "tokens as level 0, switched", "repetition, switched"}};
  rows.push_back({"level 0", "", "", "", fmt::format("{:.3f}", scores[0].repetition.mean)});
  for (size_t i = 0; i < evaluation.subjects.size(); ++i) {
    const GenerationScore& score = scores[1 + i];
    rows.push_back({evaluation.subjects[i].Title(), fmt::format("{:.1f}", score.same.mean),
                    Interval(score.same, 1), fmt::format("{:.2f}", score.identical.mean),
                    fmt::format("{:.3f}", score.repetition.mean)});
    if (!score.has_switched) continue;
    rows.back().push_back(fmt::format("{:.1f}", score.same_switched.mean));
    rows.back().push_back(fmt::format("{:.3f}", score.repetition_switched.mean));
  }
  document.Table(rows);
}

}  // namespace

ReportDocument EvaluationDocument(const Evaluation& evaluation, const EvaluationOptions& options,
                                  const EvaluationReportOptions& report) {
  ReportDocument document;
  document.Title("Evaluation");
  document.Text(fmt::format(
      "{} documents, {} tokens of {}; level 0: {:.4f} nats per token. KL(level 0 || level) in nats "
      "per token. Intervals are 95% bootstrap intervals over documents.",
      evaluation.documents, evaluation.tokens, report.data, evaluation.teacher_loss));
  AddText(evaluation, document);
  AddSwitches(evaluation, document);
  if (report.by_position) AddPositions(evaluation, document);
  AddRecall(evaluation, document);
  AddGeneration(evaluation, options.generation, document);
  return document;
}

}  // namespace dsla
