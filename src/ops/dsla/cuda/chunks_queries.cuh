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
  int64_t row0;      // of q and out that belongs to row 0 of the first chunk

  __device__ __forceinline__ Chunk chunk(int i) const {
    return {n, e0 + i * kChunk, i == 0 ? lo : 0, i == count - 1 ? hi : kChunk};
  }
  __device__ __forceinline__ int64_t row(int i) const { return row0 + i * kChunk; }
};

template <int kChannels>
struct ChunksShared {
  uint4 key[2][kChunk * kChannels / 8];    // K~
  uint4 query[2][kChunk * kChannels / 8];  // e^{G-R} as A fragments; then in its place Q~
  uint4 phi[kWidth * kWidth / 8];          // phi_q, transposed
  uint4 q[2 * kPanel];
  uint4 v[2][kPanel];              // each state team's columns
  uint4 out[2][kPanel];            // likewise: the window's result, then the whole
  uint4 score[kPanel];             // tril(Q~ K~^T)
  float4 decay[2][kChannels / 2];  // of two channels: e^{L-R} of the chunk before, e^R
  float2 norm[kChannels / 2];      // e^R z
  float2 weight[2][kChunk];        // of a row: the states' over the denominator, the window's
  Work work;
  // Written: Q~ and decays, scores and weights. Read: Q~, scores, K~.
  uint64_t query_full[2], score_full, query_free[2], score_free, key_free[2];
};

