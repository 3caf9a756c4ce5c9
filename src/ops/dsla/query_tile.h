// What the kernels of the queries of one block of times share. Private to src/ops/dsla.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/dsla/cpu_wave.h"

namespace dsla {

// Up to kQueryBlock times of a chunk and some heads of one KV head. A lane is a (head, time) pair,
// lane = head * kQueryBlock + time: the lanes of a head are whole vectors. What lies [.., lanes] is
// undefined in the lanes of times that are not there.
struct DslaQueryTile {
  const DslaWave& wave;
  const DslaChunk& chunk;
  const DslaSegment& segment;
  int64_t at;             // of (chunk, KV head) in the wave's arrays
  int h;                  // KV head
  int first_head, heads;  // query heads
  int first, times;       // rows of the chunk
  int64_t row;            // of the first time in q and out
  int64_t time;           // the first time
  // Scratch.
  float* rows;         // [lanes, D]: y, later queries
  float* query;        // [D, lanes]: y, later queries
  float* keyed;        // [SF, lanes]: Q~
  float* linear;       // [lanes, D] numerator
  float* window;       // [lanes, D] numerator
  float* scores;       // [DslaBlockKeys, lanes]
  float* denominator;  // [lanes]
  float* top;          // [lanes] largest score of the window
  float* sum;          // [lanes] of exp(score - top)
  float* shares;       // [2, lanes] of the numerators in the output

  int lanes() const { return heads * kQueryBlock; }
  const float* Query(int g) const {
    return wave.forward->q + row * wave.forward->q_stride +
           static_cast<int64_t>(first_head + g) * wave.shape.D;
  }
  // body(lane, count) for all lanes of times: at once if there are no others, else by heads.
  template <class Body>
  void ForLanes(Body&& body) const {
    if (times == kQueryBlock) return body(0, lanes());
    for (int g = 0; g < heads; ++g) body(g * kQueryBlock, times);
  }
};

}  // namespace dsla
