// The warpgroups of `fold` that make gates and states of what fold_keys.cuh has put into shared
// memory.
#pragma once

#include "ops/dsla/cuda/fold.cuh"

namespace dsla::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// 64 channels: x = weights (high + low)^T.
template <int D>
__device__ __forceinline__ void MakeLogits(float (&x)[8][4], uint32_t weight, uint32_t high,
                                           uint32_t low) {
  weight = Fresh(weight);
#pragma unroll
  for (int term = 0; term < 2; ++term) {
    const uint32_t keys = Fresh(term == 0 ? high : low);
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      const int at = c / 4 * (64 * 128) + c % 4 * 32;
      if (term == 0 && c == 0)
        FirstWarpgroupMma(x, PanelDescriptor(weight, at), PanelDescriptor(keys, at));
      else
        WarpgroupMma(x, PanelDescriptor(weight, at), PanelDescriptor(keys, at));
    }
  }
}
// 64 channels of a state, and rows 16 c .. 16 c + 15 of V.
template <int D>
__device__ __forceinline__ void AddToState(float (&state)[D / 8][4], const uint32_t (&key)[4],
                                           uint32_t v, int c) {
  WarpgroupMma<1>(state, key, PanelDescriptor(v, c * (16 * 128), 64 * 128));
}

// e^a - 1 of gates that are not all slow, of logits as GateMinusOneOf has them: by logarithms where
// all of the warp's are over kFast, in fewer instructions. 1 + e^-x has an error of 2^-24 there,
// and e^a one of 2^-22, which is 2e-4 of 1 - e^a at most.
constexpr float kFast = -6;
template <int n>
__device__ __forceinline__ void FastGatesMinusOne(float (&t)[n][4], float least) {
  float lowest[4] = {t[0][0], t[0][1], t[0][2], t[0][3]};
#pragma unroll
  for (int i = 4; i < 4 * n; ++i) lowest[i % 4] = fminf(lowest[i % 4], t[i / 4][i % 4]);
  if (!__all_sync(~0u, fminf(fminf(lowest[0], lowest[1]), fminf(lowest[2], lowest[3])) > kFast))
    return AnyGatesMinusOne(t, least);
#pragma unroll
  for (int i = 0; i < 4 * n; ++i) {
    float& x = t[i / 4][i % 4];
    x = fmaxf(Exp2(Log2(1 + Exp2(x)) * (-1.f / kDslaGateDivisor)) - 1, least);
  }
}

// Of a thread of the warps that fold; `warp` counts all of the block's.
struct FoldThread {
  int lane, warp, group, g, t;
  __device__ __forceinline__ FoldThread() {
    const uint32_t i = threadIdx.x;
    lane = i % 32;
    warp = i / 32 - 4;
    group = i / 128 - 1;
    g = i / 4 % 8;
    t = i % 4;
  }
};

// A warpgroup's part of a segment.
template <int D, int kBlocks>
struct Folder {
  static constexpr int kLast = kBlocks - 1;
  using Shared = FoldShared<D, kBlocks>;

  Shared& s;
  const PrefillParams& p;
  // States and norms of the segment with their signs turned, as e^a - 1 has it: a weight takes one
  // instruction less. Norms and decays: a quad has two channels of each block, and its lanes keep
  // those of one each.
  float state[kBlocks][D / 8][4] = {};
  float z = 0, decay = 1;
  float gate[8][4];    // logits without their bias, then e^a - 1
  uint32_t key[4][4];  // -K^T, of 16 rows of a tile each

  // One for all of a warp.
  __device__ __forceinline__ int Group() const { return __shfl_sync(~0u, FoldThread().group, 0); }

  // Block b's gates of chunk i: products under way.
  __device__ __forceinline__ void StartGates(int i, int b) {
    // Behind the last chunk the same is done with whatever is there, for nobody.
    if (b == 0 && i < s.part.chunks) Await(s.plain_full[i % 2], i / 2);
    BeginProducts();
    MakeLogits<D>(gate, SharedAddress(s.gates[b][Group()]), SharedAddress(s.plain[i % 2][0]),
                  SharedAddress(s.plain[i % 2][1]));
    CommitProducts();
  }
  // They are there; at most `pending` products that came after them are not.
  template <int pending>
  __device__ __forceinline__ void EndGates(int i, int b) {
    WaitProducts<pending>();
    Pin(gate);
    if (b == kLast) Arrive(s.plain_free[i % 2]);
  }

  // Block b of chunk i to its state, and the gates that come next. These are awaited; most of the
  // state's products run while they are worked on. Not all: the last 16 rows of K would be more
  // registers than there are.
  __device__ __forceinline__ void StartState(int i, int b) {
    Pin(state[b]);
    Pin(key);
    const uint32_t v = Fresh(SharedAddress(s.v[i % 2]));
    BeginProducts();
    AddToState<D>(state[b], key[3], v, 3);
    EndProducts();
    Pin(state[b]);
    Pin(key);
    const int next = b == kLast ? i + 1 : i, next_block = b == kLast ? 0 : b + 1;
    StartGates(next, next_block);
    BeginProducts();
#pragma unroll
    for (int c = 2; c >= 0; --c) AddToState<D>(state[b], key[c], v, c);
    CommitProducts();
    EndGates<1>(next, next_block);
  }
  // Before its first chunk a segment ends one that it has not begun: V's places are counted so.
  __device__ __forceinline__ void EndState(int i, int b) {
    WaitProducts<0>();
    Pin(state[b]);
#pragma unroll
    for (int c = 0; c < 3; ++c) Pin(key[c]);
    if (b == kLast) Arrive(s.value_free[i & 1]);
  }

