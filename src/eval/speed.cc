#include "eval/speed.h"

#include <algorithm>

#include "base/clock.h"
#include "eval/cost.h"

namespace dsla {
namespace {

double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

struct Samples {
  std::vector<double> prefill, decode, fold;
};

class Run {
 public:
  Run(const ExecContext& ctx, const HybridModel& model, CachePool& pool, int level)
      : ctx_(ctx), model_(model), pool_(pool), cache_(model.NewSequence(pool, level)) {}

  Status Prefill(std::span<const int32_t> text, int chunk) {
    for (size_t done = 0; done < text.size(); done += chunk) {
      DSLA_RETURN_IF_ERROR(
          Forward(text.subspan(done, std::min<size_t>(chunk, text.size() - done))));
    }
    return Status::Ok();
  }

  // Greedy steps from the last row on.
  Status Decode(int count, std::vector<double>& seconds) {
    for (int i = 0; i < count; ++i) {
      const auto token = static_cast<int32_t>(
          std::max_element(logits_.data(), logits_.data() + logits_.size()) - logits_.data());
      const double start = NowSeconds();
      DSLA_RETURN_IF_ERROR(Forward({&token, 1}));
      seconds.push_back(NowSeconds() - start);
    }
    return Status::Ok();
  }

  Status Raise(int level) { return model_.Raise(ctx_, pool_, cache_, level); }

 private:
  Status Forward(std::span<const int32_t> tokens) {
    return model_.Append(ctx_, pool_, cache_, tokens, 1, logits_);
  }

  const ExecContext& ctx_;
  const HybridModel& model_;
  CachePool& pool_;
  SequenceCache cache_;
  Buffer<float> logits_;
};

}  // namespace

Expected<std::vector<LevelSpeed>> MeasureSpeed(
    const ExecContext& ctx, const HybridModel& model, CachePool& pool,
    std::span<const int32_t> text, const SpeedOptions& options,
    const std::function<void(const std::string&)>& progress) {
  if (text.empty()) return InvalidArgument("no text to measure on");
  if (static_cast<int64_t>(text.size()) + options.decode_tokens > model.max_positions()) {
    return InvalidArgument("{} tokens of text and {} to decode do not fit the context of {}",
                           text.size(), options.decode_tokens, model.max_positions());
  }
  for (const int level : options.levels) {
    if (level < 0 || level > model.max_level()) {
      return InvalidArgument("level {}: the adapter has levels 0 to {}", level, model.max_level());
    }
  }
  std::vector<Samples> samples(options.levels.size());
  for (int repetition = 0; repetition < options.repetitions; ++repetition) {
    for (size_t i = 0; i < options.levels.size(); ++i) {
      const int level = options.levels[i];
      if (progress)
        progress(fmt::format("level {}, run {} of {}", level, repetition + 1, options.repetitions));
      Run run(ctx, model, pool, level);
      const double start = NowSeconds();
      DSLA_RETURN_IF_ERROR(run.Prefill(text, options.prefill_chunk));
      model.Wait();
      samples[i].prefill.push_back(NowSeconds() - start);
      DSLA_RETURN_IF_ERROR(run.Decode(options.decode_tokens, samples[i].decode));
      if (level != 0) continue;
      // The level-0 cache is there: fold it once for one of the other levels, in turn.
      std::vector<size_t> targets;
      for (size_t j = 0; j < options.levels.size(); ++j) {
        if (options.levels[j] > 0) targets.push_back(j);
      }
      if (targets.empty()) continue;
      const size_t target = targets[repetition % targets.size()];
      const double fold_start = NowSeconds();
      DSLA_RETURN_IF_ERROR(run.Raise(options.levels[target]));
      samples[target].fold.push_back(NowSeconds() - fold_start);
    }
  }
  std::vector<LevelSpeed> result;
  for (size_t i = 0; i < options.levels.size(); ++i) {
    result.push_back(
        {.level = options.levels[i],
         .prefill_seconds = Median(samples[i].prefill),
         .decode_seconds = Median(samples[i].decode),
         .fold_seconds = Median(samples[i].fold),
         .cache_bytes = CacheBytesAt(model, options.levels[i], static_cast<int64_t>(text.size())),
         .prefill_runs = samples[i].prefill,
         .decode_steps = samples[i].decode});
  }
  return result;
}

}  // namespace dsla
