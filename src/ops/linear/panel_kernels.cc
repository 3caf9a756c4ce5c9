#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "ops/linear/panel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/linear/panel_kernels.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "ops/linear/panel_unpack-inl.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef DSLA_OPS_LINEAR_PANEL_KERNELS_CC_
#define DSLA_OPS_LINEAR_PANEL_KERNELS_CC_
namespace dsla {

// Unpacked weights: of one strip and segment at a time.
struct PanelScratch {
  alignas(64) int32_t pairs[kPanelFeatures * kPanelSegment / 2];
  alignas(64) float step[kPanelFeatures];
};

// All rows of `product` times the features of a panel.
struct PanelTask {
  PanelArgs product;
  int64_t panel;
  PanelScratch* scratch;
  float* sums;  // [T, kPanelFeatures]
};

}  // namespace dsla
#endif  // DSLA_OPS_LINEAR_PANEL_KERNELS_CC_

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {

// Sums of the element type, not of the library's: with those GCC moves or spills them all at every
// step.
typedef int32_t Sums __attribute__((vector_size(sizeof(Ints))));
HWY_INLINE Sums SumsOf(Ints ints) { return (Sums)ints.raw; }
HWY_INLINE Ints IntsOf(Sums sums) { return Ints{(decltype(Ints::raw))sums}; }

// 24 sums of 32 registers, 12 of 16: one broadcast of activations serves kVectors products, one
// load of weights kTileRows, and there are more chains of sums than hide the latency of two
// products a cycle.
constexpr int kTileRows = 6;

// Features of a panel that one tile takes, over one segment.
struct Strip {
  const int32_t* pairs;  // [count][kStrip] pairs of 16-bit weights
  int64_t count;
  const float* step;
  int64_t features;  // the first ones, the others are undefined
};

// The sums of two 16-bit products in every lane.
HWY_INLINE Ints MulPairs(Ints w, Ints x) {
#if HWY_TARGET == HWY_SCALAR
  const auto half = [](Ints v, int by) { return static_cast<int16_t>(v.raw >> by); };
  return Ints(half(w, 0) * half(x, 0) + half(w, 16) * half(x, 16));
#else
  const hn::Repartition<int16_t, DI> d16;
  Ints unused = hn::Zero(DI());
  return hn::ReorderWidenMulAccumulate(DI(), hn::BitCast(d16, w), hn::BitCast(d16, x), unused,
                                       unused);
#endif
}

namespace plain {
#include "ops/linear/panel_tile-inl.h"
}  // namespace plain

#if HWY_TARGET == HWY_AVX3
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512vnni")
namespace dsla {
namespace HWY_NAMESPACE {
namespace vnni {
#define DSLA_WITH_VNNI
#include "ops/linear/panel_tile-inl.h"
#undef DSLA_WITH_VNNI
}  // namespace vnni
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_POP_ATTRIBUTES
namespace dsla {
namespace HWY_NAMESPACE {
#endif

template <class Done>
HWY_INLINE void StripProduct(const Strip& strip, const PanelRows& x, int64_t rows, bool first,
                             float* to, const Done& done) {
#if HWY_TARGET == HWY_AVX3
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  if (has_vnni) return vnni::StripTiles(strip, x, rows, first, to, done);
#endif
  plain::StripTiles(strip, x, rows, first, to, done);
}

// The sums of rows [t, t + rows) and a strip, the panel's features from `first` on, to the result.
HWY_INLINE void WriteStrip(const PanelTask& a, int64_t first, int64_t t, int64_t rows) {
  const PanelArgs& to = a.product;
  const int64_t feature = a.panel * kPanelFeatures + first,
                count = std::min<int64_t>(kStrip, to.out - feature);
  for (const int64_t end = t + rows; t < end; ++t) {
    const float* from = a.sums + t * kPanelFeatures + first;
    float* y = to.y + t * to.y_stride + feature;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      Floats value = hn::Load(DF(), from + i);
      if (to.bias != nullptr) value = hn::Add(value, hn::LoadU(DF(), to.bias + feature + i));
      if (to.accumulate) {
        hwy::Prefetch(y + i + kTileRows * to.y_stride);  // of the next tile
        value = hn::Add(hn::LoadU(DF(), y + i), value);
      }
      hn::StoreU(value, DF(), y + i);
    }
    for (; i < count; ++i) {
      const float value = from[i] + (to.bias != nullptr ? to.bias[feature + i] : 0.f);
      y[i] = to.accumulate ? y[i] + value : value;
    }
  }
}

void PanelTarget(const PanelTask& a) {
  const PanelArgs& product = a.product;
  const int64_t from = a.panel * kPanelFeatures,
                features = std::min(kPanelFeatures, product.out - from);
  const PanelRows& x = product.x;
  int32_t* const pairs = a.scratch->pairs;
  float* const step = a.scratch->step;
  for (int64_t s = 0; s < x.segments; ++s) {
    const int64_t begin = s * kPanelSegment,
                  end = std::min(product.padded(), begin + kPanelSegment);
    for (int64_t first = 0; first < features; first += kStrip) {
      const int64_t count = std::min<int64_t>(kStrip, features - first);
      for (int64_t v = 0; v < count; v += kLanes)
        UnpackLanes(product, from + first + v, begin, end, pairs + v, step + v);
      const Strip strip{pairs, (end - begin) / 2, step, count};
      // Tile by tile, so that the result's cache misses pass during the next tile.
      const auto done = [&](int64_t t, int64_t rows) {
        if (s + 1 == x.segments) WriteStrip(a, first, t, rows);
      };
      StripProduct(strip, x.Segment(s), product.T, s == 0, a.sums + first, done);
    }
  }
}

// kLanes inputs of which `count` are there, the others 0.
HWY_INLINE Floats LoadInputs(const float* x, int64_t count) {
  if (count >= kLanes) return hn::LoadU(DF(), x);
  HWY_ALIGN float last[kLanes] = {};
  std::copy(x, x + std::max<int64_t>(count, 0), last);
  return hn::Load(DF(), last);
}

// One segment of a row, `count` inputs, to integers up to `padded`. A NaN or an infinity has no
// integer: the scale carries it to the result as NaN.
HWY_INLINE float RoundSegment(const float* x, int64_t count, int64_t padded, int16_t* to) {
  // Without their sign, floats are in the order of their bits, infinities and then NaNs at the end.
  Ints most = hn::Zero(DI());
  for (int64_t i = 0; i < padded; i += kLanes)
    most = hn::Max(hn::BitCast(DI(), hn::Abs(LoadInputs(x + i, count - i))), most);
  const float largest = hn::GetLane(hn::BitCast(DF(), hn::MaxOfLanes(DI(), most)));
  if (!std::isfinite(largest)) {
    std::fill(to, to + padded, int16_t{0});
    return std::numeric_limits<float>::quiet_NaN();
  }
  const Floats inverse = hn::Set(DF(), largest > kTiny ? kLargestActivation / largest : 0.f);
  const hn::Rebind<int16_t, DI> d16;
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Ints q = RoundSteps(hn::Mul(LoadInputs(x + i, count - i), inverse));
    hn::StoreU(hn::DemoteTo(d16, q), d16, to + i);
  }
  return largest / kLargestActivation;
}

void RoundPieceTarget(const float* x, int64_t begin, int64_t end, int64_t in,
                      const PanelRows& row) {
  for (int64_t i = begin; i < end; i += kPanelSegment) {
    const int64_t count = std::min(kPanelSegment, in - i),
                  padded = std::min(kPanelSegment, row.stride - i);
    row.scale[i / kPanelSegment] = RoundSegment(x + i, count, padded, row.q + i);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dsla {

HWY_EXPORT(PanelTarget);
HWY_EXPORT(RoundPieceTarget);

namespace {

// Rows of a task: enough of them that unpacking a panel is little beside its products, and no more
// than an L2 cache holds sums and activations of.
constexpr int64_t kFewestTaskRows = 128, kMostTaskRows = 516;
// Tasks that the threads finish at about the same time.
constexpr int64_t kTasksPerThread = 8;
// Rows of a part of a task, where that keeps a thread from waiting for others.
constexpr int64_t kFewestPartRows = 30;

int64_t WholeTiles(int64_t rows, int64_t pieces) {
  constexpr int64_t kUnit = 6;
  return (rows + pieces * kUnit - 1) / (pieces * kUnit) * kUnit;
}

// A task is a panel and `rows` rows. Where they are few and not a multiple of the threads, the last
// ones are cut into parts.
class TaskPlan {
 public:
  struct Piece {
    int64_t panel, first, rows;
  };

  TaskPlan(int64_t threads, int64_t panels, int64_t T) : T_(T) {
    const int64_t for_threads = (kTasksPerThread * threads + panels - 1) / panels;
    rows_ = WholeTiles(T, std::max((T + kMostTaskRows - 1) / kMostTaskRows,
                                   std::min(for_threads, T / kFewestTaskRows)));
    pieces_ = (T + rows_ - 1) / rows_;
    const int64_t tasks = panels * pieces_, over = tasks % threads;
    whole_ = tasks;
    if (over > 0 && tasks < kTasksPerThread * threads) {
      const int64_t parts = std::min(threads / std::gcd(over, threads),
                                     std::max<int64_t>(1, rows_ / kFewestPartRows));
      part_rows_ = WholeTiles(rows_, parts);
      parts_ = (rows_ + part_rows_ - 1) / part_rows_;
      whole_ -= over;
    }
    size_ = whole_ + (tasks - whole_) * parts_;
  }

  int64_t size() const { return size_; }
  int64_t rows() const { return rows_; }
  Piece At(int64_t i) const {  // its rows may be none
    const int64_t task = i < whole_ ? i : whole_ + (i - whole_) / parts_;
    const int64_t begin = task % pieces_ * rows_, end = std::min(T_, begin + rows_);
    if (i < whole_) return {task / pieces_, begin, end - begin};
    const int64_t first = std::min(end, begin + (i - whole_) % parts_ * part_rows_);
    return {task / pieces_, first, std::min(end - first, part_rows_)};
  }

 private:
  int64_t T_, rows_, pieces_, whole_, part_rows_ = 0, parts_ = 1, size_;
};

}  // namespace

void RoundPanelPiece(const float* x, int64_t begin, int64_t end, int64_t in, const PanelRows& row) {
  HWY_DYNAMIC_DISPATCH(RoundPieceTarget)(x, begin, end, in, row);
}

void PanelProduct(const ExecContext& ctx, const PanelArgs& args) {
  const int64_t panels = (args.out + kPanelFeatures - 1) / kPanelFeatures;
  const TaskPlan plan(std::max(ctx.threads, 1), panels, args.T);
  const Workspace::Scope scope(*ctx.workspace);
  auto* const scratch = ctx.workspace->Take<PanelScratch>(ctx.threads);
  float* const sums = ctx.workspace->Take<float>(ctx.threads * plan.rows() * kPanelFeatures);
  ParallelFor(ctx, plan.size(), [&](int64_t i, int thread) {
    const TaskPlan::Piece piece = plan.At(i);
    if (piece.rows == 0) return;
    PanelTask task{.product = args,
                   .panel = piece.panel,
                   .scratch = scratch + thread,
                   .sums = sums + thread * plan.rows() * kPanelFeatures};
    task.product.T = piece.rows;
    task.product.x = args.x.From(piece.first);
    task.product.y += piece.first * args.y_stride;
    HWY_DYNAMIC_DISPATCH(PanelTarget)(task);
  });
}

}  // namespace dsla
#endif  // HWY_ONCE
