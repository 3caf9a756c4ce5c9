// The chunks of a segment, one after another, for one KV head and the query heads of its group:
//   O = Q~ S^ + tril(Q~ K~^T) V,  denominator = Q~ (e^R z) + row sums of tril(Q~ K~^T),
// merged with the window's result; then S' = e^{L-R} (S^ + K~^T V). For compute capability 9.0.
//
// Two warpgroups have the states (chunks.cuh) and make the outputs, transposed too. A third is one
// item, a chunk of a query head, ahead of them: phi_q, Q~, scores, denominators, z.
#include "ops/dsla/cuda/chunks.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 3 * kTeam;
constexpr int kStateRegisters = 200, kQueryRegisters = 104;

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
  uint4 v[2][kPanel];      // each state team's columns
  uint4 out[2][kPanel];    // likewise: the window's result, then the whole
  uint4 score[kPanel];     // tril(Q~ K~^T)
  float4 decay[2][kChannels / 2];  // of two channels: e^{L-R} of the chunk before, e^R
  float2 norm[kChannels / 2];      // e^R z
  float2 weight[2][kChunk];  // of a row: the states' over the denominator, the window's
  Work work;
  // Written: Q~ and decays, scores and weights. Read: Q~, scores, K~.
  uint64_t query_full[2], score_full, query_free[2], score_free, key_free[2];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Parity of use `i` of one of two places that are used by turns.
__device__ __forceinline__ int Parity(int i) { return i / 2 % 2; }

// The next item.
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
            k == 0 ? x.x : k == 1 ? x.y : k == 2 ? x.z : x.w;
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
          y[j][c] *= 1.4426950408889634f;  // here, or registers do not suffice
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
          a[i] = Pack(from[2 * r] * factor[r] * Low(e[i]),
                      from[2 * r + 1] * factor[r] * High(e[i]));
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
        const auto* from = reinterpret_cast<const float2*>(p.key_sum) +
                           part(item.i) * (2 * kChannels) + thread;
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

template <int kChannels>
struct States {
  const PrefillParams& p;
  ChunksShared<kChannels>& s;
  const Work& work;

  __device__ __forceinline__ States(const PrefillParams& p, ChunksShared<kChannels>& s)
      : p(p), s(s), work(s.work) {}

  __device__ __forceinline__ void FetchV(int i) const {
    const int thread = ThreadIndex(), team = thread / kTeam;
    FetchValues(p, p.rows, s.v[team], work.chunk(i), work.h, 64 * team, thread % kTeam);
  }

