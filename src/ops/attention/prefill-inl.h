// Prefill form of paged attention, one task = (sequence, KV head, block of query positions). Per
// target; see README.md for the recurrence and the blocking.
#if defined(DSLA_OPS_ATTENTION_PREFILL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_ATTENTION_PREFILL_INL_H_
#undef DSLA_OPS_ATTENTION_PREFILL_INL_H_
#else
#define DSLA_OPS_ATTENTION_PREFILL_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "hwy/highway.h"
#include "ops/attention/attention.h"
#include "ops/attention/paging.h"
#include "ops/attention/plan.h"
#include "ops/simd/math-inl.h"
#include "ops/simd/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {
namespace prefill_internal {
namespace hn = hwy::HWY_NAMESPACE;
using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;
constexpr int kLanes = HWY_LANES(float);

// The G query heads of a KV head are stacked: row i is position i / G and head i % G of the group.
// Rows M .. Mp - 1 pad the lanes and are never written out.
struct Tile {
  int G, D, M, Mp;
  int first_pos;        // absolute position of row 0
  float* qt;            // [D, Mp] scaled queries, transposed
  float* panel;         // [kPrefillKeys, D] K, then V, of a key block
  float* st;            // [kPrefillKeys, Mp] scores, then probabilities, transposed
  float* acc;           // [Mp, D] unnormalised output
  float* max;           // [Mp] running maximum
  float* sum;           // [Mp] running sum of exp(score - max)
  float* decay;         // [Mp] exp(old max - new max)
  int32_t *low, *high;  // [Mp] first and last visible key of a row
};

inline Tile MakeTile(const PagedAttentionArgs& a, int n, int first, int last, float* scratch) {
  Tile t;
  t.G = a.H / a.kv.Hkv;
  t.D = a.kv.D;
  t.M = (last - first) * t.G;
  t.Mp = RoundUp(t.M, kPrefillRowPad);
  t.first_pos = a.rows.pos[n] + first;
  const auto take = [&scratch](int64_t floats) {
    float* p = scratch;
    scratch += RoundUp64(floats, 16);
    return p;
  };
  t.qt = take(int64_t{t.D} * t.Mp);
  t.panel = take(int64_t{kPrefillKeys} * t.D);
  t.st = take(int64_t{kPrefillKeys} * t.Mp);
  t.acc = take(int64_t{t.Mp} * t.D);
  t.max = take(t.Mp);
  t.sum = take(t.Mp);
  t.decay = take(t.Mp);
  t.low = reinterpret_cast<int32_t*>(take(t.Mp));
  t.high = reinterpret_cast<int32_t*>(take(t.Mp));
  for (int i = 0; i < t.Mp; ++i) {
    t.max[i] = -std::numeric_limits<float>::infinity();
    t.sum[i] = 0;
    // Padding rows repeat the last row's range.
    t.high[i] = t.first_pos + std::min(i, t.M - 1) / t.G;
    t.low[i] = FirstVisibleKey(t.high[i], a.sliding_window);
  }
  std::fill_n(t.acc, int64_t{t.Mp} * t.D, 0.f);
  return t;
}

inline void LoadQueries(const PagedAttentionArgs& a, int64_t first_row, int head, const Tile& t) {
  for (int i = 0; i < t.Mp; ++i) {
    const float* q = a.q + (first_row + i / t.G) * a.q_stride +
                     (static_cast<int64_t>(head) * t.G + i % t.G) * t.D;
    for (int d = 0; d < t.D; ++d) t.qt[int64_t{d} * t.Mp + i] = i < t.M ? a.scale * q[d] : 0.f;
  }
}

// Keys (or values) [begin, end) of the head as fp32 rows.
template <typename T>
void LoadPanel(void* base, const PagedAttentionArgs& a, int n, int head, int begin, int end,
               float* panel) {
  ForEachRun(a.kv, a.tables, n, head, begin, end, [&](int s, int count, int64_t offset) {
    if constexpr (std::is_same_v<T, int8_t>) {
      const float* scale = RowScale(a.kv, base, a.tables, n, head, s);
      for (int j = 0; j < count; ++j)
        DequantizeRow(static_cast<const int8_t*>(base) + offset + int64_t{j} * a.kv.D, scale[j],
                      panel + int64_t{s - begin + j} * a.kv.D, a.kv.D);
      return;
    } else
      ConvertRow(static_cast<const T*>(base) + offset, panel + int64_t{s - begin} * a.kv.D,
                 static_cast<size_t>(count) * static_cast<size_t>(a.kv.D));
  });
}

// Scores outside a row's visible range become -inf.
inline void Mask(const Tile& t, int begin, int end) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const VF minus_infinity = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int s = begin; s < end; ++s) {
    float* row = t.st + int64_t{s - begin} * t.Mp;
    const auto key = hn::Set(di, s);
    for (int i = 0; i < t.Mp; i += kLanes) {
      const auto outside = hn::Or(hn::VecFromMask(di, hn::Gt(key, hn::Load(di, t.high + i))),
                                  hn::VecFromMask(di, hn::Lt(key, hn::Load(di, t.low + i))));
      const auto mask = hn::MaskFromVec(hn::BitCast(d, outside));
      hn::Store(hn::IfThenElse(mask, minus_infinity, hn::Load(d, row + i)), d, row + i);
    }
  }
}

