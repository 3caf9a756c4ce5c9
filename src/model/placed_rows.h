// One step's rows in the order in which the layers run them: sorted by level, so that each layer's
// softmax rows come first and its DSLA rows last, and within a level single rows (decode) before
// longer pieces of prompts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "base/exec.h"
#include "cache/sequence_cache.h"
#include "ops/sampling/sampling_params.h"

namespace dsla {

// One sequence's new rows in a batch. Room for them was reserved in `cache`.
struct SequenceRows {
  SequenceCache* cache = nullptr;
  std::span<const int32_t>
      tokens;           // at positions cache->length(), ...; at least one, each in [0, V)
  int logits_rows = 1;  // logits of the last so many rows; 0 = none
  // Not null: the caller takes the token that these draw (ops/sampling/sampling.h), with what
  // follows, and needs no more than a TokenChoice of each row. A model may give the logits all the
  // same.
  const SamplingParams* sampling = nullptr;
  std::span<const LogitEdit> edits = {};    // of steps 1 to 3: each token once
  std::span<const int32_t> ruled_out = {};  // tokens
  std::span<const uint32_t> allowed = {};   // a mask of tokens; empty: all
  int top = 0;  // how many of the likeliest tokens to tell, at most kMostDeviceTop
  // HybridModel::Begin: not negative, the token is the one chosen for this sequence of the batch
  // begun before; `tokens` then holds one that is not read.
  int feed = -1;
};

// The most of a row's likeliest tokens that a device tells; who wants more takes the logits.
inline constexpr int kMostDeviceTop = 20;

// The token drawn for a row and its log-probability under the softmax over all logits as given;
// broken: there is none, as Sampler::Sample says it. top: of the likeliest tokens, likeliest first,
// as TopLogprobs says it; it lasts as long as the choice.
struct TokenChoice {
  int32_t token = 0;
  float logprob = 0;
  bool broken = false;
  std::span<const TokenLogprob> top = {};
};

// Of a Forward that hands out logits by tiles: the batch's `sequence`, its new token number `row`.
struct LogitsRow {
  int sequence = 0;
  int row = 0;
};

struct PlacedRows {
  std::span<const SequenceRows*> sequences;  // [N] in the order of the step
  std::span<int> batch_index;                // [N] each one's place in the batch
  std::span<int32_t> row_start;              // [N + 1]
  std::span<int32_t> pos;                    // [N] tokens cached before the step
  std::span<int32_t> positions;              // [T]

  std::span<LogitsRow> wanted;     // whose logits were asked for, in the batch's order
  std::span<int64_t> wanted_rows;  // where they are in the step

  int N() const { return static_cast<int>(sequences.size()); }
  int64_t T() const { return static_cast<int64_t>(positions.size()); }
  // How many sequences, the first ones, are softmax in the layer of this rank in the ladder.
  int SoftmaxSequences(int rank) const {
    const auto first_dsla = std::partition_point(
        sequences.begin(), sequences.end(),
        [&](const SequenceRows* rows) { return rows->cache->level() <= rank; });
    return static_cast<int>(first_dsla - sequences.begin());
  }
};

// The result lies in `workspace`; every sequence of `batch` must outlive it.
PlacedRows PlaceRows(std::span<const SequenceRows> batch, Workspace& workspace);

}  // namespace dsla