  // Block b of chunk i from its gates' logits to K, and what comes before it to the chunk's end.
  __device__ __forceinline__ void Weigh(int i, int b) {
    const Layer& l = p.layer;
    const auto [lane, warp, group, g, t] = FoldThread();
    const float* bias = s.bias + b * D + 16 * warp + g;
    // Known before it is asked.
    const bool whole = i >= s.part.lead && i < s.part.tail;
    if (ScaleLogits(gate, {bias[0], bias[8]}, l.least_gate))
      SlowGatesMinusOne(gate);
    else
      FastGatesMinusOne(gate, l.least_gate);
    if (!whole) {
      const int first = s.part.e0 + i * kChunk, from = l.S, until = s.part.until;
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        const int token = first + 16 * t + k;
        if (token < from || token >= until) gate[k / 2][k % 2] = gate[k / 2][2 + k % 2] = 0;
      }
    }
    float run[2], total[2];  // products of what comes later, of all
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x = 1 + gate[0][2 * r];
#pragma unroll
      for (int k = 1; k < 16; ++k) x += x * gate[k / 2][2 * r + k % 2];
      const float next = __shfl_xor_sync(~0u, x, 1), pair = x * next;
      const float others = __shfl_xor_sync(~0u, pair, 2);
      run[r] = (t & 1 ? 1.f : next) * (t & 2 ? 1.f : others);
      total[r] = pair * others;
    }
    b > 0 ? EndState(i, b - 1) : EndState(i - 1, kLast);
    if (b == 0) MeetAt(Meeting::kFull, Group());
    const FoldThread at;
    const float4* features = s.feature + FeaturePlace<D>(16 * at.warp + at.g, at.t, 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (at.t == 2 * b + r) {
        z *= total[r];
        decay *= total[r];
      }
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        state[b][j][2 * r] *= total[r];
        state[b][j][2 * r + 1] *= total[r];
      }
    }
    float sum[2] = {};
#pragma unroll
    for (int four = 3; four >= 0; --four) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        asm volatile("" ::: "memory");  // no sooner: there are no registers to spare
        const float4 x = features[four * (4 * D) + 32 * r];
        const float feature[4] = {x.x, x.z, x.y, x.w};
        float weight[4];
#pragma unroll
        for (int k = 3; k >= 0; --k) {
          const float x = gate[2 * four + k / 2][2 * r + k % 2];
          weight[k] = x * run[r] * feature[k];
          run[r] = fmaf(run[r], x, run[r]);  // does not wait for the weight
          sum[r] += weight[k];
        }
        key[four][r] = Pack(weight[0], weight[1]);
        key[four][2 + r] = Pack(weight[2], weight[3]);
      }
    }
    if (b == kLast) ArriveAt(Meeting::kFree, Group());
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = QuadSum(sum[r]);
      if (FoldThread().t == 2 * b + r) z += sum[r];
    }
  }

  __device__ __forceinline__ void Run() {
    if (s.part.chunks == 0) return;
    StartGates(0, 0);
    EndGates<0>(0, 0);
    for (int i = 0; i < s.part.chunks; ++i) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        Weigh(i, b);
        StartState(i, b);
      }
    }
    EndState(s.part.chunks - 1, kLast);
  }

  // To the slot, or for a segment among others to its part of `start`.
  __device__ __forceinline__ void Write() const {
    const auto [lane, warp, group, g, t] = FoldThread();
    const Layer& l = p.layer;
    const int h = blockIdx.x, store = blockIdx.y;
    const int64_t at = int64_t{h} * l.SF + blockIdx.z * D + 16 * warp + g;
    float *states, *norms, *decays = nullptr;
    if (s.part.segments == 1) {
      std::byte* slot = SlotBase(l, s.part.n);
      states = reinterpret_cast<float*>(slot + l.at.state) + at * D;
      norms = reinterpret_cast<float*>(slot + l.at.norm) + at;
    } else {
      const int64_t before = int64_t{store} * l.Hkv * l.SF + at;
      states = p.start + before * D;
      norms = p.start_norm + before;
      decays = p.start_decay + before;
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int channel = b * l.F + 8 * r;
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
          *reinterpret_cast<float2*>(states + channel * D + 8 * j + 2 * t) = {
              0 - state[b][j][2 * r], 0 - state[b][j][2 * r + 1]};
        if (t != 2 * b + r) continue;
        norms[channel] = 0 - z;
        if (decays) decays[channel] = decay;
      }
  }
};

#endif

}  // namespace dsla::cuda
