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

// The keys that any of a tile's times sees, in the order of the rows of scores. Sinks and window
// are whole multiples of `step` keys; masks cut off what that adds.
struct WindowKeys {
  int sinks;      // rows of sinks
  int64_t first;  // position of the key in the row after them, a multiple of step
  int keys;       // rows after them

  int rows() const { return sinks + keys; }
};
inline WindowKeys KeysOf(const DslaQueryTile& tile, int step) {
  const int64_t W = tile.wave.shape.window, S = tile.wave.shape.sinks;
  const int64_t end = tile.time + tile.times;
  const auto whole = [step](int64_t n) {
    return static_cast<int>((std::max<int64_t>(n, 0) + step - 1) / step * step);
  };
  WindowKeys k;
  k.first = std::max(tile.time + 1 - W, S) / step * step;
  k.sinks = whole(std::min(S, end));
  k.keys = whole(end - k.first);
  return k;
}

// Replaces the scores of one key by -inf in the lanes whose time, counted from the tile's first,
// is not in [low, high).
HWY_INLINE void MaskKey(const DslaQueryTile& tile, int64_t low, int64_t high,
                        float* HWY_RESTRICT scores) {
  const F32 d;
  const auto clamped = [](int64_t time) {
    return hn::Set(F32(), static_cast<float>(std::clamp<int64_t>(time, 0, kQueryBlock)));
  };
  const V32 from = clamped(low), to = clamped(high);
  for (int l = 0; l < tile.lanes(); l += kTileLanes) {
    const auto time = hn::Iota(d, static_cast<float>(l % kQueryBlock));
    const auto seen = hn::And(hn::Ge(time, from), hn::Lt(time, to));
    const V32 score = hn::LoadU(d, scores + l);
    hn::StoreU(hn::IfThenElse(seen, score, hn::Set(d, -INFINITY)), d, scores + l);
  }
}

inline void MaskKeys(const DslaQueryTile& tile, const WindowKeys& k, float* scores) {
  const int64_t W = tile.wave.shape.window, S = tile.wave.shape.sinks;
  const int lanes = tile.lanes();
  for (int s = 0; s < k.sinks; ++s)
    MaskKey(tile, s < S ? s - tile.time : kQueryBlock, kQueryBlock, scores + s * lanes);
  // All times see the keys between those that leave the window, or are sinks, and those that come.
  const auto row = [&](int64_t position) {
    return static_cast<int>(std::clamp<int64_t>(position - k.first, 0, k.keys));
  };
  const int leave = row(std::max(tile.time + tile.times - W, S));
  const int come = std::max(leave, row(tile.time + 1));
  const auto mask = [&](int x) {
    const int64_t entry = k.first + x - tile.time;
    MaskKey(tile, entry + tile.time < S ? kQueryBlock : entry, entry + W,
            scores + (k.sinks + x) * lanes);
  };
  for (int x = 0; x < leave; ++x) mask(x);
  for (int x = come; x < k.keys; ++x) mask(x);
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

// The tile's queries times `scale` as rows [lanes, D] of fp32 or bf16, zeros where there is no
// time.
template <class T>
void ScaleQueries(const DslaQueryTile& tile, float scale, T* to) {
  const F32 d;
  const int D = tile.wave.shape.D;
  const V32 by = hn::Set(d, scale);
  for (int g = 0; g < tile.heads; ++g) {
    const float* q = tile.Query(g);
    for (int i = 0; i < tile.times; ++i, q += tile.wave.forward->q_stride, to += D)
      for (int x = 0; x < D; x += kTileLanes) StoreF32(d, hn::Mul(by, hn::LoadU(d, q + x)), to + x);
    const int rest = (kQueryBlock - tile.times) * D;
    std::fill_n(to, rest, T{});
    to += rest;
  }
}

// Products in fp32, of the wave's streams of tokens as they are.
class Fp32Window {
 public:
  static constexpr int kStep = 1;

  explicit Fp32Window(const DslaQueryTile& tile) : tile_(tile), D_(tile.wave.shape.D) {
    const DslaWave& wave = tile.wave;
    const int64_t sink =
        (static_cast<int64_t>(tile.chunk.segment) * wave.shape.Hkv + tile.h) * wave.shape.sinks;
    sink_k_ = wave.sink_k + sink * D_;
    sink_v_ = wave.sink_v + sink * D_;
  }

  void Scores(const WindowKeys& k) {
    const int lanes = tile_.lanes();
    ScaleQueries(tile_, 1.f / std::sqrt(static_cast<float>(D_)), tile_.rows);
    Transpose(tile_.rows, D_, lanes, D_, tile_.query, lanes);
    GemmTile(sink_k_, D_, 1, tile_.query, lanes, tile_.scores, lanes, k.sinks, lanes, D_, false);
    GemmTile(tile_.wave.k + Token(k) * D_, D_, 1, tile_.query, lanes,
             tile_.scores + k.sinks * lanes, lanes, k.keys, lanes, D_, false);
  }

  void Weights(const WindowKeys& k) {
    const F32 d;
    const int lanes = tile_.lanes();
    for (int l = 0; l < lanes; l += kTileLanes) {
      float* at = tile_.scores + l;
      const V32 top = LargestScore(at, lanes, k.rows());
      V32 sum = hn::Zero(d);
      for (int s = 0; s < k.rows(); ++s, at += lanes) {
        const V32 weight = Exp(d, hn::Sub(hn::LoadU(d, at), top));
        hn::StoreU(weight, d, at);
        sum = hn::Add(sum, weight);
      }
      hn::StoreU(top, d, tile_.top + l);
      hn::StoreU(sum, d, tile_.sum + l);
    }
  }

  void Outputs(const WindowKeys& k) {
    const int lanes = tile_.lanes();
    tile_.ForLanes([&](int l, int count) {
      const float* const weights = tile_.scores + l;
      float* const to = tile_.window + l * D_;
      GemmTile(weights, 1, lanes, sink_v_, D_, to, D_, count, D_, k.sinks, false);
      GemmTile(weights + k.sinks * lanes, 1, lanes, tile_.wave.v + Token(k) * D_, D_, to, D_, count,
               D_, k.keys, true);
    });
  }

 private:
  int64_t Token(const WindowKeys& k) const {
    const DslaSegment& seg = tile_.segment;
    return tile_.h * tile_.wave.tokens + seg.token + k.first - seg.begin + tile_.wave.shape.window;
  }

  const DslaQueryTile& tile_;
  const int D_;
  const float *sink_k_, *sink_v_;
};

// By a form's products, of fp32 or of bf16.
template <class Form>
void WindowOutputs(const DslaQueryTile& tile) {
  Form form(tile);
  const WindowKeys keys = KeysOf(tile, Form::kStep);
  form.Scores(keys);
  MaskKeys(tile, keys, tile.scores);
  form.Weights(keys);
  form.Outputs(keys);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_DSLA_WINDOW_INL_H_
