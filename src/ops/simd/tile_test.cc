// GemmTile against a sum in fp64, on every target this CPU has.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/simd/tile_test.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Must come after foreach_target.h.
#include "hwy/highway.h"
#include "ops/simd/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {
void CallGemmTile(const float* a, ptrdiff_t a_row, ptrdiff_t a_col, const float* b, ptrdiff_t b_row,
                  float* c, ptrdiff_t c_row, int M, int N, int K, bool accumulate) {
  GemmTile(a, a_row, a_col, b, b_row, c, c_row, M, N, K, accumulate);
}
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <vector>

#include "ops/simd/each_target.h"
#include "ops/testing/expect_close.h"

namespace dsla {
namespace {

HWY_EXPORT(CallGemmTile);

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// A product with its operands in rows that are longer than needed, filled with NaN.
struct Product {
  int M, N, K;
  bool transposed;
  ptrdiff_t a_stride, b_stride, c_stride;
  std::vector<float> a, b, c;

  Product(int m, int n, int k, bool trans, std::mt19937& rng)
      : M(m),
        N(n),
        K(k),
        transposed(trans),
        a_stride((trans ? m : k) + 3),
        b_stride(n + 5),
        c_stride(n + 2) {
    std::normal_distribution<float> normal;
    a.assign(static_cast<size_t>((trans ? K : M) * a_stride), kNaN);
    b.assign(static_cast<size_t>(K * b_stride), kNaN);
    c.assign(static_cast<size_t>(M * c_stride), kNaN);
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < K; ++j) A(i, j) = normal(rng);
    for (int i = 0; i < K; ++i)
      for (int j = 0; j < N; ++j) b[static_cast<size_t>(i * b_stride + j)] = normal(rng);
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) c[static_cast<size_t>(i * c_stride + j)] = normal(rng);
  }
  float& A(int i, int k) {
    return a[static_cast<size_t>(transposed ? k * a_stride + i : i * a_stride + k)];
  }
  std::vector<float> Dense() const {
    std::vector<float> x;
    for (int i = 0; i < M; ++i)
      x.insert(x.end(), c.begin() + i * c_stride, c.begin() + i * c_stride + N);
    return x;
  }
  std::vector<double> Want(bool accumulate) {
    std::vector<double> x;
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < N; ++j) {
        double sum = accumulate ? c[static_cast<size_t>(i * c_stride + j)] : 0;
        for (int k = 0; k < K; ++k)
          sum += double{A(i, k)} * b[static_cast<size_t>(k * b_stride + j)];
        x.push_back(sum);
      }
    }
    return x;
  }
  void Run(int first_row, int rows, bool accumulate) {
    const ptrdiff_t a_row = transposed ? 1 : a_stride, a_col = transposed ? a_stride : 1;
    HWY_DYNAMIC_DISPATCH(CallGemmTile)
    (a.data() + first_row * a_row, a_row, a_col, b.data(), b_stride,
     c.data() + first_row * c_stride, c_stride, rows, N, K, accumulate);
  }
};

TEST(GemmTile, MatchesFp64ForAnyShape) {
  ForEachTarget([] {
    constexpr unsigned kSeed = 11;
    std::mt19937 rng(kSeed);
    for (const int M : {1, 2, 5, 6, 7, 8, 13, 50, 65}) {
      for (const int N : {1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64}) {
        for (const int K : {1, 2, 16, 64, 300}) {
          for (const bool transposed : {false, true}) {
            for (const bool accumulate : {false, true}) {
              SCOPED_TRACE(::testing::Message()
                           << "seed " << kSeed << " M " << M << " N " << N << " K " << K
                           << " transposed " << transposed << " accumulate " << accumulate);
              Product p(M, N, K, transposed, rng);
              const std::vector<double> want = p.Want(accumulate);
              p.Run(0, M, accumulate);
              ExpectClose(p.Dense(), want, SumTolerance(K));
              for (int i = 0; i < M; ++i)  // nothing is written past a row's end
                for (ptrdiff_t j = N; j < p.c_stride; ++j)
                  ASSERT_TRUE(std::isnan(p.c[static_cast<size_t>(i * p.c_stride + j)]));
            }
          }
        }
      }
    }
  });
}

TEST(GemmTile, RowsDoNotDependOnTheSplit) {
  ForEachTarget([] {
    std::mt19937 rng(12);
    for (const int N : {5, 16, 64, 77}) {
      for (const int K : {64, 300}) {
        Product whole(70, N, K, false, rng);
        Product parts = whole, single = whole;
        whole.Run(0, 70, true);
        parts.Run(0, 9, true);
        parts.Run(9, 60, true);
        parts.Run(69, 1, true);
        for (int i = 0; i < 70; ++i) single.Run(i, 1, true);
        EXPECT_EQ(whole.Dense(), parts.Dense()) << "N " << N << " K " << K;
        EXPECT_EQ(whole.Dense(), single.Dense()) << "N " << N << " K " << K;
      }
    }
  });
}

TEST(GemmTile, EmptySumIsZeroOrC) {
  ForEachTarget([] {
    std::mt19937 rng(13);
    Product p(3, 5, 0, false, rng);
    const std::vector<float> before = p.Dense();
    p.Run(0, 3, true);
    EXPECT_EQ(p.Dense(), before);
    p.Run(0, 3, false);
    EXPECT_EQ(p.Dense(), std::vector<float>(15, 0.f));
  });
}

}  // namespace
}  // namespace dsla
#endif  // HWY_ONCE
