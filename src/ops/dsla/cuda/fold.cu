// A fold in one kernel, for compute capability 9.0: pages to states, with nothing of a chunk in
// memory in between. Queries want K~ relative to the middle of a chunk; a fold only what the chunk
// adds at its end,
//   S' = e^L S + K^T V,  K_t = e^{L - G_t} (1 - e^{a_t}) phi_k(k_t),
// so weights are products of e^a backwards from the end, all at most 1.
//
// A block folds a segment of a sequence for one KV head, over with one set of weights. Of its
// warpgroups one fetches chunks and undoes RoPE (fold.cuh), the others each have 64 channels of
// every block of D: logits as [channels, d] x [d, tokens] by wgmma, so that a lane has 16 tokens of
// its two channels and products over time stay in registers; K^T, rounded, is in these registers
// the A operand of its product with V, and the states are accumulators from the first chunk to the
// last. One warpgroup's products run under the other's exponentials.
#include <algorithm>

#include "ops/dsla/cuda/fold.cuh"

namespace dsla::cuda {
namespace {

// Blocks at a time of the GPU that this is for, with 132 multiprocessors. A sequence is cut into as
// many segments, so results depend on the number; any will do.
template <int D>
constexpr int kBlocksAtOnce = D == 128 ? 132 : 264;
constexpr int BlocksOfPart(const DslaShape& s) { return s.states == 1 && s.F == s.D ? 1 : 2; }

template <int D>
constexpr int kThreads = 2 * D + 128;
// Registers of a thread of the warps that fetch, which need few, and of the others.
template <int D, int kSigns>
constexpr int kFetchRegisters = D == 64       ? 72
                                : kSigns == 2 ? 40
                                              : 56;
template <int D, int kSigns>
constexpr int kFoldRegisters = D == 64       ? 184
                               : kSigns == 2 ? 232
                                             : 224;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Segment `index` of the call's, by a warp.
__device__ __forceinline__ FoldPart PartOf(const PrefillParams& p, int index) {
  const int lane = threadIdx.x % 32;
  for (int base = 0; base < p.layer.N; base += 32) {
    const int count = base + lane < p.layer.N ? FoldSegments(p, base + lane) : 0;
    int end = count;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const int other = __shfl_up_sync(~0u, end, i);
      if (lane >= i) end += other;
    }
    const unsigned after = __ballot_sync(~0u, end > index);
    if (after == 0) {
      index -= __shfl_sync(~0u, end, 31);
      continue;
    }
    const int found = __ffs(static_cast<int>(after)) - 1, n = base + found;
    const int segment = index - __shfl_sync(~0u, end - count, found);
    const int chunks = FoldChunks(p, n), each = FoldSegmentChunks(p, chunks);
    return {n,
            segment,
            FoldSegments(p, n),
            segment * each * kChunk,
            max(min(each, chunks - segment * each), 0),
            max(p.layer.pos[n] - p.layer.W, 0)};
  }
  return {-1, 0, 0, 0, 0, 0};
}

__device__ __forceinline__ void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// At most `pending` groups of products are still under way.
template <int pending>
__device__ __forceinline__ void AwaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

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
      WarpgroupMma(state[panel], key[c], PanelDescriptor(v, panel * (64 * 128) + c * (16 * 128)));
}

// Of a thread of the warps that fold; `warp` counts all of the block's.
struct FoldThread {
  int lane, warp, group, g, t;
  __device__ __forceinline__ FoldThread() {
    const auto i = static_cast<int>(Fresh(threadIdx.x)) - 128;
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
      AwaitProducts<1>();
    } else {
      AwaitProducts<0>();
    }
    Pin(y);
    Arrive(s.key_free);
#pragma unroll
    for (int sign = 0; sign < kSigns; ++sign) Sum(i, sign);
    Arrive(s.sums_full);
    if constexpr (kAdd) {
      AwaitProducts<0>();
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

template <int D, int kBlocks, int kSigns>
__device__ __forceinline__ void FoldSegment(FoldShared<D, kBlocks, kSigns>& s,
                                            const PrefillParams& p) {
  constexpr int kFoldWarps = D / 16;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  LoadFoldWeights(s, p.layer, blockIdx.x, blockIdx.z * kBlocks);
  if (threadIdx.x == 0) {
    InitBarrier(s.key_full, 4);
    InitBarrier(s.key_free, kFoldWarps);
    for (int i = 0; i < 2; ++i) {
      InitBarrier(s.stage_full[i], 4);
      InitBarrier(s.stage_free[i], kFoldWarps);
    }
    InitBarrier(s.sums_full, kFoldWarps);
  }
  AwaitPrevious();
  AllowNext();
  if (warp == 0) {
    const FoldPart part = PartOf(p, p.wave * p.wave_segments + blockIdx.y);
    if (lane == 0) s.part = part;
  }
  PublishCopies();
  __syncthreads();
  if (s.part.n < 0) return;
  if (warp < 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFetchRegisters<D, kSigns>));
    Fetch(s, p);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kFoldRegisters<D, kSigns>));
    Folder<D, kBlocks, kSigns> folder{s, p};
    folder.Run();
    folder.Write();
  }
}

