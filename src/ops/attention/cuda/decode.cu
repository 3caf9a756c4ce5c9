// Decode: one query row per sequence, in two launches:
//   part   the keys of a (row, KV head), cut into parts that all stream from memory
//   merge  adds the parts up
//
// A warp takes every fourth run of 16 keys of its part through a ring of its own in shared memory,
// so that no warp waits for another before the end. Up to 8 query heads share a KV head's tile as
// rows 0..7 of mma's A operand. Their weights go into the second product as two bf16 terms, the
// rest after rounding in rows 8..15, which are free: so weights have 16 bits at no cost.
#include <algorithm>

#include "base/check.h"
#include "ops/attention/cuda/attention_cuda.h"
#include "ops/cuda/kernel_attribute.cuh"
#include "ops/dsla/cuda/common.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kHeads = 8;             // query heads per block
constexpr int kRun = 16;              // keys of a warp's step
constexpr int kLongPart = 512;        // parts beyond one wave of blocks are not shorter
constexpr int kMaxParts = 128;        // of a row
constexpr int kRingBytes = 24 << 10;  // per warp: two blocks fit into a multiprocessor of 9.0

struct Params {
  int H, Hkv, G, groups;  // groups of up to kHeads query heads per KV head
  int parts, wave_parts;  // at most, and of one wave
  int page_size, window;
  int64_t page_stride, q_stride;
  float scale;  // times log2 e
  const int32_t *rows, *pos, *page_start, *pages;
  const __nv_bfloat16 *q, *k, *v;
  __nv_bfloat16* out;
  float* sums;     // [N, H, parts, D]
  float2* scales;  // [N, H, parts]: maximum of the scores in base 2, sum of weights
};

// How the keys of a row are cut: parts of `runs` runs of 16 keys, at absolute multiples of 16.
struct Cut {
  int first_key, last_key, first_run, runs_in_all, runs, parts;
};
__device__ __forceinline__ Cut CutOf(const Params& p, int t) {
  Cut c;
  c.last_key = t;
  c.first_key = p.window > 0 ? max(0, t - p.window + 1) : 0;
  c.first_run = c.first_key / kRun;
  c.runs_in_all = t / kRun - c.first_run + 1;
  const auto per = [&](int parts) { return (c.runs_in_all + parts - 1) / parts; };
  const int runs = max(per(p.parts), min(kLongPart / kRun, max(per(p.wave_parts), kWarps)));
  c.runs = (runs + kWarps - 1) / kWarps * kWarps;
  c.parts = per(c.runs);
  return c;
}

// What a lane holds of the online softmax of 8 query heads: head lane / 4.
template <int D>
struct Softmax {
  float top = -INFINITY, sum = 0;
  float acc[D / 8][4] =
      {};  // channels 8 j + 2 (lane % 4), + 1; then the same of the weights' rests
};

template <int D>
__device__ __forceinline__ void AddRun(Softmax<D>& s, const uint32_t (&q)[D / 16][2],
                                       const uint4* k, const uint4* v, int from, int until,
                                       float scale) {
  constexpr int kPieces = D / 8;
  const int lane = threadIdx.x % 32;
  float dot[2][2][4] = {};  // [keys 0..7, 8..15][even and odd steps]: short chains of mma
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    uint32_t b[4];
    LoadMatrix(b,
               SharedAddress(k + Swizzle<kPieces>(lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2)));
    const uint32_t a[4] = {q[i][0], 0, q[i][1], 0};
    Mma(dot[0][i % 2], a, b[0], b[1]);
    Mma(dot[1][i % 2], a, b[2], b[3]);
  }
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int key = i / 2 * 8 + lane % 4 * 2 + i % 2;
    const float score = dot[i / 2][0][i % 2] + dot[i / 2][1][i % 2];
    x[i] = key >= from && key < until ? score * scale : -INFINITY;
  }
  // Every run has a visible key, so the maximum is a number.
  const float top = fmaxf(s.top, QuadMax(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]))));
  if (__any_sync(~0u, top > s.top)) {
    const float fade = Exp2(s.top - top);
    s.top = top;
    s.sum *= fade;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) s.acc[j][c] *= fade;
  }
  uint32_t p[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float a = Exp2(x[2 * i] - s.top), b = Exp2(x[2 * i + 1] - s.top);
    s.sum += a + b;
    p[2 * i] = Pack(a, b);
    p[2 * i + 1] = Pack(a - Low(p[2 * i]), b - High(p[2 * i]));
  }
