// How a call of PagedAttentionCpu is cut into tasks. Sequences with at most kDecodePositions new
// rows take the decode form, cut into ranges of keys; longer ones the prefill form, cut into blocks
// of query positions. Every cut lies at a fixed place, never at one that depends on the threads or
// on the other sequences.
#pragma once

#include <cstdint>

#include "ops/attention/attention.h"

namespace dsla {

// Up to here a sequence's new rows share one pass over its cache without a tile of their own.
inline constexpr int kDecodePositions = 4;
// Keys of a decode task: 64 KiB of bf16 K and V at D = 64, enough to hide the start of a task, and
// few enough that three KV heads keep many threads busy.
inline constexpr int kDecodeKeys = 256;
// Rows (positions times G) of a prefill task, about. With kPrefillKeys and D = 64 the tile takes
// 230 KiB: half of a common L2 cache. 192 is a multiple of every register block.
inline constexpr int kPrefillRows = 192;
inline constexpr int kPrefillKeys = 128;
inline constexpr int kPrefillRowPad = 32;  // a whole number of register blocks on every target
inline constexpr int kPartialPad =
    32;  // D in the decode form is padded to two vectors of any target

struct AttentionTask {
  int64_t cost;  // rows times keys, to start the largest first
  int32_t n, head;
  int32_t begin, end;  // rows of the sequence (prefill) or keys (decode)
  int64_t partial;     // where among the partial results a decode task's goes; -1: prefill
};

// The decode tasks of one (sequence, KV head), which are merged in ascending order of keys.
struct AttentionMerge {
  int32_t n, head, splits;
  int64_t partial, split_stride;  // of the first, and between them
};

constexpr int RoundUp(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }
constexpr int64_t RoundUp64(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

inline int PrefillPositions(const PagedAttentionArgs& a) {
  const int G = a.H / a.kv.Hkv;
  return G >= kPrefillRows ? 1 : kPrefillRows / G;
}

// Floats of scratch memory that one thread needs for any task of the call.
inline int64_t PrefillScratch(const PagedAttentionArgs& a) {
  const int64_t D = a.kv.D;
  const int64_t Mp = RoundUp(PrefillPositions(a) * (a.H / a.kv.Hkv), kPrefillRowPad);
  constexpr int64_t kArrays = 9, kAlign = 16;
  return D * Mp + kPrefillKeys * D + kPrefillKeys * Mp + Mp * D + 5 * Mp + kArrays * kAlign;
}
inline int64_t DecodeScratch(const PagedAttentionArgs& a) {
  const int64_t Dp = RoundUp(a.kv.D, kPartialPad);
  const int64_t R = int64_t{kDecodePositions} * (a.H / a.kv.Hkv);
  return R * Dp + R * kDecodeKeys + kDecodeKeys * Dp;
}
// Floats of one task's partial result: per row the unnormalised output [Dp], the maximum and the
// sum.
inline int64_t PartialRow(int D) { return RoundUp(D, kPartialPad) + kPartialPad; }

}  // namespace dsla
