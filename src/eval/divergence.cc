#include "eval/divergence.h"

#include <algorithm>
#include <cmath>
#include <limits>

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

// Sums of one level over all documents.
struct Sums {
  double kl = 0, agree = 0, kl_suffix = 0, kl_switched = 0;
};

// A document's runs side by side: level 0, each level from the start, each level switched at `at`.
class DocumentRun {
 public:
  DocumentRun(const ExecContext& ctx, const HybridModel& model, CachePool& pool,
              std::span<const int32_t> tokens, const DivergenceOptions& options)
      : ctx_(ctx),
        model_(model),
        pool_(pool),
        tokens_(tokens),
        options_(options),
        at_(static_cast<int>(options.switch_at * static_cast<double>(tokens.size()))),
        teacher_(model.NewSequence(pool, 0)) {
    for (int level : options.levels) {
      start_.push_back(model.NewSequence(pool, level));
      switched_.push_back(model.NewSequence(pool, 0));
    }
  }

  int suffix_tokens() const { return static_cast<int>(tokens_.size()) - at_; }

  Status Run(std::vector<Sums>& sums, double& loss) {
    const int T = static_cast<int>(tokens_.size());
    for (int begin = 0; begin < T;) {
      // A chunk ends at the switch, so that the fold happens between steps.
      int end = std::min(T, begin + options_.chunk);
      if (begin < at_) end = std::min(end, at_);
      DSLA_RETURN_IF_ERROR(Forward(teacher_, begin, end, true, teacher_logits_));
      loss += Loss(begin, end);
      for (size_t i = 0; i < options_.levels.size(); ++i) {
        DSLA_RETURN_IF_ERROR(Forward(start_[i], begin, end, true, logits_));
        const Sums chunk = Compare(end - begin);
        sums[i].kl += chunk.kl;
        sums[i].agree += chunk.agree;
        if (!options_.measure_switched) continue;
        if (begin < at_) {
          DSLA_RETURN_IF_ERROR(Forward(switched_[i], begin, end, false, logits_));
          continue;
        }
        sums[i].kl_suffix += chunk.kl;
        if (begin == at_)
          DSLA_RETURN_IF_ERROR(model_.Raise(ctx_, pool_, switched_[i], options_.levels[i]));
        DSLA_RETURN_IF_ERROR(Forward(switched_[i], begin, end, true, logits_));
        sums[i].kl_switched += Compare(end - begin).kl;
      }
      begin = end;
    }
    return Status::Ok();
  }

 private:
  Status Forward(SequenceCache& cache, int begin, int end, bool all_logits, Buffer<float>& logits) {
    return model_.Append(ctx_, pool_, cache, tokens_.subspan(begin, end - begin),
                         all_logits ? end - begin : 1, logits);
  }

  Sums Compare(int rows) {
    const int64_t V = model_.config().V;
    std::vector<RowDivergence> result(rows);
    ParallelFor(ctx_, rows, [&](int64_t t, int) {
      result[t] =
          Divergence(teacher_logits_.span().subspan(t * V, V), logits_.span().subspan(t * V, V));
    });
    Sums sums;
    for (const RowDivergence& row : result) {
      sums.kl += row.kl;
      sums.agree += row.agree ? 1 : 0;
    }
    return sums;
  }

  double Loss(int begin, int end) const {
    const int64_t V = model_.config().V;
    std::vector<double> loss(end - begin, 0);
    ParallelFor(ctx_, end - begin, [&](int64_t t, int) {
      if (begin + t + 1 >= static_cast<int64_t>(tokens_.size())) return;
      const auto row = teacher_logits_.span().subspan(t * V, V);
      loss[t] = Summarise(row).lse - row[tokens_[begin + t + 1]];
    });
    double sum = 0;
    for (const double x : loss) sum += x;
    return sum;
  }

  const ExecContext& ctx_;
  const HybridModel& model_;
  CachePool& pool_;
  std::span<const int32_t> tokens_;
  const DivergenceOptions& options_;
  int at_;
  SequenceCache teacher_;
  std::vector<SequenceCache> start_, switched_;
  Buffer<float> teacher_logits_, logits_;
};

}  // namespace

RowDivergence Divergence(std::span<const float> p_logits, std::span<const float> q_logits) {
  DSLA_CHECK(p_logits.size() == q_logits.size() && !p_logits.empty());
  const RowSummary p = Summarise(p_logits), q = Summarise(q_logits);
  double kl = 0;
  for (size_t i = 0; i < p_logits.size(); ++i) {
    const double log_p = p_logits[i] - p.lse;
    kl += std::exp(static_cast<float>(log_p)) * (log_p - (q_logits[i] - q.lse));
  }
  return {.kl = kl, .agree = p.argmax == q.argmax};
}

Expected<DivergenceReport> MeasureDivergence(const ExecContext& ctx, const HybridModel& model,
                                             CachePool& pool,
                                             std::span<const std::vector<int32_t>> documents,
                                             const DivergenceOptions& options,
                                             const std::function<void(int64_t done)>& progress) {
  for (const int level : options.levels) {
    if (level < 0 || level > model.max_level()) {
      return InvalidArgument("level {}: the adapter has levels 0 to {}", level, model.max_level());
    }
  }
  if (!(options.switch_at >= 0 && options.switch_at < 1)) {
    return InvalidArgument("switch at {}: must be a share of the document in [0, 1)",
                           options.switch_at);
  }
  if (documents.empty()) return InvalidArgument("no documents to measure on");
  std::vector<Sums> sums(options.levels.size());
  DivergenceReport report;
  double loss = 0;
  int64_t tokens = 0, suffix_tokens = 0, targets = 0;
  for (const auto& document : documents) {
    if (document.size() < 2 || static_cast<int64_t>(document.size()) > model.max_positions()) {
      return InvalidArgument("a document has {} tokens; 2 to {} are possible", document.size(),
                             model.max_positions());
    }
    DocumentRun run(ctx, model, pool, document, options);
    DSLA_RETURN_IF_ERROR(run.Run(sums, loss));
    tokens += static_cast<int64_t>(document.size());
    targets += static_cast<int64_t>(document.size()) - 1;
    suffix_tokens += run.suffix_tokens();
    ++report.documents;
    if (progress) progress(report.documents);
  }
  report.teacher_loss = loss / static_cast<double>(targets);
  for (size_t i = 0; i < options.levels.size(); ++i) {
    const auto all = static_cast<double>(tokens), suffix = static_cast<double>(suffix_tokens);
    report.levels.push_back({.level = options.levels[i],
                             .tokens = tokens,
                             .suffix_tokens = suffix_tokens,
                             .kl = sums[i].kl / all,
                             .agreement = sums[i].agree / all,
                             .kl_suffix = sums[i].kl_suffix / suffix,
                             .kl_switched = sums[i].kl_switched / suffix});
  }
  return report;
}

}  // namespace dsla
