// Softmax attention over window and sinks of the chunked form (cpu_wave.h), up to the division by
// the sum. Included once per Highway target.
//
// Scores are transposed: a row is a key, a lane is a (time, head) pair. Keys then need no
// transposition, nothing is summed across a vector, and what masks cut off are a few whole rows.

#if defined(DSLA_OPS_DSLA_WINDOW_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_DSLA_WINDOW_INL_H_
#undef DSLA_OPS_DSLA_WINDOW_INL_H_
#else
#define DSLA_OPS_DSLA_WINDOW_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "hwy/highway.h"
#include "ops/dsla/features-inl.h"
#include "ops/dsla/query_tile.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {
namespace {  // of the one file that includes this

// A block of times and the keys that any of them sees, in the order of the rows of scores.
struct WindowBlock {
  int row;        // of the tile, the block's first
  int times;      // of the block
  int queries;    // times * heads
  int lanes;      // the same rounded up to whole vectors
  int sinks;      // rows of sinks
  int64_t first;  // position of the key in the row after them
  int keys;       // rows after them
};

// Keys of sinks and window are rounded up to a multiple of `step`, and the window's first one down
// to a multiple of it from the first that the tile sees; masks cut off what that adds.
inline WindowBlock MakeWindowBlock(const DslaQueryTile& tile, int i0, int step) {
  const int W = tile.wave.shape.window, S = tile.wave.shape.sinks;
  WindowBlock b;
  b.row = i0 * tile.heads;
  b.times = std::min(tile.chunk.rows - i0, kQueryBlock);
  b.queries = b.times * tile.heads;
  b.lanes = (b.queries + 15) / 16 * 16;
  const int64_t time = tile.time + i0, last = time + b.times - 1;
  const int64_t base = tile.FirstKey();
  b.first = std::max<int64_t>(time + 1 - W, S);
  b.first -= (b.first - base) % step;
  const auto whole = [step](int64_t n) {
    return static_cast<int>((std::max<int64_t>(n, 0) + step - 1) / step * step);
  };
  b.sinks = whole(std::min<int64_t>(S, last + 1));
  b.keys = whole(last + 1 - b.first);
  return b;
}

// Replaces the scores of one key by -inf in the lanes whose time, counted from the block's first,
// is not in [low, high).
HWY_INLINE void MaskKey(const DslaQueryTile& tile, const WindowBlock& b, int64_t low, int64_t high,
                        float* HWY_RESTRICT scores) {
  if (low <= 0 && high >= b.times) return;
  const F32 d;
  const auto first_lane = [&](int64_t time) {
    return static_cast<float>(std::clamp<int64_t>(time, 0, b.times) * tile.heads);
  };
  const V32 from = hn::Set(d, first_lane(low)), to = hn::Set(d, first_lane(high));
  for (int l = 0; l < b.lanes; l += kTileLanes) {
    const auto lane = hn::Iota(d, static_cast<float>(l));
    const auto seen = hn::And(hn::Ge(lane, from), hn::Lt(lane, to));
    const V32 score = hn::LoadU(d, scores + l);
    hn::StoreU(hn::IfThenElse(seen, score, hn::Set(d, -INFINITY)), d, scores + l);
  }
}

inline void MaskKeys(const DslaQueryTile& tile, const WindowBlock& b, float* scores) {
  const int W = tile.wave.shape.window, S = tile.wave.shape.sinks;
  const int64_t time = tile.time + b.row / tile.heads;
  constexpr int64_t kEver = std::numeric_limits<int32_t>::max();
  for (int s = 0; s < b.sinks; ++s)
    MaskKey(tile, b, s < S ? s - time : kEver, kEver, scores + s * b.lanes);
  for (int x = 0; x < b.keys; ++x) {
    const int64_t entry = b.first + x - time;
    MaskKey(tile, b, entry, entry + W, scores + (b.sinks + x) * b.lanes);
  }
}

// The largest of the rows' scores in each lane of a vector.
HWY_INLINE V32 LargestScore(const float* scores, int lanes, int rows) {
  const F32 d;
  const V32 none = hn::Set(d, -INFINITY);
  V32 most[4] = {none, none, none, none};  // four chains hide the latency
  int s = 0;
  for (; s + 4 <= rows; s += 4)
    for (int i = 0; i < 4; ++i) most[i] = hn::Max(most[i], hn::LoadU(d, scores + (s + i) * lanes));
  for (; s < rows; ++s) most[0] = hn::Max(most[0], hn::LoadU(d, scores + s * lanes));
  return hn::Max(hn::Max(most[0], most[1]), hn::Max(most[2], most[3]));
}

// The block's queries / sqrt(D) as rows [lanes, D] of fp32 or bf16, zeros in the lanes past them.
template <class T>
void ScaleQueries(const DslaQueryTile& tile, const WindowBlock& b, T* to) {
  const F32 d;
  const int D = tile.wave.shape.D;
  const V32 scale = hn::Set(d, 1.f / std::sqrt(static_cast<float>(D)));
  for (int m = b.row; m < b.row + b.queries; ++m, to += D) {
    const float* q = tile.Query(m / tile.heads, m % tile.heads);
    for (int x = 0; x < D; x += kTileLanes)
      StoreF32(d, hn::Mul(scale, hn::LoadU(d, q + x)), to + x);
  }
  std::memset(to, 0, sizeof(T) * static_cast<size_t>((b.lanes - b.queries) * D));
}

// Products in fp32, of the wave's streams of tokens as they are.
class Fp32Window {
 public:
  static constexpr int kStep = 1;

