// The window's products in bf16 (window-inl.h), for CPUs with AVX-512 and its BF16 instructions,
// which multiply and add pairs of bf16 to sums in fp32. The library has no target for them.
//
// Keys and values are the cache's bf16, laid out once for a wave. Queries are rounded to bf16, and
// so are the weights; a row's sum is of the rounded ones.

#if defined(DSLA_OPS_DSLA_WINDOW_BF16_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_DSLA_WINDOW_BF16_INL_H_
#undef DSLA_OPS_DSLA_WINDOW_BF16_INL_H_
#else
#define DSLA_OPS_DSLA_WINDOW_BF16_INL_H_
#endif

#include "hwy/highway.h"
#include "ops/dsla/chunk-inl.h"
#include "ops/dsla/window-inl.h"

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3

HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512bf16")  // for HWY_BEFORE_NAMESPACE
namespace dsla {
namespace HWY_NAMESPACE {
namespace {  // of the one file that includes this

constexpr int kPairLanes = 16;

HWY_INLINE __m512 AddPairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// GemmTile (ops/simd/tile-inl.h) with pairs of bf16 for the elements of A and B and twice the K.
template <int R, int Vecs>
HWY_INLINE void PairBlock(const uint32_t* HWY_RESTRICT a, ptrdiff_t a_row, ptrdiff_t a_col,
                          const uint32_t* HWY_RESTRICT b, ptrdiff_t b_row, float* HWY_RESTRICT c,
                          ptrdiff_t c_row, int K, bool accumulate) {
  __m512 sum[R][Vecs];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < Vecs; ++v) sum[r][v] = _mm512_setzero_ps();
  for (int k = 0; k < K; ++k) {
    __m512i bv[Vecs];
    for (int v = 0; v < Vecs; ++v) bv[v] = _mm512_loadu_si512(b + v * kPairLanes);
    for (int r = 0; r < R; ++r) {
      const __m512i av = _mm512_set1_epi32(static_cast<int>(a[r * a_row]));
      for (int v = 0; v < Vecs; ++v) sum[r][v] = AddPairs(sum[r][v], av, bv[v]);
    }
    a += a_col;
    b += b_row;
  }
  // Otherwise GCC puts the sums into memory before it stores them.
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      float* to = c + r * c_row + v * kPairLanes;
      _mm512_storeu_ps(to, accumulate ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]) : sum[r][v]);
    }
  }
}

// The last rows < R + 1 of a panel.
template <int R, int Vecs>
HWY_INLINE void LastPairBlock(int rows, const uint32_t* a, ptrdiff_t a_row, ptrdiff_t a_col,
                              const uint32_t* b, ptrdiff_t b_row, float* c, ptrdiff_t c_row, int K,
                              bool accumulate) {
  if constexpr (R > 0) {
    if (rows == R)
      PairBlock<R, Vecs>(a, a_row, a_col, b, b_row, c, c_row, K, accumulate);
    else
      LastPairBlock<R - 1, Vecs>(rows, a, a_row, a_col, b, b_row, c, c_row, K, accumulate);
  }
}

template <int Vecs>
HWY_NOINLINE void PairPanel(const uint32_t* a, ptrdiff_t a_row, ptrdiff_t a_col, const uint32_t* b,
                            ptrdiff_t b_row, float* c, ptrdiff_t c_row, int M, int K,
                            bool accumulate) {
  constexpr int kRows = Vecs == 4 ? 6 : 8;  // at most 24 sums of 32 registers
  int m = 0;
  for (; m + kRows <= M; m += kRows)
    PairBlock<kRows, Vecs>(a + m * a_row, a_row, a_col, b, b_row, c + m * c_row, c_row, K,
                           accumulate);
  LastPairBlock<kRows - 1, Vecs>(M - m, a + m * a_row, a_row, a_col, b, b_row, c + m * c_row, c_row,
                                 K, accumulate);
}

// N is a multiple of 16.
inline void PairTile(const uint32_t* a, ptrdiff_t a_row, ptrdiff_t a_col, const uint32_t* b,
                     ptrdiff_t b_row, float* c, ptrdiff_t c_row, int M, int N, int K,
                     bool accumulate) {
  int n = 0;
  for (; n + 4 * kPairLanes <= N; n += 4 * kPairLanes)
    PairPanel<4>(a, a_row, a_col, b + n, b_row, c + n, c_row, M, K, accumulate);
  switch ((N - n) / kPairLanes) {
    case 3:
      return PairPanel<3>(a, a_row, a_col, b + n, b_row, c + n, c_row, M, K, accumulate);
    case 2:
      return PairPanel<2>(a, a_row, a_col, b + n, b_row, c + n, c_row, M, K, accumulate);
    case 1:
      return PairPanel<1>(a, a_row, a_col, b + n, b_row, c + n, c_row, M, K, accumulate);
  }
}

