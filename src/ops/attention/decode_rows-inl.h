// Rows of K and V for the decode form of paged attention: where they lie, in which order their
// channels are held, and their prefetch. Per target; part of decode-inl.h.
#if defined(DSLA_OPS_ATTENTION_DECODE_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_ATTENTION_DECODE_ROWS_INL_H_
#undef DSLA_OPS_ATTENTION_DECODE_ROWS_INL_H_
#else
#define DSLA_OPS_ATTENTION_DECODE_ROWS_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "base/half.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "ops/attention/attention.h"
#include "ops/attention/paging.h"
#include "ops/attention/plan.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {
namespace decode_internal {
namespace hn = hwy::HWY_NAMESPACE;
using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;
constexpr int kLanes = HWY_LANES(float);
// Rows of K or V requested ahead of their use: with pages in any order the hardware prefetcher
// loses the stream at each page.
constexpr int kAhead = 32;

// Channels in the order in which the kernels below hold them. Two neighbouring bf16 are the halves
// of one 32-bit lane, which a shift and a mask widen, cheaper than a widening load per vector: of
// every 2 N channels come first the N of even index, then the N of odd index. Queries, widened rows
// and partial results are in this order too; fp32 and int8 caches keep their own.
template <typename T>
constexpr bool kPaired = std::is_same_v<T, bf16>;
template <typename T>
constexpr int Place(int d) {
  constexpr int kPair = 2 * kLanes;
  return kPaired<T> ? d / kPair * kPair + d % 2 * kLanes + d % kPair / 2 : d;
}
// Vector `kHalf` of the two that begin at p.
template <int kHalf>
HWY_INLINE VF LoadHalf(const bf16* p) {
  const DF d;
  const hn::RebindToUnsigned<DF> du;
  const auto raw = hn::LoadU(du, reinterpret_cast<const uint32_t*>(p));
  return hn::BitCast(d,
                     kHalf == 0 ? hn::ShiftLeft<16>(raw) : hn::And(raw, hn::Set(du, 0xffff0000u)));
}
// Integers as they are: their scales go to the scores, and to the weights of V.
template <int kHalf>
HWY_INLINE VF LoadHalf(const int8_t* p) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<int8_t, DF> d8;
  return hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(d8, p + kHalf * kLanes)));
}
template <int kHalf>
HWY_INLINE VF LoadHalf(const float* p) {
  return hn::LoadU(DF(), p + kHalf * kLanes);
}

// Two lines at once: a row of 64 bf16. One of int8 has one.
template <typename T>
HWY_INLINE void PrefetchRow(const T* row, int D) {
  constexpr int kPerLine = 64 / static_cast<int>(sizeof(T));
  hwy::Prefetch(row);
  if (sizeof(T) == 1 && D <= kPerLine) return;
  hwy::Prefetch(row + kPerLine);
  for (int d = 2 * kPerLine; d < D; d += kPerLine) hwy::Prefetch(row + d);
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

// D channels in the kernels' order from `from` in its own, zeros up to Dp.
template <typename T>
void WidenRow(const T* from, int D, int Dp, float* to) {
  const DF d;
  int i = 0;
  for (; i + 2 * kLanes <= D; i += 2 * kLanes) {
    hn::Store(LoadHalf<0>(from + i), d, to + i);
    hn::Store(LoadHalf<1>(from + i), d, to + i + kLanes);
  }
  std::fill(to + i, to + Dp, 0.f);
  for (; i < D; ++i) {
    if constexpr (kPaired<T>)
      to[Place<T>(i)] = ToFloat(from[i]);
    else
      to[i] = static_cast<float>(from[i]);
  }
}

// Copies `keys` rows to dense fp32 ones, padded with zeros to Dp, and points `wide` at them.
template <typename T>
void Widen(const T* const* rows, int keys, int D, int Dp, float* panel, const float** wide) {
  for (int s = 0; s < keys; ++s) {
    float* to = panel + int64_t{s} * Dp;
    WidenRow(rows[s], D, Dp, to);
    wide[s] = to;
  }
  std::fill(wide + keys, wide + RoundUp(keys, 4) + kAhead, wide[keys - 1]);
}

// The scales of keys [begin, end), and 1 up to a whole number of vectors.
inline void ScalesOf(void* base, const PagedAttentionArgs& a, int n, int head, int begin, int end,
                     float* scales) {
  ForEachRun(a.kv, a.tables, n, head, begin, end, [&](int s, int count, int64_t) {
    std::copy_n(RowScale(a.kv, base, a.tables, n, head, s), count, scales + s - begin);
  });
  std::fill(scales + (end - begin), scales + RoundUp(end - begin, std::max(kLanes, 4)), 1.f);
}

}  // namespace decode_internal
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_ATTENTION_DECODE_ROWS_INL_H_
