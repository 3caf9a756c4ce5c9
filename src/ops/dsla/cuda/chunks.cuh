// What `chunks` does to a chunk for one query head, phase by phase. The states stay in registers
// meanwhile and leave few others: so what a block needs to know is in shared memory, and a thread
// reads its index anew in each phase, since what is computed from it would else be kept.
#pragma once

#include "ops/dsla/cuda/prefill.cuh"

namespace dsla::cuda {

// States and signs of the features that a launch does. Warp w of 2 D / 32 has value columns
// [16 w, 16 w + 16) of the states.
template <int D_, int kStates_, int kSigns_, int kStages_>
struct ChunksShape {
  static constexpr int D = D_, kStates = kStates_, kSigns = kSigns_, kStages = kStages_;
  static constexpr int kThreads = 2 * D, kPieces = D / 8, kBlocks = kStates * kSigns;
  static constexpr int kSF = D * kBlocks, kSteps = kSF / 16;
  static constexpr int kHalves = D / 64;  // of the queries' columns, and of the scores'
  // A launch has at most 256 channels: two do the 512 of the largest shape.
  static constexpr bool kMayShareStates = D == 128 && kStates == 1 && kSigns == 2;
};

// What a block does.
struct Work {
  int n, e0, at, count, first_lo, last_hi;  // of its segment
  int pos, row0;                            // row0: of q and out, for row 0 of the first chunk
  int h, first_head, last_head;
  bool ends;  // in the slot

