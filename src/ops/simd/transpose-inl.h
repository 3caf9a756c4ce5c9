// Transposition of small matrices of 32-bit elements.
//
// Compiled once per target: include it from a file that uses hwy/foreach_target.h, and call it
// inside that file's HWY_NAMESPACE.

// Per-target include guard: toggled so that foreach_target.h can include this file again.
#if defined(DSLA_OPS_SIMD_TRANSPOSE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_SIMD_TRANSPOSE_INL_H_
#undef DSLA_OPS_SIMD_TRANSPOSE_INL_H_
#else
#define DSLA_OPS_SIMD_TRANSPOSE_INL_H_
#endif

#include <cstdint>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {

#if HWY_TARGET != HWY_SCALAR  // has no vectors of 4
namespace transpose_internal {

// A block of 4 elements from each of the addresses p, p + step, ..
template <class D, class T>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> LoadBlocks(D d, const T* p, int64_t step) {
  namespace hn = hwy::HWY_NAMESPACE;
  if constexpr (hn::MaxLanes(D()) == 4) {
    return hn::LoadU(d, p);
  } else {
    const hn::Half<D> half;
    constexpr int64_t kBlocks = hn::MaxLanes(half) / 4;
    return hn::Combine(d, LoadBlocks(half, p + kBlocks * step, step), LoadBlocks(half, p, step));
  }
}

// As many rows as a vector has lanes. Block b of four vectors takes the rows 4b .. 4b + 3, so that
// transposing within blocks leaves whole columns.
template <class D, class T>
HWY_INLINE void TransposeLanes(D d, const T* HWY_RESTRICT from, int64_t from_row, int cols,
                               T* HWY_RESTRICT to, int64_t to_row) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::Repartition<double, D> dd;
  for (int c = 0; c < cols; c += 4) {
    const auto row = [&](int i) { return LoadBlocks(d, from + i * from_row + c, 4 * from_row); };
    const auto r0 = row(0), r1 = row(1), r2 = row(2), r3 = row(3);
    const auto a = hn::BitCast(dd, hn::InterleaveLower(d, r0, r1));
    const auto b = hn::BitCast(dd, hn::InterleaveLower(d, r2, r3));
    const auto e = hn::BitCast(dd, hn::InterleaveUpper(d, r0, r1));
    const auto f = hn::BitCast(dd, hn::InterleaveUpper(d, r2, r3));
    T* q = to + c * to_row;
    hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, a, b)), d, q);
    hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, a, b)), d, q + to_row);
    hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, e, f)), d, q + 2 * to_row);
    hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, e, f)), d, q + 3 * to_row);
  }
}

}  // namespace transpose_internal
#endif

// to[c * to_row + r] = from[r * from_row + c]; rows need not be a multiple of 4, cols is one.
template <class T>
HWY_INLINE void Transpose(const T* HWY_RESTRICT from, int64_t from_row, int rows, int cols,
                          T* HWY_RESTRICT to, int64_t to_row) {
  int r = 0;
#if HWY_TARGET != HWY_SCALAR
  namespace hn = hwy::HWY_NAMESPACE;
  const auto lanes = [&](auto d) {
    constexpr int kLanes = hn::MaxLanes(d);
    for (; r + kLanes <= rows; r += kLanes)
      transpose_internal::TransposeLanes(d, from + r * from_row, from_row, cols, to + r, to_row);
  };
  lanes(hn::CappedTag<T, 16>());
  lanes(hn::FixedTag<T, 4>());
#endif
  for (; r < rows; ++r)
    for (int c = 0; c < cols; ++c) to[c * to_row + r] = from[r * from_row + c];
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_SIMD_TRANSPOSE_INL_H_
