// The plan of a call: which chunks and segments each wave has. Made on the device, so that a call
// needs nothing but device arrays.
#include "ops/dsla/cuda/prefill.cuh"

namespace dsla::cuda {
namespace {

constexpr int kPlanThreads = 256;

// The times of a sequence that enter the states in this call.
__device__ __forceinline__ int2 Range(const PrefillParams& p, int n) {
  const Layer& l = p.layer;
  const int begin = p.fold ? 0 : l.pos[n] - l.W;
  const int end = (p.fold ? 0 : l.row_start[n + 1] - l.row_start[n]) + l.pos[n] - l.W;
  return {begin, end};
}
__device__ __forceinline__ int FloorChunk(int e) { return e >> 6; }  // of 64, rounds down
static_assert(kChunk == 64);

// Where the next segment goes. One thread lays out all of them: a segment is a few instructions.
struct Layout {
  int wave = 0, chunks = 0, stores = 0;  // of the wave: chunks and parts of `start` so far
  int segments = 0;                      // in all
};

__device__ __forceinline__ void NextWave(const PrefillParams& p, Layout& to) {
  p.wave_first[++to.wave] = to.segments;
  to.chunks = to.stores = 0;
}

__device__ void Place(const PrefillParams& p, int n, int2 range, Layout& to) {
  const int first = FloorChunk(range.x);
  const int chunks = range.x < range.y ? FloorChunk(range.y - 1) - first + 1 : 0;
  if (chunks == 0) {  // a fold still resets the slot
    if (p.fold) p.segments[to.segments++] = {n, 0, 0, 0, 0, 0, 0, kFirst | kLast | 1 << kRunShift};
    return;
  }
  const bool whole = p.segment == 0 || chunks <= p.segment;
  int head = to.segments;  // first of this wave
  for (int done = 0; done < chunks;) {
    int count = chunks - done;
    const int room = p.wave_chunks - to.chunks;
    if (p.segment > 0 ? min(count, p.segment) > room : room == 0) {
      if (head < to.segments) p.segments[head].flags |= (to.segments - head) << kRunShift;
      NextWave(p, to);
      head = to.segments;
      continue;
    }
    count = min(count, p.segment > 0 ? p.segment : room);
    const int e0 = (first + done) * kChunk, last = done + count == chunks;
    const int lo = done == 0 ? max(range.x - e0, 0) : 0;
    const int hi = last ? min(range.y - (e0 + (count - 1) * kChunk), kChunk) : kChunk;
    p.segments[to.segments++] = {n,  e0, to.chunks, count,
                                 lo, hi, to.stores, (done == 0 ? kFirst : 0) | (last ? kLast : 0)};
    to.chunks += count;
    to.stores += !whole;
    done += count;
  }
  p.segments[head].flags |= (to.segments - head) << kRunShift | kRunEnds;
}

// One block.
__global__ void __launch_bounds__(kPlanThreads)
    PlanKernel(const __grid_constant__ PrefillParams p) {
  __shared__ int2 ranges[kPlanThreads];
  const int N = p.layer.N, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  AwaitPrevious();
  AllowNext();
  for (int64_t i = threadIdx.x; i < int64_t{p.waves} * p.wave_chunks; i += kPlanThreads)
    p.chunks[i] = {-1, 0, 0, 0};
  Layout layout;
  for (int base = 0; base < N; base += kPlanThreads) {
    __syncthreads();
    if (base + static_cast<int>(threadIdx.x) < N)
      ranges[threadIdx.x] = Range(p, base + threadIdx.x);
    __syncthreads();
    if (threadIdx.x == 0)
      for (int n = base; n < min(N, base + kPlanThreads); ++n)
        Place(p, n, ranges[n - base], layout);
  }
  if (threadIdx.x == 0) {
    p.wave_first[0] = 0;
    while (layout.wave < p.waves) NextWave(p, layout);
  }
  __syncthreads();
  for (int wave = 0; wave < p.waves; ++wave) {
    const int end = p.wave_first[wave + 1];
    for (int i = p.wave_first[wave] + warp; i < end; i += kPlanThreads / 32) {
      const Segment s = p.segments[i];
      Chunk* to = p.chunks + int64_t{wave} * p.wave_chunks + s.at;
      for (int c = lane; c < s.count; c += 32)
        to[c] = {s.n, s.e0 + c * kChunk, c == 0 ? s.lo : 0, c == s.count - 1 ? s.hi : kChunk};
    }
  }
}

}  // namespace

void LaunchPlan(const PrefillParams& p, cudaStream_t stream) {
  Start<PlanKernel>("plan", dim3(1), kPlanThreads, 0, p, stream);
}

}  // namespace dsla::cuda
