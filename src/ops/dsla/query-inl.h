// Queries of the chunked form (cpu_wave.h). Included once per Highway target.
//
// Features and scores lie transposed, a lane being a (head, time) pair: the heads of a group share
// each product with keys and states, and nothing is summed across a vector. The causal half of a
// product is left out by blocks of times.

#if defined(DSLA_OPS_DSLA_QUERY_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_DSLA_QUERY_INL_H_
#undef DSLA_OPS_DSLA_QUERY_INL_H_
#else
#define DSLA_OPS_DSLA_QUERY_INL_H_
#endif

#include <algorithm>

#include "hwy/highway.h"
#include "ops/dsla/chunk-inl.h"
#include "ops/dsla/cpu_wave.h"
#include "ops/dsla/features-inl.h"
#include "ops/dsla/query_tile.h"
#include "ops/dsla/window-inl.h"
#include "ops/dsla/window_bf16-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {
namespace {  // of the one file that includes this

// The heads' y = q M_q to tile.query.
void ProjectQueries(const DslaQueryTile& tile) {
  const int D = tile.wave.shape.D;
  for (int g = 0; g < tile.heads; ++g)
    GemmTile(tile.Query(g), tile.wave.forward->q_stride, 1,
             tile.wave.params.phi_q + static_cast<int64_t>(tile.first_head + g) * D * D, D,
             tile.rows + g * kQueryBlock * D, D, tile.times, D, D, false);
  Transpose(tile.rows, D, tile.lanes(), D, tile.query, tile.lanes());
}

// y [D] of one vector of lanes -> e [F] = exp(y - max y), then exp(min y - y) if F = 2D. inverse
// are 1 / their sums.
HWY_INLINE void ExpFeatureLanes(const float* HWY_RESTRICT y, int lanes, int D, int F,
                                float* HWY_RESTRICT e, V32 inverse[2]) {
  const F32 d;
  V32 high = hn::LoadU(d, y), low = high;
  for (int x = 1; x < D; ++x) {
    const V32 v = hn::LoadU(d, y + x * lanes);
    high = hn::Max(high, v);
    low = hn::Min(low, v);
  }
  const auto half = [&](const auto& exponent, float* to) {
    V32 sum = hn::Zero(d);
    for (int x = 0; x < D; ++x) {
      const V32 v = Exp(d, exponent(hn::LoadU(d, y + x * lanes)));
      hn::StoreU(v, d, to + x * lanes);
      sum = hn::Add(sum, v);
    }
    return hn::Div(hn::Set(d, 1.f), sum);
  };
  inverse[0] = inverse[1] = half([high](V32 v) { return hn::Sub(v, high); }, e);
  if (F > D) inverse[1] = half([low](V32 v) { return hn::Sub(low, v); }, e + D * lanes);
}

// Q~ = g_i phi_q e^(G - R), and its product with the entry state's denominator.
void MakeQueries(const DslaQueryTile& tile) {
  const F32 d;
  const DslaShape& shape = tile.wave.shape;
  const int D = shape.D, F = shape.F, SF = shape.SF(), lanes = tile.lanes();
  const float* norm = tile.wave.norm + tile.at * SF;
  for (int l = 0; l < lanes; l += kTileLanes) {
    const int head = tile.first_head + l / kQueryBlock;
    const float* decay = tile.wave.decay + tile.at * SF * kCpuChunk + tile.first + l % kQueryBlock;
    float* const keyed = tile.keyed + l;
    V32 inverse[2];
    ExpFeatureLanes(tile.query + l, lanes, D, F, keyed, inverse);
    V32 sum = hn::Zero(d);
    for (int i = shape.states - 1; i >= 0; --i) {  // the features lie where state 0 is made
      const V32 mix = hn::Set(d, tile.wave.params.mix[head * shape.states + i]);
      for (int f = 0; f < F; ++f) {
        const V32 phi = hn::Mul(hn::Mul(mix, inverse[f / D]), hn::LoadU(d, keyed + f * lanes));
        const int to = i * F + f;
        const V32 q = hn::Mul(phi, hn::LoadU(d, decay + to * kCpuChunk));
        hn::StoreU(q, d, keyed + to * lanes);
        sum = hn::MulAdd(q, hn::Set(d, norm[to]), sum);
      }
    }
    hn::StoreU(sum, d, tile.denominator + l);
  }
}

// Zeroes scores above the diagonal and adds what is left to the denominators.
void MaskAndSum(const DslaQueryTile& tile, int keys) {
  const F32 d;
  const int lanes = tile.lanes();
  for (int l = 0; l < lanes; l += kTileLanes) {
    const auto row = hn::Iota(d, static_cast<float>(tile.first + l % kQueryBlock));
    V32 sum = hn::LoadU(d, tile.denominator + l);
    for (int j = 0; j < keys; ++j) {
      float* const at = tile.scores + j * lanes + l;
      V32 score = hn::LoadU(d, at);
      if (j > tile.first) {  // by selection: what is masked may be infinite
        score = hn::IfThenElseZero(hn::Ge(row, hn::Set(d, static_cast<float>(j))), score);
        hn::StoreU(score, d, at);
      }
      sum = hn::Add(sum, score);
    }
    hn::StoreU(sum, d, tile.denominator + l);
  }
}

// O = Q~ (e^R S) + tril(Q~ K~^T) V, and the same for the denominator.
void LinearOutputs(const DslaQueryTile& tile) {
  const DslaShape& shape = tile.wave.shape;
  const int D = shape.D, SF = shape.SF(), lanes = tile.lanes(), keys = tile.first + tile.times;
  const int64_t token = tile.segment.token + tile.chunk.offset;
  const float* v = tile.wave.v + (tile.h * tile.wave.tokens + token) * D;
  ProjectQueries(tile);
  MakeQueries(tile);
  GemmTile(tile.wave.keys + tile.at * SF * kCpuChunk, 1, kCpuChunk, tile.keyed, lanes, tile.scores,
           lanes, keys, lanes, SF, false);
  MaskAndSum(tile, keys);
  tile.ForLanes([&](int l, int count) {
    GemmTile(tile.keyed + l, 1, lanes, tile.wave.state + tile.at * SF * D, D, tile.linear + l * D,
             D, count, D, SF, false);
    GemmTile(tile.scores + l, 1, lanes, v, D, tile.linear + l * D, D, count, D, keys, true);
  });
}

// What the two numerators are multiplied with, to tile.shares.
void MakeShares(const DslaQueryTile& tile, bool linear) {
  const F32 d;
  const int lanes = tile.lanes();
  const bool window = tile.wave.shape.window > 0;
  if (window) {  // claims, in the place of the shares
    const DslaArgs& args = *tile.wave.forward;
    for (int l = 0; l < lanes; ++l) {
      const int time = std::min(l % kQueryBlock, tile.times - 1);
      tile.shares[l] =
          args.claim[(tile.row + time) * args.shape.H + tile.first_head + l / kQueryBlock];
    }
  }
  for (int l = 0; l < lanes; l += kTileLanes) {
    const V32 den = linear ? hn::LoadU(d, tile.denominator + l) : hn::Zero(d);
    const Shares shares =
        window ? MergeShares(den, hn::LoadU(d, tile.top + l), hn::LoadU(d, tile.sum + l),
                             hn::LoadU(d, tile.shares + l))
               : LinearShare(den);
    hn::StoreU(shares.linear, d, tile.shares + l);
    hn::StoreU(shares.window, d, tile.shares + lanes + l);
  }
}

void MergeOutputs(const DslaQueryTile& tile, bool linear) {
  const F32 d;
  const int D = tile.wave.shape.D, H = tile.wave.shape.H, W = tile.wave.shape.window;
  MakeShares(tile, linear);
  for (int g = 0; g < tile.heads; ++g) {
    for (int i = 0; i < tile.times; ++i) {
      const int l = g * kQueryBlock + i;
      float* const out = tile.wave.forward->out + ((tile.row + i) * H + tile.first_head + g) * D;
      const V32 a = hn::Set(d, tile.shares[l]), b = hn::Set(d, tile.shares[tile.lanes() + l]);
      for (int x = 0; x < D; x += kTileLanes) {
        V32 v = hn::Zero(d);
        if (linear) v = hn::Mul(a, hn::LoadU(d, tile.linear + l * D + x));
        if (W > 0) v = hn::MulAdd(b, hn::LoadU(d, tile.window + l * D + x), v);
        hn::StoreU(v, d, out + x);
      }
    }
  }
}

// Whether the window's products can be of bf16.
bool HasBf16Window() {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

void QueryBlock(const DslaWave& wave, int chunk, int first, int first_head, int heads,
                float* scratch) {
  const DslaShape& shape = wave.shape;
  const DslaChunk& ck = wave.chunks[chunk];
  const DslaSegment& seg = wave.segments[ck.segment];
  const int h = first_head / shape.G(), lanes = heads * kQueryBlock, D = shape.D;
  const auto take = [&scratch, lanes](int rows) {
    float* const taken = scratch;
    scratch += static_cast<int64_t>(rows) * lanes;
    return taken;
  };
  const DslaQueryTile tile{.wave = wave,
                           .chunk = ck,
                           .segment = seg,
                           .at = wave.At(chunk, h),
                           .h = h,
                           .first_head = first_head,
                           .heads = heads,
                           .first = first,
                           .times = std::min(kQueryBlock, ck.rows - first),
                           .row = seg.row + ck.offset + first,
                           .time = seg.begin + ck.offset + first,
                           .rows = take(D),
                           .query = take(D),
                           .keyed = take(shape.SF()),
                           .linear = take(D),
                           .window = take(D),
                           .scores = take(DslaBlockKeys(shape)),
                           .denominator = take(1),
                           .top = take(1),
                           .sum = take(1),
                           .shares = take(2)};
  const bool linear = ck.idle < ck.rows;
  if (linear) LinearOutputs(tile);
  if (wave.bf16_window) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
    WindowOutputs<Bf16Window>(tile);
#endif
  } else if (shape.window > 0) {
    WindowOutputs<Fp32Window>(tile);
  }
  MergeOutputs(tile, linear);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_DSLA_QUERY_INL_H_