  // Rows and columns of a warp's part of `out`: piece i of 4 of this lane's.
  struct OutPiece {
    uint4* shared;
    __nv_bfloat16* global;
    bool valid;
  };
  __device__ __forceinline__ OutPiece out_piece(const StatePlace& at, const Item& item,
                                                int i) const {
    const int lane = 4 * at.g + at.t;
    const int row = lane / 2 + 16 * i, c = 2 * at.warp + lane % 2;
    const Chunk chunk = work.chunk(item.i);
    const int64_t head = work.h * p.layer.G + item.head;
    return {s.out[at.team] + Swizzle<kPanelPieces>(row, c),
            p.out + ((work.row(item.i) + row) * p.layer.H + head) * kWidth + 64 * at.team + 8 * c,
            item.i < work.count && row >= chunk.lo && row < chunk.hi};
  }
  // Nothing but zeros of chunks that the segment does not have.
  __device__ __forceinline__ void FetchWindow(const Item& item) const {
    const StatePlace at(ThreadIndex());
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const OutPiece piece = out_piece(at, item, i);
      CopyAsync(piece.shared, piece.global, piece.valid && p.layer.W > 0);
    }
  }
  // From O^T: the merge with the window's result, and to memory.
  __device__ __forceinline__ void WriteOut(const float (&o)[kChunk / 8][4], const Item& item,
                                           int k) const {
    const StatePlace at(ThreadIndex());
    const int lane = 4 * at.g + at.t;
    const auto* weights = reinterpret_cast<const float4*>(s.weight[k % 2]) + at.t;
    const uint32_t tile = SharedAddress(s.out[at.team]) +
                          16 * Swizzle<kPanelPieces>(lane % 8 + lane / 16 * 8,
                                                     2 * at.warp + lane / 8 % 2);
#pragma unroll
    for (int m = 0; m < kChunk / 16; ++m) {
      const uint32_t place = tile + m * (16 * 128);
      uint32_t x[4];
      LoadMatrixTransposed(x, place);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 w = weights[4 * (2 * m + i)];  // of two tokens
        const float(&from)[4] = o[2 * m + i];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          uint32_t& to = x[2 * i + r];
          to = Pack(w.x * from[2 * r] + w.y * Low(to), w.z * from[2 * r + 1] + w.w * High(to));
        }
      }
      StoreMatrixTransposed(place, x);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const OutPiece piece = out_piece(at, item, i);
      // No branch, which the compiler would have the products under way end before.
      const uint4 x = *piece.shared;
      asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}"
                   ::"r"(static_cast<int>(piece.valid)), "l"(piece.global), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                   : "memory");
    }
  }

  // O^T += S^T Q~^T, with S^ = e^R S, after the chunk before's e^{L-R}, made on the way if this is
  // the chunk's first head. Two k steps at a time, of which no product is under way when the
  // states of the next are read: to the compiler these are the product that made them.
  __device__ __forceinline__ void AddStates(float (&o)[kChunk / 8][4],
                                            float (&acc)[kChannels / 8][4], int k,
                                            const Item& item) const {
    const float4* decay = s.decay[item.i % 2] + ThreadIndex() % 4;
    const uint32_t query = SharedAddress(s.query[k % 2]);
#pragma unroll
    for (int u = 0; u < kChannels / 32; ++u) {
      if (item.head == 0) {
#pragma unroll
        for (int j = 4 * u; j < 4 * u + 4; ++j) {
          // Not by the product of both: that could be too small for fp32.
          const float4 d = decay[4 * j];
          acc[j][0] = acc[j][0] * d.x * d.z;
          acc[j][1] = acc[j][1] * d.y * d.w;
          acc[j][2] = acc[j][2] * d.x * d.z;
          acc[j][3] = acc[j][3] * d.y * d.w;
        }
      }
      uint32_t a[2][4];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float(&even)[4] = acc[4 * u + 2 * c], (&odd)[4] = acc[4 * u + 2 * c + 1];
        a[c][0] = Pack(even[0], even[1]);
        a[c][1] = Pack(even[2], even[3]);
        a[c][2] = Pack(odd[0], odd[1]);
        a[c][3] = Pack(odd[2], odd[3]);
      }
      Pin(a);
      Pin(o);
      BeginProducts();
#pragma unroll
      for (int c = 0; c < 2; ++c)
        WarpgroupMma<0>(o, a[c], PanelDescriptor(query, u / 2 * kPanelBytes + (u % 2 * 2 + c) * 32));
      EndProducts();
      Pin(a);
      Pin(o);
    }
  }

  // An item's output; then, with the last of a chunk, its keys into the states.
  template <bool kLastHead>
  __device__ __forceinline__ void Attend(float (&acc)[kChannels / 8][4], const Item& item,
                                         int k) const {
    const int team = __shfl_sync(~0u, ThreadIndex() / kTeam, 0);
    const uint32_t v = SharedAddress(s.v[team]), score = SharedAddress(s.score);
    float o[kChunk / 8][4] = {};
    Await(s.query_full[k % 2], Parity(k));
    AddStates(o, acc, k, item);
    Arrive(s.query_free[k % 2]);
    WaitCopies<0>();
    PublishCopies();
    Barrier<kTeam>(team);  // V is there
    Await(s.score_full, k % 2);
    Pin(acc);
    Pin(o);
    BeginProducts();
#pragma unroll
    for (int c = 0; c < kChunk / 16; ++c)
      WarpgroupMma<1, 0>(o, PanelDescriptor(v, c * (16 * 128)), PanelDescriptor(score, c * 32));
    CommitProducts();
    if constexpr (kLastHead) {
      AddKeys<kChannels>(acc, v, SharedAddress(s.key[item.i % 2]));
      CommitProducts();
      WaitProducts<1>();
    } else {
      WaitProducts<0>();
    }
    Pin(o);
    Arrive(s.score_free);
    WriteOut(o, item, k);
    __syncwarp();
    FetchWindow(kLastHead ? Item{item.i + 1, 0} : Item{item.i, item.head + 1});
    if constexpr (kLastHead) {
      WaitProducts<0>();
      Pin(acc);
      Arrive(s.key_free[item.i % 2]);
    } else {
      CommitCopies();
    }
  }

  __device__ __forceinline__ void Run() const {
    const Layer& l = p.layer;
    AwaitPrevious();
    AllowNext();
    FetchV(0);
    FetchWindow({0, 0});
    CommitCopies();
    float acc[kChannels / 8][4];
    const auto slot = [&] {
      return reinterpret_cast<float*>(SlotBase(l, work.n) + l.at.state) +
             int64_t{work.h} * kChannels * kWidth;
    };
    LoadStates<kChannels>(
        acc, StatePlace(ThreadIndex()), work.alone ? slot() : nullptr,
        p.start + (int64_t{work.store} * l.Hkv + work.h) * kChannels * kWidth);
    int k = 0;
    for (int i = 0;; ++i) {
      for (int head = 0; head + 1 < l.G; ++head) Attend<false>(acc, {i, head}, k++);
      Attend<true>(acc, {i, l.G - 1}, k++);
      if (i + 1 == work.count) break;
      Barrier<kTeam>(ThreadIndex() / kTeam);  // V has been read
      FetchV(i + 1);
      CommitCopies();
    }
    if (!work.ends) return;
    Await(s.query_full[k % 2], Parity(k));
    const StatePlace at(ThreadIndex());
    const float4* decay = s.decay[work.count % 2] + at.t;
#pragma unroll
    for (int j = 0; j < kChannels / 8; ++j) {
      const float4 d = decay[4 * j];
      acc[j][0] *= d.x;
      acc[j][1] *= d.y;
      acc[j][2] *= d.x;
      acc[j][3] *= d.y;
    }
    StoreStates<kChannels>(acc, at, slot(), nullptr);
  }
};

