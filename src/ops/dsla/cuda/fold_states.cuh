// The warpgroups of `fold` that make gates and states of what fold_keys.cuh has put into shared
// memory.
#pragma once

#include "ops/dsla/cuda/fold.cuh"

namespace dsla::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Of 64 channels and half of a chunk's tokens: x = weights keys^T.
template <int D>
__device__ __forceinline__ void MakeLogits(float (&x)[4][4], uint32_t weight, uint32_t keys) {
  weight = Fresh(weight);
  keys = Fresh(keys);
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    const int at = c / 4 * (64 * 128) + c % 4 * 32;
    if (c == 0)
      FirstWarpgroupMmaF16(x, PanelDescriptor(weight, at), PanelDescriptor(keys, at));
    else
      WarpgroupMmaF16(x, PanelDescriptor(weight, at), PanelDescriptor(keys, at));
  }
}
// 64 channels of a state, and rows 16 c .. 16 c + 15 of V.
template <int D>
__device__ __forceinline__ void AddToState(float (&state)[D / 8][4], const uint32_t (&key)[4],
                                           uint32_t v, int c) {
  WarpgroupMma<1>(state, key, PanelDescriptor(v, c * (16 * 128), 64 * 128));
}

// RootMinusOne with two terms less: a relative error under 5e-4, where a weight has 9 bits.
__device__ __forceinline__ float ShortRootMinusOne(float u) {
  float x = 0.00510186f;
  x = x * u - 0.01725619f;
  x = x * u + 0.03224871f;
  x = x * u - 0.06247231f;
  return x * u;
}
// e^a - 1 of logits t of GateMinusOneOf, four at a time: as many chains as hide one's latency. The
// floor is one of the exponent: a saturated product.
template <int n>
__device__ __forceinline__ void MakeGatesMinusOne(float (&t)[n][4], float lowest, float share) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    float fast[4], root[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      root[e] = Exp2(-fabsf(t[i][e]));
      fast[e] = Exp2(__saturatef(t[i][e] * share) * lowest);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) root[e] = ShortRootMinusOne(root[e]);
#pragma unroll
    for (int e = 0; e < 4; ++e) t[i][e] = fast[e] * root[e] + (fast[e] - 1);
  }
}
// Of slow gates.
template <int n>
__device__ __forceinline__ void MakeSlowGatesMinusOne(float (&t)[n][4]) {
#pragma unroll
  for (int i = 0; i < 4 * n; ++i) t[i / 4][i % 4] = ShortRootMinusOne(Exp2(t[i / 4][i % 4]));
}

// Of a thread of the warps that fold; `warp` counts all of the block's.
struct FoldThread {
  int warp, group, g, t;
  __device__ __forceinline__ FoldThread() {
    const uint32_t i = ThreadAgain();
    warp = i / 32 - 4;
    group = i / 128 - 1;
    g = i / 4 % 8;
    t = i % 4;
  }
  __device__ __forceinline__ int Channel() const { return 16 * warp + g; }
};

// The least scale of a state: its inverse is a factor of weights, which stay far from the largest
// numbers of bf16 and fp32.
constexpr float kLeastScale = 0x1p-64f;

// A warpgroup's part of a segment, in steps of one half of a chunk's tokens and one block of
// channels. Products that a step's gates are made of are started two steps ahead, and awaited, with
// those that the step before has added to its state, in the middle of that.
template <int D, int kBlocks>
struct Folder {
  using Shared = FoldShared<D, kBlocks>;

  Shared& s;
  const FoldParams& p;
  const int group = __shfl_sync(~0u, FoldThread().group, 0);  // one for all of a warp
  const int chunks = s.part.chunks, lead = s.part.lead, tail = s.part.tail;
  // In one register: the first of the lane's two channels, the other is 8 further, and where phi_k
  // has that.
  const uint32_t places =
      FoldThread().Channel() | FeaturePlace<D>(FoldThread().Channel(), FoldThread().t, 0) << 8;
  // States and norms of the segment, in units of a channel's scale and with their signs turned, as
  // e^a - 1 has it: a weight takes one instruction less, and decays go to the scale until it is too
  // small. A quad has two channels of each block: its lanes have parts of their norms, and lane
  // 2 b + r the decay up to the last change of unit of channel r of block b.
  float state[kBlocks][D / 8][4] = {};
  float norm[kBlocks][2] = {};
  float decay = 1;
  float gate[2][4][4];  // of every other step: logits, then e^a - 1, then parts of weights
  bool slow;            // all gates of the warp in the step that comes
  uint32_t key[2][4];   // -K^T over the scale, of 16 rows of a tile each

