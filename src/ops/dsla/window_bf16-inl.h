// The window's products in bf16 (window-inl.h), for CPUs with AVX-512 and its BF16 instructions,
// which multiply and add pairs of bf16 to sums in fp32. The library has no target for them.
//
// Keys and values are bf16 as they lie in ring, sinks and rows. Queries are rounded to bf16, and so
// are the weights; a row's sum is of the rounded ones.

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
  for (int r = 0; r < R; ++r) {
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

// e^x for x <= 0, relative error 3.6e-6 (rounding to bf16 makes 3.9e-3 of it): x = n ln 2 + r, and
// e^r by the minimax polynomial of degree 4.
HWY_INLINE __m512 ExpForBf16(__m512 x) {
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-110.f), x);  // 0 from there on
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(clamped, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.69314718f), clamped);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(4.238052451e-2f), r, _mm512_set1_ps(1.680863062e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.999596294e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.999515598e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, n);
}

HWY_INLINE __m512i Widen(const bf16* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Two rows as a row of pairs.
inline void PairRows(const bf16* even, const bf16* odd, int D, uint32_t* to) {
  for (int x = 0; x < D; x += kPairLanes)
    _mm512_storeu_si512(to + x,
                        _mm512_or_si512(Widen(even + x), _mm512_slli_epi32(Widen(odd + x), 16)));
}

class Bf16Window {
 public:
  static constexpr int kStep = 2;  // keys of a pair

  explicit Bf16Window(const DslaQueryTile& tile) : tile_(tile) {
    const DslaShape& shape = tile.wave.shape;
    const int64_t rows = DslaWindowKeys(shape), pairs = shape.D / 2;
    query_ = reinterpret_cast<uint32_t*>(tile.scores);
    k_ = query_ + pairs * kQueryBlock * tile.heads;
    v_ = k_ + rows * pairs;
    scores_ = reinterpret_cast<float*>(v_ + rows * pairs);
    Gather();
  }
  float* scores() { return scores_; }

  void Scores(const WindowBlock& b) {
    const int pairs = tile_.wave.shape.D / 2;
    ScaleQueries(tile_, b, reinterpret_cast<bf16*>(tile_.query));
    Transpose(reinterpret_cast<const uint32_t*>(tile_.query), pairs, b.lanes, pairs, query_,
              b.lanes);
    PairTile(k_, pairs, 1, query_, b.lanes, scores_, b.lanes, b.sinks, b.lanes, pairs, false);
    PairTile(k_ + Row(b) * pairs, pairs, 1, query_, b.lanes, scores_ + b.sinks * b.lanes, b.lanes,
             b.keys, b.lanes, pairs, false);
  }

  // Leaves pairs of weights in the first half of the scores.
  void Weights(const WindowBlock& b) {
    const __m512i ones = _mm512_set1_epi32(0x3f803f80);
    alignas(64) uint16_t order[32];
    for (uint16_t i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
    const __m512i interleave = _mm512_load_si512(order);
    for (int l = 0; l < b.lanes; l += kPairLanes) {
      const __m512 top = LargestScore(scores_ + l, b.lanes, b.sinks + b.keys).raw;
      __m512 sum = _mm512_setzero_ps();
      for (int s = 0; s < b.sinks + b.keys; s += 2) {
        const float* from = scores_ + s * b.lanes + l;
        const __m512 even = ExpForBf16(_mm512_sub_ps(_mm512_loadu_ps(from), top));
        const __m512 odd = ExpForBf16(_mm512_sub_ps(_mm512_loadu_ps(from + b.lanes), top));
        const __m512i pairs =
            _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
        sum = AddPairs(sum, pairs, ones);
        _mm512_storeu_si512(scores_ + s / 2 * b.lanes + l, pairs);
      }
      _mm512_storeu_ps(tile_.top + b.row + l, top);
      _mm512_storeu_ps(tile_.sum + b.row + l, sum);
    }
  }

  void Outputs(const WindowBlock& b) {
    const int D = tile_.wave.shape.D;
    const auto* weights = reinterpret_cast<const uint32_t*>(scores_);
    float* to = tile_.window + static_cast<int64_t>(b.row) * D;
    PairTile(weights, 1, b.lanes, v_, D, to, D, b.queries, D, b.sinks / 2, false);
    PairTile(weights + b.sinks / 2 * b.lanes, 1, b.lanes, v_ + Row(b) / 2 * D, D, to, D, b.queries,
             D, b.keys / 2, true);
  }

 private:
  int SinkRows() const { return (tile_.wave.shape.sinks + 1) / 2 * 2; }
  // Of the window's first key of a block.
  int64_t Row(const WindowBlock& b) const { return SinkRows() + b.first - tile_.FirstKey(); }

  // Keys as they are, values as pairs of rows; zeros where there is no token.
  void Gather() {
    const DslaWave& wave = tile_.wave;
    const DslaShape& shape = wave.shape;
    const DslaSegment& seg = tile_.segment;
    const DslaSlot slot = SlotAt(wave.layout, wave.states, wave.slots[seg.n]);
    const int64_t W = shape.window, S = shape.sinks, D = shape.D,
                  end = tile_.time + tile_.chunk.rows;
    const auto gather = [&](int64_t first, int64_t last, const std::byte* old_k,
                            const std::byte* old_v, int64_t places, int64_t row) {
      static constexpr bf16 kZeros[kMaxHeadDim] = {};
      const auto rows_of = [&](const void* rows, const std::byte* old, int64_t t) {
        if (t >= last) return kZeros;
        return t >= seg.begin
                   ? Elements<bf16>(rows, ((seg.row + t - seg.begin) * shape.Hkv + tile_.h) * D)
                   : Elements<bf16>(old, (tile_.h * places + t % places) * D);
      };
      for (int64_t t = first; t < last; t += 2, row += 2) {
        for (int64_t i = 0; i < 2; ++i)
          std::memcpy(k_ + (row + i) * D / 2, rows_of(wave.forward->k, old_k, t + i),
                      static_cast<size_t>(D) * sizeof(bf16));
        PairRows(rows_of(wave.forward->v, old_v, t), rows_of(wave.forward->v, old_v, t + 1),
                 shape.D, v_ + row / 2 * D);
      }
    };
    gather(0, std::min(S, end), slot.sink_k, slot.sink_v, S, 0);
    gather(tile_.FirstKey(), end, slot.ring_k, slot.ring_v, W, SinkRows());
  }

  const DslaQueryTile& tile_;
  uint32_t* query_;  // [D / 2, lanes] pairs of dimensions
  uint32_t* k_;      // [keys, D / 2] the same
  uint32_t* v_;      // [keys / 2, D] pairs of keys
  float* scores_;    // [sinks + keys of a block, lanes]
};

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_POP_ATTRIBUTES

#endif  // HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3

#endif  // DSLA_OPS_DSLA_WINDOW_BF16_INL_H_
