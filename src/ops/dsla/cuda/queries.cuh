// What the warpgroups of `queries` share, and what the one that fetches does.
#pragma once

#include "ops/dsla/cuda/window.cuh"

namespace dsla::cuda {

inline constexpr int kD = 64, kTeam = 128;
inline constexpr int kMostChunks = 32;  // of a block

struct Stage {
  Tile<kD> part[3];  // of a block of channels K~, e^{G-R}, e^R S; of tokens K, V
};
struct Head {
  Tile<kD> phi, q[2];  // phi_q transposed; a chunk's queries, then their output
};
// Shared memory has so many stages and heads. One head leaves room for two blocks.
static_assert(sizeof(Stage) == sizeof(Head));
template <int kHeads>
inline constexpr int kPlaces = kHeads == 1 ? 4 : 9;
inline constexpr int kMostStages = 7;

struct __align__(1024) Control {
  Part part[kMostChunks];
  float4 norm[kMostStages][kD / 4];  // e^R z of a stage's channels
  uint64_t full[kMostStages], empty[kMostStages], q_empty[2];
  int h, first_head, heads;  // KV head, and query heads of the block
  int first, count;          // chunks of the wave
  int stages;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

extern __shared__ __align__(1024) std::byte memory[];  // control, stages, heads

__device__ __forceinline__ Control& Shared() { return *reinterpret_cast<Control*>(memory); }
__device__ __forceinline__ Stage& StageAt(int i) {
  return reinterpret_cast<Stage*>(memory + sizeof(Control))[i];
}
__device__ __forceinline__ Head& HeadAt(int i) {
  return reinterpret_cast<Head*>(memory + sizeof(Control))[Shared().stages + i];
}

// The stages are used by turns.
struct Turn {
  int stage = 0, turn = 0;
  __device__ __forceinline__ void Next() {
    if (++stage == Shared().stages) stage = 0, ++turn;
  }
};

// The warpgroup that fetches.
struct Fetcher {
  const PrefillParams& p;
  Turn next{}, arrived{};
  int under_way = 0;

  __device__ __forceinline__ explicit Fetcher(const PrefillParams& p) : p(p) {}

  __device__ __forceinline__ Stage& Begin() {
    if (next.turn > 0) Await(Shared().empty[next.stage], next.turn - 1);
    return StageAt(next.stage);
  }
  __device__ __forceinline__ void Announce() {
    PublishCopies();
    Arrive(Shared().full[arrived.stage]);
    arrived.Next();
  }
  // The last two may still be on their way.
  __device__ __forceinline__ void End() {
    CommitCopies();
    next.Next();
    if (under_way < 2) {
      ++under_way;
      return;
    }
    WaitCopies<2>();
    Announce();
  }

  __device__ __forceinline__ void FetchQueries(const Part& part, int i) {
    if (i > 1) Await(Shared().q_empty[i % 2], i / 2 - 1);
    for (int w = 0; w < Shared().heads; ++w)
      CopyRows<kD, kTeam>(HeadAt(w).q[i % 2],
                          p.q + part.row * p.q_stride + (Shared().first_head + w) * kD, p.q_stride,
                          0, part.chunk.lo, part.chunk.hi);
  }
  __device__ __forceinline__ void FetchChannels(Stage& stage, int64_t channel) {
    const int thread = ThreadIndex() % kTeam;
    const int place = Swizzle<8>(thread / 8, thread % 8);
    const int64_t at = channel * (kD / 8) + thread;
    const auto* key = reinterpret_cast<const uint4*>(p.key) + at;
    const auto* growth = reinterpret_cast<const uint4*>(p.growth) + at;
    const auto* state = reinterpret_cast<const uint4*>(p.state) + at;
#pragma unroll
    for (int i = 0; i < kD * kD / 8; i += kTeam) {
      CopyAsync(stage.part[0].pieces + place + i, key + i);
      CopyAsync(stage.part[1].pieces + thread + i, growth + i);
      CopyAsync(stage.part[2].pieces + place + i, state + i);
    }
    if (thread < kD / 4)
      CopyAsync(Shared().norm[next.stage] + thread, p.norm + channel + 4 * thread);
  }

  __device__ __forceinline__ void Run() {
    const Layer& l = p.layer;
    const int tiles = l.W > 0 ? TilesOf(l) : 1;
    for (int i = 0; i < Shared().count; ++i) {
      const Part& part = Shared().part[i];
      for (int c = 0; c < l.SF; c += kD) {
        Stage& stage = Begin();
        if (c == 0) FetchQueries(part, i);
        FetchChannels(stage, (int64_t{Shared().first + i} * l.Hkv + Shared().h) * l.SF + c);
        End();
      }
      for (int tile = 0; tile < tiles; ++tile) {
        Stage& stage = Begin();
        FetchTile<kD, kTeam>(p, stage.part[0], stage.part[1], part, Shared().h,
                             part.base + tile * kChunk);
        End();
      }
      if (l.S > 0) {
        Stage& stage = Begin();
        FetchSinks<kD, kTeam>(p, stage.part[0].pieces, stage.part[1].pieces, part, Shared().h);
        End();
      }
    }
    WaitCopies<1>();
    Announce();
    WaitCopies<0>();
    Announce();
  }
};

#endif

}  // namespace dsla::cuda