  explicit Fp32Window(const DslaQueryTile& tile)
      : tile_(tile),
        D_(tile.wave.shape.D),
        query_(tile.scores),
        scores_(query_ + kQueryBlock * tile.heads * D_) {
    const DslaWave& wave = tile.wave;
    const int64_t sink =
        (static_cast<int64_t>(tile.chunk.segment) * wave.shape.Hkv + tile.h) * wave.shape.sinks;
    sink_k_ = wave.sink_k + sink * D_;
    sink_v_ = wave.sink_v + sink * D_;
  }
  float* scores() { return scores_; }

  void Scores(const WindowBlock& b) {
    ScaleQueries(tile_, b, tile_.query);
    Transpose(tile_.query, D_, b.lanes, D_, query_, b.lanes);
    GemmTile(sink_k_, D_, 1, query_, b.lanes, scores_, b.lanes, b.sinks, b.lanes, D_, false);
    GemmTile(tile_.wave.k + Token(b) * D_, D_, 1, query_, b.lanes, scores_ + b.sinks * b.lanes,
             b.lanes, b.keys, b.lanes, D_, false);
  }

  void Weights(const WindowBlock& b) {
    const F32 d;
    for (int l = 0; l < b.lanes; l += kTileLanes) {
      float* at = scores_ + l;
      const V32 top = LargestScore(at, b.lanes, b.sinks + b.keys);
      V32 sum = hn::Zero(d);
      for (int s = 0; s < b.sinks + b.keys; ++s, at += b.lanes) {
        const V32 weight = Exp(d, hn::Sub(hn::LoadU(d, at), top));
        hn::StoreU(weight, d, at);
        sum = hn::Add(sum, weight);
      }
      hn::StoreU(top, d, tile_.top + b.row + l);
      hn::StoreU(sum, d, tile_.sum + b.row + l);
    }
  }

  void Outputs(const WindowBlock& b) {
    float* to = tile_.window + static_cast<int64_t>(b.row) * D_;
    GemmTile(scores_, 1, b.lanes, sink_v_, D_, to, D_, b.queries, D_, b.sinks, false);
    GemmTile(scores_ + b.sinks * b.lanes, 1, b.lanes, tile_.wave.v + Token(b) * D_, D_, to, D_,
             b.queries, D_, b.keys, true);
  }

 private:
  int64_t Token(const WindowBlock& b) const {
    const DslaSegment& seg = tile_.segment;
    return tile_.h * tile_.wave.tokens + seg.token + b.first - seg.begin + tile_.wave.shape.window;
  }

  const DslaQueryTile& tile_;
  const int D_;
  float* query_;   // [D, lanes]
  float* scores_;  // [sinks + keys, lanes], later weights
  const float *sink_k_, *sink_v_;
};

// By a form's products, of fp32 or of bf16.
template <class Form>
void WindowOutputs(const DslaQueryTile& tile) {
  Form form(tile);
  for (int i0 = 0; i0 < tile.chunk.rows; i0 += kQueryBlock) {
    const WindowBlock block = MakeWindowBlock(tile, i0, Form::kStep);
    form.Scores(block);
    MaskKeys(tile, block, form.scores());
    form.Weights(block);
    form.Outputs(block);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_DSLA_WINDOW_INL_H_
