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
constexpr int kAhead = 16;

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

// scores[r * kDecodeKeys + s] = q_r . k_s for R rows and `keys` keys, rounded up to a multiple of
// four: what follows the last key repeats it.
template <int R, typename T>
void Scores(const float* q, int Dp, const T* const* k, int keys, float* scores) {
  const DF d;
  constexpr int kKeys = 4;
  for (int s = 0; s < keys; s += kKeys) {
    const T* row[kKeys];
    for (int j = 0; j < kKeys; ++j) {
      row[j] = k[std::min(s + j, keys - 1)];
      PrefetchRow(k[std::min(s + j + kAhead, keys - 1)], Dp);
    }
    VF sum[R][kKeys];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < kKeys; ++j) sum[r][j] = hn::Zero(d);
    for (int i = 0; i < Dp; i += kLanes) {
      VF kv[kKeys];
      for (int j = 0; j < kKeys; ++j) kv[j] = LoadF32(d, row[j] + i);
      for (int r = 0; r < R; ++r) {
        const VF qv = hn::Load(d, q + r * Dp + i);
        for (int j = 0; j < kKeys; ++j) sum[r][j] = hn::MulAdd(qv, kv[j], sum[r][j]);
      }
    }
    for (int r = 0; r < R; ++r)
      StoreSums4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], scores + r * kDecodeKeys + s);
  }
}

// out_r += sum_s p_{r,s} v_s, s ascending. The probabilities of what follows the last key are 0.
template <int R, typename T>
void Accumulate(const float* p, const T* const* v, int keys, int Dp, float* out,
                int64_t out_stride) {
  const DF d;
  constexpr int kKeys = R <= 3 ? 4 : 2;
  for (int s = 0; s < keys; s += kKeys) {
    const T* row[kKeys];
    VF weight[R][kKeys];
    for (int j = 0; j < kKeys; ++j) {
      row[j] = v[std::min(s + j, keys - 1)];
      PrefetchRow(v[std::min(s + j + kAhead, keys - 1)], Dp);
      for (int r = 0; r < R; ++r) weight[r][j] = hn::Set(d, p[r * kDecodeKeys + s + j]);
    }
    for (int i = 0; i < Dp; i += kLanes) {
      VF sum[R];
      for (int r = 0; r < R; ++r) sum[r] = hn::Load(d, out + r * out_stride + i);
      for (int j = 0; j < kKeys; ++j) {
        const VF vv = LoadF32(d, row[j] + i);
        for (int r = 0; r < R; ++r) sum[r] = hn::MulAdd(weight[r][j], vv, sum[r]);
      }
      for (int r = 0; r < R; ++r) hn::Store(sum[r], d, out + r * out_stride + i);
    }
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

// Row addresses of keys [begin, end).
template <typename T>
void RowsOf(const void* base, const PagedAttentionArgs& a, int n, int head, int begin, int end,
            const T** rows) {
  ForEachRun(a.kv, a.tables, n, head, begin, end, [&](int s, int count, int64_t offset) {
    const T* at = static_cast<const T*>(base) + offset;
    for (int j = 0; j < count; ++j) rows[s - begin + j] = at + int64_t{j} * a.kv.D;
  });
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
}

template <typename T>
void Attend(const PagedAttentionArgs& a, int n, int head, int begin, int end, float* partial,
            float* scratch) {
  const int D = a.kv.D, Dp = RoundUp(D, kPartialPad), G = a.H / a.kv.Hkv;
  const int R = a.rows.count(n) * G, keys = end - begin;
  const int64_t stride = PartialRow(D);
  float* q = scratch;                                // [R, Dp]
  float* scores = q + int64_t{R} * Dp;               // [R, kDecodeKeys]
  float* panel = scores + int64_t{R} * kDecodeKeys;  // [kDecodeKeys, Dp]
  for (int r = 0; r < R; ++r) {
    const float* from = a.q + (a.rows.row_start[n] + r / G) * a.q_stride +
                        (static_cast<int64_t>(head) * G + r % G) * D;
    for (int d = 0; d < Dp; ++d) q[int64_t{r} * Dp + d] = d < D ? a.scale * from[d] : 0.f;
  }

  const T* rows[kDecodeKeys];
  const float* wide[kDecodeKeys];
  // Straight from the cache if one pass serves all rows and D is whole vectors, else through a
  // dense fp32 copy, so that each row is converted once.
  const bool direct = R <= kGroup && D == Dp;
  RowsOf(a.kv.k, a, n, head, begin, end, rows);
  if (!direct) Widen(rows, keys, D, Dp, panel, wide);
  for (int r = 0; r < R; r += kGroup) {
    const int group = std::min(kGroup, R - r);
    float* to = scores + int64_t{r} * kDecodeKeys;
    if (direct)
      ScoresOf(group, q + int64_t{r} * Dp, Dp, rows, keys, to);
    else
      ScoresOf(group, q + int64_t{r} * Dp, Dp, wide, keys, to);
  }
  for (int r = 0; r < R; ++r) {
    const int t = a.rows.pos[n] + r / G;
    float* out = partial + r * stride;
    std::fill_n(out, Dp, 0.f);
    SoftmaxRow(scores + int64_t{r} * kDecodeKeys, keys,
               FirstVisibleKey(t, a.sliding_window) - begin, t + 1 - begin, out + Dp, out + Dp + 1);
  }
  RowsOf(a.kv.v, a, n, head, begin, end, rows);
  if (!direct) Widen(rows, keys, D, Dp, panel, wide);
  for (int r = 0; r < R; r += kGroup) {
    const int group = std::min(kGroup, R - r);
    const float* p = scores + int64_t{r} * kDecodeKeys;
    if (direct)
      AccumulateOf(group, p, rows, keys, Dp, partial + r * stride, stride);
    else
      AccumulateOf(group, p, wide, keys, Dp, partial + r * stride, stride);
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
