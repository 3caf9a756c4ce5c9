// The warps of `fold` that make features, gates and states of what fold.cuh has put into shared
// memory.
#pragma once

#include "ops/dsla/cuda/fold.cuh"

namespace dsla::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// 64 channels: x += weights keys^T.
template <int D>
__device__ __forceinline__ void AddLogits(float (&x)[8][4], uint32_t weight, uint32_t keys) {
  weight = Fresh(weight);
  keys = Fresh(keys);
#pragma unroll
  for (int c = 0; c < D / 16; ++c)
    WarpgroupMma(x, PanelDescriptor(weight, c / 4 * (64 * 128) + c % 4 * 32),
                 PanelDescriptor(keys, c / 4 * (64 * 128) + c % 4 * 32));
}
template <int D>
__device__ __forceinline__ void AddToState(float (&state)[D / 64][8][4],
                                           const uint32_t (&key)[4][4], uint32_t v) {
  v = Fresh(v);
#pragma unroll
  for (int c = 0; c < 4; ++c)
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel)
      WarpgroupMma<1>(state[panel], key[c],
                      PanelDescriptor(v, panel * (64 * 128) + c * (16 * 128)));
}

// Of a thread of the warps that fold; `warp` counts all of the block's.
struct FoldThread {
  int lane, warp, group, g, t;
  __device__ __forceinline__ FoldThread() {
    const auto i = ThreadIndex() - 128;
    lane = i % 32;
    warp = i / 32;
    group = i / 128;
    g = lane / 4;
    t = lane % 4;
  }
};

// A warpgroup's part of a segment.
template <int D, int kBlocks, int kSigns>
struct Folder {
  static constexpr int kPanels = D / 64;
  using Shared = FoldShared<D, kBlocks, kSigns>;

  Shared& s;
  const PrefillParams& p;
  float state[kBlocks][kPanels][8][4] = {};
  float y[8][4];       // logits of phi_k; then, with one sign, phi_k
  float gate[8][4];    // logits, then e^a - 1
  uint32_t key[4][4];  // K

  // One for all of a warp.
  __device__ __forceinline__ int Group() const { return __shfl_sync(~0u, FoldThread().group, 0); }
  __device__ __forceinline__ void PinState(int b) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) Pin(state[b][panel]);
  }
  __device__ __forceinline__ void StartGates(int b) {
    const FoldThread i;
    const float* bias = s.bias + b * D + 16 * i.warp + i.g;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      gate[j][0] = gate[j][1] = bias[0];
      gate[j][2] = gate[j][3] = bias[8];
    }
    Pin(gate);
  }
  __device__ __forceinline__ void AddGates(int b, int stage) {
    const uint32_t weight = SharedAddress(s.weight[1 + b][Group()]);
#pragma unroll
    for (int term = 0; term < 2; ++term)
      AddLogits<D>(gate, weight, SharedAddress(s.stage[stage].plain[term]));
  }

  // Of this warp's channels, base 2: log of the sum of e^{sign y} per token.
  __device__ __forceinline__ void Sum(int i, int sign) {
    const auto [lane, warp, group, g, t] = FoldThread();
    const float scale = sign == 0 ? kLog2e : -kLog2e;
    float* sums = s.sum[i % 2][sign][warp];
    float2* mine =
        reinterpret_cast<float2*>(sums + 16 * t + 8 * (g & 1) + 4 * (g >> 1 & 1) + 2 * (g >> 2));
    float v[16];
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const float a = y[k / 2][k % 2], b = y[k / 2][2 + k % 2];
      v[k] = sign == 0 ? fmaxf(a, b) : -fminf(a, b);
    }
    float2 most = ReduceRows(v, lane, [](float a, float b) { return fmaxf(a, b); });
    most.x *= kLog2e;
    most.y *= kLog2e;
    *mine = most;
    __syncwarp();
    float base[4];
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      if (k % 4 == 0) LoadSlots(base, sums + 16 * t + k);
      v[k] = Exp2(y[k / 2][k % 2] * scale - base[k % 4]) +
             Exp2(y[k / 2][2 + k % 2] * scale - base[k % 4]);
    }
    const float2 sum = ReduceRows(v, lane, [](float a, float b) { return a + b; });
    __syncwarp();
    *mine = {most.x + Log2(sum.x), most.y + Log2(sum.y)};
  }

  // Logits of chunk i and its first gates, and with kAdd the products of the chunk before with V.
  template <bool kAdd>
  __device__ __forceinline__ void Start(int i) {
    // Behind the last chunk the same is done with whatever is there, for nobody.
    const bool real = i < s.part.chunks;
    if (real) Await(s.key_full, i);
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) y[j][c] = 0;
    Pin(y);
    BeginProducts();
    AddLogits<D>(y, SharedAddress(s.weight[0][Group()]), SharedAddress(s.key));
    CommitProducts();
    if constexpr (kAdd) {
      PinState(kBlocks - 1);
      Pin(key);
      BeginProducts();
      AddToState<D>(state[kBlocks - 1], key, SharedAddress(s.stage[(i - 1) % 2].v));
      CommitProducts();
      WaitProducts<1>();
    } else {
      WaitProducts<0>();
    }
    Pin(y);
    Arrive(s.key_free);