static_assert(sizeof(ChunksShared<256>) <= 227 * 1024);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

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
  const PrefillParams& p;
  ChunksShared<kChannels>& s;
  const Work& work;

  __device__ __forceinline__ Queries(const PrefillParams& p, ChunksShared<kChannels>& s)
      : p(p), s(s), work(s.work) {}

  __device__ __forceinline__ int head_of(const Item& item) const {
    return work.h * p.layer.G + item.head;
  }
  __device__ __forceinline__ int64_t part(int i) const {
    return int64_t{work.at + i} * p.layer.Hkv + work.h;
  }
  static __device__ __forceinline__ void Meet() { Barrier<kTeam>(2); }

  __device__ __forceinline__ void FetchQueries(const Item& item) const {
    const int thread = ThreadIndex() % kTeam;
    const int c = thread % 16, first = thread / 16;
    const Chunk chunk = work.chunk(item.i);
    const __nv_bfloat16* from =
        p.q + (work.row(item.i) + first) * p.q_stride + head_of(item) * kWidth + 8 * c;
    uint4* to = s.q + c / kPanelPieces * kPanel + Swizzle<kPanelPieces>(first, c % kPanelPieces);
#pragma unroll
    for (int i = 0; i < kChunk; i += 8) {
      CopyAsync(to + i * kPanelPieces, from, first + i >= chunk.lo && first + i < chunk.hi);
      from += 8 * p.q_stride;
    }
  }

  // A warp reads what it has copied itself: the fragments of its 16 rows, four k steps where the
  // same rows' panel of Q~ will be.
  __device__ __forceinline__ void FetchGrowth(const Item& item, int k) const {
    const int thread = ThreadIndex() % kTeam, lane = thread % 32, warp = thread / 32;
    const uint4* from = reinterpret_cast<const uint4*>(p.growth) +
                        part(item.i) * (kChannels * kChunk / 8) + warp * 256 + lane;
    uint4* to = s.query[k % 2] + warp * 128 + lane;
#pragma unroll
    for (int c = 0; c < kChannels / 16; ++c)
      CopyAsync(to + c / 4 * kPanel + c % 4 * 32, from + c / 8 * 1024 + c % 8 * 32);
  }

  // From the order of mma's B fragments to rows of columns.
  __device__ __forceinline__ void CopyPhi(const Item& item) const {
    const int thread = ThreadIndex() % kTeam, lane = thread % 32, warp = thread / 32;
    const auto* from = reinterpret_cast<const uint4*>(p.layer.weights.phi_q +
                                                      int64_t{head_of(item)} * kWidth * kWidth) +
                       thread;
    auto* to = reinterpret_cast<uint32_t*>(s.phi) + lane % 4;
    const int g = lane / 4;
#pragma unroll 4
    for (int i = 0; i < kWidth * kWidth / 8 / kTeam; ++i) {
      const uint4 x = __ldg(from + i * kTeam);
      const int tile = 4 * i + warp, c = tile / 8, column = tile % 8 * 16 + g;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = column + k / 2 * 8;
        to[4 * (c / 4 * (2 * kPanel) + Swizzle<kPanelPieces>(row, c % 4 * 2 + k % 2))] =
            k == 0   ? x.x
            : k == 1 ? x.y
            : k == 2 ? x.z
                     : x.w;
      }
    }
  }

  // From q phi_q the powers of e, and by row the factor that makes phi(q) of them.
  static __device__ __forceinline__ void Features(float (&y)[kWidth / 8][4], float (&scale)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float high = -INFINITY, sum = 0;
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c) {
          y[j][c] *= kLog2e;  // here, or registers do not suffice
          high = fmaxf(high, y[j][c]);
        }
      high = QuadMax(high);
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c) {
          y[j][c] = Exp2(y[j][c] - high);
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

  // Q~ in the place of e^{G-R}, and its products with e^R z.
  __device__ __forceinline__ void WriteQueries(const Item& item, int k,
                                               const float (&y)[kWidth / 8][4],
                                               const float (&scale)[2], float (&norm)[2]) const {
    const int thread = ThreadIndex() % kTeam, lane = thread % 32, warp = thread / 32;
    const int t = lane % 4;
    const float* mix = p.layer.mix + head_of(item) * p.layer.states;
#pragma unroll
    for (int panel = 0; panel < 2; ++panel)
#pragma unroll
      for (int state = 0; state < kChannels / kWidth; ++state) {
        const float mixed = mix[state], factor[2] = {mixed * scale[0], mixed * scale[1]};
        uint4* const place = s.query[k % 2] + (2 * state + panel) * kPanel;
        const float2* z_of = s.norm + (2 * state + panel) * 32 + t;
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
            const float2 z = z_of[c * 8 + i / 2 * 4];
            norm[r] += Low(a[i]) * z.x + High(a[i]) * z.y;
          }
          StoreMatrix(to ^ (32 * c), a);
        }
      }
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
    FetchQueries({0, 0});
    CommitCopies();
    CopyPhi({0, 0});
    AwaitPrevious();
    AllowNext();
    FetchGrowth({0, 0}, 0);
    FetchKeys<kChannels, kTeam>(s.key[0], p.key + part(0) * kChannels * kChunk,
                                ThreadIndex() % kTeam);
    CommitCopies();
    // Two channels of each thread.
    const auto decay_of = [&](int i, int thread) {  // e^R and e^{L-R} of each
      return reinterpret_cast<const float4*>(p.decay)[part(i) * (kChannels / 2) + thread];
    };
    const auto begin_chunk = [&](int i, int thread, float2 z, float2 end, const float4& decay) {
      s.decay[i % 2][thread] = {end.x, end.y, decay.x, decay.z};
      s.norm[thread] = {z.x * decay.x, z.y * decay.z};
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
      const Item next = item.Next(l.G);
      WaitCopies<1>();
      PublishCopies();
      Meet();  // the queries and phi_q are there; so is z
      float y[kWidth / 8][4];
      ScoreKeys<kWidth, kWidth, kWidth>(y, SharedAddress(s.q), SharedAddress(s.phi));
      Meet();  // and have been read
      if (more || !last_head) {
        FetchQueries(next);
        if (l.G > 1) CopyPhi(next);
      }
      CommitCopies();
      float scale[2], norm[2] = {};
      Features(y, scale);
      WaitCopies<1>();
      __syncwarp();
      WriteQueries(item, k, y, scale, norm);
      PublishCopies();
      Arrive(s.query_full[k % 2]);
      Meet();  // all of Q~ and K~ is there

      if (more || !last_head) {
        if (k > 0) Await(s.query_free[(k + 1) % 2], Parity(k - 1));
        FetchGrowth(next, k + 1);
        if (last_head) {
          if (item.i > 0) Await(s.key_free[next.i % 2], Parity(item.i - 1));
          FetchKeys<kChannels, kTeam>(s.key[next.i % 2], p.key + part(next.i) * kChannels * kChunk,
                                      ThreadIndex() % kTeam);
        }
      }
      CommitCopies();
      const Chunk chunk = work.chunk(item.i);
      const int thread = ThreadIndex() % kTeam, lane = thread % 32, warp = thread / 32;
      const bool has_channels = last_head && thread < kChannels / 2;
      const int row = 16 * warp + lane / 4 + lane % 2 * 8;  // of lanes with t < 2
      const bool has_row = lane % 4 < 2 && row >= chunk.lo && row < chunk.hi;
      float lse = 0, claim = 0;
      if (l.W > 0 && has_row) {
        lse = p.lse[(int64_t{work.at + item.i} * l.H + head_of(item)) * kChunk + row];
        claim = p.claim[(work.row(item.i) + row) * l.H + head_of(item)];
      }
      float4 decay{}, next_decay{1, 1, 1, 1};
      float2 sums[4] = {};
      if (has_channels) {
        decay = decay_of(item.i, thread);
        if (more) next_decay = decay_of(next.i, thread);
        const auto* from =
            reinterpret_cast<const float2*>(p.key_sum) + part(item.i) * (2 * kChannels) + thread;
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) sums[quarter] = from[quarter * kChannels / 2];
      }
      float score[kChunk / 8][4];
      ScoreKeys<kChannels, kChunk, kChunk>(score, SharedAddress(s.query[k % 2]),
                                           SharedAddress(s.key[item.i % 2]));
      if (k > 0) Await(s.score_free, (k - 1) % 2);
      WriteScores(score, norm);
      norm[0] = QuadSum(norm[0]);
      norm[1] = QuadSum(norm[1]);
      if (lane % 4 < 2) {
        const float denominator = lane % 2 ? norm[1] : norm[0];
        float w = 1;
        if (l.W > 0) w = denominator < kDslaEpsilon ? 0.f : 1 / (1 + Exp(lse - claim));
        s.weight[k % 2][row] = {w / (denominator + kDslaEpsilon), 1 - w};
      }
      PublishCopies();
      Arrive(s.score_full);
      if (has_channels) {
        float2 z = s.norm[thread];
        z.x = (z.x + ((sums[0].x + sums[1].x) + (sums[2].x + sums[3].x))) * decay.y;
        z.y = (z.y + ((sums[0].y + sums[1].y) + (sums[2].y + sums[3].y))) * decay.w;
        begin_chunk(next.i, thread, z, {decay.y, decay.w}, next_decay);
      }
      if (last_head && !more) {
        Arrive(s.query_full[(k + 1) % 2]);  // the last chunk's e^{L-R}
        break;
      }
      item = next;
    }
    if (const int thread = ThreadIndex() % kTeam; work.ends && thread < kChannels / 2)
      reinterpret_cast<float2*>(slot())[thread] = s.norm[thread];
  }
};

#endif

}  // namespace dsla::cuda
