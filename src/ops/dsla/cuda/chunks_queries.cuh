// What the warpgroups of `chunks` share, and what the third of them does, an item ahead of the
// other two: of a chunk and a query head phi_q, Q~, scores, denominators, and of a chunk z.
#pragma once

#include "ops/dsla/cuda/chunks.cuh"

namespace dsla::cuda {

// What a block does.
struct Work {
  int n, e0, at, count, lo, hi;
  int h, store;
  bool alone, ends;  // its states come from the slot; go there
  int row0;          // of q and out that belongs to row 0 of the first chunk
  int v0;            // of v, likewise
  int begin;         // tokens from here on enter, and are rows of the call
  // Of the first chunk, the KV head, its first query head and row 0. In registers they are spilled.
  const float4* decay;
  const float2* key_sum;
  const float *lse, *claim;

  __device__ __forceinline__ Chunk chunk(int i) const {
    return {n, e0 + i * kChunk, i == 0 ? lo : 0, i == count - 1 ? hi : kChunk};
  }
  __device__ __forceinline__ int row(int i) const { return row0 + i * kChunk; }
  // All rows of V enter, and lie side by side.
  __device__ __forceinline__ bool whole(int i) const {
    const Chunk c = chunk(i);
    return c.e0 >= begin && c.lo == 0 && c.hi == kChunk;
  }
};

// Of a panel with both places of K~.
inline constexpr int kKeyRows = 2 * kChunk + 8, kKeyPanelBytes = kKeyRows * 128;

template <int kChannels>
struct ChunksShared {
  // K~ of one chunk, e^R z as three terms of bf16 in eight rows, K~ of another chunk: so both have
  // z beside them, and one product has them all.
  uint4 key[kChannels / 64][kKeyRows * kPanelPieces];
  uint4 query[2][kChunk * kChannels / 8];  // e^{G-R} as A fragments; then in its place Q~
  uint4 phi[kWidth * kWidth / 8];          // phi_q, transposed
  uint4 q[2 * kPanel];
  uint4 v[2][kPanel];              // each state team's columns
  uint4 out[2][kPanel];            // likewise: the window's result, then the whole
  uint4 score[kPanel];             // tril(Q~ K~^T)
  float2 z[kChannels / 2];         // e^R z, which only the thread with its channels looks at
  float4 decay[2][kChannels / 2];  // of two channels: e^{L-R} of the chunk before, e^R
  float2 weight[2][kChunk];        // of a row: the states' over the denominator, the window's
  Work work;
  // Written: Q~ and decays, scores and weights. Read: Q~, scores, K~. Copied: queries
  // and phi_q, e^{G-R}, K~, and for each state team V and the window's result.
  uint64_t query_full[2], score_full, query_free[2], score_free, key_free[2];
  uint64_t q_full, growth_full, key_full, tile_full[2];
};

static_assert(sizeof(ChunksShared<256>) <= 227 * 1024);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The first row of a chunk's K~; z is after or before it.
__device__ __forceinline__ int KeyRow(int i) { return i % 2 * (kKeyRows - kChunk); }

// Parity of use `i` of one of two places that are used by turns.
__device__ __forceinline__ int Parity(int i) { return i / 2 % 2; }

// A chunk of a query head.
struct Item {
  int i, head;  // chunk, and head of the group
  __device__ __forceinline__ Item Next(int G) const {
    return head + 1 == G ? Item{i + 1, 0} : Item{i, head + 1};
  }
};

template <int kChannels>
struct Queries {
  const ChunksParams& p;
  ChunksShared<kChannels>& s;
  const Work& work;

  __device__ __forceinline__ Queries(const ChunksParams& p, ChunksShared<kChannels>& s)
      : p(p), s(s), work(s.work) {}

  __device__ __forceinline__ int head_of(const Item& item) const {
    return work.h * p.layer.G + item.head;
  }
  __device__ __forceinline__ int64_t part(int i) const {
    return int64_t{work.at + i} * p.layer.Hkv + work.h;
  }
  static __device__ __forceinline__ void Meet() { Barrier<kTeam>(2); }