#endif

// grid (Hkv, segments of a wave, SF / D / kBlocks)
template <int D, int kBlocks, int kSigns>
__global__ void __launch_bounds__(kThreads<D>, D == 128 ? 1 : 2)
    FoldKernel(const __grid_constant__ PrefillParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::byte memory[];
  FoldSegment(*reinterpret_cast<FoldShared<D, kBlocks, kSigns>*>(memory), p);
#else
  __trap();  // FoldsInOne says where it may be called
#endif
}

// Sequences of several segments: S' = e^{decay} S + what a segment adds, over those of a wave.
// grid (threads for 4 columns of the states or 4 norms each, Hkv, N)
constexpr int kCombineThreads = 256, kCombineAhead = 8;
template <int D>
__global__ void __launch_bounds__(kCombineThreads)
    CombineKernel(const __grid_constant__ PrefillParams p) {
  AwaitPrevious();
  AllowNext();
  const Layer& l = p.layer;
  const int n = blockIdx.z, h = blockIdx.y, lane = threadIdx.x % 32;
  const int segments = FoldSegments(p, n);
  if (segments == 1) return;
  int first = 0;  // the sequence's first segment, counted from the wave's
  for (int i = lane; i < n; i += 32) first += FoldSegments(p, i);
  first = __reduce_add_sync(~0u, first) - p.wave * p.wave_segments;
  const int begin = max(first, 0), end = min(first + segments, p.wave_segments);
  const int index = blockIdx.x * kCombineThreads + threadIdx.x, states = l.SF * D / 4;
  if (begin >= end || index >= states + l.SF / 4) return;

  const bool is_norm = index >= states;
  const int at = is_norm ? index - states : index;
  const int64_t stride = int64_t{l.Hkv} * l.SF, head = int64_t{h} * l.SF;
  const float* decays = p.start_decay + begin * stride + head + (is_norm ? 4 * at : 4 * at / D);
  const float* adds = is_norm ? p.start_norm + begin * stride + head + 4 * at
                              : p.start + (begin * stride + head) * D + int64_t{4} * at;
  float4* to = reinterpret_cast<float4*>(SlotBase(l, n) + (is_norm ? l.at.norm : l.at.state)) +
               head * (is_norm ? 1 : D) / 4 + at;
  float4 x = first >= 0 ? float4{} : *to;
  for (int base = begin; base < end; base += kCombineAhead) {
    float4 add[kCombineAhead], decay[kCombineAhead];
#pragma unroll
    for (int i = 0; i < kCombineAhead; ++i) {
      if (base + i >= end) continue;
      add[i] = *reinterpret_cast<const float4*>(adds);
      if (is_norm) {
        decay[i] = *reinterpret_cast<const float4*>(decays);
      } else {
        decay[i].x = decay[i].y = decay[i].z = decay[i].w = *decays;
      }
      adds += stride * (is_norm ? 1 : D);
      decays += stride;
    }
#pragma unroll
    for (int i = 0; i < kCombineAhead; ++i) {
      if (base + i >= end) continue;
      x = {decay[i].x * x.x + add[i].x, decay[i].y * x.y + add[i].y, decay[i].z * x.z + add[i].z,
           decay[i].w * x.w + add[i].w};
    }
  }
  *to = x;
}

template <int D, int kBlocks, int kSigns>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  const dim3 grid(p.layer.Hkv, p.wave_segments, p.layer.SF / D / kBlocks);
  Start<FoldKernel<D, kBlocks, kSigns>>("fold", grid, kThreads<D>,
                                        sizeof(FoldShared<D, kBlocks, kSigns>), p, stream);
}
template <int D>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  if (p.layer.F > D)
    Launch<D, 2, 2>(p, stream);
  else if (p.layer.states == 2)
    Launch<D, 2, 1>(p, stream);
  else
    Launch<D, 1, 1>(p, stream);
}

template <int D>
void Combine(const PrefillParams& p, cudaStream_t stream) {
  const int parts = p.layer.SF * (D + 1) / 4;
  const dim3 grid((parts + kCombineThreads - 1) / kCombineThreads, p.layer.Hkv, p.layer.N);
  Start<CombineKernel<D>>("combine", grid, kCombineThreads, 0, p, stream);
}

}  // namespace

bool FoldsInOne() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major == 9;
}

int MostFoldSegments(const DslaShape& s) {
  const int blocks = s.Hkv * s.SF() / s.D / BlocksOfPart(s);
  return std::max((s.D == 64 ? kBlocksAtOnce<64> : kBlocksAtOnce<128>) / blocks, 1);
}

void LaunchFold(const PrefillParams& p, int D, cudaStream_t stream) {
  D == 64 ? Launch<64>(p, stream) : Launch<128>(p, stream);
}
void LaunchCombine(const PrefillParams& p, int D, cudaStream_t stream) {
  D == 64 ? Combine<64>(p, stream) : Combine<128>(p, stream);
}

}  // namespace dsla::cuda
