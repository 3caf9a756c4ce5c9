// What the kernels of the queries of one chunk share. Private to src/ops/dsla.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/dsla/cpu_wave.h"

namespace dsla {

// One tile: the times of a chunk times some heads of one KV head. Its rows are (time, head) pairs,
// m = time * heads + head.
struct DslaQueryTile {
  const DslaWave& wave;
  const DslaChunk& chunk;
  const DslaSegment& segment;
  int64_t at;      // of (chunk, KV head) in the wave's arrays
  int h;           // KV head
  int first_head;  // query heads
  int heads;
  int64_t row;    // of the tile's first time in q and out
  int64_t time;   // of the tile's first time
  int64_t token;  // stream index of the token entering at it
  // Scratch.
  float* query;        // [m, D]: y, later q / sqrt(D)
  float* keyed;        // [m, SF]: Q~
  float* linear;       // [m, D] numerator
  float* window;       // [m, D] numerator
  float* scores;       // [kQueryBlock * heads, kCpuChunk], or the window's scratch
  float* denominator;  // [m]
  float* top;          // [m] largest score of the window
  float* sum;          // [m] of exp(score - top)

  // The first position in the window of any time, if it is not a sink.
  int64_t FirstKey() const {
    return std::max<int64_t>(time + 1 - wave.shape.window, wave.shape.sinks);
  }
  const float* Query(int i, int g) const {
    return wave.forward->q + (row + i) * wave.forward->q_stride +
           static_cast<int64_t>(first_head + g) * wave.shape.D;
  }
};

}  // namespace dsla