  // Each of these by one lane. With another head's phi_q than before.
  __device__ __forceinline__ void FetchQueries(const Item& item, bool other_head) const {
    ArriveExpecting(s.q_full, sizeof(s.q) + (other_head ? sizeof(s.phi) : 0));
    CopyTile(s.q, p.maps.q, work.row(item.i), head_of(item) * (kWidth / 64), s.q_full);
    if (!other_head) return;
    CopyBulk(s.phi, p.layer.weights.phi_q_panels + int64_t{head_of(item)} * kWidth * kWidth,
             sizeof(s.phi), s.q_full);
  }
  __device__ __forceinline__ void FetchKeys(int i) const {
    ArriveExpecting(s.key_full, kChannels * kChunk * 2);
    CopyKeys<kChannels>(s.key[0] + KeyRow(i) * kPanelPieces, kKeyRows * kPanelPieces, p.maps,
                        part(i), s.key_full);
  }
  // The fragments of 16 rows and four k steps come where the same rows' panel of Q~ will be.
  __device__ __forceinline__ void FetchGrowth(const Item& item, int k) const {
    ArriveExpecting(s.growth_full, sizeof(s.query[0]));
    CopyGrowth(s.query[k % 2], p.maps.growth, static_cast<int>(part(item.i)) * (kChannels / kWidth),
               s.growth_full);
  }