#endif

// grid (Hkv, segments)
template <int kChannels>
__global__ void __launch_bounds__(kThreads, 1) ChunksKernel(const __grid_constant__ PrefillParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::byte memory[];
  auto& s = *reinterpret_cast<ChunksShared<kChannels>*>(memory);
  const Segment segment = SegmentOf(p, blockIdx.y);
  if (segment.count < 0) {
    AwaitPrevious();
    return;
  }
  if (threadIdx.x == 0) {
    const Layer& l = p.layer;
    const bool alone = p.segment == 0 || IsWhole(segment);
    s.work = {segment.n,
              segment.e0,
              segment.at,
              segment.count,
              segment.lo,
              segment.hi,
              static_cast<int>(blockIdx.x),
              segment.store,
              alone,
              alone || (segment.flags & kLast),
              l.row_start[segment.n] + (segment.e0 + l.W - l.pos[segment.n])};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      InitBarrier(s.query_full[i], kTeam / 32);
      InitBarrier(s.query_free[i], 2 * kTeam / 32);
      InitBarrier(s.key_free[i], 2 * kTeam / 32);
    }
    InitBarrier(s.score_full, kTeam / 32);
    InitBarrier(s.score_free, 2 * kTeam / 32);
  }
  __syncthreads();
  if (__shfl_sync(~0u, threadIdx.x / kTeam, 0) == 2) {
    GiveUpRegisters<kQueryRegisters>();
    Queries<kChannels>(p, s).Run();
  } else {
    TakeRegisters<kStateRegisters>();
    States<kChannels>(p, s).Run();
  }
#endif
}

template <int kChannels>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  Start<ChunksKernel<kChannels>>("chunks", dim3(p.layer.Hkv, p.wave_segments), kThreads,
                                         sizeof(ChunksShared<kChannels>), p, stream);
}

}  // namespace

void LaunchChunks(const PrefillParams& p, cudaStream_t stream) {
  p.layer.states == 2 ? Launch<256>(p, stream) : Launch<128>(p, stream);
}

}  // namespace dsla::cuda
