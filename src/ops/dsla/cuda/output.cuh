// Queries of the chunked form, in registers of a warp that has 16 of them: features, Q~, and scores
// within the chunk. Fragments as mma.cuh has them.
#pragma once

#include "ops/dsla/cuda/prefill.cuh"

namespace dsla::cuda {

// From q phi_q, whose features are phi = e^{y - log(sum e^y)}, and phi(-y) if there are both: the
// logarithms of the sums, in base 2.
template <int D>
__device__ __forceinline__ void LogSums(const float (&y)[D / 8][4], bool both_signs,
                                        float (&log_sum)[2][2]) {  // [sign][row]
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float high = -INFINITY, low = -INFINITY, sum = 0, sum_negative = 0;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int c = 2 * r; c < 2 * r + 2; ++c) {
        high = fmaxf(high, y[j][c]);
        low = fmaxf(low, -y[j][c]);
      }
    high = QuadMax(high) * kLog2e;
    low = QuadMax(low) * kLog2e;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int c = 2 * r; c < 2 * r + 2; ++c) {
        sum += Exp2(y[j][c] * kLog2e - high);
        if (both_signs) sum_negative += Exp2(y[j][c] * -kLog2e - low);
      }
    log_sum[0][r] = high + Log2(QuadSum(sum));
    log_sum[1][r] = low + Log2(QuadSum(sum_negative));
  }
}

// The logarithms of a head's mix, of two states at most.
struct LogMix {
  float of[2];
  __device__ __forceinline__ LogMix(const Layer& l, int head) {
#pragma unroll
    for (int s = 0; s < 2; ++s)  // a mix may be 0
      of[s] = s < l.states ? __log2f(l.mix[head * l.states + s]) : 0.f;
  }
};

// What turns y into the features of a block of D channels, mixed: 2^{scale y + base}, by row.
struct BlockOfFeatures {
  float scale, base[2];
  __device__ __forceinline__ BlockOfFeatures(int b, bool both_signs, const LogMix& log_mix,
                                             const float (&log_sum)[2][2]) {
    const bool negative = both_signs && b % 2 == 1;
    const float mix = (both_signs ? b / 2 : b) == 0 ? log_mix.of[0] : log_mix.of[1];
    scale = negative ? -kLog2e : kLog2e;
    base[0] = mix - (negative ? log_sum[1][0] : log_sum[0][0]);
    base[1] = mix - (negative ? log_sum[1][1] : log_sum[0][1]);
  }
};

// Q~ of channels [16 c, 16 c + 16) of a block as A operand, from e^{G-R} in the same order, and its
// products with e^R z (from the lane's t on).
template <int D>
__device__ __forceinline__ void MakeQueries(uint32_t (&a)[4], const float (&y)[D / 8][4], int c,
                                            const BlockOfFeatures& of, const uint4& growth,
                                            const float2* z, float (&norm)[2]) {
  const uint32_t e[4] = {growth.x, growth.y, growth.z, growth.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = i % 2;
    const float(&from)[4] = y[2 * c + i / 2];
    a[i] = Pack(Exp2(of.scale * from[2 * r] + of.base[r]) * Low(e[i]),
                Exp2(of.scale * from[2 * r + 1] + of.base[r]) * High(e[i]));
    const float2 state_norm = z[8 * c + 4 * (i / 2)];
    norm[r] = fmaf(High(a[i]), state_norm.y, fmaf(Low(a[i]), state_norm.x, norm[r]));
  }
}

// tril(Q~ K~^T) of rows 16 warp .. and columns [16 c, 16 c + 16) as A operand, and its rows' sums.
__device__ __forceinline__ void MaskScores(uint32_t (&a)[4], float (&score)[kChunk / 8][4], int c,
                                           int warp, int lane, float (&norm)[2]) {
  if (c > warp) {
    a[0] = a[1] = a[2] = a[3] = 0;
    return;
  }
  float(&left)[4] = score[2 * c], (&right)[4] = score[2 * c + 1];
  if (c == warp) {  // selected, not multiplied: above the diagonal products may be infinite
    const int row = lane / 4, column = lane % 4 * 2;
    if (column > row) left[0] = right[2] = 0;
    if (column + 1 > row) left[1] = right[3] = 0;
    right[0] = right[1] = 0;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = i % 2;
    const float(&from)[4] = i < 2 ? left : right;
    a[i] = Pack(from[2 * r], from[2 * r + 1]);
    norm[r] += Low(a[i]) + High(a[i]);
  }
}

// The states' share of a row's output; `lse` is the log-sum-exp of the window, which has the rest.
__device__ __forceinline__ float StatesShare(float denominator, float lse, float claim) {
  return denominator < kDslaEpsilon ? 0.f : Reciprocal(1 + Exp(lse - claim));
}

}  // namespace dsla::cuda