  // From q phi_q the powers of e, and by row the factor that makes phi(q) of them.
  static __device__ __forceinline__ void Features(float (&y)[kWidth / 8][4], float (&scale)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float high = -INFINITY, sum = 0;
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c) high = fmaxf(high, y[j][c]);
      high = QuadMax(high) * kLog2e;
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c) {
          y[j][c] = Exp2(y[j][c] * kLog2e - high);
          sum += y[j][c];
        }
      scale[r] = Reciprocal(QuadSum(sum));
    }
  }

  // Where stmatrix wants this lane's row of a 16 x 16 tile: k step 0; that of k step c is at an
  // address that differs by an exclusive or with 32 c.
  __device__ __forceinline__ uint32_t TileRow(const uint4* tile) const {
    const int thread = ThreadIndex() % kTeam, lane = thread % 32, warp = thread / 32;
    return SharedAddress(tile) + 16 * Swizzle<kPanelPieces>(16 * warp + lane % 16, lane / 16);
  }

  // Q~ in the place of e^{G-R}.
  __device__ __forceinline__ void WriteQueries(const Item& item, int k,
                                               const float (&y)[kWidth / 8][4],
                                               const float (&scale)[2]) const {
    const int thread = ThreadIndex() % kTeam, lane = thread % 32, warp = thread / 32;
    const float* mix = p.layer.mix + head_of(item) * p.layer.states;
#pragma unroll
    for (int panel = 0; panel < 2; ++panel)
#pragma unroll
      for (int state = 0; state < kChannels / kWidth; ++state) {
        const float mixed = mix[state], factor[2] = {mixed * scale[0], mixed * scale[1]};
        uint4* const place = s.query[k % 2] + (2 * state + panel) * kPanel;
        uint4 growth[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) growth[c] = place[warp * 128 + c * 32 + lane];
        __syncwarp();
        const uint32_t to = TileRow(place);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const uint32_t e[4] = {growth[c].x, growth[c].y, growth[c].z, growth[c].w};
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = i % 2;
            const float(&from)[4] = y[8 * panel + 2 * c + i / 2];
            a[i] =
                Pack(from[2 * r] * factor[r] * Low(e[i]), from[2 * r + 1] * factor[r] * High(e[i]));
          }
          StoreMatrix(to ^ (32 * c), a);
        }
      }
  }

  // e^R z of two channels of this thread, as what three terms of bf16 leave of it.
  __device__ __forceinline__ void WriteNorm() const {
    const int thread = ThreadIndex() % kTeam;
    if (thread >= kChannels / 2) return;
    float2 z = s.z[thread];
    auto* panel = reinterpret_cast<uint32_t*>(s.key[thread / 32]) + thread % 4;
#pragma unroll
    for (int term = 0; term < 3; ++term) {
      const uint32_t x = Pack(z.x, z.y);
      panel[4 * Swizzle<kPanelPieces>(kChunk + term, thread % 32 / 4)] = x;
      z.x -= Low(x);
      z.y -= High(x);
    }
  }

  // Q~ K~^T, and a lane's part of Q~ e^R z.
  __device__ __forceinline__ void Score(float (&score)[kChunk / 8][4], float (&norm)[2], int k,
                                        int i) const {
    const bool z_first = KeyRow(i) > 0;
    float all[kChunk / 8 + 1][4];
    ScoreKeys<kChannels, kChunk + 8, kKeyRows>(all, SharedAddress(s.query[k % 2]),
                                               SharedAddress(s.key) + (z_first ? kPanelBytes : 0));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float first = all[0][2 * r] + all[0][2 * r + 1];
      const float last = all[kChunk / 8][2 * r] + all[kChunk / 8][2 * r + 1];
      norm[r] = z_first ? first : last;
    }
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) score[j][c] = z_first ? all[j + 1][c] : all[j][c];
  }

  // tril(Q~ K~^T) rounded, and its rows' sums.
  __device__ __forceinline__ void WriteScores(const float (&score)[kChunk / 8][4],
                                              float (&norm)[2]) const {
    const int thread = ThreadIndex() % kTeam, lane = thread % 32, warp = thread / 32;
    const uint32_t to = TileRow(s.score);
#pragma unroll
    for (int c = 0; c < kChunk / 16; ++c) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i % 2, row = 16 * warp + lane / 4 + 8 * r;
        const int key = 16 * c + lane % 4 * 2 + i / 2 * 8;
        const float(&from)[4] = score[2 * c + i / 2];
        // Selected, not multiplied: above the diagonal products may be infinite.
        a[i] = Pack(key <= row ? from[2 * r] : 0.f, key + 1 <= row ? from[2 * r + 1] : 0.f);
        norm[r] += Low(a[i]) + High(a[i]);
      }
      StoreMatrix(to ^ (32 * c), a);
    }
  }

  __device__ __forceinline__ void Run() const {
    const Layer& l = p.layer;
    // Each copy by another warp, as they cost some latency.
    const int fetcher = __shfl_sync(~0u, ThreadIndex() % kTeam / 32, 0);
    if (fetcher == 1 && Elect()) FetchQueries({0, 0}, true);
    for (int i = ThreadIndex() % kTeam; i < kChannels; i += kTeam)
      s.key[i / 64][kPanel + i % 64] = {};  // what z leaves of its rows
    AwaitPrevious();
    AllowNext();
    if (fetcher == 2 && Elect()) FetchGrowth({0, 0}, 0);
    if (fetcher == 3 && Elect()) FetchKeys(0);
    // Two channels of each thread.
    const auto decay_of = [&](int i, int thread) {  // e^R and e^{L-R} of each
      return work.decay[i * l.Hkv * (kChannels / 2) + thread];
    };
    const auto begin_chunk = [&](int i, int thread, float2 z, float2 end, const float4& decay) {
      s.decay[i % 2][thread] = {end.x, end.y, decay.x, decay.z};
      s.z[thread] = {z.x * decay.x, z.y * decay.z};
    };
    const auto slot = [&] {
      return reinterpret_cast<float*>(SlotBase(l, work.n) + l.at.norm) +
             int64_t{work.h} * kChannels;
    };
    if (const int thread = ThreadIndex() % kTeam; thread < kChannels / 2) {
      const float* from =
          work.alone ? slot() : p.start_norm + (int64_t{work.store} * l.Hkv + work.h) * kChannels;
      begin_chunk(0, thread, reinterpret_cast<const float2*>(from)[thread], {1, 1},
                  decay_of(0, thread));
    }
    Item item{0, 0};
    for (int k = 0;; ++k) {
      const bool last_head = item.head + 1 == l.G, more = item.i + 1 < work.count;
      const bool has_next = more || !last_head;
      const Item next = item.Next(l.G);
      Await(s.q_full, k);
      float y[kWidth / 8][4];
      ScoreKeys<kWidth, kWidth, kWidth>(y, SharedAddress(s.q), SharedAddress(s.phi));
      Meet();  // the queries and phi_q have been read
      if (has_next && fetcher == 1 && Elect()) FetchQueries(next, l.G > 1);
      if (item.head == 0) WriteNorm();
      float scale[2];
      Features(y, scale);
      Await(s.growth_full, k);
      WriteQueries(item, k, y, scale);
      PublishCopies();
      Arrive(s.query_full[k % 2]);
      // Here, as a warp that came to it after the copy of the next K~ would wait for ever: two
      // phases later a barrier looks as it did.
      if (item.head == 0) Await(s.key_full, item.i);
      Meet();  // all of Q~ is there, and z

      if (has_next && fetcher == 2) {
        if (k > 0) Await(s.query_free[(k + 1) % 2], Parity(k - 1));
        if (Elect()) FetchGrowth(next, k + 1);
      }
      if (more && last_head && fetcher == 3) {
        if (item.i > 0) Await(s.key_free[next.i % 2], Parity(item.i - 1));
        if (Elect()) FetchKeys(next.i);
      }
      const Chunk chunk = work.chunk(item.i);
      const int thread = ThreadIndex() % kTeam, lane = thread % 32, warp = thread / 32;
      const bool has_channels = last_head && thread < kChannels / 2;
      const int row = 16 * warp + lane / 4 + lane % 2 * 8;  // of lanes with t < 2
      const bool has_row = lane % 4 < 2 && row >= chunk.lo && row < chunk.hi;
      float lse = 0, claim = 0;
      if (l.W > 0 && has_row) {
        lse = work.lse[(item.i * l.H + item.head) * kChunk + row];
        claim = work.claim[(item.i * kChunk + row) * l.H + item.head];
      }
      float4 decay{}, next_decay{1, 1, 1, 1};
      float2 sums[4] = {};
      if (has_channels) {
        decay = decay_of(item.i, thread);
        if (more) next_decay = decay_of(next.i, thread);
        const float2* from = work.key_sum + item.i * l.Hkv * (2 * kChannels) + thread;
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) sums[quarter] = from[quarter * kChannels / 2];
      }
      float score[kChunk / 8][4], norm[2];
      Score(score, norm, k, item.i);
      if (k > 0) Await(s.score_free, (k - 1) % 2);
      WriteScores(score, norm);
      norm[0] = QuadSum(norm[0]);
      norm[1] = QuadSum(norm[1]);
      if (lane % 4 < 2) {
        const float denominator = lane % 2 ? norm[1] : norm[0];
        float w = 1;
        if (l.W > 0) w = denominator < kDslaEpsilon ? 0.f : Reciprocal(1 + Exp(lse - claim));
        s.weight[k % 2][row] = {w * Reciprocal(denominator + kDslaEpsilon), 1 - w};
      }
      PublishCopies();
      Arrive(s.score_full);
      if (has_channels) {
        float2 z = s.z[thread];
        z.x = (z.x + ((sums[0].x + sums[1].x) + (sums[2].x + sums[3].x))) * decay.y;
        z.y = (z.y + ((sums[0].y + sums[1].y) + (sums[2].y + sums[3].y))) * decay.w;
        begin_chunk(next.i, thread, z, {decay.y, decay.w}, next_decay);
      }
      if (!has_next) {
        Arrive(s.query_full[(k + 1) % 2]);  // the last chunk's e^{L-R}
        break;
      }
      item = next;
    }
    if (const int thread = ThreadIndex() % kTeam; work.ends && thread < kChannels / 2)
      reinterpret_cast<float2*>(slot())[thread] = s.z[thread];
  }
};

#endif

}  // namespace dsla::cuda
