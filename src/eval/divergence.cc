#include "eval/divergence.h"

#include <algorithm>
#include <cmath>

#include "eval/comparison.h"

namespace dsla {
namespace {

// log(sum(exp(x))) and the place of the maximum.
struct RowSummary {
  double lse = 0;
  int64_t argmax = 0;
};
RowSummary Summarise(std::span<const float> logits) {
  RowSummary row;
  row.argmax = std::max_element(logits.begin(), logits.end()) - logits.begin();
  const float max = logits[row.argmax];
  double sum = 0;
  for (const float x : logits) sum += std::exp(x - max);
  row.lse = max + std::log(sum);
  return row;
}

}  // namespace

RowDivergence Divergence(std::span<const float> p_logits, std::span<const float> q_logits) {
  DSLA_CHECK(p_logits.size() == q_logits.size() && !p_logits.empty());
  const RowSummary p = Summarise(p_logits), q = Summarise(q_logits);
  double kl = 0;
  for (size_t i = 0; i < p_logits.size(); ++i) {
    const double log_p = p_logits[i] - p.lse;
    kl += std::exp(static_cast<float>(log_p)) * (log_p - (q_logits[i] - q.lse));
  }
  return {.kl = kl, .agree = p.argmax == q.argmax, .q_log_sum = q.lse};
}

double LogSumExp(std::span<const float> logits) { return Summarise(logits).lse; }

Expected<DivergenceReport> MeasureDivergence(const ExecContext& ctx, const HybridModel& model,
                                             CachePool& pool,
                                             std::span<const std::vector<int32_t>> documents,
                                             const DivergenceOptions& options,
                                             const std::function<void(int64_t done)>& progress) {
  if (documents.empty()) return InvalidArgument("no documents to measure on");
  std::vector<Subject> subjects;
  for (const int level : options.levels) subjects.push_back({&model, &pool, level});
  ComparisonOptions comparison{.switches = {}, .chunk = options.chunk};
  if (options.measure_switched) comparison.switches = {options.switch_at};

  DivergenceReport report;
  std::vector<PositionSums> sums(subjects.size());
  std::vector<SwitchSums> switches(subjects.size());
  double loss = 0;
  int64_t targets = 0;
  for (const auto& document : documents) {
    DSLA_ASSIGN_OR_RETURN(const DocumentSums found,
                          CompareDocument(ctx, model, pool, document, subjects, comparison));
    loss += found.teacher.Total().loss;
    targets += found.teacher.Total().targets;
    for (size_t i = 0; i < subjects.size(); ++i) {
      const PositionSums all = found.subjects[i].Total();
      sums[i].tokens += all.tokens, sums[i].kl += all.kl, sums[i].agree += all.agree;
      if (!options.measure_switched) continue;
      const SwitchSums& after = found.subjects[i].switches[0];
      switches[i].tokens += after.tokens;
      switches[i].kl_start += after.kl_start, switches[i].kl_switched += after.kl_switched;
    }
    ++report.documents;
    if (progress) progress(report.documents);
  }
  report.teacher_loss = loss / static_cast<double>(targets);
  for (size_t i = 0; i < subjects.size(); ++i) {
    const auto all = static_cast<double>(sums[i].tokens);
    const auto after = static_cast<double>(std::max<int64_t>(1, switches[i].tokens));
    report.levels.push_back({.level = options.levels[i],
                             .tokens = sums[i].tokens,
                             .suffix_tokens = switches[i].tokens,
                             .kl = sums[i].kl / all,
                             .agreement = sums[i].agree / all,
                             .kl_suffix = switches[i].kl_start / after,
                             .kl_switched = switches[i].kl_switched / after});
  }
  return report;
}

}  // namespace dsla