  struct Step {
    int chunk, half, b;
    __device__ __forceinline__ int Parity() const { return kBlocks == 2 ? b : half; }
    __device__ __forceinline__ bool IsFirst() const { return half == 0 && b == 0; }
    __device__ __forceinline__ bool IsLast() const { return half == 1 && b == kBlocks - 1; }
    __device__ __forceinline__ Step Next() const {
      return b + 1 < kBlocks ? Step{chunk, half, b + 1} : Step{chunk + half, 1 - half, 0};
    }
  };

  __device__ __forceinline__ int Channel() const { return static_cast<int>(Fresh(places) & 0xff); }
  // Of the lane's first channel.
  __device__ __forceinline__ float* Scale(int b) const { return s.scale + b * D + Channel(); }

  // Products under way.
  __device__ __forceinline__ void StartGates(const Step& at) {
    // Behind the last chunk the same is done with whatever is there, for nobody.
    if (at.IsFirst() && at.chunk < chunks) Await(s.plain_full[at.chunk % 2], at.chunk / 2);
    BeginProducts();
    MakeLogits<D>(gate[at.Parity()], SharedAddress(s.gates[at.b][group]),
                  SharedAddress(s.plain[at.chunk % 2]) + at.half * (32 * 128));
    CommitProducts();
  }
  __device__ __forceinline__ void StartState(const Step& at) {
    auto& to = state[at.b];
    const uint32_t v = Fresh(SharedAddress(s.v[at.chunk % 2])) + at.half * (32 * 128);
    Pin(to);
    Pin(key);
    BeginProducts();
#pragma unroll
    for (int c = 0; c < 2; ++c) AddToState<D>(to, key[c], v, c);
    CommitProducts();
  }
  // In a step: what the one before has added to its state is there, and the next one's logits.
  // Before its first chunk a segment ends one that it has not begun: V's places are counted so.
  __device__ __forceinline__ void AwaitProducts(const Step& at) {
    WaitProducts<0>();
    Pin(state[kBlocks - 1 - at.b]);
    Pin(key);
    Pin(gate[1 - at.Parity()]);
    if (at.IsFirst()) Arrive(s.value_free[(at.chunk + 1) % 2]);
    if (at.Next().IsLast()) Arrive(s.plain_free[at.chunk % 2]);
  }