#pragma unroll
  for (int j = 0; j < D / 16; ++j) {
    uint32_t b[4];
    LoadMatrixTransposed(b, SharedAddress(v + Swizzle<kPieces>(lane % 16, 2 * j + lane / 16)));
    Mma(s.acc[2 * j], p, b[0], b[1]);
    Mma(s.acc[2 * j + 1], p, b[2], b[3]);
  }
}

// The softmaxes of a block's warps, added up in their order.
template <int D>
__device__ __forceinline__ void WritePart(const Params& p, Softmax<D>& s, float* shared, int row,
                                          int heads, int part) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = lane / 4;
  s.sum = QuadSum(s.sum);
  float* sums = shared;                          // [kWarps][kHeads][D]
  float* scales = shared + kWarps * kHeads * D;  // [2][kWarps][kHeads]
  __syncthreads();                               // all rings are empty and read
  if (lane % 4 == 0) {
    scales[warp * kHeads + head] = s.top;
    scales[(kWarps + warp) * kHeads + head] = s.sum;
  }
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
    *reinterpret_cast<float2*>(sums + (warp * kHeads + head) * D + 8 * j + lane % 4 * 2) = {
        s.acc[j][0] + s.acc[j][2], s.acc[j][1] + s.acc[j][3]};
  __syncthreads();
  for (int i = threadIdx.x; i < heads * D / 4; i += kThreads) {
    const int h = i / (D / 4), d = i % (D / 4) * 4;
    float top = -INFINITY, sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, scales[w * kHeads + h]);
    float4 x{};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float fade = Exp2(scales[w * kHeads + h] - top);  // 0 of a warp without keys
      const float4 y = *reinterpret_cast<const float4*>(sums + (w * kHeads + h) * D + d);
      sum += fade * scales[(kWarps + w) * kHeads + h];
      x.x += fade * y.x;
      x.y += fade * y.y;
      x.z += fade * y.z;
      x.w += fade * y.w;
    }
    const int64_t at = int64_t{row + h} * p.parts + part;
    *reinterpret_cast<float4*>(p.sums + at * D + d) = x;
    if (d == 0) p.scales[at] = {top, sum};
  }
}

