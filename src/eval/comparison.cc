#include "eval/comparison.h"

#include <algorithm>
#include <list>
#include <utility>

#include "eval/divergence.h"
#include "eval/fork.h"

namespace dsla {
namespace {

int Bucket(int64_t position) {
  const auto above = std::upper_bound(kPositionBounds.begin(), kPositionBounds.end(), position);
  return static_cast<int>(above - kPositionBounds.begin()) - 1;
}

void Add(PositionSums& to, const PositionSums& from) {
  to.tokens += from.tokens, to.targets += from.targets;
  to.kl += from.kl, to.agree += from.agree, to.loss += from.loss;
}

// A document's runs side by side.
class DocumentRun {
 public:
  DocumentRun(const ExecContext& ctx, const HybridModel& model, CachePool& pool,
              std::span<const int32_t> tokens, std::span<const Subject> subjects,
              const ComparisonOptions& options)
      : ctx_(ctx),
        model_(model),
        pool_(pool),
        tokens_(tokens),
        subjects_(subjects),
        options_(options),
        teacher_(model.NewSequence(pool, 0)) {
    for (const double share : options.switches)
      switch_at_.push_back(static_cast<int>(share * static_cast<double>(tokens.size())));
    sums_.tokens = static_cast<int64_t>(tokens.size());
    sums_.subjects.resize(subjects.size());
    for (size_t i = 0; i < subjects.size(); ++i) {
      start_.push_back(subjects[i].model->NewSequence(*subjects[i].pool, subjects[i].level));
      if (subjects[i].model == &model) sums_.subjects[i].switches.resize(switch_at_.size());
    }
  }

  Status Run() {
    const int T = static_cast<int>(tokens_.size());
    for (int begin = 0; begin < T;) {
      // A chunk ends at a switch, so that the fold happens between steps.
      int end = std::min(T, begin + options_.chunk);
      for (const int at : switch_at_)
        if (begin < at) end = std::min(end, at);
      DSLA_RETURN_IF_ERROR(Switch(begin));
      DSLA_RETURN_IF_ERROR(Step({&model_, &pool_, 0}, teacher_, begin, end, teacher_logits_));
      AddTeacher(begin, end);
      for (size_t i = 0; i < subjects_.size(); ++i) {
        DSLA_RETURN_IF_ERROR(Step(subjects_[i], start_[i], begin, end, logits_));
        const double kl = Compare(begin, end, &sums_.subjects[i].positions);
        for (size_t s = 0; s < sums_.subjects[i].switches.size(); ++s)
          if (begin >= switch_at_[s]) sums_.subjects[i].switches[s].kl_start += kl;
      }
      for (Switched& run : switched_) {
        DSLA_RETURN_IF_ERROR(Step(subjects_[run.subject], run.cache, begin, end, logits_));
        SwitchSums& sums = sums_.subjects[run.subject].switches[run.which];
        sums.tokens += end - begin;
        sums.kl_switched += Compare(begin, end, nullptr);
      }
      begin = end;
    }
    return Status::Ok();
  }

  DocumentSums TakeSums() { return std::move(sums_); }

 private:
  struct Switched {
    size_t subject, which;
    SequenceCache cache;
  };

  // Starts the switched runs whose switch is at `begin`, out of the teacher's cache.
  Status Switch(int begin) {
    for (size_t s = 0; s < switch_at_.size(); ++s) {
      if (switch_at_[s] != begin) continue;
      for (size_t i = 0; i < subjects_.size(); ++i) {
        if (subjects_[i].model != &model_) continue;
        DSLA_ASSIGN_OR_RETURN(SequenceCache fork,
                              ForkAnywhere(ctx_, model_, pool_, teacher_, tokens_, begin));
        DSLA_RETURN_IF_ERROR(model_.Raise(ctx_, pool_, fork, subjects_[i].level));
        switched_.push_back({i, s, std::move(fork)});
      }
    }
    return Status::Ok();
  }

