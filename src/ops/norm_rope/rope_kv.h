// A layer's new rows from the product that made them to where attention reads them, in one pass:
// q/k norm and RoPE, K and V to the pages of a softmax layer's cache, or to dense rows for a DSLA
// layer.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/exec.h"
#include "ops/norm_rope/norm_rope.h"
#include "ops/views.h"

namespace dsla {

struct RopeKvArgs {
  // [T, (H + 2 Hkv) D]: of each row the queries, which are normalised and rotated in place, then
  // the keys and the values, which stay as they are.
  float* qkv = nullptr;
  int64_t stride = 0;  // floats between rows
  int64_t T = 0;
  int H = 0, Hkv = 0;
  const int32_t* positions = nullptr;  // [T], each < table->positions()
  const RopeTable* table = nullptr;
  const float* q_norm = nullptr;  // [D], null: none
  const float* k_norm = nullptr;
  float norm_eps = 0;

  // The first rows, those of `paged`, go to their pages, rounded to the cache's dtype (to nearest
  // even; kI8: by each head's largest).
  RaggedRows paged;
  PageTables tables;
  PagedKvView kv;
  // The others go to their own rows of these.
  DType row_type = DType::kBF16;  // fp32 or bf16
  void* k = nullptr;              // [T, Hkv, D]
  void* v = nullptr;              // [T, Hkv, D]
};
void RopeKvCpu(const ExecContext& ctx, const RopeKvArgs& args);

// The oracle: fp64, scalar, one thread.
void RopeKvRef(const RopeKvArgs& args);

}  // namespace dsla
