// What the layers of a step on the CPU share: worked out once, before the first of them. Private to
// src/model.
#pragma once

#include <cstdint>
#include <span>

#include "base/exec.h"
#include "format/config.h"
#include "model/placed_rows.h"
#include "ops/attention/attention.h"

namespace dsla {

struct StepPlan {
  // The layers in which the same sequences are softmax, the first ones.
  struct Split {
    int softmax_sequences = 0;
    int64_t softmax_rows = 0;
    PagedAttentionPlan attention;
  };

  int N = 0;
  RaggedRows rows;                      // of all sequences
  const int32_t* page_start = nullptr;  // [N + 1] a sequence holds as many pages in every layer
  const int32_t* pages = nullptr;       // [L, page_start[N]], undefined where the layer is DSLA
  const int32_t* slots = nullptr;       // [L, N], -1 where the layer is softmax
  const Split* splits = nullptr;
  const int32_t* split_of = nullptr;  // [L]

  const Split& split(int layer) const { return splits[split_of[layer]]; }
  PageTables tables(int layer) const {
    return {.page_start = page_start, .pages = pages + int64_t{layer} * page_start[N]};
  }
  // The rows of the softmax sequences, and of the others, whose rows are counted like all others'.
  RaggedRows softmax_rows(int layer) const {
    return {.N = split(layer).softmax_sequences, .row_start = rows.row_start, .pos = rows.pos};
  }
  RaggedRows dsla_rows(int layer) const {
    const int first = split(layer).softmax_sequences;
    return {.N = N - first, .row_start = rows.row_start + first, .pos = rows.pos + first};
  }
  const int32_t* dsla_slots(int layer) const {
    return slots + int64_t{layer} * N + split(layer).softmax_sequences;
  }
};

// ladder: the layers in the order in which they convert. The plan lies in `workspace`.
StepPlan PlanStep(const PlacedRows& rows, const ModelConfig& config, int page_size,
                  std::span<const int> ladder, Workspace& workspace);

}  // namespace dsla
