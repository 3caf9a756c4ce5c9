// One new row per sequence, in three launches:
//   project  products with the adapter's matrices, 16 rows at a time: phi_q, phi_k, e^a - 1
//   update   states (read and written once) and window, cut into parts that all stream from memory
//   merge    adds the parts up, merges window and states, writes the row into ring and sinks
#include "base/check.h"
#include "ops/dsla/cuda/decode.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kSplit = 64;       // channels of a state per block of `update`
constexpr int kWindowPart = 64;  // keys per block of `update`

// Channels [64 split, +64) of the states of one (row, KV head). A lane owns four value columns, so
// the sums over channels need no shuffles; every load of the part is issued before the first use.
template <int D, int kG>
__device__ __forceinline__ void UpdateStates(const DecodeParams& p, int n, int h, int split,
                                             float* shared) {
  constexpr int kRows = 128 / D;                       // channels per load of a warp
  constexpr int kLoads = kSplit / kWarps / kRows;      // of a lane
  float2* factor = reinterpret_cast<float2*>(shared);  // [64]: e^a, k'
  float* query = shared + 2 * kSplit;                  // [64][kG]
  float* sums = query + kSplit * kG;                   // [kWarps][kG][D]
  const Layer& l = p.layer;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = lane % (D / 4) * 4, sub = lane / (D / 4), c0 = split * kSplit;
  const int64_t head = int64_t{n} * l.Hkv + h;
  std::byte* slot = SlotBase(l, n);
  float* state = reinterpret_cast<float*>(slot + l.at.state) +
                 (int64_t{h} * l.SF + c0 + warp * (kSplit / kWarps) + sub) * D + column;
  float4 s[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i)
    s[i] = __ldcs(reinterpret_cast<const float4*>(state + int64_t{i} * kRows * D));
  float* norm = reinterpret_cast<float*>(slot + l.at.norm) + int64_t{h} * l.SF + c0;
  float z = threadIdx.x < kSplit ? norm[threadIdx.x] : 0;

  const int pos = l.pos[n], e = Entering(l, pos);
  float4 v{};
  if (e >= 0) {
    const uint2 x = *reinterpret_cast<const uint2*>(EnteringRow<D>(p, n, h, pos).v + column);
    v = {Low(x.x), High(x.x), Low(x.y), High(x.y)};
  }
  AwaitPrevious();  // from here on `project` has ended
  AllowNext();
  if (threadIdx.x < kSplit) {
    const int c = c0 + threadIdx.x, f = c % l.F;
    const float gate = p.gate[head * l.SF + c];
    const float k = e >= 0 ? -gate * p.phi_k[head * l.F + f] : 0;
    factor[threadIdx.x] = {1 + gate, k};
    z = (1 + gate) * z + k;
    norm[threadIdx.x] = z;
#pragma unroll
    for (int g = 0; g < kG; ++g) {
      const int qh = h * l.G + g;
      query[threadIdx.x * kG + g] =
          g < l.G ? l.mix[qh * l.states + c / l.F] * p.phi_q[(int64_t{n} * l.H + qh) * l.F + f] : 0;
    }
  }
  __syncthreads();

  float4 acc[kG] = {};
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int c = warp * (kSplit / kWarps) + i * kRows + sub;
    const float2 f = factor[c];
    s[i].x = f.x * s[i].x + f.y * v.x;
    s[i].y = f.x * s[i].y + f.y * v.y;
    s[i].z = f.x * s[i].z + f.y * v.z;
    s[i].w = f.x * s[i].w + f.y * v.w;
    __stcs(reinterpret_cast<float4*>(state + int64_t{i} * kRows * D), s[i]);
#pragma unroll
    for (int g = 0; g < kG; ++g) {
      const float q = query[c * kG + g];
      acc[g].x += q * s[i].x;
      acc[g].y += q * s[i].y;
      acc[g].z += q * s[i].z;
      acc[g].w += q * s[i].w;
    }
  }
  if (threadIdx.x < kSplit) {  // two whole warps
#pragma unroll
    for (int g = 0; g < kG; ++g) {
      const float part = WarpSum(query[threadIdx.x * kG + g] * z);
      if (lane == 0) shared[2 * kSplit + kSplit * kG + kWarps * kG * D + warp * kG + g] = part;
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
    if (sub == 0) *reinterpret_cast<float4*>(sums + (warp * kG + g) * D + column) = acc[g];
  }
  __syncthreads();
  const int64_t part = head * p.splits + split;
  const float* norms = sums + kWarps * kG * D;
  for (int i = threadIdx.x; i < l.G * D; i += kThreads) {
    float x = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x += sums[w * kG * D + i];
    p.linear[part * l.G * D + i] = x;
  }
  if (threadIdx.x < l.G)
    p.norm[part * l.G + threadIdx.x] = norms[threadIdx.x] + norms[kG + threadIdx.x];
}

