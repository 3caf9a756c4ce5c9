#include "eval/calibrate.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/clock.h"
#include "cache/cache_pool.h"

namespace dsla {
namespace {

constexpr int kProbeTokens = 64;  // of the first run, which says how fast the machine is
constexpr int kRounds = 3;        // at most; the fastest counts: what disturbs only adds
constexpr int kDecodeSteps = 3;   // of one decode point in a round

class Calibrator {
 public:
  Calibrator(const ExecContext& ctx, const HybridModel& model, CachePool& pool)
      : ctx_(ctx), model_(model), pool_(pool) {}

  // Tokens per second of a short prompt at level 0; the first run warms up.
  Expected<double> ProbeRate(int tokens) {
    double seconds = 0;
    for (int run = 0; run < 2; ++run) {
      SequenceCache cache = model_.NewSequence(pool_, 0);
      DSLA_ASSIGN_OR_RETURN(seconds, Prefill(cache, tokens));
    }
    return tokens / std::max(seconds, 1e-9);
  }

  // Keeps the shorter of the point's time and this one's.
  Status Measure(PrefillPoint& point) {
    SequenceCache cache = model_.NewSequence(pool_, point.level);
    DSLA_RETURN_IF_ERROR(MakeContext(cache, point.context));
    DSLA_ASSIGN_OR_RETURN(const double seconds, Prefill(cache, point.tokens));
    Keep(point.seconds, seconds);
    return Status::Ok();
  }

  Status Measure(DecodePoint& point) {
    std::vector<SequenceCache> caches;
    for (const DecodeRow& row : point.rows) {
      caches.push_back(model_.NewSequence(pool_, row.level));
      DSLA_RETURN_IF_ERROR(MakeContext(caches.back(), row.length));
    }
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
      Keep(point.seconds, Forward(batch));
      for (SequenceCache& cache : caches) cache.Commit(1);
    }
    return Status::Ok();
  }

  Status Measure(FoldPoint& point) {
    // Twice: the first one also pays for slots that were never touched.
    for (int run = 0; run < 2; ++run) {
      SequenceCache cache = model_.NewSequence(pool_, point.from);
      DSLA_RETURN_IF_ERROR(MakeContext(cache, point.length));
      const double start = NowSeconds();
      DSLA_RETURN_IF_ERROR(model_.Raise(ctx_, pool_, cache, point.to));
      Keep(point.seconds, NowSeconds() - start);
    }
    return Status::Ok();
  }

 private:
  static void Keep(double& best, double seconds) {
    // A clock's tick at least: a time of 0 could not be fitted.
    seconds = std::max(seconds, 1e-9);
    best = best == 0 ? seconds : std::min(best, seconds);
  }

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
    const PagedKvView view = pool_.pages();
    const int64_t stride = view.page_stride * SizeOf(view.dtype);
    const int64_t bytes = int64_t{view.Hkv} * view.page_size * view.D * SizeOf(view.dtype);
    for (int layer = 0; layer < cache.layers(); ++layer) {
      const std::span<const int32_t> pages = cache.pages(layer);
      pool_.Touch(BlockKind::kPage, pages);
      for (const int32_t page : pages) {
        std::memset(static_cast<char*>(view.k) + page * stride, 0, bytes);
        std::memset(static_cast<char*>(view.v) + page * stride, 0, bytes);
      }
    }
    cache.Commit(static_cast<int>(tokens));
    return Status::Ok();
  }

  const ExecContext& ctx_;
  const HybridModel& model_;
  CachePool& pool_;
  Buffer<float> logits_;
};

// Measures the points once more. Those that do not fit the memory stay at 0, as do, where time has
// run out, those of the least important level.
class Round {
 public:
  Round(Calibrator& calibrator, CostMeasurements& points, int top_level, double deadline)
      : calibrator_(calibrator), points_(points), top_level_(top_level), deadline_(deadline) {}

  Status Run() {
    // The plan ends with the middle level, where it has one: the fit can do without it.
    const int last = points_.prefill.back().level;
    const int optional = last < top_level_ && last > 0 ? last : -1;
    for (PrefillPoint& p : points_.prefill) DSLA_RETURN_IF_ERROR(Measure(p, p.level != optional));
    for (DecodePoint& p : points_.decode) {
      DSLA_RETURN_IF_ERROR(Measure(p, p.rows[0].level != optional));
    }
    for (FoldPoint& p : points_.fold) DSLA_RETURN_IF_ERROR(Measure(p, &p == &points_.fold[0]));
    return Status::Ok();
  }

 private:
  template <typename Point>
  Status Measure(Point& point, bool needed) {
    if (NowSeconds() > deadline_ && (!needed || point.seconds > 0)) return Status::Ok();
    const Status status = calibrator_.Measure(point);
    return status.code() == StatusCode::kResourceExhausted ? Status::Ok() : status;
  }

  Calibrator& calibrator_;
  CostMeasurements& points_;
  const int top_level_;
  const double deadline_;
};

template <typename Point>
void DropUnmeasured(std::vector<Point>& points) {
  std::erase_if(points, [](const Point& point) { return point.seconds == 0; });
}

}  // namespace

Expected<CostModel> Calibrate(const ExecContext& ctx, const HybridModel& model,
                              const CalibrateOptions& options) {
  const int L = model.config().L;
  if (options.top_level < 0 || options.top_level > model.max_level()) {
    return InvalidArgument("calibration up to level {}: the model has levels 0 to {}",
                           options.top_level, model.max_level());
  }
  DSLA_ASSIGN_OR_RETURN(CachePool pool,
                        CachePool::Create(model.cache_geometry(), options.memory_bytes));
  const int64_t page_tokens = model.cache_geometry().page_size;
  const int64_t memory_tokens =
      options.memory_bytes / (L * model.cache_geometry().page_bytes()) * page_tokens;
  Calibrator calibrator(ctx, model, pool);
  const double start = NowSeconds();
  const auto probe = static_cast<int>(std::max<int64_t>(
      1, std::min<int64_t>({kProbeTokens, memory_tokens, model.max_positions()})));
  DSLA_ASSIGN_OR_RETURN(const double rate, calibrator.ProbeRate(probe));
  CostMeasurements points = CalibrationPlan({.layers = L,
                                             .top_level = options.top_level,
                                             .max_positions = model.max_positions(),
                                             .memory_tokens = memory_tokens,
                                             .tokens_per_second = rate});
  const double deadline = start + options.target_seconds;
  for (int round = 0; round < kRounds && (round == 0 || NowSeconds() < deadline); ++round) {
    DSLA_RETURN_IF_ERROR(Round(calibrator, points, options.top_level, deadline).Run());
  }
  DropUnmeasured(points.prefill);
  DropUnmeasured(points.decode);
  DropUnmeasured(points.fold);
  // Without a measured point a kind of layer would seem to cost nothing.
  const auto at_top = [&](int level) { return level == options.top_level; };
  if (points.prefill.size() < 2 || points.decode.size() < 2 ||
      std::none_of(points.prefill.begin(), points.prefill.end(),
                   [&](const PrefillPoint& p) { return at_top(p.level); }) ||
      std::none_of(points.decode.begin(), points.decode.end(),
                   [&](const DecodePoint& p) { return at_top(p.rows[0].level); })) {
    return ResourceExhausted("{} bytes of cache are too few to measure the cost model in",
                             options.memory_bytes);
  }
  return CostModel::Fit(L, points);
}

}  // namespace dsla
