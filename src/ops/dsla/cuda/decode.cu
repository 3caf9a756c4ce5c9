// One new row per sequence, in two launches:
//   project  products with the adapter's matrices, 16 rows at a time: phi_q, phi_k, e^a - 1
//   update   states (read and written once) and window of one (row, KV head) or a part of it; the
//            last part to end adds the parts up, merges window and states, and writes the row into
//            ring and sinks
#include <algorithm>

#include "base/check.h"
#include "ops/dsla/cuda/decode_window.cuh"

namespace dsla::cuda {
namespace {

// Channels [kChannels part, +kChannels) of the states of one (row, KV head). A lane owns four value
// columns, so the sums over channels need no shuffles; every load of the part is issued before the
// first use.
template <int D, int kG, int kChannels>
struct States {
  static constexpr int kWarps = Warps(D);
  static constexpr int kRows = 128 / D;                      // channels per load of a warp
  static constexpr int kLoads = kChannels / kWarps / kRows;  // of a lane
  static constexpr int kStride = kG == 3 ? 4 : kG;           // for whole vectors
  struct Shared {
    float2 factor[kChannels];  // e^a, k'
    alignas(16) float query[kChannels][kStride];
    float norm[kChannels / 32][kG];  // q' z, by warp
  };
  float4 s[kLoads];
  uint2 entering;  // value of the token that enters
  float z;
  float *state, *norm;
  int c0, column, sub;

  __device__ __forceinline__ void Load(const DecodeParams& p, const Keys<D>& keys, std::byte* slot,
                                       int h, int part) {
    const Layer& l = p.layer;
    const int lane = threadIdx.x % 32, warp = Warp();
    column = lane % (D / 4) * 4, sub = lane / (D / 4), c0 = part * kChannels;
    state = reinterpret_cast<float*>(slot + l.at.state) +
            (int64_t{h} * l.SF + c0 + warp * (kChannels / kWarps) + sub) * D + column;
    norm = reinterpret_cast<float*>(slot + l.at.norm) + int64_t{h} * l.SF + c0 + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      s[i] = __ldcs(reinterpret_cast<const float4*>(state + int64_t{i} * kRows * D));
    z = threadIdx.x < kChannels ? *norm : 0;
    entering = {};
    if (Entering(l, keys.t) >= 0) {  // from the ring's place that token t is going to take
      const __nv_bfloat16* from = l.W > 0 ? keys.ring_v + int64_t{keys.newest} * D : keys.new_v;
      entering = *reinterpret_cast<const uint2*>(from + column);
    }
  }

  // Leaves the numerators in `sums` [kG, D], one such array for each warp, and q' z in `shared`.
  __device__ __forceinline__ void Update(const DecodeParams& p, Shared& shared, float* sums, int n,
                                         int h, bool enters) {
    const Layer& l = p.layer;
    const int lane = threadIdx.x % 32, warp = Warp();
    const int64_t head = int64_t{n} * l.Hkv + h;
    if (threadIdx.x < kChannels) {  // whole warps
      const int c = c0 + threadIdx.x, second = c >= l.F, f = c - second * l.F;
      const float gate = p.gate[head * l.SF + c], phi_k = p.phi_k[head * l.F + f];
      float q[kG];  // loaded without a branch, so that no load waits for another
#pragma unroll
      for (int g = 0; g < kG; ++g) {
        const int qh = h * l.G + min(g, l.G - 1);
        q[g] = l.mix[qh * l.states + second] * p.phi_q[(int64_t{n} * l.H + qh) * l.F + f];
      }
      const float k = enters ? -gate * phi_k : 0;
      shared.factor[threadIdx.x] = {1 + gate, k};
      z = (1 + gate) * z + k;
      *norm = z;
#pragma unroll
      for (int g = 0; g < kG; ++g) {
        shared.query[threadIdx.x][g] = q[g];
        const float sum = WarpSum(q[g] * z);
        if (lane == 0) shared.norm[warp][g] = sum;
      }
    }
    __syncthreads();
    const float4 v{Low(entering.x), High(entering.x), Low(entering.y), High(entering.y)};
    float4 acc[kG] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int c = warp * (kChannels / kWarps) + i * kRows + sub;
      const float2 f = shared.factor[c];
      s[i].x = f.x * s[i].x + f.y * v.x;
      s[i].y = f.x * s[i].y + f.y * v.y;
      s[i].z = f.x * s[i].z + f.y * v.z;
      s[i].w = f.x * s[i].w + f.y * v.w;
      __stcs(reinterpret_cast<float4*>(state + int64_t{i} * kRows * D), s[i]);
#pragma unroll
      for (int g = 0; g < kG; ++g) {
        const float q = shared.query[c][g];
        acc[g].x += q * s[i].x;
        acc[g].y += q * s[i].y;
        acc[g].z += q * s[i].z;
        acc[g].w += q * s[i].w;
      }
    }
#pragma unroll
    for (int g = 0; g < kG; ++g) {
      if (D == 64) {
        acc[g].x += __shfl_xor_sync(~0u, acc[g].x, 16);
        acc[g].y += __shfl_xor_sync(~0u, acc[g].y, 16);
        acc[g].z += __shfl_xor_sync(~0u, acc[g].z, 16);
        acc[g].w += __shfl_xor_sync(~0u, acc[g].w, 16);
      }
      if (sub == 0) *reinterpret_cast<float4*>(sums + g * D + column) = acc[g];
    }
  }
};

// The share of one thread in what a (row, KV head) or a part of it adds up to: its query head's,
// and of the numerators one column.
struct Sums {
  float linear = 0, window = 0, norm = 0, top = -INFINITY, weights = 0;