// grid (parts, Hkv * groups, N)
template <int D>
__global__ void __launch_bounds__(kThreads) PartKernel(const __grid_constant__ Params p) {
  constexpr int kPieces = D / 8, kRunPieces = kRun * kPieces;  // of K or V
  constexpr int kStages = kRingBytes / (2 * 16 * kRunPieces);
  extern __shared__ uint4 shared[];
  const int n = blockIdx.z, part = blockIdx.x;
  AwaitPrevious();
  AllowNext();
  const int rows = *p.rows, t = p.pos[n];
  const int32_t* pages = p.pages + p.page_start[n];
  if (n >= rows || t < 0) return;
  const Cut cut = CutOf(p, t);
  if (part >= cut.parts) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int h = blockIdx.y / p.groups, first_head = blockIdx.y % p.groups * kHeads;
  const int heads = min(kHeads, p.G - first_head), row_head = h * p.G + first_head;
  // This warp's runs: begin, begin + kWarps, ...
  const int begin = cut.first_run + part * cut.runs + warp;
  const int end = min(cut.first_run + (part + 1) * cut.runs, cut.first_run + cut.runs_in_all);
  const int steps = begin < end ? (end - begin + kWarps - 1) / kWarps : 0;

  uint4* ring = shared + warp * (kRingBytes / 16);
  const int64_t head_at = int64_t{h} * p.page_size * D;
  int page_of_lane = 0;  // of step 32 i + lane
  const auto load = [&](int step) {
    if (step % 32 == 0) {
      const int run = begin + (step + lane) * kWarps;
      page_of_lane = run < end ? pages[run * kRun / p.page_size] : 0;
    }
    const int key = (begin + step * kWarps) * kRun;
    const int64_t page = __shfl_sync(~0u, page_of_lane, step % 32);
    const int64_t at = page * p.page_stride + head_at + int64_t{key % p.page_size} * D + lane * 8;
    uint4* to = ring + step % kStages * (2 * kRunPieces);
#pragma unroll
    for (int i = 0; i < kRunPieces / 32; ++i) {
      const int row = (i * 32 + lane) / kPieces;
      const bool valid = key + row >= cut.first_key && key + row <= t;  // others may be NaN
      const int place = Swizzle<kPieces>(row, lane % kPieces);
      CopyAsync(to + place, p.k + at + i * 256, valid);
      CopyAsync(to + kRunPieces + place, p.v + at + i * 256, valid);
    }
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) load(i);
    CommitCopies();
  }

  uint32_t q[D / 16][2] = {};
  if (lane / 4 < heads) {
    const auto* from = reinterpret_cast<const uint32_t*>(
        p.q + n * p.q_stride + int64_t{row_head + lane / 4} * D + lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      q[i][0] = from[8 * i];
      q[i][1] = from[8 * i + 4];
    }
  }
  Softmax<D> s;
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    WaitCopies<kStages - 2>();
    __syncwarp();  // all lanes' copies are there, and step i - 1 has been read
    if (i + kStages - 1 < steps) load(i + kStages - 1);
    CommitCopies();
    const uint4* k = ring + i % kStages * (2 * kRunPieces);
    const int key = (begin + i * kWarps) * kRun;
    AddRun<D>(s, q, k, k + kRunPieces, cut.first_key - key, t + 1 - key, p.scale);
  }
  WritePart<D>(p, s, reinterpret_cast<float*>(shared), n * p.H + row_head, heads, part);
}

// grid (H, N)
template <int D>
__global__ void __launch_bounds__(kThreads) MergeKernel(const __grid_constant__ Params p) {
  constexpr int kLanes = D / 4, kRows = kThreads / kLanes;  // parts at a time
  __shared__ float4 shared[kThreads];
  const int n = blockIdx.y, lane = threadIdx.x % 32;
  AllowNext();  // what may follow reads only constants before it waits
  AwaitPrevious();
  const int rows = *p.rows, t = p.pos[n];
  if (n >= rows || t < 0) return;
  const int parts = CutOf(p, t).parts;
  const int64_t row = int64_t{n} * p.H + blockIdx.x;
  const float2* scales = p.scales + row * p.parts;
  float top = -INFINITY, sum = 0;
  for (int i = lane; i < parts; i += 32) top = fmaxf(top, scales[i].x);
  top = WarpMax(top);
  for (int i = lane; i < parts; i += 32) sum += Exp2(scales[i].x - top) * scales[i].y;
  sum = WarpSum(sum);
  const int column = threadIdx.x % kLanes;
  const auto* sums = reinterpret_cast<const float4*>(p.sums + row * p.parts * D) + column;
  float4 x{};
#pragma unroll 4
  for (int i = threadIdx.x / kLanes; i < parts; i += kRows) {
    const float fade = Exp2(scales[i].x - top);
    const float4 y = sums[i * kLanes];
    x.x += fade * y.x;
    x.y += fade * y.y;
    x.z += fade * y.z;
    x.w += fade * y.w;
  }
  shared[threadIdx.x] = x;
  __syncthreads();
  if (threadIdx.x >= kLanes) return;
  x = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float4 y = shared[i * kLanes + column];
    x.x += y.x;
    x.y += y.y;
    x.z += y.z;
    x.w += y.w;
  }
  const float inverse = 1 / sum;
  reinterpret_cast<uint2*>(p.out + row * D)[column] = {Pack(x.x * inverse, x.y * inverse),
                                                       Pack(x.z * inverse, x.w * inverse)};
}

int Groups(int H, int Hkv) { return (H / Hkv + kHeads - 1) / kHeads; }