// Softmax of up to 64 keys of one (row, KV head): ring places [64 part, +64), or the sinks.
template <int D, int kG>
__device__ __forceinline__ void UpdateWindow(const DecodeParams& p, int n, int h, int part,
                                             float* shared) {
  constexpr int kLanes = D / 8, kKeys = 32 / kLanes;    // lanes per key, keys per load of a warp
  constexpr int kLoads = kWindowPart / kWarps / kKeys;  // of a lane
  float* score = shared;                                // [kG][64]
  float* sums = shared + kG * kWindowPart;              // [kWarps][kG][D]
  const Layer& l = p.layer;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = lane % kLanes * 8, t = l.pos[n];
  const bool sinks = part == p.ring_parts;
  const std::byte* slot = SlotBase(l, n);
  const __nv_bfloat16* old_k =
      reinterpret_cast<const __nv_bfloat16*>(slot + (sinks ? l.at.sink_k : l.at.ring_k));
  const __nv_bfloat16* old_v =
      reinterpret_cast<const __nv_bfloat16*>(slot + (sinks ? l.at.sink_v : l.at.ring_v));
  const int rows = sinks ? l.S : l.W;
  uint4 k[kLoads], v[kLoads];
  bool valid[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int j = warp * (kWindowPart / kWarps) + i * kKeys + lane / kLanes;  // key of this part
    const int place = sinks ? j : part * kWindowPart + j;
    // The newest token at this place: t itself takes the place t % W.
    const int s = sinks ? place : t - (t - place + l.W) % l.W;
    valid[i] = place < rows && s >= (sinks ? 0 : l.S) && s <= t;
    k[i] = v[i] = uint4{};
    if (!valid[i]) continue;
    const __nv_bfloat16 *from_k, *from_v;
    if (s == t) {
      from_k = p.rows.k + n * p.rows.k_stride + h * D;
      from_v = p.rows.v + n * p.rows.v_stride + h * D;
    } else {
      const int64_t at = (static_cast<int64_t>(h) * rows + place) * D;
      from_k = old_k + at;
      from_v = old_v + at;
    }
    k[i] = __ldcs(reinterpret_cast<const uint4*>(from_k + column));
    v[i] = __ldcs(reinterpret_cast<const uint4*>(from_v + column));
  }
  const float scale = rsqrtf(static_cast<float>(D)) * 1.4426950408889634f;
#pragma unroll
  for (int g = 0; g < kG; ++g) {
    const uint4 x =
        g < l.G ? *reinterpret_cast<const uint4*>(p.q + n * p.q_stride + (h * l.G + g) * D + column)
                : uint4{};
    const uint32_t q[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t key[4] = {k[i].x, k[i].y, k[i].z, k[i].w};
      float dot = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        dot += Low(q[c]) * Low(key[c]);
        dot += High(q[c]) * High(key[c]);
      }
#pragma unroll
      for (int m = kLanes / 2; m > 0; m /= 2) dot += __shfl_xor_sync(~0u, dot, m);
      if (lane % kLanes == 0)
        score[g * kWindowPart + warp * (kWindowPart / kWarps) + i * kKeys + lane / kLanes] =
            valid[i] ? dot * scale : -INFINITY;
    }
  }
  __syncthreads();
  AwaitPrevious();
  AllowNext();
  const int64_t at = (int64_t{n} * l.Hkv + h) * p.parts + part;
