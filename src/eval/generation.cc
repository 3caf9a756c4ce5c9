#include "eval/generation.h"

#include <algorithm>
#include <array>
#include <set>
#include <utility>

#include "eval/fork.h"

namespace dsla {
namespace {

constexpr size_t kChunk = 512;

// The length of what `a` and `b` have in common at their beginning.
size_t Common(std::span<const int32_t> a, std::span<const int32_t> b) {
  const size_t n = std::min(a.size(), b.size());
  return static_cast<size_t>(std::mismatch(a.begin(), a.begin() + n, b.begin()).first - a.begin());
}

// One score's values, document by document.
struct Values {
  std::vector<double> repetition, same, identical, same_switched, repetition_switched;

  GenerationScore Score(uint64_t seed) const {
    const auto mean = [&](const std::vector<double>& values) {
      return Bootstrap(values, std::vector<double>(values.size(), 1), seed);
    };
    return {.repetition = mean(repetition),
            .same = mean(same),
            .identical = mean(identical),
            .has_switched = !same_switched.empty(),
            .same_switched = mean(same_switched),
            .repetition_switched = mean(repetition_switched)};
  }
};

}  // namespace

int32_t LikeliestToken(std::span<const float> logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

Expected<std::vector<int32_t>> WriteGreedily(const ExecContext& ctx, const Subject& subject,
                                             SequenceCache& cache, std::span<const int32_t> prompt,
                                             int count,
                                             const std::function<bool(int32_t)>& keep_going) {
  DSLA_CHECK(!prompt.empty() && count > 0);
  Buffer<float> logits;
  for (size_t begin = 0; begin < prompt.size(); begin += kChunk) {
    const size_t end = std::min(prompt.size(), begin + kChunk);
    DSLA_RETURN_IF_ERROR(subject.model->Append(ctx, *subject.pool, cache,
                                               prompt.subspan(begin, end - begin),
                                               end == prompt.size() ? 1 : 0, logits));
  }
  std::vector<int32_t> written;
  while (true) {
    const int32_t token = LikeliestToken(logits.span());
    written.push_back(token);
    if (static_cast<int>(written.size()) == count || (keep_going && !keep_going(token)))
      return written;
    DSLA_RETURN_IF_ERROR(subject.model->Append(ctx, *subject.pool, cache, {&token, 1}, 1, logits));
  }
}

double RepetitionRate(std::span<const int32_t> tokens) {
  constexpr size_t kRun = 4;
  if (tokens.size() <= kRun) return 0;
  std::set<std::array<int32_t, kRun>> seen;
  const size_t runs = tokens.size() - kRun + 1;
  for (size_t i = 0; i < runs; ++i) {
    std::array<int32_t, kRun> run;
    std::copy_n(tokens.begin() + static_cast<ptrdiff_t>(i), kRun, run.begin());
    seen.insert(run);
  }
  return 1 - static_cast<double>(seen.size()) / static_cast<double>(runs);
}

Expected<GenerationReport> MeasureGeneration(const ExecContext& ctx, const HybridModel& model,
                                             CachePool& pool, std::span<const Subject> subjects,
                                             std::span<const std::vector<int32_t>> documents,
                                             const GenerationOptions& options,
                                             const std::function<void(int64_t done)>& progress) {
  if (options.prompt < 1 || options.tokens < 1)
    return InvalidArgument("generation: a prompt of {} and {} tokens to write must be positive",
                           options.prompt, options.tokens);
  // A document is no longer than the context, and its prompt no longer than half of it.
  const int longest = std::min(options.prompt, model.max_positions() / 2);
  if (options.tokens > model.max_positions() - longest)
    return InvalidArgument(
        "generation: a prompt of {} and {} tokens to write exceed the context {}", longest,
        options.tokens, model.max_positions());
  const Subject teacher{&model, &pool, 0};
  std::vector<Values> values(1 + subjects.size());
  GenerationReport report;
  for (const auto& document : documents) {
    const auto prompt = std::span(document).first(
        std::clamp<size_t>(document.size() / 2, 1, static_cast<size_t>(options.prompt)));
    // All but the prompt's last token, which starts every continuation.
    const int known = static_cast<int>(prompt.size()) - 1;
    SequenceCache read = model.NewSequence(pool, 0);
    DSLA_ASSIGN_OR_RETURN(const std::vector<int32_t> reference,
                          WriteGreedily(ctx, teacher, read, prompt, options.tokens));
    values[0].repetition.push_back(RepetitionRate(reference));
    for (size_t i = 0; i < subjects.size(); ++i) {
      SequenceCache cache = subjects[i].model->NewSequence(*subjects[i].pool, subjects[i].level);
      DSLA_ASSIGN_OR_RETURN(const std::vector<int32_t> written,
                            WriteGreedily(ctx, subjects[i], cache, prompt, options.tokens));
      const size_t same = Common(reference, written);
      values[1 + i].repetition.push_back(RepetitionRate(written));
      values[1 + i].same.push_back(static_cast<double>(same));
      values[1 + i].identical.push_back(same == reference.size() ? 1 : 0);
      if (subjects[i].model != &model) continue;
      DSLA_ASSIGN_OR_RETURN(SequenceCache fork,
                            ForkAnywhere(ctx, model, pool, read, prompt, known));
      DSLA_RETURN_IF_ERROR(model.Raise(ctx, pool, fork, subjects[i].level));
      DSLA_ASSIGN_OR_RETURN(const std::vector<int32_t> after,
                            WriteGreedily(ctx, subjects[i], fork, prompt.last(1), options.tokens));
      values[1 + i].same_switched.push_back(static_cast<double>(Common(reference, after)));
      values[1 + i].repetition_switched.push_back(RepetitionRate(after));
    }
    ++report.documents;
    if (progress) progress(report.documents);
  }
  for (const Values& one : values) report.scores.push_back(one.Score(options.seed));
  return report;
}

}  // namespace dsla
