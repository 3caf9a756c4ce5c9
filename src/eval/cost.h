// Bytes and operations that a step must take, from shapes alone: the numerators of every stated
// share of a limit.
#pragma once

#include <cstdint>

#include "model/hybrid_model.h"

namespace dsla {

// Bytes that one decode step of `sequences` sequences moves to or from memory at `level` with
// `length` tokens cached by each: weights once, then for each sequence every softmax layer's K and
// V once, every DSLA layer's states twice (read and written) and its window and sinks once.
int64_t DecodeBytes(const HybridModel& model, int level, int64_t length, int sequences = 1);

// Floating-point operations of running `tokens` tokens after `depth` cached ones, two per
// multiply-add, logits of one row: projections, causal scores and values, and for DSLA layers
// deltas, feature maps, gates, chunk products and window.
double PrefillFlops(const HybridModel& model, int level, int64_t tokens, int64_t depth = 0);

// Cache bytes of one sequence of `length` tokens, whole pages and slots as the pool hands them out.
int64_t CacheBytesAt(const HybridModel& model, int level, int64_t length);

}  // namespace dsla
