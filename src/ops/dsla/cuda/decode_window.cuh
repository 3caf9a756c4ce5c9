// The window's part of a decode step: a warp has one or two tiles of 16 keys of one (row, KV head)
// at a time and all query heads of the group at once, on the tensor cores. q k^T has the queries as
// the rows of A, so its accumulators are, as they lie, the A operand of the product with V. Of the
// 16 rows that `mma` has, a group fills 8 at most: the other 8 take what the rounding of the
// weights to bf16 left, so that a weight has 17 bits and the product costs no more for it.
#pragma once

#include "ops/dsla/cuda/decode.cuh"

namespace dsla::cuda {

// The keys of one (row, KV head) as one list: the ring's W places, then the sinks.
template <int D>
__device__ __forceinline__ bool AllThere(const Layer& l, const Task<D>& task) {
  return task.t >= l.W + l.S - 1;
}
template <int D>
__device__ __forceinline__ bool IsThere(const Layer& l, const Task<D>& task, int j) {
  if (j >= l.W) return j - l.W < l.S && j - l.W <= task.t;
  return task.t - task.newest + j - (j > task.newest ? l.W : 0) >= l.S;
}

// Keys [first, first + 16), then their values, to a tile of shared memory: K [16, D] and V [16, D]
// in bf16, swizzled; zeros where there are none. By one warp. Without `rows` the new token's are
// left out, for FetchNewKey.
template <int D>
__device__ __forceinline__ void FetchKeys(const DecodeParams& p, const Task<D>& task, uint4* to,
                                          int first, bool rows) {
  constexpr int kPieces = D / 8, kRows = 32 / kPieces;
  const Layer& l = p.layer;
  const uint32_t lane = Lane();
  const int c = lane % kPieces, row0 = lane / kPieces;
  uint4* const to_v = to + kTile * kPieces;
  const __nv_bfloat16* const ring_k = task.Rows(l.at.ring_k, l.W) + 8 * c;
  const __nv_bfloat16* const ring_v = task.Rows(l.at.ring_v, l.W) + 8 * c;
  const int taken = task.Taken(l);
  const bool has_new = static_cast<unsigned>(taken - first) < kTile;
  if (AllThere(l, task) && first + kTile <= l.W && !has_new) {
    const int64_t at = int64_t{first + row0} * D;
#pragma unroll
    for (int i = 0; i < kTile / kRows; ++i) {
      const int place = Swizzle<kPieces>(i * kRows + row0, c);
      CopyAsync(to + place, ring_k + at + i * kRows * D);
      CopyAsync(to_v + place, ring_v + at + i * kRows * D);
    }
    return;
  }
  // Sinks begin at j = W.
  const __nv_bfloat16* const sinks_k = task.Rows(l.at.sink_k, l.S) - int64_t{l.W} * D + 8 * c;
  const __nv_bfloat16* const sinks_v = task.Rows(l.at.sink_v, l.S) - int64_t{l.W} * D + 8 * c;
#pragma unroll 1
  for (int row = row0; row < kTile; row += kRows) {
    const int j = first + row, place = Swizzle<kPieces>(row, c);
    const int64_t at = int64_t{j} * D;
    const bool is_new = j == taken, valid = IsThere(l, task, j);
    if (is_new && !rows) continue;
    CopyAsync(to + place, is_new ? task.NewKey(p) + 8 * c : (j < l.W ? ring_k : sinks_k) + at,
              valid);
    CopyAsync(to_v + place, is_new ? task.NewValue(p) + 8 * c : (j < l.W ? ring_v : sinks_v) + at,
              valid);
  }
}

// The new token's key and value, to the tile that FetchKeys has left them out of. By one warp.
template <int D>
__device__ __forceinline__ void FetchNewKey(const DecodeParams& p, const Task<D>& task, uint4* to) {
  constexpr int kPieces = D / 8;
  const int lane = Lane(), c = lane % kPieces,
            place = Swizzle<kPieces>(task.Taken(p.layer) % kTile, c);
  if (lane < kPieces)
    CopyAsync(to + place, task.NewKey(p) + 8 * c);
  else if (lane < 2 * kPieces)
    CopyAsync(to + kTile * kPieces + place, task.NewValue(p) + 8 * c);
}

// Tiles that a warp has at a time: 8 KB, where places for them are 16 KB or nothing would be on its
// way meanwhile. Two together make a chain of latencies that is hardly longer than one's.
constexpr int JointTiles(int D) { return D == 64 ? 2 : 1; }

// Softmax in base 2 over a step's tiles, some after others, and over a strand's steps. A lane has
// the scores of query heads 2 (lane % 4) + {0, 1} of the group, and of the sums of values query
// head lane / 4, columns 8 c + 2 (lane % 4) + {0, 1}.
template <int D, int kG>
struct Window {
  static constexpr int kJoint = JointTiles(D);
  uint32_t q[D / 16][2];  // as B
  float acc[D / 8][2], top[2], weights[2];
  float all_top[2], all_weights[2];  // of the steps that have been added to the strand's sums

  __device__ __forceinline__ void LoadQueries(const DecodeParams& p, const Task<D>& task) {
    const int lane = Lane(), g = lane / 4, t = lane % 4, G = p.layer.G;
    const __nv_bfloat16* from = p.q + task.n * p.q_stride + (task.h * G + g) * D + 2 * t;
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        q[k][i] = g < G ? *reinterpret_cast<const uint32_t*>(from + 16 * k + 8 * i) : 0;
  }

