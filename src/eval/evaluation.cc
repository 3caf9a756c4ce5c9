#include "eval/evaluation.h"

#include <algorithm>
#include <utility>

namespace dsla {
namespace {

// A control's model and the cache that has its geometry.
struct ControlModel {
  std::string name;
  bool reorders = false;
  std::unique_ptr<HybridModel> model;
  std::unique_ptr<CachePool> pool;
};

Expected<std::vector<int>> EntropyOrder(const ExecContext& ctx, const HybridModel& model,
                                        CachePool& pool,
                                        std::span<const std::vector<int32_t>> documents) {
  constexpr size_t kTexts = 4, kTokens = 1024;
  std::vector<std::span<const int32_t>> texts;
  for (size_t i = 0; i < std::min(kTexts, documents.size()); ++i)
    texts.push_back(std::span(documents[i]).first(std::min(kTokens, documents[i].size())));
  DSLA_ASSIGN_OR_RETURN(const std::vector<double> entropy,
                        AttentionEntropy(ctx, model, pool, texts));
  return OrderBy(entropy);
}

Expected<std::shared_ptr<const Adapter>> AdapterFor(const ExecContext& ctx,
                                                    const HybridModel& model,
                                                    const Adapter& adapter, CachePool& pool,
                                                    std::span<const std::vector<int32_t>> documents,
                                                    const EvaluationOptions& options,
                                                    Control control) {
  switch (control) {
    case Control::kRandomOrder:
      return WithOrder(adapter, RandomLayerOrder(model.config().L, options.seed));
    case Control::kEntropyOrder: {
      DSLA_ASSIGN_OR_RETURN(const std::vector<int> order,
                            EntropyOrder(ctx, model, pool, documents));
      return WithOrder(adapter, order);
    }
    case Control::kGivenOrder:
      return WithOrder(adapter, options.order);
    default:
      return ControlAdapter(adapter, model.config(), control);
  }
}

Expected<ControlModel> MakeControl(const ExecContext& ctx, const HybridModel& model,
                                   const Adapter& adapter, CachePool& pool,
                                   std::span<const std::vector<int32_t>> documents,
                                   const EvaluationOptions& options, Control control) {
  ControlModel made;
  made.name = Name(control);
  made.reorders = control == Control::kRandomOrder || control == Control::kEntropyOrder ||
                  control == Control::kGivenOrder;
  DSLA_ASSIGN_OR_RETURN(const std::shared_ptr<const Adapter> changed,
                        AdapterFor(ctx, model, adapter, pool, documents, options, control));
  DSLA_ASSIGN_OR_RETURN(made.model, model.WithAdapter(*changed));
  DSLA_ASSIGN_OR_RETURN(
      CachePool own, CachePool::Create(made.model->cache_geometry(), options.control_memory_bytes,
                                       made.model->memory()));
  made.pool = std::make_unique<CachePool>(std::move(own));
  return made;
}

// A quantity's interval over documents: `value` and `weight` of each document's sums.
template <typename Value, typename Weight>
Estimate Over(const std::vector<DocumentSums>& documents, uint64_t seed, Value&& value,
              Weight&& weight) {
  std::vector<double> values, weights;
  for (const DocumentSums& document : documents) {
    values.push_back(value(document));
    weights.push_back(static_cast<double>(weight(document)));
  }
  return Bootstrap(values, weights, seed);
}

// What one bucket, or all of them, says of a subject.
struct Summary {
  int64_t tokens = 0;
  double teacher_loss = 0;
  Estimate kl, loss_gap, agreement;
};
template <typename Select>
Summary Summarise(const std::vector<DocumentSums>& documents, size_t subject, uint64_t seed,
                  Select&& select) {
  const auto own = [&](const DocumentSums& d) { return select(d.subjects[subject]); };
  const auto teacher = [&](const DocumentSums& d) { return select(d.teacher); };
  const auto tokens = [&](const DocumentSums& d) { return own(d).tokens; };
  const auto targets = [&](const DocumentSums& d) { return own(d).targets; };
  Summary summary;
  for (const DocumentSums& d : documents) summary.tokens += tokens(d);
  summary.teacher_loss =
      Over(
          documents, seed, [&](const DocumentSums& d) { return teacher(d).loss; }, targets)
          .mean;
  summary.kl = Over(
      documents, seed, [&](const DocumentSums& d) { return own(d).kl; }, tokens);
  summary.agreement = Over(
      documents, seed, [&](const DocumentSums& d) { return own(d).agree; }, tokens);
  summary.loss_gap = Over(
      documents, seed, [&](const DocumentSums& d) { return own(d).loss - teacher(d).loss; },
      targets);
  return summary;
}

// The states and the window as tokens of bf16 cache: F rows of D fp32 weigh as much as F tokens'
// bf16 K and V. The mean over layers where they differ.
int64_t LayerTokens(const HybridModel& model, const std::string& control) {
  int64_t sum = 0;
  for (int layer = 0; layer < model.config().L; ++layer) {
    const DslaShape& shape = model.dsla_shape(layer);
    // The controls hold states that they never read.
    const int states = control == "window" || control == "zeroed" || control == "bypass" ? 0
                       : control == "history" || control == "recency"                    ? 1
                                                                      : shape.states;
    sum += int64_t{states} * shape.F + shape.window + shape.sinks;
  }
  return sum / model.config().L;
}

void AddText(const std::vector<DocumentSums>& documents, const EvaluationOptions& options,
             size_t index, SubjectResult& result) {
  const Summary all = Summarise(documents, index, options.seed,
                                [](const SubjectSums& sums) { return sums.Total(); });
  result.tokens = all.tokens;
  result.kl = all.kl, result.loss_gap = all.loss_gap, result.agreement = all.agreement;
  for (int b = 0; b < kPositionBuckets; ++b) {
    const Summary bucket = Summarise(documents, index, options.seed,
                                     [&](const SubjectSums& sums) { return sums.positions[b]; });
    if (bucket.tokens == 0) continue;
    result.positions.push_back({.from = kPositionBounds[b],
                                .to = b + 1 < kPositionBuckets ? kPositionBounds[b + 1] : 0,
                                .tokens = bucket.tokens,
                                .teacher_loss = bucket.teacher_loss,
                                .kl = bucket.kl,
                                .loss_gap = bucket.loss_gap,
                                .agreement = bucket.agreement});
  }
  for (size_t s = 0; s < documents[0].subjects[index].switches.size(); ++s) {
    const auto at = [&](const DocumentSums& d) { return d.subjects[index].switches[s]; };
    const auto tokens = [&](const DocumentSums& d) { return at(d).tokens; };
    SwitchResult after{
        .share = options.switches[s],
        .tokens = 0,
        .kl_start = Over(
            documents, options.seed, [&](const DocumentSums& d) { return at(d).kl_start; }, tokens),
        .kl_switched = Over(
            documents, options.seed, [&](const DocumentSums& d) { return at(d).kl_switched; },
            tokens)};
    for (const DocumentSums& d : documents) after.tokens += tokens(d);
    result.switches.push_back(after);
  }
}

std::vector<int32_t> Joined(std::span<const std::vector<int32_t>> documents) {
  std::vector<int32_t> all;
  for (const auto& document : documents) all.insert(all.end(), document.begin(), document.end());
  return all;
}

}  // namespace

std::string SubjectResult::Title() const {
  return control.empty() ? fmt::format("level {}", level)
                         : fmt::format("level {}, {}", level, control);
}

Expected<Evaluation> Evaluate(const ExecContext& ctx, const HybridModel& model,
                              const Adapter& adapter, CachePool& pool,
                              std::span<const std::vector<int32_t>> documents,
                              const EvaluationOptions& options,
                              const std::function<void(const std::string&)>& progress) {
  const auto say = [&](const std::string& line) {
    if (progress) progress(line);
  };
  if (documents.empty()) return InvalidArgument("no documents to measure on");
  if (options.levels.empty()) return InvalidArgument("no levels to measure");
  for (const int level : options.levels) {
    if (level < 0 || level > model.max_level())
      return InvalidArgument("level {}: the adapter has levels 0 to {}", level, model.max_level());
  }
  Evaluation evaluation;
  std::vector<Subject> subjects;
  for (const int level : options.levels) {
    subjects.push_back({&model, &pool, level});
    evaluation.subjects.emplace_back().level = level;
  }
  std::vector<ControlModel> controls;
  for (const Control control : options.controls) {
    say(fmt::format("control {}", Name(control)));
    DSLA_ASSIGN_OR_RETURN(ControlModel made,
                          MakeControl(ctx, model, adapter, pool, documents, options, control));
    controls.push_back(std::move(made));
  }
  for (const ControlModel& control : controls) {
    for (const int level : options.levels) {
      subjects.push_back({control.model.get(), control.pool.get(), level});
      SubjectResult& result = evaluation.subjects.emplace_back();
      result.control = control.name;
      result.level = level;
      const std::vector<int>& ladder = control.model->adapter()->ladder;
      if (control.reorders) result.order.assign(ladder.begin(), ladder.begin() + level);
    }
  }

  std::vector<DocumentSums> sums;
  const ComparisonOptions comparison{.switches = options.switches};
  for (const auto& document : documents) {
    say(fmt::format("document {} of {}", sums.size() + 1, documents.size()));
    DSLA_ASSIGN_OR_RETURN(DocumentSums found,
                          CompareDocument(ctx, model, pool, document, subjects, comparison));
    evaluation.tokens += found.tokens;
    sums.push_back(std::move(found));
  }
  evaluation.documents = static_cast<int64_t>(sums.size());
  evaluation.teacher_loss =
      Over(
          sums, options.seed, [](const DocumentSums& d) { return d.teacher.Total().loss; },
          [](const DocumentSums& d) { return d.teacher.Total().targets; })
          .mean;
  for (size_t i = 0; i < subjects.size(); ++i) {
    SubjectResult& result = evaluation.subjects[i];
    result.layer_tokens = LayerTokens(*subjects[i].model, result.control);
    AddText(sums, options, i, result);
  }
  if (options.measure_recall) {
    DSLA_ASSIGN_OR_RETURN(evaluation.recall,
                          MeasureRecall(ctx, model, pool, subjects, Joined(documents),
                                        options.recall, [&](int64_t done, int64_t all) {
                                          say(fmt::format("recall: text {} of {}", done, all));
                                        }));
  }
  if (options.measure_generation) {
    DSLA_ASSIGN_OR_RETURN(
        evaluation.generation,
        MeasureGeneration(ctx, model, pool, subjects, documents, options.generation,
                          [&](int64_t done) {
                            say(fmt::format("writing: document {} of {}", done, documents.size()));
                          }));
  }
  return evaluation;
}

}  // namespace dsla
