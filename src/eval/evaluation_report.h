// An evaluation as JSON and as a report for people (Markdown, HTML with plots).
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "base/report_document.h"
#include "eval/evaluation.h"

namespace dsla {

struct EvaluationReportOptions {
  std::string data;          // where the documents came from
  bool by_position = false;  // the figures by position too
};

// One object: `data`, `documents`, `tokens`, `switch_at`, `teacher_loss` and `levels`, a list of
// objects with `level`, `kl`, `agreement`, `loss_gap`, `tokens` and, of the first share in
// `switches`, `kl_suffix`, `kl_switched` and `suffix_tokens`; `switches` and, on demand,
// `positions`. What was measured besides: `controls` (as `levels`, with `control`), `recall`,
// `generation`. A mean x stands beside its interval x_low, x_high.
nlohmann::json EvaluationJson(const Evaluation& evaluation, const EvaluationOptions& options,
                              const EvaluationReportOptions& report);

ReportDocument EvaluationDocument(const Evaluation& evaluation, const EvaluationOptions& options,
                                  const EvaluationReportOptions& report);

}  // namespace dsla
