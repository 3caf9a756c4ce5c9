// The window's part of a decode step: a warp has tiles of 16 keys of one (row, KV head) and all
// query heads of the group at once, on the tensor cores. q k^T has the queries as the rows of A, so
// its accumulators are, as they lie, the A operand of the product with V. Of the 16 rows that `mma`
// has, a group fills 8 at most: the other 8 take what the rounding of the weights to bf16 left, so
// that a weight has 17 bits and the product costs no more for it.
#pragma once

#include "ops/dsla/cuda/decode.cuh"

namespace dsla::cuda {

// A block's shared memory is tiles: K [16, D] and V [16, D] in bf16, swizzled. A part of a (row, KV
// head) has at most 88 KB of them, all on the way at once, and a block's warps take them in turn.
inline constexpr int kKeyTile = 16;
constexpr int TileBytes(int D) { return kKeyTile * D * 2 * 2; }
constexpr int MaxTiles(int D) { return 88 * 1024 / TileBytes(D); }
constexpr int Warps(int D) { return 512 / D; }
inline constexpr int kWarpTiles = 3;
static_assert(kWarpTiles * Warps(64) >= MaxTiles(64) && kWarpTiles * Warps(128) >= MaxTiles(128));

// Of the calling thread; the same for a warp's threads in a way that the compiler sees.
__device__ __forceinline__ int Warp() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

// Where tile `i` of this block's part begins in the list of keys; there are no more from p.keys on.
__device__ __forceinline__ int FirstKey(const DecodeParams& p, int i) {
  return (i * p.parts + static_cast<int>(blockIdx.x)) * kKeyTile;
}

// The keys of one (row, KV head) as one list: the ring's W places, then the sinks.
template <int D>
struct Keys {
  const __nv_bfloat16 *ring_k, *ring_v;    // place 0
  const __nv_bfloat16 *sinks_k, *sinks_v;  // W rows before sink 0
  const __nv_bfloat16 *new_k, *new_v;
  int W, S, t;
  int newest;  // the ring's place that token t takes
  int taken;   // where in the list token t counts: a young sink is in the ring too

  __device__ __forceinline__ Keys(const DecodeParams& p, const std::byte* slot, int n, int h, int t)
      : W(p.layer.W), S(p.layer.S), t(t) {
    const Layer& l = p.layer;
    const int64_t ring = int64_t{h} * W * D, sink = (int64_t{h} * S - W) * D;
    ring_k = reinterpret_cast<const __nv_bfloat16*>(slot + l.at.ring_k) + ring;
    ring_v = reinterpret_cast<const __nv_bfloat16*>(slot + l.at.ring_v) + ring;
    sinks_k = reinterpret_cast<const __nv_bfloat16*>(slot + l.at.sink_k) + sink;
    sinks_v = reinterpret_cast<const __nv_bfloat16*>(slot + l.at.sink_v) + sink;
    new_k = p.rows.k + n * p.rows.k_stride + h * D;
    new_v = p.rows.v + n * p.rows.v_stride + h * D;
    newest = W > 0 ? t % W : 0;
    taken = t < S ? W + t : newest;
  }

  // All keys of the list are there.
  __device__ __forceinline__ bool Full() const { return t >= W + S - 1; }
  __device__ __forceinline__ bool Valid(int j) const {
    if (j >= W) return j - W < S && j - W <= t;
    return t - newest + j - (j > newest ? W : 0) >= S;
  }