  __device__ __forceinline__ void SortGates(const Step& at) {
    const float* bias = s.bias + at.b * D + Channel();
    slow = ScaleLogits(gate[at.Parity()], {bias[0], bias[8]}, p.layer.least_gate);
  }
  // e^a - 1, which is 0 for tokens that do not enter.
  __device__ __forceinline__ void MakeGates(const Step& at, bool whole) {
    auto& x = gate[at.Parity()];
    if (slow)
      MakeSlowGatesMinusOne(x);
    else
      MakeGatesMinusOne(x, p.lowest, p.share);
    if (p.near_floor) {
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i / 4][i % 4] = fmaxf(x[i / 4][i % 4], p.layer.least_gate);
    }
    if (whole) return;
    const int first = s.part.e0 + at.chunk * kChunk + at.half * (kChunk / 2) + 8 * FoldThread().t;
    const int from = p.layer.S, until = s.part.until;
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (first + k < from || first + k >= until) x[k / 2][k % 2] = x[k / 2][2 + k % 2] = 0;
  }

  // In the place of e^a - 1: weights but for the decays of what comes after a lane's tokens. Leaves
  // the decays over these tokens.
  __device__ __forceinline__ void Weigh(const Step& at, float (&decays)[2]) {
    auto& x = gate[at.Parity()];
    const float4* features = s.feature + (Fresh(places) >> 8) + at.half * (8 * D);
#pragma unroll
    for (int r = 0; r < 2; ++r) decays[r] = 1;
#pragma unroll
    for (int four = 1; four >= 0; --four)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float4 y = features[four * (4 * D) + 32 * r];
        const float feature[4] = {y.x, y.z, y.y, y.w};
#pragma unroll
        for (int k = 3; k >= 0; --k) {
          float& less = x[2 * four + k / 2][2 * r + k % 2];
          const float decayed = fmaf(decays[r], less, decays[r]);
          less = less * decays[r] * feature[k];
          decays[r] = decayed;
        }
      }
  }

  // Weights, with their other factor, to K^T. Leaves their sums.
  __device__ __forceinline__ void MakeKeys(const Step& at, const float (&factor)[2],
                                           float (&sums)[2]) {
    const auto& x = gate[at.Parity()];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float weight[2] = {x[j][2 * r], x[j][2 * r + 1]};
        key[j / 2][j % 2 * 2 + r] = Pack(weight[0] * factor[r], weight[1] * factor[r]);
        sum[j] = weight[0] + weight[1];
      }
      sums[r] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * factor[r];
    }
  }
  // Units of 1 for those of `by`.
  __device__ __forceinline__ void ChangeUnits(int b, const float (&by)[2]) {
    const int t = FoldThread().t;
    if (t / 2 == b) decay *= t % 2 == 0 ? by[0] : by[1];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      norm[b][r] *= by[r];
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        state[b][j][2 * r] *= by[r];
        state[b][j][2 * r + 1] *= by[r];
      }
    }
  }

  __device__ __forceinline__ void Run(const Step& at, bool whole) {
    MakeGates(at, whole);
    if (at.IsFirst()) Await(s.feature_full[group], at.chunk);
    float after[2], total[2];  // decays of what comes after a lane's tokens, of all
    Weigh(at, total);
    if (at.IsLast()) Arrive(s.feature_free[group]);
    const int t = FoldThread().t;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float next = __shfl_xor_sync(~0u, total[r], 1), pair = total[r] * next;
      const float others = __shfl_xor_sync(~0u, pair, 2);
      after[r] = (t & 1 ? 1.f : next) * (t & 2 ? 1.f : others);
      total[r] = pair * others;
    }
    AwaitProducts(at);
    float by[2], sums[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) by[r] = Scale(at.b)[8 * r] * total[r];
    const bool far = __any_sync(~0u, fminf(by[0], by[1]) < kLeastScale);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float inverse = Reciprocal(by[r]);
      after[r] *= far ? 1 : inverse;
    }
    MakeKeys(at, after, sums);
    __syncwarp();  // all have read it
    if (t < 2) Scale(at.b)[8 * t] = far ? 1 : t == 0 ? by[0] : by[1];
    __syncwarp();
    if (far) ChangeUnits(at.b, by);
#pragma unroll
    for (int r = 0; r < 2; ++r) norm[at.b][r] += sums[r];
    StartState(at);
    StartGates(at.Next().Next());
    SortGates(at.Next());  // while products wait for their turn
  }

  __device__ __forceinline__ void Run() {
    if (chunks == 0) return;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) Pin(state[b]);  // zeros, before products are under way
    const Step first{0, 0, 0};
    StartGates(first);
    WaitProducts<0>();
    Pin(gate[0]);
    SortGates(first);
    StartGates(first.Next());
    for (int i = 0; i < chunks; ++i) {
      const bool whole = i >= lead && i < tail;
      // Twice the code would not fit into the cache of instructions.
#pragma unroll(kBlocks == 1 ? 2 : 1)
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) Run(Step{i, half, b}, whole);
    }
    WaitProducts<0>();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) Pin(state[b]);
  }

  // To the slot, or for a segment among others to its part of `start`.
  __device__ __forceinline__ void Write() const {
    const int t = FoldThread().t;
    const Layer& l = p.layer;
    const int h = blockIdx.x, store = blockIdx.y;
    const int64_t at = int64_t{h} * l.SF + blockIdx.z * D + Channel();
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
        const float unit = -Scale(b)[8 * r], sum = QuadSum(norm[b][r]);
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
          // Not the negative zeros of states of nothing.
          *reinterpret_cast<float2*>(states + channel * D + 8 * j + 2 * t) = {
              state[b][j][2 * r] * unit + 0.f, state[b][j][2 * r + 1] * unit + 0.f};
        if (t != 2 * b + r) continue;
        norms[channel] = sum * unit + 0.f;
        if (decays) decays[channel] = decay * -unit;
      }
  }
};

#endif

}  // namespace dsla::cuda
