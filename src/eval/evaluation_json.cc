#include <utility>

#include "eval/evaluation_report.h"

namespace dsla {
namespace {

using nlohmann::json;

void Put(json& object, const std::string& name, const Estimate& estimate) {
  object[name] = estimate.mean;
  object[name + "_low"] = estimate.low;
  object[name + "_high"] = estimate.high;
}

json ToJson(const SubjectResult& result, bool by_position) {
  json object = {{"level", result.level}, {"tokens", result.tokens}};
  if (!result.control.empty()) object["control"] = result.control;
  if (!result.order.empty()) object["order"] = result.order;
  object["layer_tokens"] = result.layer_tokens;
  Put(object, "kl", result.kl);
  Put(object, "loss_gap", result.loss_gap);
  Put(object, "agreement", result.agreement);
  if (!result.switches.empty()) {
    object["suffix_tokens"] = result.switches[0].tokens;
    object["kl_suffix"] = result.switches[0].kl_start.mean;
    object["kl_switched"] = result.switches[0].kl_switched.mean;
    object["switches"] = json::array();
    for (const SwitchResult& after : result.switches) {
      json one = {{"at", after.share}, {"tokens", after.tokens}};
      Put(one, "kl_start", after.kl_start);
      Put(one, "kl_switched", after.kl_switched);
      object["switches"].push_back(std::move(one));
    }
  }
  if (!by_position) return object;
  object["positions"] = json::array();
  for (const PositionResult& at : result.positions) {
    json one = {{"from", at.from}, {"tokens", at.tokens}, {"teacher_loss", at.teacher_loss}};
    if (at.to > 0) one["to"] = at.to;
    Put(one, "kl", at.kl);
    Put(one, "loss_gap", at.loss_gap);
    Put(one, "agreement", at.agreement);
    object["positions"].push_back(std::move(one));
  }
  return object;
}

// scores[0] is level 0's; the others are the subjects'.
template <typename Score, typename ToObject>
void PutScores(json& object, const Evaluation& evaluation, const std::vector<Score>& scores,
               ToObject&& to_object) {
  object["teacher"] = to_object(scores[0]);
  object["levels"] = json::array();
  for (size_t i = 0; i < evaluation.subjects.size(); ++i) {
    json one = to_object(scores[1 + i]);
    one["level"] = evaluation.subjects[i].level;
    if (!evaluation.subjects[i].control.empty()) one["control"] = evaluation.subjects[i].control;
    object["levels"].push_back(std::move(one));
  }
}

json RecallJson(const Evaluation& evaluation) {
  json cells = json::array();
  for (const RecallCell& cell : evaluation.recall) {
    json object = {{"kind", Name(cell.task.kind)},
                   {"length", cell.task.length},
                   {"texts", cell.texts},
                   {"asked", cell.asked}};
    if (cell.task.kind == RecallKind::kCopy) object["gap"] = cell.task.gap;
    if (cell.depth >= 0) object["depth"] = cell.depth;
    PutScores(object, evaluation, cell.scores, [](const RecallScore& score) {
      json one = json::object();
      Put(one, "accuracy", score.accuracy);
      Put(one, "exact", score.exact);
      if (score.has_switched) Put(one, "switched", score.switched);
      if (score.has_written) Put(one, "written", score.written);
      return one;
    });
    cells.push_back(std::move(object));
  }
  return cells;
}

json GenerationJson(const Evaluation& evaluation, const GenerationOptions& options) {
  json object = {{"documents", evaluation.generation.documents},
                 {"prompt", options.prompt},
                 {"tokens", options.tokens}};
  bool teacher = true;
  PutScores(object, evaluation, evaluation.generation.scores, [&](const GenerationScore& score) {
    json one = json::object();
    Put(one, "repetition", score.repetition);
    if (std::exchange(teacher, false)) return one;
    Put(one, "same", score.same);
    Put(one, "identical", score.identical);
    if (score.has_switched) {
      Put(one, "same_switched", score.same_switched);
      Put(one, "repetition_switched", score.repetition_switched);
    }
    return one;
  });
  return object;
}

}  // namespace

json EvaluationJson(const Evaluation& evaluation, const EvaluationOptions& options,
                    const EvaluationReportOptions& report) {
  json object = {{"data", report.data},
                 {"documents", evaluation.documents},
                 {"tokens", evaluation.tokens},
                 {"teacher_loss", evaluation.teacher_loss},
                 {"levels", json::array()}};
  if (!options.switches.empty()) object["switch_at"] = options.switches[0];
  for (const SubjectResult& result : evaluation.subjects)
    object[result.control.empty() ? "levels" : "controls"].push_back(
        ToJson(result, report.by_position));
  if (!evaluation.recall.empty()) object["recall"] = RecallJson(evaluation);
  if (!evaluation.generation.scores.empty())
    object["generation"] = GenerationJson(evaluation, options.generation);
  return object;
}

}  // namespace dsla
