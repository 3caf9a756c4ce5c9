// Decode form of paged attention: one task = (sequence, KV head, range of keys), whose rows (up to
// kDecodePositions positions times G query heads) share one pass over K and one over V. Per target;
// see README.md.
#if defined(DSLA_OPS_ATTENTION_DECODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_ATTENTION_DECODE_INL_H_
#undef DSLA_OPS_ATTENTION_DECODE_INL_H_
#else
#define DSLA_OPS_ATTENTION_DECODE_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "ops/attention/attention.h"
#include "ops/attention/paging.h"
#include "ops/attention/plan.h"
#include "ops/simd/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {
namespace decode_internal {
namespace hn = hwy::HWY_NAMESPACE;
using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;
constexpr int kLanes = HWY_LANES(float);
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Rows that one pass handles: 4 keys x 3 rows of accumulators, or 2 x 4, fill the registers.
constexpr int kGroup = 4;
// Rows of K or V requested ahead of their use: with pages in any order the hardware prefetcher
// loses the stream at each page.
constexpr int kAhead = 32;

template <typename T>
HWY_INLINE void PrefetchRow(const T* row, int D) {
  constexpr int kPerLine = 64 / static_cast<int>(sizeof(T));
  for (int d = 0; d < D; d += kPerLine) hwy::Prefetch(row + d);
}

// The sums over the lanes of four vectors, into to[0..3].
#if HWY_TARGET == HWY_SCALAR  // which has one lane and no shuffles
HWY_INLINE void StoreSums4(VF a, VF b, VF c, VF e, float* to) {
  to[0] = hn::GetLane(a);
  to[1] = hn::GetLane(b);
  to[2] = hn::GetLane(c);
  to[3] = hn::GetLane(e);
}
#else
// The sum of the 128-bit blocks.
template <class D>
HWY_INLINE void StoreBlockSum(D d, hn::Vec<D> x, float* to) {
  if constexpr (hn::MaxLanes(D()) == 4) {
    hn::StoreU(x, d, to);
  } else {
    const hn::Half<D> half;
    StoreBlockSum(half, hn::Add(hn::LowerHalf(half, x), hn::UpperHalf(half, x)), to);
  }
}
HWY_INLINE void StoreSums4(VF a, VF b, VF c, VF e, float* to) {
  const DF d;
  const hn::Repartition<double, DF> dd;
  // Within each 128-bit block: pairs, then pairs of pairs.
  const auto ab =
      hn::BitCast(dd, hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  const auto ce =
      hn::BitCast(dd, hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e)));
  StoreBlockSum(d,
                hn::Add(hn::BitCast(d, hn::InterleaveLower(dd, ab, ce)),
                        hn::BitCast(d, hn::InterleaveUpper(dd, ab, ce))),
                to);
}
#endif

// One vector of channels of Scores: sum_{r,j} += q_r k_j, lane by lane. The queries and one key at
// a time, so that with the sums they just fit 16 registers: a spilled sum would be a chain through
// memory.
template <int R, int kKeys, typename T>
HWY_INLINE void ScoreStep(const float* q, int Dp, const T* const (&row)[kKeys], int i,
                          VF (&sum)[R][kKeys]) {
  const DF d;
  VF qv[R];
  for (int r = 0; r < R; ++r) qv[r] = hn::Load(d, q + r * Dp + i);
  for (int j = 0; j < kKeys; ++j) {
    const VF k = LoadF32(d, row[j] + i);
    for (int r = 0; r < R; ++r) sum[r][j] = hn::MulAdd(qv[r], k, sum[r][j]);
  }
}

// scores[r * kDecodeKeys + s] = q_r . k_s for R rows and `keys` keys, rounded up to whole steps. k
// goes on past the last key: see RowsAndAhead.
template <int R, typename T>
void Scores(const float* q, int Dp, const T* const* k, int keys, float* scores) {
  const DF d;
  constexpr int kKeys = R <= 3 ? 4 : 2;
  for (int s = 0; s < keys; s += kKeys) {
    for (int j = 0; j < kKeys; ++j) PrefetchRow(k[s + j + kAhead], Dp);
    const T* row[kKeys];
    for (int j = 0; j < kKeys; ++j) row[j] = k[s + j];
    VF sum[R][kKeys];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < kKeys; ++j) sum[r][j] = hn::Zero(d);
    for (int i = 0; i < Dp; i += kLanes) ScoreStep(q, Dp, row, i, sum);
    if constexpr (kKeys == 4) {
      for (int r = 0; r < R; ++r)
        StoreSums4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], scores + r * kDecodeKeys + s);
    } else {
      for (int j = 0; j < kKeys; ++j) {
        float of_row[4];
        StoreSums4(sum[0][j], sum[1][j], sum[2][j], sum[3][j], of_row);
        for (int r = 0; r < 4; ++r) scores[r * kDecodeKeys + s + j] = of_row[r];
      }
    }
  }
}