#pragma unroll
  for (int g = 0; g < kG; ++g) {
    const float a = score[g * kWindowPart + lane], b = score[g * kWindowPart + 32 + lane];
    const float top = WarpMax(fmaxf(a, b));
    const float base = top == -INFINITY ? 0.f : top;  // a part without a key: all p are 0
    if (warp == 0 && g < l.G) {
      const float sum = WarpSum(Exp2(a - base) + Exp2(b - base));
      if (lane == 0) {
        p.softmax[(at * l.G + g) * 2] = top;
        p.softmax[(at * l.G + g) * 2 + 1] = sum;
      }
    }
    float acc[8] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float weight =
          Exp2(score[g * kWindowPart + warp * (kWindowPart / kWarps) + i * kKeys + lane / kLanes] -
               base);
      const uint32_t value[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        acc[2 * c] += weight * Low(value[c]);
        acc[2 * c + 1] += weight * High(value[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
#pragma unroll
      for (int m = kLanes; m < 32; m *= 2) acc[c] += __shfl_xor_sync(~0u, acc[c], m);
    }
    if (lane < kLanes) {
      float4* to = reinterpret_cast<float4*>(sums + (warp * kG + g) * D + column);
      to[0] = {acc[0], acc[1], acc[2], acc[3]};
      to[1] = {acc[4], acc[5], acc[6], acc[7]};
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < l.G * D; i += kThreads) {
    float x = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x += sums[w * kG * D + i];
    p.window[at * l.G * D + i] = x;
  }
}

// grid (splits + parts, Hkv, N)
template <int D, int kG>
__global__ void __launch_bounds__(kThreads) UpdateKernel(const __grid_constant__ DecodeParams p) {
  __shared__ __align__(16) float shared[2 * kSplit + kSplit * kG + kWarps * kG * D + 2 * kG];
  const int n = blockIdx.z, h = blockIdx.y, part = blockIdx.x;
  if (p.layer.slots[n] < 0) return;
  if (part < p.splits)
    UpdateStates<D, kG>(p, n, h, part, shared);
  else
    UpdateWindow<D, kG>(p, n, h, part - p.splits, shared);
}

// grid (H, N), D threads: thread d has value column d.
template <int D>
__global__ void __launch_bounds__(D) MergeKernel(const __grid_constant__ DecodeParams p) {
  const Layer& l = p.layer;
  const int n = blockIdx.y, qh = blockIdx.x, h = qh / l.G, g = qh % l.G, d = threadIdx.x;
  AllowNext();
  AwaitPrevious();
  if (l.slots[n] < 0) return;
  const int64_t head = int64_t{n} * l.Hkv + h;
  float sum = 0, norm = 0;
#pragma unroll 4
  for (int i = 0; i < p.splits; ++i) {
    sum += p.linear[((head * p.splits + i) * l.G + g) * D + d];
    norm += p.norm[(head * p.splits + i) * l.G + g];
  }
  float out = sum / (norm + kDslaEpsilon);
  if (l.W > 0) {
    float top = -INFINITY, all = 0, win = 0;
#pragma unroll 4
    for (int i = 0; i < p.parts; ++i)
      top = fmaxf(top, p.softmax[((head * p.parts + i) * l.G + g) * 2]);
#pragma unroll 4
    for (int i = 0; i < p.parts; ++i) {
      const int64_t at = (head * p.parts + i) * l.G + g;
      const float scale = Exp2(p.softmax[at * 2] - top);
      all += scale * p.softmax[at * 2 + 1];
      win += scale * p.window[at * D + d];
    }
    const float lse = top * 0.6931471805599453f + logf(all);
    const float w = norm < kDslaEpsilon ? 0.f : 1 / (1 + Exp(lse - p.claim[int64_t{n} * l.H + qh]));
    out = w * out + (1 - w) * (win / all);
  }
  p.out[(int64_t{n} * l.H + qh) * D + d] = __float2bfloat16_rn(out);
  if (l.W == 0 || g > 0) return;
  const int t = l.pos[n];
  std::byte* slot = SlotBase(l, n);
  const __nv_bfloat16 k = p.rows.k[n * p.rows.k_stride + h * D + d];
  const __nv_bfloat16 v = p.rows.v[n * p.rows.v_stride + h * D + d];
  const int64_t ring = (int64_t{h} * l.W + t % l.W) * D + d;
  reinterpret_cast<__nv_bfloat16*>(slot + l.at.ring_k)[ring] = k;
  reinterpret_cast<__nv_bfloat16*>(slot + l.at.ring_v)[ring] = v;
  if (t < l.S) {
    const int64_t sink = (int64_t{h} * l.S + t) * D + d;
    reinterpret_cast<__nv_bfloat16*>(slot + l.at.sink_k)[sink] = k;
    reinterpret_cast<__nv_bfloat16*>(slot + l.at.sink_v)[sink] = v;
  }
}

template <int D>
int Launch(const DecodeParams& p, cudaStream_t stream) {
  const Layer& l = p.layer;
  LaunchProject(p, D, stream);
  const dim3 grid(p.splits + p.parts, l.Hkv, l.N);
  switch (l.G) {
    case 1:
      StartEarly(UpdateKernel<D, 1>, grid, kThreads, p, stream);
      break;
    case 2:
      StartEarly(UpdateKernel<D, 2>, grid, kThreads, p, stream);
      break;
    case 3:
      StartEarly(UpdateKernel<D, 3>, grid, kThreads, p, stream);
      break;
    case 4:
      StartEarly(UpdateKernel<D, 4>, grid, kThreads, p, stream);
      break;
    default:
      StartEarly(UpdateKernel<D, kMaxGroup>, grid, kThreads, p, stream);
  }
  StartEarly(MergeKernel<D>, dim3(l.H, l.N), D, p, stream);
  return cudaGetLastError();
}

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
  p->splits = s.SF() / kSplit;
  p->ring_parts = (s.window + kWindowPart - 1) / kWindowPart;
  p->parts = p->ring_parts + (s.sinks > 0);
  const int64_t heads = int64_t{N} * s.Hkv, queries = int64_t{N} * s.H;
  p->phi_q = c.Take(queries * s.F);
  p->phi_k = c.Take(heads * s.F);
  p->gate = c.Take(heads * s.SF());
  p->linear = c.Take(queries * p->splits * s.D);
  p->norm = c.Take(queries * p->splits);
  p->window = c.Take(queries * p->parts * s.D);
  p->softmax = c.Take(queries * p->parts * 2);
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
  return a.shape.D == 64 ? Launch<64>(p, stream) : Launch<128>(p, stream);
}

}  // namespace dsla::cuda