// Two for each multiprocessor.
int WaveBlocks() { return 2 * CurrentDevice().multiprocessors; }

// Parts that a row has at most, and those of one wave of two blocks per multiprocessor.
struct Parts {
  int most, wave;
};
Parts PartsFor(int N, int H, int Hkv) {
  const int rows = N * Hkv * Groups(H, Hkv), blocks = WaveBlocks();
  // Four waves even out what blocks need; a long row among short ones is cut in any case.
  return {std::clamp(4 * blocks / rows, 4, kMaxParts), std::clamp(blocks / rows, 1, kMaxParts)};
}

int64_t AlignedFloats(int64_t n) { return (n + 63) / 64 * 64; }

template <int D>
int Launch(const Params& p, int N, cudaStream_t stream) {
  const size_t shared = kWarps * kRingBytes;
  const cudaError_t error = AllowShared<PartKernel<D>>(static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  StartEarly(PartKernel<D>, dim3(p.parts, p.Hkv * p.groups, N), kThreads, p, stream, shared);
  StartEarly(MergeKernel<D>, dim3(p.H, N), kThreads, p, stream);
  return cudaGetLastError();
}

}  // namespace

int64_t DecodeAttentionWorkspaceBytes(int N, int H, int Hkv, int D) {
  if (N == 0) return 0;
  // At least N times PartsFor's, and that for every smaller N, too: fewer rows have more parts
  // each.
  const int64_t wave_parts = 4 * WaveBlocks() / (Hkv * Groups(H, Hkv));
  const int64_t rows =
      H * std::min<int64_t>(int64_t{N} * kMaxParts, std::max<int64_t>(int64_t{4} * N, wave_parts));
  return (AlignedFloats(rows * D) + AlignedFloats(rows * 2)) * 4;
}

int DecodeAttention(const DecodeAttentionArgs& a, Stream stream) {
  if (a.N == 0) return cudaSuccess;
  DSLA_CHECK(a.kv.D == 64 || a.kv.D == 128);
  DSLA_CHECK(a.kv.dtype == DType::kBF16 && a.kv.Hkv > 0 && a.H % a.kv.Hkv == 0);
  DSLA_CHECK(a.kv.page_size > 0 && a.kv.page_size % kRun == 0 && a.kv.page_stride % 8 == 0);
  DSLA_CHECK(a.rows && a.pos && a.tables.page_start && a.tables.pages && a.kv.k && a.kv.v);
  DSLA_CHECK(a.q && a.out && a.workspace && a.q_stride % 2 == 0 && a.scale > 0);
  DSLA_CHECK(DecodeAttentionWorkspaceBytes(a.N, a.H, a.kv.Hkv, a.kv.D) <= a.workspace_bytes);
  const Parts parts = PartsFor(a.N, a.H, a.kv.Hkv);
  Params p;
  p.H = a.H;
  p.Hkv = a.kv.Hkv;
  p.G = a.H / a.kv.Hkv;
  p.groups = Groups(a.H, a.kv.Hkv);
  p.parts = parts.most;
  p.wave_parts = parts.wave;
  p.page_size = a.kv.page_size;
  p.window = a.sliding_window;
  p.page_stride = a.kv.page_stride;
  p.q_stride = a.q_stride;
  p.scale = a.scale * kLog2e;
  p.rows = a.rows;
  p.pos = a.pos;
  p.page_start = a.tables.page_start;
  p.pages = a.tables.pages;
  p.q = static_cast<const __nv_bfloat16*>(a.q);
  p.k = static_cast<const __nv_bfloat16*>(a.kv.k);
  p.v = static_cast<const __nv_bfloat16*>(a.kv.v);
  p.out = static_cast<__nv_bfloat16*>(a.out);
  p.sums = static_cast<float*>(a.workspace);
  const int64_t rows = int64_t{a.N} * a.H * parts.most;
  p.scales = reinterpret_cast<float2*>(p.sums + AlignedFloats(rows * a.kv.D));
  return a.kv.D == 64 ? Launch<64>(p, a.N, stream) : Launch<128>(p, a.N, stream);
}

}  // namespace dsla::cuda
