// What the chunked CPU form keeps for a wave of chunks, and its kernels. Private to src/ops/dsla.
//
// A wave is a list of segments (consecutive times of one sequence), each cut into chunks; several
// sequences fill one wave, a long one takes several. Row j of a chunk is a time t at which the
// token e = t - W enters the states (before the output of t); chunks begin where e is a multiple of
// kCpuChunk. Passes, each parallel: load each chunk's tokens and prepare its keys, decays and
// contribution to the states; scan the states over the chunks; queries, a block of times at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/dsla/dsla.h"

namespace dsla {

// Rows per chunk. As fast as 64 (README), with exponents half as large and more tasks to share out.
inline constexpr int kCpuChunk = 32;
static_assert(kDslaChunk % kCpuChunk == 0);

struct DslaSegment {
  int n = 0;            // sequence
  int64_t begin = 0;    // first time
  int count = 0;        // times
  int64_t row = 0;      // of the first time in q, k, v and out
  int64_t token = 0;    // where token begin - W lies in the wave's streams of tokens
  int64_t pair = 0;     // where its sinks lie in the wave's pairs of tokens
  int first_chunk = 0;  // in the wave
  int chunks = 0;
};

struct DslaChunk {
  int segment = 0;
  int offset = 0;  // of row 0 in the segment
  int rows = 0;
  int idle = 0;  // leading rows at which nothing enters; nothing ever entered before them
};

struct DslaWave {
  DslaShape shape;
  DslaParams params;
  DslaSlotLayout layout;
  DslaStateView states;
  const int32_t* slots = nullptr;
  const DslaArgs* forward = nullptr;  // exactly one of the two
  const DslaFoldArgs* fold = nullptr;

  const DslaSegment* segments = nullptr;
  const DslaChunk* chunks = nullptr;
  int num_segments = 0, num_chunks = 0;

  // The window's products are of bf16.
  bool bf16_window = false;

  // Tokens as fp32. A segment has the tokens begin - W .. at token ..: the `count` that enter and,
  // for a window in fp32, W more. Tokens before position 0 are zero.
  int64_t tokens = 0;
  float* k = nullptr;  // [Hkv, tokens, D]
  float* v = nullptr;  // [Hkv, tokens, D]
  // Sinks, for a window in fp32.
  float* sink_k = nullptr;  // [segments, Hkv, S, D]
  float* sink_v = nullptr;  // [segments, Hkv, S, D]
  // Tokens of windows in bf16, in pairs. A segment has its sinks, then its tokens from FirstPaired
  // on; zeros where there is no token.
  int64_t pairs = 0;
  uint32_t* pair_k = nullptr;  // [Hkv, pairs, 2, D / 2]: the keys of a pair, one after the other
  uint32_t* pair_v = nullptr;  // [Hkv, pairs, D]: the values of a pair, element beside element

  // Per chunk and KV head; G are the chunk's inclusive sums of gates, R those of its anchor row,
  // L those of its last row.
  float* decay = nullptr;  // [chunks, Hkv, SF, kCpuChunk]: e^(G - R); forward only
  float* keys = nullptr;   // [chunks, Hkv, SF, kCpuChunk]: K~ = k' e^(R - G); forward only
  float* state = nullptr;  // [chunks, Hkv, SF, D]: K~^T V, after the scan e^R S of the entry state
  float* norm = nullptr;   // [chunks, Hkv, SF]: the same of the denominator
  float* scale_in = nullptr;   // [chunks, Hkv, SF]: e^R
  float* scale_out = nullptr;  // [chunks, Hkv, SF]: e^(L - R)

  int StreamWindow() const { return forward && !bf16_window ? shape.window : 0; }
  int64_t SinkPairs() const { return bf16_window ? (shape.sinks + 1) / 2 : 0; }
  // Even, so that a token's partner does not depend on how its sequence is cut into segments.
  int64_t FirstPaired(const DslaSegment& seg) const { return (seg.begin - shape.window) & ~1; }
  int64_t SegmentPairs(const DslaSegment& seg) const {
    return bf16_window ? SinkPairs() + (seg.begin + seg.count - FirstPaired(seg) + 1) / 2 : 0;
  }
  int64_t At(int chunk, int h) const { return static_cast<int64_t>(chunk) * shape.Hkv + h; }
};

// Times whose outputs are computed together, from the keys that any of them sees: a whole number of
// vectors, and few enough to leave out most of what is masked.
inline constexpr int kQueryBlock = 16;
static_assert(kCpuChunk % kQueryBlock == 0);

// At least the keys whose scores a block makes at once: those of a chunk, or the sinks and the
// tokens of the window that any of its times sees, each in whole pairs.
inline int DslaBlockKeys(const DslaShape& shape) {
  return std::max(kCpuChunk, shape.sinks + 1 + shape.window + kQueryBlock + 1);
}

// Whether this CPU multiplies windows of this shape in bf16.
bool DslaBf16Window(const DslaShape& shape);
// Floats of scratch a call of the kernel needs.
int64_t DslaPrepareScratch(const DslaShape& shape);
int64_t DslaQueryScratch(const DslaShape& shape, int heads);

// Loads the tokens that enter in a chunk, and its share of the segment's window; then makes the
// chunk's keys, decays and contribution.
void DslaPrepareChunk(const DslaWave& wave, int chunk, int h, float* scratch);
// Carries rows [begin, end) of the states of KV head h through the segment's chunks, from the slot
// to the slot.
void DslaScanStates(const DslaWave& wave, int segment, int h, int begin, int end);
// Outputs of up to kQueryBlock times of a chunk, from its row `first` on, for `heads` query heads
// from first_head on, all of one KV head.
void DslaQueryBlock(const DslaWave& wave, int chunk, int first, int first_head, int heads,
                    float* scratch);

}  // namespace dsla