  __device__ __forceinline__ void Store(float* part, int G, int D, int i) const {
    part[i] = linear;
    part[G * D + i] = window;
    if (i % D > 0) return;
    float* head = part + 2 * G * D + i / D;
    head[0] = norm;
    head[G] = top;
    head[2 * G] = weights;
  }
  // Of `parts` parts, in their order.
  __device__ __forceinline__ void Load(const float* part, int parts, int G, int D, int i) {
    const int stride = PartFloats(G, D);
    const float* head = part + 2 * G * D + i / D;
#pragma unroll 4
    for (int j = 0; j < parts; ++j) top = fmaxf(top, __ldcg(head + j * stride + G));
    const float base = top == -INFINITY ? 0.f : top;
#pragma unroll 4
    for (int j = 0; j < parts; ++j) {
      const float scale = Exp2(__ldcg(head + j * stride + G) - base);
      linear += __ldcg(part + j * stride + i);
      window += scale * __ldcg(part + j * stride + G * D + i);
      norm += __ldcg(head + j * stride);
      weights += scale * __ldcg(head + j * stride + 2 * G);
    }
  }
  __device__ __forceinline__ float Merged(bool has_window, float claim) const {
    const float out = linear / (norm + kDslaEpsilon);
    if (!has_window) return out;
    const float lse = top * 0.6931471805599453f + logf(weights);
    const float w = norm < kDslaEpsilon ? 0.f : 1 / (1 + Exp(lse - claim));
    return w * out + (1 - w) * (window / weights);
  }
};

// True in the block that comes last of a (row, KV head): it sees what the others have written.
__device__ __forceinline__ bool IsLast(int* arrived, int parts) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    int before;  // orders what the block has written and what it is going to read
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(arrived)
                 : "memory");
    last = before == parts - 1;
  }
  __syncthreads();
  return last;
}

// Token t into ring and sinks.
template <int D>
__device__ __forceinline__ void StoreRow(const DecodeParams& p, const Keys<D>& keys,
                                         std::byte* slot, int h) {
  constexpr int kPieces = D / 8;
  const Layer& l = p.layer;
  const int i = 32 * Warps(D) - 1 - threadIdx.x;  // the last threads: few have outputs to make
  if (l.W == 0 || i >= 2 * kPieces) return;
  const bool is_k = i < kPieces;
  const int column = i % kPieces * 8;
  const uint4 x = *reinterpret_cast<const uint4*>((is_k ? keys.new_k : keys.new_v) + column);
  const auto store = [&](int64_t base, int64_t row) {
    *reinterpret_cast<uint4*>(slot + base + (row * D + column) * 2) = x;
  };
  store(is_k ? l.at.ring_k : l.at.ring_v, int64_t{h} * l.W + keys.newest);
  if (keys.t < l.S) store(is_k ? l.at.sink_k : l.at.sink_v, int64_t{h} * l.S + keys.t);
}

