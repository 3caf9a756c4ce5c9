// What the chunked CPU form keeps for a wave of chunks, and its kernels. Private to src/ops/dsla.
//
// A wave is a list of segments (consecutive times of one sequence), each cut into chunks; several
// sequences fill one wave, a long one takes several. Row j of a chunk is a time t at which the
// token e = t - W enters the states (before the output of t); chunks begin where e is a multiple of
// kCpuChunk. Passes, each parallel: load tokens as fp32; prepare each chunk's keys, decays and its
// contribution to the states; scan the states over the chunks; queries.
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

  // The window's products are of bf16, and read keys and values where they lie.
  bool bf16_window = false;

  // Tokens as fp32. A segment has the tokens begin - W .. at token ..: the `count` that enter and,
  // for a window in fp32, W more. Tokens before position 0 are zero.
  int64_t tokens = 0;
  float* k = nullptr;  // [Hkv, tokens, D]
  float* v = nullptr;  // [Hkv, tokens, D]
  // Sinks, for a window in fp32.
  float* sink_k = nullptr;  // [segments, Hkv, S, D]
  float* sink_v = nullptr;  // [segments, Hkv, S, D]

  // Per chunk and KV head; G are the chunk's inclusive sums of gates, R those of its anchor row,
  // L those of its last row.
  float* decay = nullptr;  // [chunks, Hkv, kCpuChunk, SF]: e^(G - R); forward only
  float* keys =
      nullptr;  // [chunks, Hkv, SF, kCpuChunk]: K~ = k' e^(R - G), transposed; forward only
  float* state = nullptr;  // [chunks, Hkv, SF, D]: K~^T V, after the scan e^R S of the entry state
  float* norm = nullptr;   // [chunks, Hkv, SF]: the same of the denominator
  float* scale_in = nullptr;   // [chunks, Hkv, SF]: e^R
  float* scale_out = nullptr;  // [chunks, Hkv, SF]: e^(L - R)

  int StreamWindow() const { return forward && !bf16_window ? shape.window : 0; }
  int64_t At(int chunk, int h) const { return static_cast<int64_t>(chunk) * shape.Hkv + h; }
};

// Times whose scores are computed together, over the keys that any of them sees: 16 times of 3
// heads fill the rows of a product and leave out most of what is masked.
inline constexpr int kQueryBlock = 16;

// At least the sinks and tokens of the window that the times of a chunk see, each rounded up to an
// even number.
inline int DslaWindowKeys(const DslaShape& shape) {
  return shape.window == 0 ? 0 : (shape.sinks + 1) / 2 * 2 + shape.window + kCpuChunk;
}
// Floats of a tile's scores of `heads` heads, or of its window's queries, keys, values and scores.
inline int64_t DslaScoreScratch(const DslaShape& shape, int heads) {
  const int64_t lanes = int64_t{kQueryBlock} * heads, keys = DslaWindowKeys(shape);
  const int64_t window = lanes * shape.D + keys * shape.D + keys * lanes;
  return std::max(lanes * kCpuChunk, shape.window == 0 ? 0 : window);
}

// Whether this CPU multiplies windows of this shape in bf16.
bool DslaBf16Window(const DslaShape& shape);
// Floats of scratch a call of the kernel needs.
int64_t DslaPrepareScratch(const DslaShape& shape);
int64_t DslaQueryScratch(const DslaShape& shape, int heads);

// Converts the tokens that the chunk's times add, and for a segment's first chunk what came before.
void DslaLoadTokens(const DslaWave& wave, int chunk, int h);
// Keys, decays and contribution of one chunk.
void DslaPrepareChunk(const DslaWave& wave, int chunk, int h, float* scratch);
// Carries rows [begin, end) of the states of KV head h through the segment's chunks, from the slot
// to the slot.
void DslaScanStates(const DslaWave& wave, int segment, int h, int begin, int end);
// Outputs of `heads` query heads from first_head on, all of one KV head.
void DslaQueryChunk(const DslaWave& wave, int chunk, int first_head, int heads, float* scratch);

}  // namespace dsla
