// One Forward's arrays on the CPU. Private to src/model.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/stage_times.h"
#include "model/hybrid_model.h"
#include "model/step_plan.h"
#include "ops/linear/linear_input.h"

namespace dsla {

struct HybridModel::Step {
  Products products = Products::kFastest;
  const QueryVisitor* visit_queries = nullptr;
  StageClock clock{nullptr};
  PlacedRows rows;
  StepPlan plan;
  PagedKvView kv;
  DslaStateView states;
  float* hidden = nullptr;   // [T, C] residual stream
  float* delta = nullptr;    // [T, C] a block's output, added to hidden by the next norm
  float* qkv = nullptr;      // [T, (H + 2 Hkv) D]
  float* gate_up = nullptr;  // [T, 2 ffn]
  std::byte* k = nullptr;    // [T, Hkv D] of the DSLA rows, in the type that their slots have
  std::byte* v = nullptr;
  // What products multiply, and the rows that it is made of.
  LinearInput normed, attention, activation;
  float* normed_rows = nullptr;      // [T, C]
  float* attention_rows = nullptr;   // [T, H D]
  float* activation_rows = nullptr;  // [T, ffn]
};

}  // namespace dsla
