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

#include "hwy/highway.h"
#include "ops/attention/attention.h"
#include "ops/attention/decode_rows-inl.h"
#include "ops/attention/paging.h"
#include "ops/attention/plan.h"
#include "ops/simd/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {
namespace decode_internal {
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Rows that one pass handles: their weights for 4 keys, or 2 with 4 rows, fill the registers.
constexpr int kGroup = 4;

// Sums over the lanes of four vectors in two steps: two of them pair by pair, then all.
#if HWY_TARGET == HWY_SCALAR  // which has one lane and no shuffles
struct TwoSums {
  VF a, b;
};
HWY_INLINE TwoSums SumPairs(VF a, VF b) { return {a, b}; }
HWY_INLINE void StoreSums4(const TwoSums& ab, const TwoSums& ce, float* to) {
  to[0] = hn::GetLane(ab.a);
  to[1] = hn::GetLane(ab.b);
  to[2] = hn::GetLane(ce.a);
  to[3] = hn::GetLane(ce.b);
}
#else
using TwoSums = VF;
// Within each 128-bit block: pairs.
HWY_INLINE TwoSums SumPairs(VF a, VF b) {
  const DF d;
  return hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
}
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
// Pairs of pairs, then the blocks.
HWY_INLINE void StoreSums4(TwoSums ab, TwoSums ce, float* to) {
  const DF d;
  const hn::Repartition<double, DF> dd;
  const auto first = hn::BitCast(dd, ab), last = hn::BitCast(dd, ce);
  StoreBlockSum(d,
                hn::Add(hn::BitCast(d, hn::InterleaveLower(dd, first, last)),
                        hn::BitCast(d, hn::InterleaveUpper(dd, first, last))),
                to);
}
#endif

// Loaded once: GCC would repeat the load as an operand of each product, and loads are what limits.
HWY_INLINE VF LoadOnce(const float* p) {
  VF v = hn::Load(DF(), p);
#if HWY_ARCH_X86
  asm("" : "+x"(v.raw));
#endif
  return v;
}

// One vector of channels of TwoKeys: sum_{r,j} += q_r k_j, lane by lane.
template <int kHalf, int R, typename T>
HWY_INLINE void ScoreStep(const float* q, int Dp, const T* first, const T* second, int i,
                          VF (&a)[R], VF (&b)[R]) {
  const VF k = LoadHalf<kHalf>(first + i), next = LoadHalf<kHalf>(second + i);
  for (int r = 0; r < R; ++r) {
    const VF qv = LoadOnce(q + r * Dp + i + kHalf * kLanes);
    a[r] = hn::MulAdd(qv, k, a[r]);
    b[r] = hn::MulAdd(qv, next, b[r]);
  }
}

// q_r . k for two keys. Two at a time leave registers to spare: with four, one of the sums is
// spilled, a chain through memory that took twice the time of the products. The latency of the
// chains of two hides behind the next two keys.
template <int R, typename T>
HWY_INLINE void TwoKeys(const float* q, int Dp, const T* first, const T* second,
                        TwoSums (&sums)[R]) {
  const DF d;
  VF a[R], b[R];
  for (int r = 0; r < R; ++r) a[r] = b[r] = hn::Zero(d);
  for (int i = 0; i < Dp; i += 2 * kLanes) {
    ScoreStep<0>(q, Dp, first, second, i, a, b);
    ScoreStep<1>(q, Dp, first, second, i, a, b);
  }
  for (int r = 0; r < R; ++r) sums[r] = SumPairs(a[r], b[r]);
}

// scores[r * kDecodeKeys + s] = q_r . k_s for R rows and `keys` keys, rounded up to whole steps. k
// goes on past the last key: see RowsAndAhead.
template <int R, typename T>
void Scores(const float* q, int Dp, const T* const* k, int keys, float* scores) {
  for (int s = 0; s < keys; s += 4) {
    for (int j = 0; j < 4; ++j) PrefetchRow(k[s + j + kAhead], Dp);
    TwoSums ab[R], ce[R];
    TwoKeys(q, Dp, k[s], k[s + 1], ab);
    TwoKeys(q, Dp, k[s + 2], k[s + 3], ce);
    for (int r = 0; r < R; ++r) StoreSums4(ab[r], ce[r], scores + r * kDecodeKeys + s);
  }
}

// One vector of channels of Accumulate: out_r += sum_j weight_{r,j} v_j.
template <int kHalf, int R, int kKeys, typename T>
HWY_INLINE void AccumulateStep(const VF (&weight)[R][kKeys], const T* const (&row)[kKeys], int i,
                               float* out, int64_t out_stride) {
  const DF d;
  VF sum[R];
  float* to = out + i + kHalf * kLanes;
  for (int r = 0; r < R; ++r) sum[r] = hn::Load(d, to + r * out_stride);
  for (int j = 0; j < kKeys; ++j) {
    const VF v = LoadHalf<kHalf>(row[j] + i);
    for (int r = 0; r < R; ++r) sum[r] = hn::MulAdd(weight[r][j], v, sum[r]);
  }
  for (int r = 0; r < R; ++r) hn::Store(sum[r], d, to + r * out_stride);
}

// out_r += sum_s p_{r,s} v_s, s ascending. The probabilities of what follows the last key are 0.
template <int R, typename T>
void Accumulate(const float* p, const T* const* v, int keys, int Dp, float* out,
                int64_t out_stride) {
  const DF d;
  constexpr int kKeys = R <= 3 ? 4 : 2;  // their weights stay in registers
  for (int s = 0; s < keys; s += kKeys) {
    for (int j = 0; j < kKeys; ++j) PrefetchRow(v[s + j + kAhead], Dp);
    const T* row[kKeys];
    VF weight[R][kKeys];
    for (int j = 0; j < kKeys; ++j) {
      row[j] = v[s + j];
      for (int r = 0; r < R; ++r) weight[r][j] = hn::Set(d, p[r * kDecodeKeys + s + j]);
    }
    for (int i = 0; i < Dp; i += 2 * kLanes) {
      AccumulateStep<0>(weight, row, i, out, out_stride);
      AccumulateStep<1>(weight, row, i, out, out_stride);
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

// A task's rows and scratch memory.
struct Range {
  int n, head, begin, end;
  int D, Dp, G, R;
  float *q, *scores, *panel;  // [R, Dp], [R, kDecodeKeys], [kDecodeKeys, Dp]
  float* partial;             // [R, stride]
  int64_t stride;
  int keys() const { return end - begin; }
};

template <typename T>
void LoadQueries(const PagedAttentionArgs& a, const Range& t) {
  const DF d;
  const VF scale = hn::Set(d, a.scale);
  for (int r = 0; r < t.R; ++r) {
    const float* from = a.q + (a.rows.row_start[t.n] + r / t.G) * a.q_stride +
                        (int64_t{t.head} * t.G + r % t.G) * t.D;
    float* to = t.q + int64_t{r} * t.Dp;
    int i = 0;
    for (; i + 2 * kLanes <= t.D; i += 2 * kLanes) {
      VF first, second;
      if constexpr (!kPaired<T>) {
        first = hn::LoadU(d, from + i);
        second = hn::LoadU(d, from + i + kLanes);
      } else {
        hn::LoadInterleaved2(d, from + i, first, second);
      }
      hn::Store(hn::Mul(scale, first), d, to + i);
      hn::Store(hn::Mul(scale, second), d, to + i + kLanes);
    }
    std::fill(to + i, to + t.Dp, 0.f);
    for (; i < t.D; ++i) to[Place<T>(i)] = a.scale * from[i];
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
// Every row's scores, or weights, times what belongs to each key; null: 1.
inline void ScaleKeys(const Range& t, const float* scales) {
  const DF d;
  if (scales == nullptr) return;
  for (int r = 0; r < t.R; ++r) {
    float* row = t.scores + int64_t{r} * kDecodeKeys;
    for (int s = 0; s < t.keys(); s += kLanes)
      hn::Store(hn::Mul(hn::Load(d, row + s), hn::LoadU(d, scales + s)), d, row + s);
  }
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
  float k_scales[kDecodeKeys], v_scales[kDecodeKeys];
  const float *k_scale = nullptr, *v_scale = nullptr;
  if constexpr (std::is_same_v<T, int8_t>) {
    ScalesOf(a.kv.k, a, n, head, begin, end, k_scales);
    ScalesOf(a.kv.v, a, n, head, begin, end, v_scales);
    k_scale = k_scales, v_scale = v_scales;
  }
  LoadQueries<T>(a, t);
  // Straight from the cache if one pass serves all rows and D is whole vectors, else through a
  // dense fp32 copy, so that each row is converted once.
  if (t.R <= kGroup && t.D == t.Dp) {
    AllScores(t, k);
    ScaleKeys(t, k_scale);
    AllSoftmax(a, t);
    ScaleKeys(t, v_scale);
    AllAccumulate(t, v);
  } else {
    const float* wide[kMaxRows];
    Widen(k, t.keys(), t.D, t.Dp, t.panel, wide);
    AllScores(t, wide);
    ScaleKeys(t, k_scale);
    AllSoftmax(a, t);
    ScaleKeys(t, v_scale);
    Widen(v, t.keys(), t.D, t.Dp, t.panel, wide);
    AllAccumulate(t, wide);
  }
}

// scale times D channels in the kernels' order, to `to` in their own.
template <typename T>
void StoreRow(const float* from, int D, float scale, float* to) {
  const DF d;
  const VF by = hn::Set(d, scale);
  int i = 0;
  for (; i + 2 * kLanes <= D; i += 2 * kLanes) {
    const VF first = hn::Mul(by, hn::Load(d, from + i));
    const VF second = hn::Mul(by, hn::Load(d, from + i + kLanes));
    if constexpr (!kPaired<T>) {
      hn::StoreU(first, d, to + i);
      hn::StoreU(second, d, to + i + kLanes);
    } else {
      hn::StoreInterleaved2(first, second, d, to + i);
    }
  }
  for (; i < D; ++i) to[i] = scale * from[Place<T>(i)];
}

}  // namespace decode_internal

// Keys [begin, end), at most kDecodeKeys, of sequence n and KV head `head`. `partial` takes
// PartialRow(D) floats per row, `scratch` has DecodeScratch(args) floats; both 64-byte aligned.
inline void DecodeTask(const PagedAttentionArgs& args, int n, int head, int begin, int end,
                       float* partial, float* scratch) {
  switch (args.kv.dtype) {
    case DType::kF32:
      return decode_internal::Attend<float>(args, n, head, begin, end, partial, scratch);
    case DType::kBF16:
      return decode_internal::Attend<bf16>(args, n, head, begin, end, partial, scratch);
    case DType::kI8:
      return decode_internal::Attend<int8_t>(args, n, head, begin, end, partial, scratch);
  }
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
    if (args.kv.dtype == DType::kBF16)
      decode_internal::StoreRow<bf16>(first, D, 1.f / sum, args.out + to * D);
    else
      decode_internal::StoreRow<float>(first, D, 1.f / sum, args.out + to * D);
    if (args.lse) args.lse[to] = max + std::log(sum);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_ATTENTION_DECODE_INL_H_