  // Of the segment's chunk i: rows that belong to this call, and the row of q and out of its row 0.
  __device__ __forceinline__ int lo(int i) const { return i == 0 ? first_lo : 0; }
  __device__ __forceinline__ int hi(int i) const { return i == count - 1 ? last_hi : kChunk; }
  __device__ __forceinline__ int64_t row(int i) const { return int64_t{row0} + i * kChunk; }
  // Its rows in what the workspace has for each chunk and query head.
  __device__ __forceinline__ int64_t part(int i, int H, int head) const {
    return (int64_t{at + i} * H + head) * kChunk;
  }
};

// K~ and V of a chunk are needed from the scores to the end of it, all else for a shorter time. So
// with one stage of them the next chunk's come in while its queries are projected.
template <typename S>
struct ChunksShared {
  uint4 key[S::kStages][kChunk * S::kSF / 8];  // K~ [SF / D][64][D]
  uint4 v[S::kStages][kChunk * S::D / 8];
  uint4 query[kChunk * S::kSF / 8];  // Q~ [SF / 16][4 tiles of 16 rows] in the order of mma's A
  uint4 phi[S::D * S::D / 8];        // phi_q
  uint4 q[kChunk * S::D / 8];
  uint4 window[kChunk * S::D / 8];           // the window's result
  uint4 score[kChunk * kChunk / 8];          // tril(Q~ K~^T) [4 tiles][64 / 16] in the order of A
  float4 decay[S::kStages + 1][S::kSF / 2];  // e^R, e^{L-R}
  float norm[S::kSF];                        // e^R z
  float log_sum[2][2][S::kHalves == 2 ? kChunk : 1];  // of e^y, e^{-y} over 64 columns, in base 2
  float denominator[2 * S::kHalves][kChunk];          // parts of it
  Work work;
};

// A thread's index and place in the fragments. Read anew in each phase: what is computed from it
// would else be kept in registers all the time, and the states leave few.
__device__ __forceinline__ int ThisThread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
struct Place {
  int lane, warp, g, t;
};
__device__ __forceinline__ Place ThisPlace() {
  const int thread = ThisThread(), lane = thread % 32;
  return {lane, thread / 32, lane / 4, lane % 4};
}

// The 64 threads that share a tile of 16 rows.
__device__ __forceinline__ void SyncTile(int tile) {
  asm volatile("bar.sync %0, 64;" ::"r"(1 + tile) : "memory");
}

__device__ __forceinline__ void PrefetchToL2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Q~ of 16 rows and 64 columns of each block of D channels a warp, and its part of the denominator.
// `growth` is the chunk's.
template <typename S>
__device__ __forceinline__ void ProjectQueries(const PrefillParams& p, ChunksShared<S>& shared,
                                               const uint4* growth, int head) {
  constexpr int D = S::D, kPieces = S::kPieces, kHalves = S::kHalves;
  constexpr int kStates = S::kStates, kSigns = S::kSigns, kBlocks = S::kBlocks;
  constexpr int kAhead = kSigns == 1 ? 4 * kStates : 4;  // pieces of e^{G-R} on their way
  const auto [lane, warp, g, t] = ThisPlace();
  const int tile = warp % 4, half = warp / 4, rows[2] = {16 * tile + g, 16 * tile + g + 8};
  growth += (tile * (D / 16) + 4 * half) * 32 + lane;
  // Pieces in the order of their use: signs, 16 columns each, states.
  const auto piece = [&](int k) {
    const int b = k % kStates * kSigns + k / (4 * kStates), c = k / kStates % 4;
    return growth[b * (8 * D) + c * 32];
  };
  uint4 grown[kAhead];
#pragma unroll
  for (int k = 0; k < kAhead; ++k) grown[k] = piece(k);
  float y[8][4] = {};
  const uint32_t q = SharedAddress(shared.q);
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    uint32_t a[4];
    LoadMatrix(a, q + 16 * Swizzle<kPieces>(16 * tile + lane % 16, 2 * c + lane / 16));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 b = shared.phi[(c * (D / 16) + 4 * half + j) * 32 + lane];
      Mma(y[2 * j], a, b.x, b.y);
      Mma(y[2 * j + 1], a, b.z, b.w);
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) y[j][c] *= 1.4426950408889634f;
  float norm[2] = {};
#pragma unroll
  for (int sign = 0; sign < kSigns; ++sign) {
    // e^y relative to the largest of these columns, then to the sum over all. Of the last sign
    // they take the place of y.
    constexpr int kLastSign = kSigns - 1;
    const auto relative = [&](float x, float largest) {
      return Exp2((sign == 0 ? x : -x) - largest);
    };
    float scale[2], top[2], log_sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = 0;
      top[r] = -INFINITY;
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c)
          top[r] = fmaxf(top[r], sign == 0 ? y[j][c] : -y[j][c]);
      top[r] = QuadMax(top[r]);
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c) {
          const float e = relative(y[j][c], top[r]);
          if (sign == kLastSign) y[j][c] = e;
          sum += e;
        }
      log_sum[r] = top[r] + Log2(QuadSum(sum));
      if (kHalves == 2 && t == 0) shared.log_sum[sign][half][rows[r]] = log_sum[r];
    }
    if constexpr (kHalves == 2) SyncTile(tile);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (kHalves == 2) {
        const float other = shared.log_sum[sign][1 - half][rows[r]];
        const float high = fmaxf(log_sum[r], other);
        log_sum[r] = high + Log2(Exp2(log_sum[r] - high) + Exp2(other - high));
      }
      scale[r] = sign == kLastSign ? Exp2(top[r] - log_sum[r]) : 1.f;
    }
    float weight[kStates][2];
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const float mix = p.layer.mix[head * p.layer.states + p.state_part * kStates + k];
      weight[k][0] = mix * scale[0];
      weight[k][1] = mix * scale[1];
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float e[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          e[j][k] = sign == kLastSign ? y[2 * c + j][k] : relative(y[2 * c + j][k], log_sum[k / 2]);
#pragma unroll
      for (int state = 0; state < kStates; ++state) {
        const int k = (sign * 4 + c) * kStates + state, b = state * kSigns + sign;
        const uint4 grow = grown[k % kAhead];
        const uint32_t by[4] = {grow.x, grow.y, grow.z, grow.w};
        const float2* norms = reinterpret_cast<const float2*>(shared.norm + b * D + 64 * half);
        uint32_t a[4];
#pragma unroll
        for (int f = 0; f < 4; ++f) {
          const int r = f % 2;
          a[f] = Pack(e[f / 2][2 * r] * weight[state][r] * Low(by[f]),
                      e[f / 2][2 * r + 1] * weight[state][r] * High(by[f]));
          const float2 of = norms[8 * c + 4 * (f / 2) + t];
          norm[r] += Low(a[f]) * of.x + High(a[f]) * of.y;
        }
        shared.query[((b * (D / 16) + 4 * half + c) * 4 + tile) * 32 + lane] = {a[0], a[1], a[2],
                                                                                a[3]};
        if (k + kAhead < 4 * kBlocks) grown[k % kAhead] = piece(k + kAhead);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    norm[r] = QuadSum(norm[r]);
    if (t == 0) shared.denominator[half][rows[r]] = norm[r];
  }
}