  Status Step(const Subject& subject, SequenceCache& cache, int begin, int end,
              Buffer<float>& logits) {
    return subject.model->Append(ctx_, *subject.pool, cache, tokens_.subspan(begin, end - begin),
                                 end - begin, logits);
  }

  std::span<const float> Row(const Buffer<float>& logits, int64_t t) const {
    const int64_t V = model_.config().V;
    return logits.span().subspan(t * V, V);
  }

  void AddTeacher(int begin, int end) {
    teacher_log_sums_.resize(end - begin);
    ParallelFor(ctx_, end - begin,
                [&](int64_t t, int) { teacher_log_sums_[t] = LogSumExp(Row(teacher_logits_, t)); });
    for (int64_t t = 0; t < end - begin; ++t) {
      PositionSums& sums = sums_.teacher.positions[Bucket(begin + t)];
      ++sums.tokens;
      AddLoss(begin + t, teacher_log_sums_[t], Row(teacher_logits_, t), sums);
    }
  }

  // The loss of the token after `position`, if there is one.
  void AddLoss(int64_t position, double log_sum, std::span<const float> row,
               PositionSums& sums) const {
    if (position + 1 >= static_cast<int64_t>(tokens_.size())) return;
    ++sums.targets;
    sums.loss += log_sum - row[tokens_[position + 1]];
  }

  // The sum of the chunk's divergences; all else to `positions`, if given.
  double Compare(int begin, int end, std::array<PositionSums, kPositionBuckets>* positions) {
    std::vector<RowDivergence> rows(end - begin);
    ParallelFor(ctx_, end - begin, [&](int64_t t, int) {
      rows[t] = Divergence(Row(teacher_logits_, t), Row(logits_, t));
    });
    double kl = 0;
    for (int64_t t = 0; t < end - begin; ++t) {
      kl += rows[t].kl;
      if (positions == nullptr) continue;
      PositionSums& sums = (*positions)[Bucket(begin + t)];
      ++sums.tokens;
      sums.kl += rows[t].kl;
      sums.agree += rows[t].agree ? 1 : 0;
      AddLoss(begin + t, rows[t].q_log_sum, Row(logits_, t), sums);
    }
    return kl;
  }

  const ExecContext& ctx_;
  const HybridModel& model_;
  CachePool& pool_;
  std::span<const int32_t> tokens_;
  std::span<const Subject> subjects_;
  const ComparisonOptions& options_;
  std::vector<int> switch_at_;
  SequenceCache teacher_;
  std::vector<SequenceCache> start_;
  std::list<Switched> switched_;
  Buffer<float> teacher_logits_, logits_;
  std::vector<double> teacher_log_sums_;
  DocumentSums sums_;
};

}  // namespace

PositionSums SubjectSums::Total() const {
  PositionSums total;
  for (const PositionSums& sums : positions) Add(total, sums);
  return total;
}

Expected<DocumentSums> CompareDocument(const ExecContext& ctx, const HybridModel& model,
                                       CachePool& pool, std::span<const int32_t> tokens,
                                       std::span<const Subject> subjects,
                                       const ComparisonOptions& options) {
  for (const Subject& subject : subjects) {
    if (subject.level < 0 || subject.level > subject.model->max_level())
      return InvalidArgument("level {}: the adapter has levels 0 to {}", subject.level,
                             subject.model->max_level());
  }
  for (const double share : options.switches) {
    if (!(share >= 0 && share < 1))
      return InvalidArgument("switch at {}: must be a share of the document in [0, 1)", share);
  }
  if (tokens.size() < 2 || static_cast<int64_t>(tokens.size()) > model.max_positions())
    return InvalidArgument("a document has {} tokens; 2 to {} are possible", tokens.size(),
                           model.max_positions());
  DocumentRun run(ctx, model, pool, tokens, subjects, options);
  DSLA_RETURN_IF_ERROR(run.Run());
  return run.TakeSums();
}

}  // namespace dsla
