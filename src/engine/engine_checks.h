// What a request must be before the engine does any work for it. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "engine/engine.h"
#include "engine/request.h"

namespace dsla {

// Candidates per position that a request may ask for.
inline constexpr int kMaxTopLogprobs = 128;
// Bytes of all stop strings together: each byte of a reply is looked at once per stop string.
inline constexpr size_t kMaxStopBytes = 16 << 10;

// Where prompts are cut in deterministic mode: at multiples of a number that depends on the pages
// alone, so that replies do not change with max_batch_tokens.
inline int DeterministicChunk(int page_size) {
  constexpr int kTokens = 128;
  return (kTokens + page_size - 1) / page_size * page_size;
}

struct RequestLimits {
  int64_t V = 0;
  int max_positions = 0;
  int max_level = 0;
};

// The first field that is wrong, or nothing. Without the bounds of the cache and of the queue.
std::optional<Rejection> CheckRequest(const Request& request, const RequestLimits& limits);

}  // namespace dsla