  __device__ __forceinline__ void Begin() {
    top[0] = top[1] = -INFINITY;
    weights[0] = weights[1] = 0;
#pragma unroll
    for (int c = 0; c < D / 8; ++c) acc[c][0] = acc[c][1] = 0;
  }

  // Tiles whose keys begin at `first` and `stride` keys further on. One that lies past the last key
  // counts for nothing, whatever finite numbers its place has.
  __device__ __forceinline__ void Add(const DecodeParams& p, const Task<D>& task,
                                      const uint4* const (&tiles)[kJoint], int first, int stride) {
    constexpr int kPieces = D / 8, kColumns = 4 / kJoint;  // tiles of 8 columns at a time
    const int lane = Lane(), row = lane % 16, half = lane / 16;
    const float scale = rsqrtf(static_cast<float>(D)) * kLog2e;
    float s[kJoint][2][4] = {};  // of even and odd k
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
      for (int j = 0; j < kJoint; ++j) {
        uint32_t a[4];
        LoadMatrix(a, SharedAddress(tiles[j] + Swizzle<kPieces>(row, 2 * k + half)));
        Mma(s[j][k % 2], a, q[k][0], q[k][1]);
      }
    float x[kJoint][4];  // of keys lane / 4 and that + 8, two queries each
#pragma unroll
    for (int j = 0; j < kJoint; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) x[j][c] = __fmul_rn(s[j][0][c] + s[j][1][c], scale);
      const int key = first + j * stride;
      if (AllThere(p.layer, task) && key + kTile <= p.keys) continue;
#pragma unroll
      for (int c = 0; c < 4; c += 2)
        if (!IsThere(p.layer, task, key + lane / 4 + 4 * c)) x[j][c] = x[j][c + 1] = -INFINITY;
    }
    float rest[2];  // what the sums so far count for
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float highest = -INFINITY;
#pragma unroll
      for (int j = 0; j < kJoint; ++j) highest = fmaxf(highest, fmaxf(x[j][i], x[j][2 + i]));
#pragma unroll
      for (int j = 4; j < 32; j *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, j));
      const Scales to(top[i], highest);
      rest[i] = to.a;
      top[i] = to.top;
      const float base = top[i] == -INFINITY ? 0.f : top[i];
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kJoint; ++j) {
        x[j][i] = Exp2(x[j][i] - base);
        x[j][2 + i] = Exp2(x[j][2 + i] - base);
        sum += x[j][i] + x[j][2 + i];
      }
      weights[i] = __fmaf_rn(rest[i], weights[i], sum);
    }
    uint32_t weight[kJoint][4];  // as A: rows 0 to 7 rounded to bf16, rows 8 to 15 the rest
#pragma unroll
    for (int j = 0; j < kJoint; ++j)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t rounded = Pack(x[j][i], x[j][i + 1]);
        weight[j][i] = Transposed(rounded);
        weight[j][i + 1] = Transposed(Pack(x[j][i] - Low(rounded), x[j][i + 1] - High(rounded)));
      }
    const float rest_of_row = OfRow(rest);
#pragma unroll
    for (int c0 = 0; c0 < D / 8; c0 += kColumns) {
      float value[kColumns][4] = {};
#pragma unroll
      for (int j = 0; j < kJoint; ++j)
#pragma unroll
        for (int c = 0; c < kColumns; c += 2) {
          uint32_t b[4];
          LoadMatrixTransposed(
              b, SharedAddress(tiles[j] + kTile * kPieces + Swizzle<kPieces>(row, c0 + c + half)));
          Mma(value[c], weight[j], b[0], b[1]);
          Mma(value[c + 1], weight[j], b[2], b[3]);
        }
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          acc[c0 + c][i] = __fmaf_rn(rest_of_row, acc[c0 + c][i], value[c][i] + value[c][2 + i]);
    }
  }

  // Adds the step's sums to those in `sums`, or begins them. A lane sees what it has written.
  __device__ __forceinline__ void End(const DecodeParams& p, Sums<D, kG>& sums, bool begins) {
    const int lane = Lane(), g = lane / 4, t = lane % 4, G = p.layer.G;
    float a[2], b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 4; j < 32; j *= 2) weights[i] += __shfl_xor_sync(~0u, weights[i], j);
      const Scales s(begins ? -INFINITY : all_top[i], top[i]);
      all_weights[i] = begins ? weights[i] : Blend(s.a, all_weights[i], s.b, weights[i]);
      all_top[i] = s.top;
      a[i] = s.a, b[i] = s.b;
      if (g == 0 && 2 * t + i < G) {
        sums.top[2 * t + i] = all_top[i];
        sums.weights[2 * t + i] = all_weights[i];
      }
    }
    const float a_of_row = OfRow(a), b_of_row = OfRow(b);
    if (g >= G) return;
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      float2& at = *reinterpret_cast<float2*>(&sums.window[g][8 * c + 2 * t]);
      at = begins ? float2{acc[c][0], acc[c][1]}
                  : float2{Blend(a_of_row, at.x, b_of_row, acc[c][0]),
                           Blend(a_of_row, at.y, b_of_row, acc[c][1])};
    }
  }

 private:
  // From the lanes that have query head lane / 4.
  __device__ __forceinline__ static float OfRow(const float (&x)[2]) {
    const int g = Lane() / 4;
    const float even = __shfl_sync(~0u, x[0], g / 2), odd = __shfl_sync(~0u, x[1], g / 2);
    return g % 2 ? odd : even;
  }
};

}  // namespace dsla::cuda
