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

// to[c * to_row + r] = from[r * from_row + c]; rows need not be a multiple of 4, cols is one.
template <class T>
HWY_INLINE void Transpose(const T* HWY_RESTRICT from, int64_t from_row, int rows, int cols,
                          T* HWY_RESTRICT to, int64_t to_row) {
  int r = 0;
#if HWY_TARGET != HWY_SCALAR  // has no vectors of 4
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::FixedTag<T, 4> d;
  const hn::Repartition<double, decltype(d)> dd;
  for (; r + 4 <= rows; r += 4) {
    const T* p = from + r * from_row;
    for (int c = 0; c < cols; c += 4) {
      const auto r0 = hn::LoadU(d, p + c), r1 = hn::LoadU(d, p + from_row + c);
      const auto r2 = hn::LoadU(d, p + 2 * from_row + c), r3 = hn::LoadU(d, p + 3 * from_row + c);
      const auto a = hn::BitCast(dd, hn::InterleaveLower(d, r0, r1));
      const auto b = hn::BitCast(dd, hn::InterleaveLower(d, r2, r3));
      const auto e = hn::BitCast(dd, hn::InterleaveUpper(d, r0, r1));
      const auto f = hn::BitCast(dd, hn::InterleaveUpper(d, r2, r3));
      T* q = to + c * to_row + r;
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, a, b)), d, q);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, a, b)), d, q + to_row);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, e, f)), d, q + 2 * to_row);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, e, f)), d, q + 3 * to_row);
    }
  }
#endif
  for (; r < rows; ++r)
    for (int c = 0; c < cols; ++c) to[c * to_row + r] = from[r * from_row + c];
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_SIMD_TRANSPOSE_INL_H_
