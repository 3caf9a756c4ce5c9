// What the warpgroups of `queries` share, and what the one that fetches does.
#pragma once

#include "ops/dsla/cuda/bulk.cuh"
#include "ops/dsla/cuda/window.cuh"

namespace dsla::cuda {

inline constexpr int kD = 64, kTeam = 128;
inline constexpr int kMostChunks = 32;  // of a block

// Of a block of channels (e^R S)^T, rows below it, K~ and e^{G-R}; of tokens values and keys.
struct Stage {
  Tile<kD> value;
  uint4 norm[8 * kD / 8];  // two terms of e^R z, and zeros
  Tile<kD> key;
  uint4 growth[kD * kD / 8];
};
struct Head {
  Tile<kD> phi, q[2];  // phi_q transposed; a chunk's queries, then their output
};
template <int kHeads>
inline constexpr int kStages = kHeads == 1 ? 3 : 6;  // one head leaves room for two blocks

struct __align__(1024) Control {
  Part part[kMostChunks];
  uint64_t full[kStages<3>], empty[kStages<3>], q_empty[2];
  int h, first_head, heads;  // KV head, and query heads of the block
  int first, count;          // chunks of the wave
};

template <int kHeads>
struct Memory {
  Control control;
  Stage stage[kStages<kHeads>];
  Head head[kHeads];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

extern __shared__ __align__(1024) std::byte memory[];  // Memory

__device__ __forceinline__ Control& Shared() { return *reinterpret_cast<Control*>(memory); }
template <int kHeads>
__device__ __forceinline__ Stage& StageAt(int i) {
  return reinterpret_cast<Memory<kHeads>*>(memory)->stage[i];
}
template <int kHeads>
__device__ __forceinline__ Head& HeadAt(int i) {
  return reinterpret_cast<Memory<kHeads>*>(memory)->head[i];
}

// The stages are used by turns.
template <int kHeads>
struct Turn {
  int stage = 0, turn = 0;
  __device__ __forceinline__ void Next() {
    if (++stage == kStages<kHeads>) stage = 0, ++turn;
  }
};

// The warpgroup that fetches. Whole tiles are copied in bulk, which one lane starts; what lies row
// by row, or is to have zeros, by all threads.
template <int kHeads>
struct Fetcher {
  const QueriesParams& p;
  Turn<kHeads> next{};
  uint32_t late = 0;  // bit i: all threads copy to the stage i before the last one

  __device__ __forceinline__ explicit Fetcher(const QueriesParams& p) : p(p) {}

  __device__ __forceinline__ Stage& Begin() {
    if (next.turn > 0) Await(Shared().empty[next.stage], next.turn - 1);
    return StageAt<kHeads>(next.stage);
  }
  // The last two that threads copy to may still be on their way.
  __device__ __forceinline__ void End(bool by_threads) {
    CommitCopies();
    if (!by_threads) Arrive(Shared().full[next.stage]);
    next.Next();
    late = late << 1 | by_threads;
    AnnounceLate<2>();
  }
  template <int age>
  __device__ __forceinline__ void AnnounceLate() {
    if ((late >> age & 1) == 0) return;
    WaitCopies<age>();
    PublishCopies();
    const int stage = next.stage - 1 - age;
    Arrive(Shared().full[stage < 0 ? stage + kStages<kHeads> : stage]);
  }
  __device__ __forceinline__ static bool Starts() { return threadIdx.x % kTeam < 32 && Elect(); }

  // True if all threads copy.
  __device__ __forceinline__ bool FetchQueries(const Part& part, int i) {
    if (i > 1) Await(Shared().q_empty[i % 2], i / 2 - 1);
    const bool whole = part.chunk.lo == 0 && part.chunk.hi == kChunk, starts = whole && Starts();
    uint64_t& full = Shared().full[next.stage];
    if (starts) Expect(full, Shared().heads * int{sizeof(Tile<kD>)});
    for (int w = 0; w < Shared().heads; ++w) {
      Tile<kD>& to = HeadAt<kHeads>(w).q[i % 2];
      const int head = Shared().first_head + w;
      if (starts) CopyTile(&to, p.q_map, static_cast<int>(part.row), head, full);
      if (!whole)
        CopyRows<kD, kTeam>(to, p.q + part.row * p.q_stride + head * kD, p.q_stride, 0,
                            part.chunk.lo, part.chunk.hi);
    }
    return !whole;
  }
  __device__ __forceinline__ void FetchChannels(Stage& stage, int64_t channel) {
    constexpr int kTerms = 2 * kD * 2;
    if (!Starts()) return;
    uint64_t& full = Shared().full[next.stage];
    Expect(full, sizeof stage.value + kTerms + sizeof stage.key + sizeof stage.growth);
    CopyTile(&stage.value, p.state_map, static_cast<int>(channel), 0, full);
    CopyBulk(stage.norm, p.norm + channel, kTerms, full);
    CopyTile(&stage.key, p.key_map, static_cast<int>(channel), 0, full);
    CopyBulk(stage.growth, p.growth + channel * (kD / 2), sizeof stage.growth, full);
  }
  // Tokens [first, first + 64); true if all threads copy.
  __device__ __forceinline__ bool FetchTokens(Stage& stage, const Part& part, int first) {
    const int h = Shared().h;
    if (first < max(part.pos, part.from) || first + kChunk > part.to) {
      FetchTile<kD, kTeam>(p, stage.key, stage.value, part, h, first);
      return true;
    }
    if (Starts()) {
      const int row = static_cast<int>(part.row) + first - (part.chunk.e0 + p.layer.W);
      uint64_t& full = Shared().full[next.stage];
      Expect(full, sizeof stage.key + sizeof stage.value);
      CopyTile(&stage.key, p.k_map, row, h, full);
      CopyTile(&stage.value, p.v_map, row, h, full);
    }
    return false;
  }

  __device__ __forceinline__ void Run() {
    const Layer& l = p.layer;
    const int tiles = l.W > 0 ? TilesOf(l) : 1;
    for (int i = 0; i < Shared().count; ++i) {
      const Part& part = Shared().part[i];
      for (int c = 0; c < l.SF; c += kD) {
        Stage& stage = Begin();
        const bool by_threads = c == 0 && FetchQueries(part, i);
        FetchChannels(stage, (int64_t{Shared().first + i} * l.Hkv + Shared().h) * l.SF + c);
        End(by_threads);
      }
      if (l.S > 0) {
        Stage& stage = Begin();
        FetchSinks<kD, kTeam>(p, stage.key.pieces, stage.value.pieces, part, Shared().h);
        End(true);
      }
      for (int tile = 0; tile < tiles; ++tile) {
        Stage& stage = Begin();
        End(FetchTokens(stage, part, part.base + tile * kChunk));
      }
    }
    WaitCopies<0>();
    AnnounceLate<1>();
    AnnounceLate<0>();
  }
};

#endif

}  // namespace dsla::cuda