#pragma unroll
    for (int sign = 0; sign < kSigns; ++sign) Sum(i, sign);
    Arrive(s.sums_full);
    if constexpr (kAdd) {
      WaitProducts<0>();
      PinState(kBlocks - 1);
      Pin(key);
      Arrive(s.stage_free[(i - 1) % 2]);
    }
    if (real) Await(s.stage_full[i % 2], i / 2);
    StartGates(0);
    BeginProducts();
    AddGates(0, i % 2);
    EndProducts();
    Pin(gate);
  }

  // Minus the logarithm of the sums over all warps, for this warpgroup.
  __device__ __forceinline__ void CombineSums(int i) {
    const auto [lane, warp, group, g, t] = FoldThread();
    Await(s.sums_full, i);
    const int token = 16 * (warp % 4) + lane % 16, half = lane / 16;
#pragma unroll
    for (int sign = 0; sign < kSigns; ++sign) {
      float x[D / 32], most = -INFINITY, sum = 0;
#pragma unroll
      for (int k = 0; k < D / 32; ++k) {
        x[k] = s.sum[i % 2][sign][half * (D / 32) + k][token];
        most = fmaxf(most, x[k]);
      }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 16));
#pragma unroll
      for (int k = 0; k < D / 32; ++k) sum += Exp2(x[k] - most);
      sum += __shfl_xor_sync(~0u, sum, 16);
      if (half == 0) s.norm[i % 2][group][sign][token] = -(most + Log2(sum));
    }
    Barrier<128>(group);
  }

  // Block b of chunk i from its gates' logits to K, and what comes before it to the chunk's end.
  __device__ __forceinline__ void Weigh(int i, int b) {
    const Layer& l = p.layer;
    GatesMinusOne(gate, l.least_gate);
    const auto [lane, warp, group, g, t] = FoldThread();
    const int first = s.part.e0 + i * kChunk, from = l.S, until = s.part.until;
    if (first < from || first + kChunk > until) {
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        const int token = first + 16 * t + k;
        if (token < from || token >= until) gate[k / 2][k % 2] = gate[k / 2][2 + k % 2] = 0;
      }
    }
    float run[2], total[2], sum[2] = {};
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
    if (b == 0) CombineSums(i);
    const float* norms = s.norm[i % 2][group][kSigns == 2 ? b : 0] + 16 * t;
    float norm[4], later[2];
#pragma unroll
    for (int k = 15; k >= 0; --k) {
      if ((kSigns == 2 || b == 0) && k % 4 == 3) {
        asm volatile("" ::: "memory");  // no sooner: there are no registers to spare
        LoadSlots(norm, norms + k - 3);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& f = y[k / 2][2 * r + k % 2];
        float phi = f;
        if (kSigns == 2 || b == 0)
          phi = Exp2(f * (kSigns == 2 && b == 1 ? -kLog2e : kLog2e) + norm[k % 4]);
        if (kSigns == 1) f = phi;
        const float x = gate[k / 2][2 * r + k % 2], weight = -(x * run[r]) * phi;
        run[r] += run[r] * x;
        sum[r] += weight;
        if (k % 2 == 0)
          key[k / 4][k / 2 % 2 * 2 + r] = Pack(weight, later[r]);
        else
          later[r] = weight;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = QuadSum(sum[r]);
      if (t == 0) {
        float2& z = s.total[b * D + 16 * warp + g + 8 * r];
        z = {z.x * total[r] + sum[r], z.y * total[r]};
      }
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          state[b][panel][j][2 * r] *= total[r];
          state[b][panel][j][2 * r + 1] *= total[r];
        }
    }
  }

  __device__ __forceinline__ void Run() {
    const auto [lane, warp, group, g, t] = FoldThread();
    if (t == 0) {
#pragma unroll
      for (int k = 0; k < 2 * kBlocks; ++k) s.total[k / 2 * D + 16 * warp + g + k % 2 * 8] = {0, 1};
    }
    if (s.part.chunks == 0) return;
    Start<false>(0);
    for (int i = 0; i < s.part.chunks; ++i) {
#pragma unroll
      for (int b = 0; b < kBlocks - 1; ++b) {
        Weigh(i, b);
        PinState(b);
        Pin(key);
        StartGates(b + 1);
        BeginProducts();
        AddToState<D>(state[b], key, SharedAddress(s.stage[i % 2].v));
        AddGates(b + 1, i % 2);
        EndProducts();
        PinState(b);
        Pin(key);
        Pin(gate);
      }
      Weigh(i, kBlocks - 1);
      Start<true>(i + 1);
    }
  }

  // To the slot, or for a segment among others to its part of `start`.
  __device__ __forceinline__ void Write() const {
    const auto [lane, warp, group, g, t] = FoldThread();
    const Layer& l = p.layer;
    const int h = blockIdx.x, first_block = blockIdx.z * kBlocks, store = blockIdx.y;
    const int64_t at = int64_t{h} * l.SF + first_block * D + 16 * warp + g;
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
        const int channel = b * D + 8 * r;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            *reinterpret_cast<float2*>(states + channel * D + 64 * panel + 8 * j + 2 * t) = {
                state[b][panel][j][2 * r], state[b][panel][j][2 * r + 1]};
        if (t != 0) continue;
        const float2 z = s.total[channel + 16 * warp + g];
        norms[channel] = z.x;
        if (decays) decays[channel] = z.y;
      }
  }
};

#endif

}  // namespace dsla::cuda