// grid (parts, Hkv, N)
template <int D, int kG, int kChannels>
__global__ void __launch_bounds__(32 * Warps(D), D == 64 ? 2 : 3)
    UpdateKernel(const __grid_constant__ DecodeParams p) {
  constexpr int kWarps = Warps(D), kThreads = 32 * kWarps, kTileUnits = TileBytes(D) / 16;
  constexpr int kLinear = kMaxGroup * D;
  static_assert(2 * kLinear * 4 == TileBytes(D));
  extern __shared__ __align__(256) uint4 tiles[];
  __shared__ typename States<D, kG, kChannels>::Shared states_shared;
  __shared__ float tops[kWarps][kG], weights[kWarps][kG], claims[kG];
  const Layer& l = p.layer;
  const int n = blockIdx.z, h = blockIdx.y, part = blockIdx.x;
  const int warp = Warp(), t = l.pos[n];
  if ((l.slots[n] | t) < 0) return;  // in one, so that both loads are under way at once
  std::byte* slot = SlotBase(l, n);
  const Keys<D> keys(p, slot, n, h, t);
  const int64_t head = int64_t{n} * l.Hkv + h, query = int64_t{n} * l.H + h * l.G;

  // Everything that comes from memory is on the way before the first use. A tile's copies are a
  // group, and a warp without a tile has an empty one.
#pragma unroll 1
  for (int i = 0; i < kWarpTiles; ++i) {
    const int tile = warp + i * kWarps;
    if (FirstKey(p, tile) < p.keys) keys.Fetch(tiles + tile * kTileUnits, FirstKey(p, tile));
    CommitCopies();
  }
  const bool has_states = part < p.splits;
  States<D, kG, kChannels> states;
  if (has_states) states.Load(p, keys, slot, h, part);
  const float claim = l.W > 0 && threadIdx.x < l.G ? p.claim[query + threadIdx.x] : 0;
  // A warp's sums take the place of its first tile: of the window that of keys, of the states that
  // of values.
  float* sums = reinterpret_cast<float*>(tiles + warp * kTileUnits);
  AttendTiles(p, keys, tiles, n, h, sums, tops[warp], weights[warp]);
  if (threadIdx.x < l.G) claims[threadIdx.x] = claim;

  AwaitPrevious();  // from here on `project` has ended
  AllowNext();
  if (has_states) states.Update(p, states_shared, sums + kLinear, n, h, Entering(l, keys.t) >= 0);
  __syncthreads();
  float* partial = p.partial + head * p.parts * PartFloats(l.G, D);
  for (int i = threadIdx.x; i < l.G * D; i += kThreads) {
    Sums s;
    const int g = i / D;
    const float* at = reinterpret_cast<const float*>(tiles) + i;
    if (has_states) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) s.linear += at[w * kTileUnits * 4 + kLinear];
#pragma unroll
      for (int w = 0; w < kChannels / 32; ++w) s.norm += states_shared.norm[w][g];
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) s.top = fmaxf(s.top, tops[w][g]);
    const float base = s.top == -INFINITY ? 0.f : s.top;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float scale = Exp2(tops[w][g] - base);
      s.window += scale * at[w * kTileUnits * 4];
      s.weights += scale * weights[w][g];
    }
    if (p.parts > 1)
      s.Store(partial + part * PartFloats(l.G, D), l.G, D, i);
    else
      p.out[query * D + i] = __float2bfloat16_rn(s.Merged(l.W > 0, claims[g]));
  }
  if (p.parts > 1) {
    if (!IsLast(p.arrived + head, p.parts)) return;
    for (int i = threadIdx.x; i < l.G * D; i += kThreads) {
      Sums s;
      s.Load(partial, p.parts, l.G, D, i);
      p.out[query * D + i] = __float2bfloat16_rn(s.Merged(l.W > 0, claims[i / D]));
    }
  }
  StoreRow<D>(p, keys, slot, h);
}

int Ceil(int a, int b) { return (a + b - 1) / b; }

