// One Forward's arrays on the CPU. Private to src/model.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/stage_times.h"
#include "model/hybrid_model.h"
#include "model/step_plan.h"

namespace dsla {

struct HybridModel::Step {
  Products products = Products::kFastest;
  const QueryVisitor* visit_queries = nullptr;
  StageClock clock{nullptr};
  PlacedRows rows;
  StepPlan plan;
  PagedKvView kv;
  DslaStateView states;
  float* hidden = nullptr;  // [T, C] residual stream
  float* normed = nullptr;  // [T, C]
  float* delta = nullptr;   // [T, C] a block's output, added to hidden by the next norm
  float* qkv = nullptr;     // [T, (H + 2 Hkv) D]
  std::byte* k = nullptr;   // [T, Hkv D] of the DSLA rows, in the type that their slots have
  std::byte* v = nullptr;
  float* attention = nullptr;   // [T, H D]
  float* gate_up = nullptr;     // [T, 2 ffn]
  float* activation = nullptr;  // [T, ffn]
};

}  // namespace dsla