// One vector of channels of Accumulate: out_r += sum_j weight_{r,j} v_j.
template <int R, int kKeys, typename T>
HWY_INLINE void AccumulateStep(const VF (&weight)[R][kKeys], const T* const (&row)[kKeys], int i,
                               float* out, int64_t out_stride) {
  const DF d;
  VF sum[R];
  float* to = out + i;
  for (int r = 0; r < R; ++r) sum[r] = hn::Load(d, to + r * out_stride);
  for (int j = 0; j < kKeys; ++j) {
    const VF v = LoadF32(d, row[j] + i);
    for (int r = 0; r < R; ++r) sum[r] = hn::MulAdd(weight[r][j], v, sum[r]);
  }
  for (int r = 0; r < R; ++r) hn::Store(sum[r], d, to + r * out_stride);
}

// out_r += sum_s p_{r,s} v_s, s ascending. The probabilities of what follows the last key are 0.
template <int R, typename T>
void Accumulate(const float* p, const T* const* v, int keys, int Dp, float* out,
                int64_t out_stride) {
  const DF d;
  constexpr int kKeys = R <= 3 ? 4 : 2;
  for (int s = 0; s < keys; s += kKeys) {
    for (int j = 0; j < kKeys; ++j) PrefetchRow(v[s + j + kAhead], Dp);
    const T* row[kKeys];
    VF weight[R][kKeys];
    for (int j = 0; j < kKeys; ++j) {
      row[j] = v[s + j];
      for (int r = 0; r < R; ++r) weight[r][j] = hn::Set(d, p[r * kDecodeKeys + s + j]);
    }
    for (int i = 0; i < Dp; i += kLanes) AccumulateStep(weight, row, i, out, out_stride);
  }
}

template <typename T>
void ScoresOf(int R, const float* q, int Dp, const T* const* k, int keys, float* scores) {
  switch (R) {
    case 1:
      return Scores<1>(q, Dp, k, keys, scores);
    case 2:
      return Scores<2>(q, Dp, k, keys, scores);
    case 3:
      return Scores<3>(q, Dp, k, keys, scores);
    default:
      return Scores<4>(q, Dp, k, keys, scores);
  }
}
template <typename T>
void AccumulateOf(int R, const float* p, const T* const* v, int keys, int Dp, float* out,
                  int64_t out_stride) {
  switch (R) {
    case 1:
      return Accumulate<1>(p, v, keys, Dp, out, out_stride);
    case 2:
      return Accumulate<2>(p, v, keys, Dp, out, out_stride);
    case 3:
      return Accumulate<3>(p, v, keys, Dp, out, out_stride);
    default:
      return Accumulate<4>(p, v, keys, Dp, out, out_stride);
  }
}

// Scores of one row to exp(score - max); those outside [low, high) count as -inf. Writes max and
// sum. Lane j sums the keys s = j mod lanes in ascending order.
inline void SoftmaxRow(float* scores, int keys, int low, int high, float* max_out, float* sum_out) {
  const DF d;
  const int padded = RoundUp(keys, std::max(kLanes, 4));
  low = std::clamp(low, 0, keys);
  high = std::clamp(high, low, keys);
  std::fill(scores, scores + low, kMinusInfinity);
  std::fill(scores + high, scores + padded, kMinusInfinity);
  VF maxv = hn::Set(d, kMinusInfinity);
  for (int s = 0; s < padded; s += kLanes) maxv = hn::Max(maxv, hn::Load(d, scores + s));
  const float max = hn::GetLane(hn::MaxOfLanes(d, maxv));
  // A row that sees none of these keys: exp(-inf - 0) = 0 rather than NaN.
  const VF subtract = hn::Set(d, max == kMinusInfinity ? 0.f : max);
  VF sum = hn::Zero(d);
  for (int s = 0; s < padded; s += kLanes) {
    const VF p = Exp(d, hn::Sub(hn::Load(d, scores + s), subtract));
    hn::Store(p, d, scores + s);
    sum = hn::Add(sum, p);
  }
  *max_out = max;
  *sum_out = hn::GetLane(hn::SumOfLanes(d, sum));
}

