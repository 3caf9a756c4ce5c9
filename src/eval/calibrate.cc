#include "eval/calibrate.h"

#include <algorithm>
#include <vector>

#include "adapt/calibration_run.h"
#include "base/clock.h"
#include "cache/cache_pool.h"

namespace dsla {
namespace {

constexpr int kProbeTokens = 64;  // of the first runs, which say how fast the machine is
constexpr int kProbeRuns = 4;     // at most; the first one warms up
constexpr double kProbeSeconds = 0.5;
// Short steps are repeated, the fastest counts: what disturbs only adds.
constexpr int kDecodeSteps = 6;  // at most, of one run of a decode point
constexpr double kDecodeSeconds = 0.1;

class ModelProbe final : public CostProbe {
 public:
  ModelProbe(const ExecContext& ctx, const HybridModel& model, CachePool& pool)
      : ctx_(ctx), model_(model), pool_(pool) {}

  // Tokens per second of a short prompt at level 0.
  Expected<double> ProbeRate(int tokens) {
    const double start = NowSeconds();
    double best = 0;
    for (int run = 0; run < kProbeRuns; ++run) {
      SequenceCache cache = model_.NewSequence(pool_, 0);
      DSLA_ASSIGN_OR_RETURN(const double seconds, Prefill(cache, tokens));
      best = std::max(best, tokens / std::max(seconds, 1e-9));
      if (run > 0 && NowSeconds() > start + kProbeSeconds) break;
    }
    return best;
  }

  double Now() override { return NowSeconds(); }

  Expected<double> Run(const PrefillPoint& point) override {
    SequenceCache cache = model_.NewSequence(pool_, point.level);
    DSLA_RETURN_IF_ERROR(MakeContext(cache, point.context));
    return Prefill(cache, point.tokens);
  }

  Expected<double> Run(const DecodePoint& point) override {
    std::vector<SequenceCache> caches;
    for (const DecodeRow& row : point.rows) {
      caches.push_back(model_.NewSequence(pool_, row.level));
      DSLA_RETURN_IF_ERROR(MakeContext(caches.back(), row.length));
    }
    const double start = NowSeconds();
    double best = 0;
    for (int step = 0; step < kDecodeSteps; ++step) {
      std::vector<SequenceRows> batch;
      const int32_t token = 1;
      for (SequenceCache& cache : caches) {
        DSLA_RETURN_IF_ERROR(cache.Reserve(1));
        SequenceRows rows;
        rows.cache = &cache;
        rows.tokens = {&token, 1};
        batch.push_back(rows);
      }
      const double seconds = Forward(batch);
      best = step == 0 ? seconds : std::min(best, seconds);
      for (SequenceCache& cache : caches) cache.Commit(1);
      if (step > 0 && NowSeconds() > start + kDecodeSeconds) break;
    }
    return best;
  }

  Expected<double> Run(const FoldPoint& point) override {
    double best = 0;
    // Twice: the first one also pays for slots that were never touched.
    for (int run = 0; run < 2; ++run) {
      SequenceCache cache = model_.NewSequence(pool_, point.from);
      DSLA_RETURN_IF_ERROR(MakeContext(cache, point.length));
      const double start = NowSeconds();
      DSLA_RETURN_IF_ERROR(model_.Raise(ctx_, pool_, cache, point.to));
      const double seconds = NowSeconds() - start;
      best = run == 0 ? seconds : std::min(best, seconds);
    }
    return best;
  }

 private:
  double Forward(std::span<const SequenceRows> batch) {
    const double start = NowSeconds();
    model_.Forward(ctx_, pool_, batch, logits_);
    return NowSeconds() - start;
  }

  Expected<double> Prefill(SequenceCache& cache, int64_t tokens) {
    std::vector<int32_t> ids(tokens);
    for (int64_t i = 0; i < tokens; ++i)
      ids[i] = static_cast<int32_t>(i * 7919 % model_.config().V);
    DSLA_RETURN_IF_ERROR(cache.Reserve(static_cast<int>(tokens)));
    SequenceRows rows;
    rows.cache = &cache;
    rows.tokens = ids;
    const double seconds = Forward({&rows, 1});
    cache.Commit(static_cast<int>(tokens));
    return seconds;
  }

  // `tokens` tokens that were never run. The pages are written, so that reading them later costs
  // what it does with real ones; the states of layers that are DSLA already are reset by the first
  // Forward.
  Status MakeContext(SequenceCache& cache, int64_t tokens) {
    if (tokens == 0) return Status::Ok();
    DSLA_RETURN_IF_ERROR(cache.Reserve(static_cast<int>(tokens)));
    for (int layer = 0; layer < cache.layers(); ++layer)
      pool_.ZeroBlocks(BlockKind::kPage, cache.pages(layer));
    cache.Commit(static_cast<int>(tokens));
    return Status::Ok();
  }

  const ExecContext& ctx_;
  const HybridModel& model_;
  CachePool& pool_;
  Buffer<float> logits_;
};

CalibrationLimits LimitsOf(const HybridModel& model, const CalibrateOptions& options,
                           double tokens_per_second) {
  const CacheGeometry geometry = model.cache_geometry();
  const int L = model.config().L;
  return {.layers = L,
          .top_level = options.top_level,
          .max_positions = model.max_positions(),
          .memory_tokens = options.memory_bytes / (L * geometry.page_bytes()) * geometry.page_size,
          .tokens_per_second = tokens_per_second};
}

}  // namespace

int64_t LongestContext(const HybridModel& model, const CalibrateOptions& options) {
  int64_t longest = 0;
  for (const PrefillPoint& point : CalibrationPlan(LimitsOf(model, options, 0)).prefill)
    longest = std::max(longest, point.context);
  return longest;
}

Expected<CostModel> Calibrate(const ExecContext& ctx, const HybridModel& model,
                              const CalibrateOptions& options) {
  const int L = model.config().L;
  if (options.top_level < 0 || options.top_level > model.max_level()) {
    return InvalidArgument("calibration up to level {}: the model has levels 0 to {}",
                           options.top_level, model.max_level());
  }
  DSLA_ASSIGN_OR_RETURN(CachePool pool, CachePool::Create(model.cache_geometry(),
                                                          options.memory_bytes, model.memory()));
  const int64_t memory_tokens = LimitsOf(model, options, 0).memory_tokens;
  ModelProbe measured(ctx, model, pool);
  const double start = NowSeconds();
  const auto probe = static_cast<int>(std::max<int64_t>(
      1, std::min<int64_t>({kProbeTokens, memory_tokens, model.max_positions()})));
  DSLA_ASSIGN_OR_RETURN(const double rate, measured.ProbeRate(probe));
  const CostMeasurements plan = CalibrationPlan(LimitsOf(model, options, rate));
  return RunCalibration(measured, L, options.top_level, plan, start + options.most_seconds);
}

}  // namespace dsla
