// Plans chunks on the device, runs the chunked form's kernels wave by wave, and writes rings and
// sinks.
#include "base/check.h"
#include "ops/dsla/cuda/prefill.cuh"

namespace dsla::cuda {
namespace {

constexpr int kPlanThreads = 256;

// The chunks that times [pos, pos + count) of a sequence touch; of a fold, times [0, pos).
__device__ __forceinline__ int2 Range(const PrefillParams& p, int n) {
  const Layer& l = p.layer;
  const int begin = p.fold ? 0 : l.pos[n] - l.W;
  const int end = (p.fold ? 0 : l.row_start[n + 1] - l.row_start[n]) + l.pos[n] - l.W;
  return {begin, end};
}
__device__ __forceinline__ int FloorChunk(int e) { return e >> 6; }  // of 64, rounds down
static_assert(kChunk == 64);

// One block. The plan is made here so that a call needs nothing but device arrays.
__global__ void __launch_bounds__(kPlanThreads)
    PlanKernel(const __grid_constant__ PrefillParams p) {
  __shared__ int sums[kPlanThreads];
  const int N = p.layer.N, thread = threadIdx.x;
  int before = 0;
  for (int base = 0; base < N; base += kPlanThreads) {
    const int n = base + thread;
    int count = 0;
    if (n < N) {
      const int2 r = Range(p, n);
      if (r.x < r.y) count = FloorChunk(r.y - 1) - FloorChunk(r.x) + 1;
    }
    sums[thread] = count;
    __syncthreads();
    for (int step = 1; step < kPlanThreads; step *= 2) {
      const int other = thread >= step ? sums[thread - step] : 0;
      __syncthreads();
      sums[thread] += other;
      __syncthreads();
    }
    if (n < N) p.chunk_start[n] = before + sums[thread] - count;
    before += sums[kPlanThreads - 1];
    __syncthreads();
  }
  if (thread == 0) p.chunk_start[N] = before;
  __syncthreads();
  for (int n = 0; n < N; ++n) {
    const int2 r = Range(p, n);
    const int first = p.chunk_start[n], last = p.chunk_start[n + 1];
    for (int i = first + thread; i < last; i += kPlanThreads) {
      const int e0 = (FloorChunk(r.x) + (i - first)) * kChunk;
      p.chunks[i] = {n, e0, max(r.x - e0, 0), min(r.y - e0, kChunk)};
    }
  }
}

// grid (Hkv, N). After the queries: the last W tokens to the ring, the first S to the sinks.
template <int D, bool kFold>
__global__ void RingKernel(const __grid_constant__ PrefillParams p) {
  constexpr int kPieces = D / 8;
  const Layer& l = p.layer;
  const int n = blockIdx.y, h = blockIdx.x, pos = l.pos[n];
  const int count = kFold ? pos : l.row_start[n + 1] - l.row_start[n];
  const int begin = kFold ? 0 : pos, end = begin + count;
  if (!kFold && count == 0) return;
  std::byte* slot = SlotBase(l, n);
  const auto copy = [&](int64_t to_k, int64_t to_v, int rows, int place, int c, int s) {
    const int64_t at = ((int64_t{h} * rows + place) * D + 8 * c) * 2;
    uint4 k{}, v{};
    if (s >= begin && s < end) {
      KvRow from;
      if constexpr (kFold)
        from = RowOf<D>(l, p.pages, n, h, s);
      else
        from = RowOf<D>(l, p.rows, n, h, s);
      k = *reinterpret_cast<const uint4*>(from.k + 8 * c);
      v = *reinterpret_cast<const uint4*>(from.v + 8 * c);
    } else if (!kFold) {
      return;  // keeps what is there
    }
    *reinterpret_cast<uint4*>(slot + to_k + at) = k;
    *reinterpret_cast<uint4*>(slot + to_v + at) = v;
  };
  for (int i = threadIdx.x; i < l.W * kPieces; i += blockDim.x) {
    const int place = i / kPieces, last = end - 1;
    // The newest token at this place; negative if there is none.
    const int s = last < 0 ? -1 : last - (last - place + l.W) % l.W;
    copy(l.at.ring_k, l.at.ring_v, l.W, place, i % kPieces, s);
  }
  for (int i = threadIdx.x; i < l.S * kPieces; i += blockDim.x)
    copy(l.at.sink_k, l.at.sink_v, l.S, i / kPieces, i % kPieces, i / kPieces);
}

template <int D>
void LaunchRing(const PrefillParams& p, cudaStream_t stream) {
  const dim3 grid(p.layer.Hkv, p.layer.N);
  if (p.fold)
    Start(RingKernel<D, true>, grid, 256, 0, p, stream);
  else
    Start(RingKernel<D, false>, grid, 256, 0, p, stream);
}

// Takes parts of the workspace, 256-byte aligned; only counts them while there is none.
struct Carver {
  std::byte* base = nullptr;
  int64_t used = 0;
  template <typename T>
  T* Take(int64_t n) {
    std::byte* at = base + used;
    used += (n * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T*>(at);
  }
};

int64_t Carve(const DslaShape& s, int N, int64_t T, int chunks, bool fold, std::byte* base,
              PrefillParams* p) {
  Carver c{base};
  p->chunk_start = c.Take<int>(N + 1);
  p->chunks = c.Take<Chunk>(MaxChunks(N, T));
  const int64_t parts = int64_t{chunks} * s.Hkv;
  p->decay = c.Take<float2>(parts * s.SF());
  p->key_sum = c.Take<float>(parts * s.SF() * 4);
  p->key = c.Take<__nv_bfloat16>(parts * s.SF() * kChunk);
  if (!fold) {
    p->norm = c.Take<float>(parts * s.SF());
    p->lse = c.Take<float>(int64_t{chunks} * s.H * kChunk);
    p->growth = c.Take<uint32_t>(parts * s.SF() * kChunk / 2);
    p->state = c.Take<__nv_bfloat16>(parts * s.SF() * s.D);
  }
  p->wave_chunks = chunks;
  return c.used;
}

// The most chunks per wave that fit, and the addresses.
void CarveAll(const DslaShape& s, int N, int64_t T, bool fold, void* workspace, int64_t bytes,
              PrefillParams* p) {
  DSLA_CHECK(workspace && reinterpret_cast<uintptr_t>(workspace) % 256 == 0);
  const int64_t one = Carve(s, N, T, 1, fold, nullptr, p);
  DSLA_CHECK(bytes >= one);
  const int64_t each = (Carve(s, N, T, 1025, fold, nullptr, p) - one + 1023) / 1024;
  int64_t chunks = 1 + (bytes - one) / each;
  if (chunks > MaxChunks(N, T)) chunks = MaxChunks(N, T);
  while (chunks > 1 && Carve(s, N, T, static_cast<int>(chunks), fold, nullptr, p) > bytes) --chunks;
  Carve(s, N, T, static_cast<int>(chunks), fold, static_cast<std::byte*>(workspace), p);
}

int Run(PrefillParams& p, const DslaShape& s, int64_t T, cudaStream_t stream) {
  Start(PlanKernel, dim3(1), kPlanThreads, 0, p, stream);
  for (p.first = 0; p.first < MaxChunks(p.layer.N, T); p.first += p.wave_chunks) {
    LaunchPrepare(p, s.D, stream);
    LaunchCarry(p, s.D, stream);
    if (p.fold) continue;
    if (s.window > 0) LaunchWindow(p, s.D, stream);
    LaunchOutput(p, s.D, stream);
  }
  if (p.fold || s.window > 0) s.D == 64 ? LaunchRing<64>(p, stream) : LaunchRing<128>(p, stream);
  return cudaGetLastError();
}

template <typename Args>
void CheckCommon(const Args& a) {
  CheckShape(a.shape, a.layout, a.states);
  DSLA_CHECK(a.rows.pos && a.slots && a.T >= 0);
  DSLA_CHECK(a.weights.packed && a.weights.mix && a.weights.rope_cos && a.weights.rope_sin);
}

}  // namespace

int MaxChunks(int N, int64_t T) { return static_cast<int>(T / kChunk) + 2 * N; }

int64_t PrefillWorkspaceBytes(const DslaShape& shape, int N, int64_t T, int chunks) {
  PrefillParams unused;
  return Carve(shape, N, T, chunks, false, nullptr, &unused);
}

int64_t FoldWorkspaceBytes(const DslaShape& shape, int N, int64_t T, int chunks) {
  PrefillParams unused;
  return Carve(shape, N, T, chunks, true, nullptr, &unused);
}

int Prefill(const DslaCudaArgs& a, Stream stream) {
  if (a.rows.N == 0 || a.T == 0) return cudaSuccess;
  CheckCommon(a);
  DSLA_CHECK(a.rows.row_start && a.q && a.k && a.v && a.out);
  DSLA_CHECK(a.shape.window == 0 || a.claim);
  DSLA_CHECK(a.q_stride % 8 == 0 && a.k_stride % 8 == 0 && a.v_stride % 8 == 0);
  PrefillParams p{};
  p.layer = MakeLayer(a);
  p.rows = {static_cast<const __nv_bfloat16*>(a.k), static_cast<const __nv_bfloat16*>(a.v),
            a.k_stride, a.v_stride};
  p.q = static_cast<const __nv_bfloat16*>(a.q);
  p.q_stride = a.q_stride;
  p.claim = a.claim;
  p.out = static_cast<__nv_bfloat16*>(a.out);
  CarveAll(a.shape, a.rows.N, a.T, false, a.workspace, a.workspace_bytes, &p);
  return Run(p, a.shape, a.T, stream);
}

int Fold(const DslaCudaFoldArgs& a, Stream stream) {
  if (a.rows.N == 0) return cudaSuccess;
  CheckCommon(a);
  DSLA_CHECK(a.tables.page_start && a.tables.pages && a.kv.k && a.kv.v && a.kv.page_size > 0);
  DSLA_CHECK(a.kv.Hkv == a.shape.Hkv && a.kv.D == a.shape.D && a.kv.dtype == DType::kBF16);
  PrefillParams p{};
  p.layer = MakeLayer(a);
  p.pages = {static_cast<const __nv_bfloat16*>(a.kv.k),
             static_cast<const __nv_bfloat16*>(a.kv.v),
             a.kv.page_stride,
             a.kv.page_size,
             a.tables.page_start,
             a.tables.pages};
  p.fold = true;
  CarveAll(a.shape, a.rows.N, a.T, true, a.workspace, a.workspace_bytes, &p);
  return Run(p, a.shape, a.T, stream);
}

}  // namespace dsla::cuda