constexpr int kMaxRows = kDecodeKeys + 4 + kAhead;

template <typename T>
void RowsOf(const void* base, const PagedAttentionArgs& a, int n, int head, int begin, int end,
            const T** rows) {
  ForEachRun(a.kv, a.tables, n, head, begin, end, [&](int s, int count, int64_t offset) {
    const T* at = static_cast<const T*>(base) + offset;
    for (int j = 0; j < count; ++j) rows[s - begin + j] = at + int64_t{j} * a.kv.D;
  });
}

// The addresses of the rows of keys [begin, end); the last one again up to a multiple of four; then
// kAhead rows that will be read next, [next_begin, next_end) of `next` as far as they go.
template <typename T>
void RowsAndAhead(const void* base, const void* next, const PagedAttentionArgs& a, int n, int head,
                  int begin, int end, int next_begin, int next_end, const T** rows) {
  RowsOf(base, a, n, head, begin, end, rows);
  const int keys = end - begin, padded = RoundUp(keys, 4);
  std::fill(rows + keys, rows + padded + kAhead, rows[keys - 1]);
  next_end = std::min(next_end, next_begin + kAhead);
  if (next_begin < next_end) RowsOf(next, a, n, head, next_begin, next_end, rows + padded);
}

// Copies `keys` rows to dense fp32 ones, padded with zeros to Dp, and points `wide` at them.
template <typename T>
void Widen(const T* const* rows, int keys, int D, int Dp, float* panel, const float** wide) {
  for (int s = 0; s < keys; ++s) {
    float* to = panel + int64_t{s} * Dp;
    ConvertRow(rows[s], to, static_cast<size_t>(D));
    std::fill(to + D, to + Dp, 0.f);
    wide[s] = to;
  }
  std::fill(wide + keys, wide + RoundUp(keys, 4) + kAhead, wide[keys - 1]);
}

// A task's rows and scratch memory.
struct Range {
  int n, head, begin, end;
  int D, Dp, G, R;
  float *q, *scores, *panel;  // [R, Dp], [R, kDecodeKeys], [kDecodeKeys, Dp]
  float* partial;             // [R, stride]
  int64_t stride;
  int keys() const { return end - begin; }
};

inline void LoadQueries(const PagedAttentionArgs& a, const Range& t) {
  for (int r = 0; r < t.R; ++r) {
    const float* from = a.q + (a.rows.row_start[t.n] + r / t.G) * a.q_stride +
                        (int64_t{t.head} * t.G + r % t.G) * t.D;
    float* to = t.q + int64_t{r} * t.Dp;
    for (int d = 0; d < t.D; ++d) to[d] = a.scale * from[d];
    std::fill(to + t.D, to + t.Dp, 0.f);
  }
}

template <typename T>
void AllScores(const Range& t, const T* const* k) {
  for (int r = 0; r < t.R; r += kGroup)
    ScoresOf(std::min(kGroup, t.R - r), t.q + int64_t{r} * t.Dp, t.Dp, k, t.keys(),
             t.scores + int64_t{r} * kDecodeKeys);
}
template <typename T>
void AllAccumulate(const Range& t, const T* const* v) {
  for (int r = 0; r < t.R; r += kGroup)
    AccumulateOf(std::min(kGroup, t.R - r), t.scores + int64_t{r} * kDecodeKeys, v, t.keys(), t.Dp,
                 t.partial + r * t.stride, t.stride);
}
inline void AllSoftmax(const PagedAttentionArgs& a, const Range& t) {
  for (int r = 0; r < t.R; ++r) {
    const int pos = a.rows.pos[t.n] + r / t.G;
    float* out = t.partial + r * t.stride;
    std::fill_n(out, t.Dp, 0.f);
    SoftmaxRow(t.scores + int64_t{r} * kDecodeKeys, t.keys(),
               FirstVisibleKey(pos, a.sliding_window) - t.begin, pos + 1 - t.begin, out + t.Dp,
               out + t.Dp + 1);
  }
}

