// Queries of the chunked form (cpu_wave.h). Included once per Highway target.
//
// The rows of a tile are (time, head) pairs, time first: a block of times is then a block of rows
// of all heads of the group, which share keys and states, and the causal half of a product is left
// out by blocks.

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

// Q~ = g_i phi_q e^(G - R), and its product with the entry state's denominator.
void MakeQueries(const DslaQueryTile& tile) {
  const F32 d;
  const DslaShape& shape = tile.wave.shape;
  const DslaParams& params = tile.wave.params;
  const int D = shape.D, F = shape.F, SF = shape.SF(), rows = tile.chunk.rows;
  const float* decay = tile.wave.decay + tile.at * kCpuChunk * SF;
  const float* norm = tile.wave.norm + tile.at * SF;
  for (int g = 0; g < tile.heads; ++g) {
    const int64_t head = tile.first_head + g;
    GemmTile(tile.Query(0, g), tile.wave.forward->q_stride, 1, params.phi_q + head * D * D, D,
             tile.query + g * D, static_cast<int64_t>(tile.heads) * D, rows, D, D, false);
  }
  HWY_ALIGN float phi[512];
  for (int m = 0; m < rows * tile.heads; ++m) {
    const int i = m / tile.heads;
    const float* mix = params.mix + (tile.first_head + m % tile.heads) * shape.states;
    float inverse[2];
    ExpFeatures(tile.query + m * D, D, F, phi, inverse);
    V32 sum = hn::Zero(d);
    for (int f = 0; f < SF; f += D) {
      const V32 scale = hn::Set(d, mix[f / F] * inverse[f % F / D]);
      for (int x = 0; x < D; x += kTileLanes) {
        const V32 p = hn::Mul(scale, hn::LoadU(d, phi + f % F + x));
        const V32 q = hn::Mul(p, hn::LoadU(d, decay + i * SF + f + x));
        hn::StoreU(q, d, tile.keyed + m * SF + f + x);
        sum = hn::MulAdd(q, hn::LoadU(d, norm + f + x), sum);
      }
    }
    tile.denominator[m] = Sum(d, sum);
  }
}

// Zeroes scores [keep, cols) of a row and returns the sum of the rest.
HWY_INLINE float MaskAndSum(float* HWY_RESTRICT row, int keep, int cols) {
  const F32 d;
  V32 sum = hn::Zero(d);
  const V32 limit = hn::Set(d, static_cast<float>(keep));
  for (int x = 0; x < cols; x += kTileLanes) {
    // By selection: what is masked may be infinite or, past the chunk's end, undefined.
    const auto kept = hn::Lt(hn::Iota(d, static_cast<float>(x)), limit);
    const V32 v = hn::IfThenElseZero(kept, hn::LoadU(d, row + x));
    hn::StoreU(v, d, row + x);
    sum = hn::Add(sum, v);
  }
  return Sum(d, sum);
}

// O = Q~ (e^R S) + tril(Q~ K~^T) V, and the same for the denominator.
void LinearOutputs(const DslaQueryTile& tile) {
  const DslaShape& shape = tile.wave.shape;
  const int D = shape.D, SF = shape.SF(), rows = tile.chunk.rows, heads = tile.heads;
  const float* keys = tile.wave.keys + tile.at * SF * kCpuChunk;
  const float* v = tile.wave.v + (tile.h * tile.wave.tokens + tile.token) * D;
  MakeQueries(tile);
  GemmTile(tile.keyed, SF, 1, tile.wave.state + tile.at * SF * D, D, tile.linear, D, rows * heads,
           D, SF, false);
  for (int i0 = 0; i0 < rows; i0 += kQueryBlock) {
    const int i1 = std::min(rows, i0 + kQueryBlock), block = (i1 - i0) * heads;
    const int cols = (i1 + 15) / 16 * 16;
    GemmTile(tile.keyed + i0 * heads * SF, SF, 1, keys, kCpuChunk, tile.scores, kCpuChunk, block,
             cols, SF, false);
    for (int m = 0; m < block; ++m)
      tile.denominator[i0 * heads + m] +=
          MaskAndSum(tile.scores + m * kCpuChunk, i0 + m / heads + 1, cols);
    GemmTile(tile.scores, kCpuChunk, 1, v, D, tile.linear + i0 * heads * D, D, block, D, i1, true);
  }
}

// What the two parts of an output are multiplied with: w / (denominator + epsilon), (1 - w) / sum.
struct Shares {
  float linear, window;
};
HWY_INLINE Shares MergeShares(float denominator, float top, float sum, float claim) {
  // sigmoid(claim - top - log(sum)) without the logarithm; an overflow to infinity gives 0.
  const F32 d;
  const float other = sum * hn::GetLane(Exp(d, hn::Set(d, top - claim)));
  const float w = denominator < kDslaEpsilon ? 0.f : 1.f / (1.f + other);
  return {w / (denominator + kDslaEpsilon), (1.f - w) / sum};
}

void MergeOutputs(const DslaQueryTile& tile, bool linear) {
  const F32 d;
  const DslaArgs& args = *tile.wave.forward;
  const int D = tile.wave.shape.D, H = tile.wave.shape.H, W = tile.wave.shape.window;
  for (int m = 0; m < tile.chunk.rows * tile.heads; ++m) {
    const int64_t out = (tile.row + m / tile.heads) * H + tile.first_head + m % tile.heads;
    const float den = linear ? tile.denominator[m] : 0.f;
    const Shares share = W == 0 ? Shares{1.f / (den + kDslaEpsilon), 0.f}
                                : MergeShares(den, tile.top[m], tile.sum[m], args.claim[out]);
    const V32 a = hn::Set(d, share.linear), b = hn::Set(d, share.window);
    for (int x = 0; x < D; x += kTileLanes) {
      V32 v = hn::Zero(d);
      if (linear) v = hn::Mul(a, hn::LoadU(d, tile.linear + m * D + x));
      if (W > 0) v = hn::MulAdd(b, hn::LoadU(d, tile.window + m * D + x), v);
      hn::StoreU(v, d, args.out + out * D + x);
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

void QueryChunk(const DslaWave& wave, int chunk, int first_head, int heads, float* scratch) {
  const DslaShape& shape = wave.shape;
  const DslaChunk& ck = wave.chunks[chunk];
  const DslaSegment& seg = wave.segments[ck.segment];
  const int h = first_head / shape.G(), m = kCpuChunk * heads;
  DslaQueryTile tile{.wave = wave,
                     .chunk = ck,
                     .segment = seg,
                     .at = wave.At(chunk, h),
                     .h = h,
                     .first_head = first_head,
                     .heads = heads,
                     .row = seg.row + ck.offset,
                     .time = seg.begin + ck.offset,
                     .token = seg.token + ck.offset,
                     .query = scratch,
                     .keyed = scratch + m * shape.D,
                     .linear = scratch + m * (shape.D + shape.SF()),
                     .window = scratch + m * (2 * shape.D + shape.SF()),
                     .scores = scratch + m * (3 * shape.D + shape.SF()),
                     .denominator = nullptr,
                     .top = nullptr,
                     .sum = nullptr};
  tile.denominator = tile.scores + DslaScoreScratch(shape, heads);
  tile.top = tile.denominator + m;
  tile.sum = tile.top + m;
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