  // Keys [first, first + 16) and their values to a tile, by one warp; zeros where there are none.
  __device__ __forceinline__ void Fetch(uint4* to, int first) const {
    constexpr int kPieces = D / 8, kRows = 32 / kPieces;
    const int c = threadIdx.x % kPieces, row0 = threadIdx.x % 32 / kPieces;
    uint4* const to_v = to + kKeyTile * kPieces;
    const bool has_new = static_cast<unsigned>(taken - first) < kKeyTile;
    if (Full() && first + kKeyTile <= W && !has_new) {
      const int64_t at = int64_t{first + row0} * D + 8 * c;
#pragma unroll
      for (int i = 0; i < kKeyTile / kRows; ++i) {
        const int place = Swizzle<kPieces>(i * kRows + row0, c);
        CopyAsync(to + place, ring_k + at + i * kRows * D);
        CopyAsync(to_v + place, ring_v + at + i * kRows * D);
      }
      return;
    }
#pragma unroll 1
    for (int row = row0; row < kKeyTile; row += kRows) {
      const int j = first + row, place = Swizzle<kPieces>(row, c);
      const int64_t at = int64_t{j} * D;
      const __nv_bfloat16* k = j == taken ? new_k : (j < W ? ring_k : sinks_k) + at;
      const __nv_bfloat16* v = j == taken ? new_v : (j < W ? ring_v : sinks_v) + at;
      const bool valid = Valid(j);
      CopyAsync(to + place, k + 8 * c, valid);
      CopyAsync(to_v + place, v + 8 * c, valid);
    }
  }
};

// Softmax in base 2 of a warp's tiles: tile i lies at i * TileBytes in `tiles`. Leaves the group's
// sums of p v in `values` [G, D], which may lie where the warp's first tile has its keys, the
// largest scores in `tops` and the sums of p in `weights` [G].
template <int D>
__device__ __forceinline__ void AttendTiles(const DecodeParams& p, const Keys<D>& keys,
                                            const uint4* tiles, int n, int h, float* values,
                                            float* tops, float* weights) {
  constexpr int kPieces = D / 8, kWarps = Warps(D), kColumns = 4;  // tiles of 8 columns at a time
  const int lane = threadIdx.x % 32, warp = Warp(), g = lane / 4, t = lane % 4;
  const int G = p.layer.G;
  uint32_t q[D / 16][2];  // rows 0 to 7 of A; rows 8 to 15 are zeros
  const __nv_bfloat16* from = p.q + n * p.q_stride + (h * G + g) * D + 2 * t;
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      q[k][i] = g < G ? *reinterpret_cast<const uint32_t*>(from + 16 * k + 8 * i) : 0;

  float x[kWarpTiles][4];  // of query g and keys {2t, 2t + 1, 2t + 8, 2t + 9}
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i) {
    const int tile = warp + i * kWarps, first = FirstKey(p, tile);
#pragma unroll
    for (int c = 0; c < 4; ++c) x[i][c] = -INFINITY;
    if (first >= p.keys) continue;
    WaitCopies<kWarpTiles - 1>();
    __syncwarp();
    CommitCopies();  // an empty group, so that the same wait fits the next tile
    float s[2][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const int row = lane % 8 + lane / 16 * 8, piece = 2 * k + lane / 8 % 2;
      uint32_t b[4];
      LoadMatrix(b,
                 SharedAddress(tiles + tile * (TileBytes(D) / 16) + Swizzle<kPieces>(row, piece)));
      const uint32_t a[4] = {q[k][0], 0, q[k][1], 0};
      Mma(s[0], a, b[0], b[1]);
      Mma(s[1], a, b[2], b[3]);
    }
    const float scale = rsqrtf(static_cast<float>(D)) * 1.4426950408889634f;
#pragma unroll
    for (int c = 0; c < 4; ++c) x[i][c] = s[c / 2][c % 2] * scale;
    if (!keys.Full() || first + kKeyTile > p.keys) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (!keys.Valid(first + 2 * t + c / 2 * 8 + c % 2)) x[i][c] = -INFINITY;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) top = fmaxf(top, x[i][c]);
  }
  top = QuadMax(top);
  const float base = top == -INFINITY ? 0.f : top;  // no key: all weights are 0
  float sum = 0;
  uint32_t weight[kWarpTiles][4];  // as A: rows 0 to 7 rounded to bf16, rows 8 to 15 the rest
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float p0 = Exp2(x[i][2 * half] - base), p1 = Exp2(x[i][2 * half + 1] - base);
      sum += p0 + p1;
      const uint32_t rounded = Pack(p0, p1);
      weight[i][2 * half] = rounded;
      weight[i][2 * half + 1] = Pack(p0 - Low(rounded), p1 - High(rounded));
    }
  sum = QuadSum(sum);
  if (g < G && t == 0) {
    tops[g] = top;
    weights[g] = sum;
  }
  __syncwarp();  // all lanes are done with the keys
#pragma unroll
  for (int c0 = 0; c0 < D / 8; c0 += kColumns) {
    float acc[kColumns][4] = {};
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      const int tile = warp + i * kWarps;
      if (FirstKey(p, tile) >= p.keys) break;
#pragma unroll
      for (int c = 0; c < kColumns; c += 2) {
        const int row = lane % 16, piece = c0 + c + lane / 16;
        uint32_t b[4];
        LoadMatrixTransposed(b, SharedAddress(tiles + tile * (TileBytes(D) / 16) +
                                              kKeyTile * kPieces + Swizzle<kPieces>(row, piece)));
        Mma(acc[c], weight[i], b[0], b[1]);
        Mma(acc[c + 1], weight[i], b[2], b[3]);
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (g < G)
        *reinterpret_cast<float2*>(values + g * D + (c0 + c) * 8 + 2 * t) = {acc[c][0] + acc[c][2],
                                                                             acc[c][1] + acc[c][3]};
  }
}

}  // namespace dsla::cuda