template <typename T>
void Attend(const PagedAttentionArgs& a, int n, int head, int begin, int end, float* partial,
            float* scratch) {
  Range t;
  t.n = n, t.head = head, t.begin = begin, t.end = end;
  t.D = a.kv.D, t.Dp = RoundUp(t.D, kPartialPad), t.G = a.H / a.kv.Hkv;
  t.R = a.rows.count(n) * t.G;
  t.q = scratch;
  t.scores = t.q + int64_t{t.R} * t.Dp;
  t.panel = t.scores + int64_t{t.R} * kDecodeKeys;
  t.partial = partial, t.stride = PartialRow(t.D);

  // V follows K, and the next range's K is likely this thread's next.
  const int tokens = a.rows.pos[n] + a.rows.count(n);
  const T* k[kMaxRows];
  const T* v[kMaxRows];
  RowsAndAhead(a.kv.k, a.kv.v, a, n, head, begin, end, begin, end, k);
  RowsAndAhead(a.kv.v, a.kv.k, a, n, head, begin, end, end, tokens, v);
  LoadQueries(a, t);
  // Straight from the cache if one pass serves all rows and D is whole vectors, else through a
  // dense fp32 copy, so that each row is converted once.
  if (t.R <= kGroup && t.D == t.Dp) {
    AllScores(t, k);
    AllSoftmax(a, t);
    AllAccumulate(t, v);
  } else {
    const float* wide[kMaxRows];
    Widen(k, t.keys(), t.D, t.Dp, t.panel, wide);
    AllScores(t, wide);
    AllSoftmax(a, t);
    Widen(v, t.keys(), t.D, t.Dp, t.panel, wide);
    AllAccumulate(t, wide);
  }
}

}  // namespace decode_internal

// Keys [begin, end), at most kDecodeKeys, of sequence n and KV head `head`. `partial` takes
// PartialRow(D) floats per row, `scratch` has DecodeScratch(args) floats; both 64-byte aligned.
inline void DecodeTask(const PagedAttentionArgs& args, int n, int head, int begin, int end,
                       float* partial, float* scratch) {
  if (args.kv.dtype == DType::kBF16)
    decode_internal::Attend<bf16>(args, n, head, begin, end, partial, scratch);
  else
    decode_internal::Attend<float>(args, n, head, begin, end, partial, scratch);
}

// Merges the `splits` partial results of sequence n and KV head `head`, `split_stride` floats
// apart, in ascending order of keys; writes out and lse of its rows. Overwrites partial 0.
inline void DecodeMerge(const PagedAttentionArgs& args, int n, int head, float* partials,
                        int splits, int64_t split_stride) {
  namespace hn = hwy::HWY_NAMESPACE;
  const decode_internal::DF d;
  const int D = args.kv.D, Dp = RoundUp(D, kPartialPad), G = args.H / args.kv.Hkv;
  const int R = args.rows.count(n) * G;
  for (int r = 0; r < R; ++r) {
    float* first = partials + r * PartialRow(D);
    float max = first[Dp];
    for (int i = 1; i < splits; ++i) max = std::max(max, first[i * split_stride + Dp]);
    float sum = 0;
    for (int i = 0; i < splits; ++i) {
      const float* part = first + i * split_stride;
      const float weight = std::exp(part[Dp] - max);
      sum = std::fma(weight, part[Dp + 1], sum);
      const auto w = hn::Set(d, weight);
      for (int j = 0; j < Dp; j += decode_internal::kLanes) {
        const auto x = hn::Load(d, part + j);
        hn::Store(i == 0 ? hn::Mul(w, x) : hn::MulAdd(w, x, hn::Load(d, first + j)), d, first + j);
      }
    }
    const int64_t to =
        (args.rows.row_start[n] + r / G) * int64_t{args.H} + int64_t{head} * G + r % G;
    const float scale = 1.f / sum;
    for (int j = 0; j < D; ++j) args.out[to * D + j] = first[j] * scale;
    if (args.lse) args.lse[to] = max + std::log(sum);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_ATTENTION_DECODE_INL_H_
