#include "eval/speed_depths.h"

#include <algorithm>
#include <deque>

#include "base/clock.h"

namespace dsla {
namespace {

class Depths {
 public:
  Depths(const ExecContext& ctx, const HybridModel& model, CachePool& pool,
         std::span<const int32_t> text, const DepthOptions& options)
      : ctx_(ctx),
        model_(model),
        pool_(pool),
        text_(text),
        options_(options),
        context_(model.NewSequence(pool, 0)) {}

  // Reads the context on to `depth`.
  Status Reach(int depth) {
    while (context_.length() < depth) {
      const int count = std::min(options_.prefill_chunk, depth - context_.length());
      DSLA_RETURN_IF_ERROR(Read(context_, count));
    }
    return Status::Ok();
  }

  // One repetition from where the context stands.
  Status Measure(DepthSpeed& speed) {
    if (speed.sequences == 1 && options_.prefill_tokens > 0) {
      SequenceCache sequence = model_.NewSequence(pool_, 0);
      DSLA_RETURN_IF_ERROR(Copy(sequence, speed.level));
      if (options_.stages) ctx_.stages = &speed.prefill_stages;
      const double start = NowSeconds();
      DSLA_RETURN_IF_ERROR(Read(sequence, options_.prefill_tokens));
      speed.prefill.push_back(NowSeconds() - start);
      ctx_.stages = nullptr;
    }
    std::deque<SequenceCache> sequences;
    for (int n = 0; n < speed.sequences; ++n) {
      sequences.push_back(model_.NewSequence(pool_, 0));
      DSLA_RETURN_IF_ERROR(Copy(sequences.back(), speed.level));
    }
    DSLA_RETURN_IF_ERROR(Step(sequences));  // not timed: the first step's memory is new
    if (options_.stages) ctx_.stages = &speed.decode_stages;
    const double start = NowSeconds();
    for (int i = 0; i < options_.decode_tokens; ++i) DSLA_RETURN_IF_ERROR(Step(sequences));
    speed.decode.push_back((NowSeconds() - start) / options_.decode_tokens);
    ctx_.stages = nullptr;
    return Status::Ok();
  }

 private:
  int32_t TokenAt(int64_t i) const { return text_[static_cast<size_t>(i) % text_.size()]; }

  Status Read(SequenceCache& sequence, int count) {
    tokens_.resize(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) tokens_[i] = TokenAt(sequence.length() + i);
    return model_.Append(ctx_, pool_, sequence, tokens_, 1, logits_);
  }

  // One decode step of all sequences. Which tokens they are makes no difference to its time, but
  // sequences are given different ones.
  Status Step(std::deque<SequenceCache>& sequences) {
    tokens_.resize(sequences.size());
    batch_.clear();
    for (size_t n = 0; n < sequences.size(); ++n) {
      tokens_[n] = TokenAt(sequences[n].length() + static_cast<int64_t>(n));
      DSLA_RETURN_IF_ERROR(sequences[n].Reserve(1));
      batch_.push_back({.cache = &sequences[n],
                        .tokens = {&tokens_[n], 1},
                        .logits_rows = 1,
                        .sampling = &greedy_});
    }
    model_.Forward(ctx_, pool_, batch_, Products::kFastest,
                   [](std::span<const LogitsRow>, float*, const TokenChoice*) {});
    for (SequenceCache& sequence : sequences) sequence.Commit(1);
    return Status::Ok();
  }

  // Fills an empty sequence with the context, and folds it to `level`.
  Status Copy(SequenceCache& to, int level) {
    DSLA_RETURN_IF_ERROR(to.Reserve(context_.length()));
    for (int layer = 0; layer < to.layers(); ++layer)
      pool_.CopyBlocks(BlockKind::kPage, context_.pages(layer), to.pages(layer));
    to.Commit(context_.length());
    return model_.Raise(ctx_, pool_, to, level);
  }

  ExecContext ctx_;
  const HybridModel& model_;
  CachePool& pool_;
  std::span<const int32_t> text_;
  const DepthOptions& options_;
  SequenceCache context_;
  std::vector<int32_t> tokens_;
  std::vector<SequenceRows> batch_;
  const SamplingParams greedy_{.temperature = 0};
  Buffer<float> logits_;
};

Status Check(const HybridModel& model, std::span<const int32_t> text, const DepthOptions& o) {
  if (text.empty()) return InvalidArgument("no text to measure on");
  // One step more than the timed ones.
  const int64_t most = std::max(o.decode_tokens + 1, o.prefill_tokens);
  for (const int depth : o.depths) {
    if (depth < 0) return InvalidArgument("depth {}: is negative", depth);
    if (depth + most > model.max_positions()) {
      return InvalidArgument("depth {} and {} tokens after it do not fit the context of {}", depth,
                             most, model.max_positions());
    }
  }
  for (const int level : o.levels) {
    if (level < 0 || level > model.max_level())
      return InvalidArgument("level {}: the adapter has levels 0 to {}", level, model.max_level());
  }
  for (const int sequences : o.batches) {
    if (sequences < 1) return InvalidArgument("batch {}: is not positive", sequences);
  }
  return Status::Ok();
}

}  // namespace

Expected<std::vector<DepthSpeed>> MeasureDepths(
    const ExecContext& ctx, const HybridModel& model, CachePool& pool,
    std::span<const int32_t> text, const DepthOptions& options,
    const std::function<void(const std::string&)>& progress) {
  DSLA_RETURN_IF_ERROR(Check(model, text, options));
  std::vector<int> depths = options.depths;
  std::sort(depths.begin(), depths.end());
  Depths run(ctx, model, pool, text, options);
  std::vector<DepthSpeed> speeds;
  for (const int depth : depths) {
    if (progress) progress(fmt::format("reading {} tokens", depth));
    DSLA_RETURN_IF_ERROR(run.Reach(depth));
    const size_t first = speeds.size();
    for (const int level : options.levels)
      for (const int sequences : options.batches)
        speeds.push_back({level, depth, sequences, {}, {}, {}, {}});
    // Alternating, so that a noisy machine treats all alike.
    for (int repetition = 0; repetition < options.repetitions; ++repetition) {
      for (size_t i = first; i < speeds.size(); ++i) {
        if (progress) {
          progress(fmt::format("depth {}, level {}, {} sequences, run {} of {}", depth,
                               speeds[i].level, speeds[i].sequences, repetition + 1,
                               options.repetitions));
        }
        DSLA_RETURN_IF_ERROR(run.Measure(speeds[i]));
      }
    }
  }
  return speeds;
}

}  // namespace dsla
