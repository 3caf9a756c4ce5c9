// The chunked form's kernels and what they hand to one another. Notation as in ops/dsla/README.md.
//
// A chunk is 64 places in the stream of entering tokens, [64 c, 64 c + 64) of token positions e;
// row j of it also is the query of time e + W. The anchor lies between rows 31 and 32: R = G_31.
// A segment is up to a number of consecutive chunks of one sequence, counted from the call's first;
// the sequence's rows in the call decide how many. A wave is what is done at a time: whole
// segments, or any chunks where there are none.
#pragma once

#include <atomic>

#include "ops/dsla/cuda/common.cuh"
#include "ops/dsla/cuda/prefill_trace.h"

namespace dsla::cuda {

// Chunk of sequence n from token e0 on (negative before the window is full), rows [lo, hi) of which
// belong to this call. n < 0 where a wave has no more.
struct __align__(16) Chunk {
  int n, e0, lo, hi;
};

// Consecutive chunks of sequence n in one wave, from its chunk `at` on: a segment, or without
// segments all that the wave has of the sequence.
struct __align__(16) Segment {
  int n, e0, at, count;
  int lo, hi;  // of the first and of the last chunk
  int store;   // its part of `start`
  int flags;
};
// Of the sequence's chunks in this call it has the first, the last.
inline constexpr int kFirst = 1, kLast = 2;
// The first of its sequence in this wave: flags >> kRunShift tells how many there are.
inline constexpr int kRunShift = 3, kRunEnds = 4;  // the run reaches the sequence's last

// What does the work after the segments' states are known.
enum class Form {
  kAnywhere,     // `carry`, then `window` and `output`
  kQueries,      // `carry`, then `queries`: D 64 on compute capability 9.0
  kKeepsStates,  // `window`, then `chunks`: D and F 128 there
};

__device__ __forceinline__ int FloorChunk(int e) { return e >> 6; }  // of 64, rounds down
static_assert(kChunk == 64);

// The most chunks that rows of one sequence are parts of.
__host__ __device__ __forceinline__ int MostChunks(int64_t rows) {
  return static_cast<int>(rows < 2 ? rows : (rows - 2) / kChunk + 2);
}

// Chunks of a segment: so many that a sequence has `wanted` segments, but no fewer than `least` and
// no more than `most`, and fewer than 4 only as long as there are no more than 32 segments: the
// scan goes over one after another. All 0: no segments.
struct Cut {
  int least = 0, most = 0, wanted = 1;
  __host__ __device__ __forceinline__ int Chunks(int64_t rows) const {
    const int all = MostChunks(rows), few = (all + 31) / 32;
    int chunks = (all + wanted - 1) / wanted;
    if (chunks < few && chunks < 4) chunks = few < 4 ? few : 4;
    return chunks < least ? least : chunks > most ? most : chunks;
  }
};

struct PrefillParams {
  Layer layer;
  NewRows rows;
  PagedRows pages;
  const __nv_bfloat16* q;
  int64_t q_stride;
  int total_rows;  // of q and out
  const float* claim;
  __nv_bfloat16* out;
  bool fold;
  Form form;