// One step of the online softmax: turns the block's scores into exp(score - new max) and moves
// max, sum and decay on. Lanes are rows, so nothing is reduced across them; Vecs vectors at a time
// keep a stripe of the tile in the L1 cache between the two passes.
template <int Vecs>
HWY_INLINE void SoftmaxStripe(const Tile& t, int i, int keys) {
  const DF d;
  const VF minus_infinity = hn::Set(d, -std::numeric_limits<float>::infinity());
  VF old[Vecs], max[Vecs], sum[Vecs];
  for (int v = 0; v < Vecs; ++v) max[v] = old[v] = hn::Load(d, t.max + i + v * kLanes);
  for (int s = 0; s < keys; ++s)
    for (int v = 0; v < Vecs; ++v)
      max[v] = hn::Max(max[v], hn::Load(d, t.st + int64_t{s} * t.Mp + i + v * kLanes));
  for (int v = 0; v < Vecs; ++v) {
    hn::Store(max[v], d, t.max + i + v * kLanes);
    // A row that has seen no key yet: exp(-inf - 0) = 0 rather than exp(-inf + inf) = NaN.
    max[v] = hn::IfThenElse(hn::Eq(max[v], minus_infinity), hn::Zero(d), max[v]);
    sum[v] = hn::Zero(d);
  }
  for (int s = 0; s < keys; ++s) {
    for (int v = 0; v < Vecs; ++v) {
      float* at = t.st + int64_t{s} * t.Mp + i + v * kLanes;
      const VF p = Exp(d, hn::Sub(hn::Load(d, at), max[v]));
      hn::Store(p, d, at);
      sum[v] = hn::Add(sum[v], p);
    }
  }
  for (int v = 0; v < Vecs; ++v) {
    const VF decay = Exp(d, hn::Sub(old[v], max[v]));
    hn::Store(decay, d, t.decay + i + v * kLanes);
    float* at = t.sum + i + v * kLanes;
    hn::Store(hn::MulAdd(hn::Load(d, at), decay, sum[v]), d, at);
  }
}

inline void Softmax(const Tile& t, int keys) {
  for (int i = 0; i < t.Mp; i += 2 * kLanes) SoftmaxStripe<2>(t, i, keys);
  for (int i = 0; i < t.M; ++i) {
    const float decay = t.decay[i];
    if (decay == 1.f) continue;
    float* row = t.acc + int64_t{i} * t.D;
    for (int d = 0; d < t.D; ++d) row[d] *= decay;
  }
}

template <typename T>
void Attend(const PagedAttentionArgs& a, int n, int head, int first, int last, float* scratch) {
  const Tile t = MakeTile(a, n, first, last, scratch);
  const int64_t first_row = a.rows.row_start[n] + first;
  LoadQueries(a, first_row, head, t);

  const int end = t.high[t.M - 1] + 1;  // keys that some row sees: [low[0], end)
  // Blocks start at absolute multiples, so that a row's sums are the same however its prompt was
  // cut.
  for (int block = t.low[0] / kPrefillKeys * kPrefillKeys; block < end; block += kPrefillKeys) {
    const int keys = std::min(kPrefillKeys, end - block);
    LoadPanel<T>(a.kv.k, a, n, head, block, block + keys, t.panel);
    GemmTile(t.panel, t.D, 1, t.qt, t.Mp, t.st, t.Mp, keys, t.Mp, t.D, false);
    if (block + keys - 1 > t.high[0] || block < t.low[t.M - 1]) Mask(t, block, block + keys);
    Softmax(t, keys);
    LoadPanel<T>(a.kv.v, a, n, head, block, block + keys, t.panel);
    GemmTile(t.st, 1, t.Mp, t.panel, t.D, t.acc, t.D, t.M, t.D, keys, true);
  }

  for (int i = 0; i < t.M; ++i) {
    const int64_t to = (first_row + i / t.G) * a.H + int64_t{head} * t.G + i % t.G;
    const float scale = 1.f / t.sum[i];
    for (int d = 0; d < t.D; ++d) a.out[to * t.D + d] = t.acc[int64_t{i} * t.D + d] * scale;
    if (a.lse) a.lse[to] = t.max[i] + std::log(t.sum[i]);
  }
}

}  // namespace prefill_internal

// Rows [first, last) of sequence n, the query heads of KV head `head`. `scratch` has
// PrefillScratch(args) floats, 64-byte aligned.
inline void PrefillTask(const PagedAttentionArgs& args, int n, int head, int first, int last,
                        float* scratch) {
  switch (args.kv.dtype) {
    case DType::kF32:
      return prefill_internal::Attend<float>(args, n, head, first, last, scratch);
    case DType::kBF16:
      return prefill_internal::Attend<bf16>(args, n, head, first, last, scratch);
    case DType::kI8:
      return prefill_internal::Attend<int8_t>(args, n, head, first, last, scratch);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_ATTENTION_PREFILL_INL_H_