template <int D, int kG, int kChannels>
int LaunchUpdate(const DecodeParams& p, cudaStream_t stream) {
  const auto kernel = UpdateKernel<D, kG, kChannels>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       MaxTiles(D) * TileBytes(D));
  PreferShared(kernel);
  const int tiles = std::max(Warps(D), Ceil(Ceil(p.keys, kKeyTile), p.parts));
  StartEarly(kernel, dim3(p.parts, p.layer.Hkv, p.layer.N), 32 * Warps(D), p, stream,
             static_cast<size_t>(tiles * TileBytes(D)));
  return cudaGetLastError();
}
template <int D, int kChannels>
int LaunchUpdate(const DecodeParams& p, cudaStream_t stream) {
  switch (p.layer.G) {
    case 1:
      return LaunchUpdate<D, 1, kChannels>(p, stream);
    case 2:
      return LaunchUpdate<D, 2, kChannels>(p, stream);
    case 3:
      return LaunchUpdate<D, 3, kChannels>(p, stream);
    case 4:
      return LaunchUpdate<D, 4, kChannels>(p, stream);
    default:
      return LaunchUpdate<D, kMaxGroup, kChannels>(p, stream);
  }
}

// Channels of a part: 16 or 32 KB of states.
int Channels(const DslaShape& s) { return s.D == 64 && s.SF() % 128 == 0 ? 128 : 64; }

// Counts floats, or hands out addresses when `base` is set; each part 256-byte aligned.
struct Carver {
  float* base = nullptr;
  int64_t used = 0;
  float* Take(int64_t n) {
    float* at = base + used;
    used += (n + 63) / 64 * 64;
    return at;
  }
};

int64_t Carve(const DslaShape& s, int N, float* base, DecodeParams* p) {
  Carver c{base};
  p->splits = s.SF() / Channels(s);
  p->keys = s.window + s.sinks;
  p->parts = std::max(p->splits, Ceil(p->keys, MaxTiles(s.D) * kKeyTile));
  const int64_t heads = int64_t{N} * s.Hkv;
  p->phi_q = c.Take(int64_t{N} * s.H * s.F);
  p->phi_k = c.Take(heads * s.F);
  p->gate = c.Take(heads * s.SF());
  p->partial = c.Take(p->parts > 1 ? heads * p->parts * PartFloats(s.G(), s.D) : 0);
  p->arrived = reinterpret_cast<int*>(c.Take(heads));
  return c.used * 4;
}

}  // namespace

int64_t DecodeWorkspaceBytes(const DslaShape& shape, int N) {
  DecodeParams unused;
  return Carve(shape, N, nullptr, &unused);
}

int Decode(const DslaCudaArgs& a, Stream stream) {
  if (a.rows.N == 0) return cudaSuccess;
  CheckShape(a.shape, a.layout, a.states);
  DSLA_CHECK(a.shape.G() <= kMaxGroup);
  DSLA_CHECK(a.T == a.rows.N && a.rows.pos && a.slots && a.q && a.k && a.v && a.out);
  DSLA_CHECK(a.weights.packed && a.weights.mix && a.weights.rope_cos && a.weights.rope_sin);
  DSLA_CHECK(a.shape.window == 0 || a.claim);
  DSLA_CHECK(a.q_stride % 8 == 0 && a.k_stride % 8 == 0 && a.v_stride % 8 == 0);
  DecodeParams p;
  p.layer = MakeLayer(a);
  p.rows = {static_cast<const __nv_bfloat16*>(a.k), static_cast<const __nv_bfloat16*>(a.v),
            a.k_stride, a.v_stride};
  p.q = static_cast<const __nv_bfloat16*>(a.q);
  p.q_stride = a.q_stride;
  p.claim = a.claim;
  p.out = static_cast<__nv_bfloat16*>(a.out);
  DSLA_CHECK(Carve(a.shape, a.rows.N, static_cast<float*>(a.workspace), &p) <= a.workspace_bytes);
  LaunchProject(p, a.shape.D, stream);
  if (a.shape.D == 128) return LaunchUpdate<128, 64>(p, stream);
  return Channels(a.shape) == 128 ? LaunchUpdate<64, 128>(p, stream)
                                  : LaunchUpdate<64, 64>(p, stream);
}

}  // namespace dsla::cuda