  // Workspace: the plan of the whole call, then what one wave of chunks needs, [chunk, Hkv, ..].
  Chunk* chunks;       // [waves, wave_chunks]
  int* wave_first;     // [waves + 1] first segment of each wave
  Segment* segments;   // [wave_first[waves]]
  float2* decay;       // [SF]: e^R, e^{L-R}
  float* key_sum;      // [4, SF]: sums of K~ over each 16 rows
  float* norm;         // [SF]: e^R z, from `carry`; for `queries` [SF / 64][2 terms of bf16][64]
  float* lse;          // [chunk, H, 64] of the window, natural log
  uint32_t* growth;    // e^{G-R} bf16 [SF / D][4 tiles of 16 rows][D / 16] in the order of mma's A
  __nv_bfloat16* key;  // K~ [SF / D][64][D]
  __nv_bfloat16* state;  // from `carry`: e^R S [SF / D], each D x D in fragment order
  // [segment, Hkv, ..]: what each adds to the states, then the states before it; its total decay.
  float* start;        // [SF / 32], each 32 x D as the accumulators of `carry` lie
  float* start_norm;   // [SF]
  float* start_decay;  // [SF]
  int segment;         // chunks of a segment, at least; 0: none
  Cut cut;
  int most_segments;  // of a sequence, where `fold` does all but the rings; 0 elsewhere
  int wave_chunks;    // chunks that the wave's part has room for
  int wave_segments;  // the most segments of a wave
  int waves, wave;
  // Of a prefill of one sequence, which has no plan: its rows (0 where there is one), and chunks of
  // a segment, or of a wave.
  int only_rows, only_segment;
};

// The chunks of a prefill's only sequence. A kernel finds its own among them sooner than it could
// read a plan of them.
struct OnlySequence {
  int first, count, lo, hi;  // the first of the stream; rows of the first and of the last
  int done, in_wave;         // chunks before this wave, and its own
  __device__ __forceinline__ OnlySequence(const PrefillParams& p, int pos) {
    const int begin = pos - p.layer.W, end = begin + p.only_rows;
    first = FloorChunk(begin);
    count = FloorChunk(end - 1) - first + 1;
    lo = begin - first * kChunk;
    hi = end - (first + count - 1) * kChunk;
    done = p.wave * p.wave_chunks;
    in_wave = max(min(count - done, p.wave_chunks), 0);
  }
  __device__ __forceinline__ int Segments(const PrefillParams& p) const {
    return (in_wave + p.only_segment - 1) / p.only_segment;
  }
  __device__ __forceinline__ Chunk ChunkAt(int index) const {
    const int i = done + index;
    if (index >= in_wave) return {-1, 0, 0, 0};
    return {0, (first + i) * kChunk, i == 0 ? lo : 0, i == count - 1 ? hi : kChunk};
  }
  __device__ __forceinline__ Segment SegmentAt(const PrefillParams& p, int index) const {
    const int at = index * p.only_segment, begin = done + at;
    if (at >= in_wave) return {-1, 0, 0, -1, 0, 0, 0, 0};
    const int chunks = min(p.only_segment, in_wave - at);
    const bool is_first = begin == 0, is_last = begin + chunks == count;
    int flags = (is_first ? kFirst : 0) | (is_last ? kLast : 0);
    if (index == 0) flags |= Segments(p) << kRunShift | (done + in_wave == count ? kRunEnds : 0);
    return {0,
            (first + begin) * kChunk,
            at,
            chunks,
            is_first ? lo : 0,
            is_last ? hi : kChunk,
            is_first && is_last ? 0 : index,
            flags};
  }
};

// The chunk of a block. The plan is read around the L1 cache, for kernels that read it before they
// await the one before them.
__device__ __forceinline__ Chunk ChunkOf(const PrefillParams& p, int index) {
  if (p.only_rows > 0) return OnlySequence(p, p.layer.pos[0]).ChunkAt(index);
  const int4 x =
      __ldcg(reinterpret_cast<const int4*>(p.chunks) + int64_t{p.wave} * p.wave_chunks + index);
  return {x.x, x.y, x.z, x.w};
}

// How many segments the wave has.
__device__ __forceinline__ int SegmentsOf(const PrefillParams& p) {
  if (p.only_rows > 0) return OnlySequence(p, p.layer.pos[0]).Segments(p);
  return __ldcg(p.wave_first + p.wave + 1) - __ldcg(p.wave_first + p.wave);
}

// The segment of a block; count < 0 if there is none.
__device__ __forceinline__ Segment SegmentOf(const PrefillParams& p, int index) {
  if (p.only_rows > 0) return OnlySequence(p, p.layer.pos[0]).SegmentAt(p, index);
  const int i = __ldcg(p.wave_first + p.wave) + index;
  if (i >= __ldcg(p.wave_first + p.wave + 1)) return {-1, 0, 0, -1, 0, 0, 0, 0};
  const int4* from = reinterpret_cast<const int4*>(p.segments + i);
  const int4 a = __ldcg(from), b = __ldcg(from + 1);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}
// All of its sequence's chunks in this call.
__device__ __forceinline__ bool IsWhole(const Segment& s) {
  return (s.flags & kFirst) && (s.flags & kLast);
}

// The token of row j enters the states in this call.
__device__ __forceinline__ bool Enters(const Layer& l, const Chunk& c, int j) {
  return j >= c.lo && j < c.hi && c.e0 + j >= l.S;
}

// The row of q and out that belongs to row 0 of the chunk; before the call's first row if lo > 0.
__device__ __forceinline__ int64_t FirstRow(const Layer& l, const Chunk& c) {
  return l.row_start[c.n] + (c.e0 + l.W - l.pos[c.n]);
}

// Launches a kernel with more shared memory than it has by default. A kernel ends only after the
// one before it, and allows the next one only after that has ended: so all but the direct
// predecessor have ended when a kernel starts. `window` allows it at once, while `carry` may still
// run: before `output` or `chunks` awaits them it reads only the plan and the call's inputs.
template <auto kKernel, typename Params>
void Start(const char* name, dim3 grid, int threads, int shared_bytes, const Params& p,
           cudaStream_t stream) {
  if (shared_bytes > 0) {
    static std::atomic<uint64_t> done{0};  // by device
    int device = 0;
    cudaGetDevice(&device);
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (!(done.load(std::memory_order_relaxed) & bit)) {
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      done.fetch_or(bit, std::memory_order_relaxed);
    }
  }
  StartEarly(kKernel, grid, threads, p, stream, static_cast<size_t>(shared_bytes));
  Trace(name, stream);
}
void LaunchPlan(const PrefillParams& p, cudaStream_t stream);
void LaunchPrepare(const PrefillParams& p, int D, cudaStream_t stream);
void LaunchSummary(const PrefillParams& p, int D, cudaStream_t stream);  // of a fold: the states
void LaunchScan(const PrefillParams& p, int D, cudaStream_t stream);
void LaunchCarry(const PrefillParams& p, int D, cudaStream_t stream);
void LaunchWindow(const PrefillParams& p, int D, cudaStream_t stream);
void LaunchOutput(const PrefillParams& p, int D, cudaStream_t stream);
// Whether the current device is of compute capability 9.0: what is below runs nowhere else.
bool OnHopper();
void LaunchQueries(const PrefillParams& p, cudaStream_t stream);  // window and output at once
// Where the states stay on the chip.
void LaunchChunksSummary(const PrefillParams& p, cudaStream_t stream);
void LaunchChunks(const PrefillParams& p, cudaStream_t stream);

// A fold in one kernel, where OnHopper.
inline constexpr int kLeastFoldSegment = 8;  // chunks: weights are loaded once for all of them
int MostFoldSegments(const DslaShape& s);    // of a sequence
void LaunchFold(const PrefillParams& p, int D, cudaStream_t stream);
void LaunchCombine(const PrefillParams& p, int D, cudaStream_t stream);

}  // namespace dsla::cuda