// A of 16 rows and 64 or 32 keys a warp: halves such that the triangle is shared among the parts of
// a multiprocessor. And its part of the denominator.
template <typename S>
__device__ __forceinline__ void MultiplyScores(ChunksShared<S>& shared, uint32_t key) {
  constexpr int D = S::D, kPieces = S::kPieces, kHalves = S::kHalves;
  constexpr int kGroups = 4 / kHalves;
  const auto [lane, warp, g, t] = ThisPlace();
  const int half = warp / 4, m = half == 0 ? warp : 7 - warp, first = half * kGroups;
  float score[2 * kGroups][4] = {}, norm[2] = {};
  if (first <= m) {
#pragma unroll
    for (int k = 0; k < S::kSteps; ++k) {
      const uint4 query = shared.query[(k * 4 + m) * 32 + lane];
      const uint32_t a[4] = {query.x, query.y, query.z, query.w};
      const int c = k % (D / 16), block = k / (D / 16) * (kChunk * D * 2);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        uint32_t b[4];
        LoadMatrix(b, key + block +
                          16 * Swizzle<kPieces>(16 * (first + j) + lane % 8 + lane / 16 * 8,
                                                2 * c + lane / 8 % 2));
        Mma(score[2 * j], a, b[0], b[1]);
        Mma(score[2 * j + 1], a, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    uint32_t a[4];
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const int r = f % 2, row = 16 * m + g + 8 * r, s = 16 * (first + j) + 2 * t + f / 2 * 8;
      const float(&from)[4] = score[2 * j + f / 2];
      // Selected, not multiplied: above the diagonal products may be infinite.
      a[f] = Pack(s <= row ? from[2 * r] : 0.f, s + 1 <= row ? from[2 * r + 1] : 0.f);
      norm[r] += Low(a[f]) + High(a[f]);
    }
    shared.score[(m * 4 + first + j) * 32 + lane] = {a[0], a[1], a[2], a[3]};
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    norm[r] = QuadSum(norm[r]);
    if (t == 0) shared.denominator[kHalves + half][16 * m + g + 8 * r] = norm[r];
  }
}

// Divides 64 rows, 16 columns a warp by the denominator, merges them with the window's, and writes
// them. weight: of rows `lane` and `lane + 32`, the states' over the denominator, the window's.
template <typename S>
__device__ __forceinline__ void WriteRows(const PrefillParams& p, const ChunksShared<S>& shared,
                                          float (&out)[4][2][4], const float2 (&weight)[2], int i,
                                          int head, const Place& place) {
  constexpr int D = S::D, kPieces = S::kPieces;
  const Layer& l = p.layer;
  const Work& work = shared.work;
  const auto [lane, warp, g, t] = place;
  const uint32_t* window = reinterpret_cast<const uint32_t*>(shared.window) + t;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * m + 8 * r + g, from = (16 * m + 8 * r) % 32 + g;
      if constexpr (S::kMayShareStates) {
        if (p.state_parts > 1) {
          float2* partial = reinterpret_cast<float2*>(
                                p.partial + (work.part(i, l.H, head) + row) * D + 16 * warp) +
                            t;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            float &x0 = out[m][n][2 * r], &x1 = out[m][n][2 * r + 1];
            if (p.state_part == 0) {
              partial[4 * n] = {x0, x1};
            } else {
              x0 += partial[4 * n].x;
              x1 += partial[4 * n].y;
            }
          }
          if (p.state_part + 1 < p.state_parts) continue;
        }
      }
      const float w = __shfl_sync(~0u, weight[m / 2].x, from);
      const float rest = __shfl_sync(~0u, weight[m / 2].y, from);
      uint32_t packed[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float x0 = w * out[m][n][2 * r], x1 = w * out[m][n][2 * r + 1];
        if (l.W > 0) {
          const uint32_t x = window[4 * Swizzle<kPieces>(row, 2 * warp + n)];
          x0 += rest * Low(x);
          x1 += rest * High(x);
        }
        packed[n] = Pack(x0, x1);
      }
      // Two lanes exchange halves, so that each has four columns in a row.
      const bool is_odd = t % 2;
      const uint32_t got = __shfl_xor_sync(~0u, is_odd ? packed[0] : packed[1], 1);
      if (row < work.lo(i) || row >= work.hi(i)) continue;
      auto* to = reinterpret_cast<uint2*>(p.out + ((work.row(i) + row) * l.H + head) * D +
                                          16 * warp + (is_odd ? 2 * t + 6 : 2 * t));
      *to = is_odd ? uint2{got, packed[1]} : uint2{packed[0], got};
    }
}

}  // namespace dsla::cuda