// 2^x for x <= 0, relative error 7.5e-5 (rounding to bf16 makes 3.9e-3 of it): a cubic of what x is
// above the next lower integer, which scalef takes from x itself.
HWY_INLINE __m512 Exp2ForBf16(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(7.802452266e-2f), r, _mm512_set1_ps(2.260671554e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.958335405e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.999252186e-1f));
  return _mm512_scalef_ps(p, x);
}

// Keys and values are the wave's pairs. Scores are logarithms to the base 2.
class Bf16Window {
 public:
  static constexpr int kStep = 2;  // keys of a pair

  explicit Bf16Window(const DslaQueryTile& tile)
      : tile_(tile), D_(tile.wave.shape.D), pairs_(tile.h * tile.wave.pairs + tile.segment.pair) {}

  void Scores(const WindowKeys& k) {
    const int depth = D_ / 2, lanes = tile_.lanes();
    constexpr float kLog2E = 1.44269504f;
    auto* const query = reinterpret_cast<uint32_t*>(tile_.query);  // [D / 2, lanes]
    ScaleQueries(tile_, kLog2E / std::sqrt(static_cast<float>(D_)),
                 reinterpret_cast<bf16*>(tile_.rows));
    Transpose(reinterpret_cast<const uint32_t*>(tile_.rows), depth, lanes, depth, query, lanes);
    PairTile(Keys(0), depth, 1, query, lanes, tile_.scores, lanes, k.sinks, lanes, depth, false);
    PairTile(Keys(Pair(k)), depth, 1, query, lanes, tile_.scores + k.sinks * lanes, lanes, k.keys,
             lanes, depth, false);
  }

  // Leaves pairs of weights in the first half of the scores.
  void Weights(const WindowKeys& k) {
    const __m512i ones = _mm512_set1_epi32(0x3f803f80);
    alignas(64) uint16_t order[32];
    for (uint16_t i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
    const __m512i interleave = _mm512_load_si512(order);
    const int lanes = tile_.lanes();
    for (int l = 0; l < lanes; l += kPairLanes) {
      const __m512 top = LargestScore(tile_.scores + l, lanes, k.rows()).raw;
      __m512 sum = _mm512_setzero_ps();
      for (int s = 0; s < k.rows(); s += 2) {
        const float* from = tile_.scores + s * lanes + l;
        const __m512 even = Exp2ForBf16(_mm512_sub_ps(_mm512_loadu_ps(from), top));
        const __m512 odd = Exp2ForBf16(_mm512_sub_ps(_mm512_loadu_ps(from + lanes), top));
        const __m512i pairs =
            _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
        sum = AddPairs(sum, pairs, ones);
        _mm512_storeu_si512(tile_.scores + s / 2 * lanes + l, pairs);
      }
      _mm512_storeu_ps(tile_.top + l, _mm512_mul_ps(top, _mm512_set1_ps(0.69314718f)));
      _mm512_storeu_ps(tile_.sum + l, sum);
    }
  }

  void Outputs(const WindowKeys& k) {
    const int lanes = tile_.lanes();
    tile_.ForLanes([&](int l, int count) {
      const auto* const weights = reinterpret_cast<const uint32_t*>(tile_.scores) + l;
      float* const to = tile_.window + l * D_;
      PairTile(weights, 1, lanes, Values(0), D_, to, D_, count, D_, k.sinks / 2, false);
      PairTile(weights + k.sinks / 2 * lanes, 1, lanes, Values(Pair(k)), D_, to, D_, count, D_,
               k.keys / 2, true);
    });
  }

 private:
  // Of the segment's, the pair of the window's first key.
  int64_t Pair(const WindowKeys& k) const {
    return tile_.wave.SinkPairs() + (k.first - tile_.wave.FirstPaired(tile_.segment)) / 2;
  }
  const uint32_t* Keys(int64_t pair) const { return tile_.wave.pair_k + (pairs_ + pair) * D_; }
  const uint32_t* Values(int64_t pair) const { return tile_.wave.pair_v + (pairs_ + pair) * D_; }

  const DslaQueryTile& tile_;
  const int D_;
  const int64_t pairs_;  // of the segment and head, the first
};

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_POP_ATTRIBUTES

#endif  // HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3

#endif  // DSLA_OPS_DSLA_WINDOW_BF16_INL_H_
