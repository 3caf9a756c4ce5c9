// The plan of a call: which chunks and segments each wave has. Made on the device, so that a call
// needs nothing but device arrays. A prefill of one sequence needs none (OnlySequence).
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

// Where the next segment goes.
struct Layout {
  int wave = 0, chunks = 0, stores = 0;  // of the wave: chunks and parts of `start` so far
  int segments = 0, runs = 0;            // in all
};

__device__ __forceinline__ void NextWave(const PrefillParams& p, Layout& to) {
  ++to.wave;
  if (threadIdx.x == 0) p.wave_first[to.wave] = to.segments;
  to.chunks = to.stores = 0;
}

// The segments of a sequence that are in one wave, and their chunks.
struct Run {
  int n, done, count;         // chunks of the sequence before, chunks
  int segments, length;       // segments, of so many chunks; the last may have fewer
  int first, chunks, lo, hi;  // the sequence's: first chunk of the stream, how many there are,
  bool whole;                 // rows of the first and of the last; one segment has all
};

__device__ __forceinline__ void Write(const PrefillParams& p, const Run& r, const Layout& to) {
  const int lane = threadIdx.x % 32;
  for (int i = lane; i < r.segments; i += 32) {
    const int at = i * r.length, begin = r.done + at, count = min(r.length, r.count - at);
    const bool first = begin == 0, last = begin + count == r.chunks;
    int flags = (first ? kFirst : 0) | (last ? kLast : 0);
    if (i == 0) flags |= r.segments << kRunShift | (r.done + r.count == r.chunks ? kRunEnds : 0);
    p.segments[to.segments + i] = {r.n,
                                   (r.first + begin) * kChunk,
                                   to.chunks + at,
                                   count,
                                   first ? r.lo : 0,
                                   last ? r.hi : kChunk,
                                   to.stores + (r.whole ? 0 : i),
                                   flags};
  }
  Chunk* chunks = p.chunks + int64_t{to.wave} * p.wave_chunks + to.chunks;
  for (int c = lane; c < r.count; c += 32) {
    const int i = r.done + c;
    chunks[c] = {r.n, (r.first + i) * kChunk, i == 0 ? r.lo : 0, i == r.chunks - 1 ? r.hi : kChunk};
  }
}

// All warps lay out all runs, and take turns to write one: a run is a few instructions, but not its
// segments and chunks.
__device__ void Place(const PrefillParams& p, int n, int2 range, Layout& to) {
  Run run{n};
  run.first = FloorChunk(range.x);
  run.chunks = range.x < range.y ? FloorChunk(range.y - 1) - run.first + 1 : 0;
  if (run.chunks == 0) {  // a fold still resets the slot
    if (!p.fold) return;
    if (threadIdx.x == 0)
      p.segments[to.segments] = {n, 0, 0, 0, 0, 0, 0, kFirst | kLast | 1 << kRunShift};
    ++to.segments;
    return;
  }
  run.lo = range.x - run.first * kChunk;
  run.hi = range.y - (run.first + run.chunks - 1) * kChunk;
  const int segment = p.segment > 0 ? p.cut.Chunks(range.y - range.x) : run.chunks;
  run.whole = run.chunks <= segment;
  while (run.done < run.chunks) {
    const int rest = run.chunks - run.done, room = p.wave_chunks - to.chunks;
    // Without segments a run is as long as there is room.
    run.length = p.segment > 0 ? min(segment, rest) : min(rest, room);
    run.segments = run.length > 0 ? min(rest, room) / run.length : 0;
    run.count = run.segments * run.length;
    if (run.segments > 0 && rest - run.count < run.length &&
        rest <= room) {  // the last, shorter one
      run.segments += rest > run.count;
      run.count = rest;
    }
    if (run.segments == 0) {
      NextWave(p, to);
      continue;
    }
    if (to.runs++ % (kPlanThreads / 32) == threadIdx.x / 32) Write(p, run, to);
    to.chunks += run.count;
    to.segments += run.segments;
    if (!run.whole) to.stores += run.segments;
    run.done += run.count;
  }
}

// One block.
__global__ void __launch_bounds__(kPlanThreads)
    PlanKernel(const __grid_constant__ PrefillParams p) {
  __shared__ int2 ranges[kPlanThreads];
  const int N = p.layer.N;
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
    for (int n = base; n < min(N, base + kPlanThreads); ++n) Place(p, n, ranges[n - base], layout);
  }
  if (threadIdx.x == 0) p.wave_first[0] = 0;
  while (layout.wave < p.waves) NextWave(p, layout);
}

}  // namespace

void LaunchPlan(const PrefillParams& p, cudaStream_t stream) {
  Start<PlanKernel>("plan", dim3(1), kPlanThreads, 0, p, stream);
}

}  // namespace dsla::cuda
