// Weights bound to layers: what Forward multiplies by. Loaded once, immutable afterwards, shared by
// all threads.
#pragma once

#include <memory>
#include <vector>

#include "base/arena.h"
#include "base/buffer.h"
#include "base/exec.h"
#include "base/status.h"
#include "format/adapter.h"
#include "format/model_file.h"
#include "ops/dsla/dsla.h"
#include "ops/linear/linear.h"

namespace dsla {

struct LayerWeights {
  Buffer<float> attn_norm;  // [C]
  Buffer<float> mlp_norm;   // [C]
  Buffer<float> q_norm;     // [D], empty unless the family normalises queries
  Buffer<float> k_norm;     // [D]
  Linear qkv;               // [(H + 2 Hkv) D, C]: one product for all three
  Linear o;                 // [C, H D]
  Linear gate_up;           // [2 ffn, C]
  Linear down;              // [C, ffn]
};

struct ModelWeights {
  std::unique_ptr<Arena> arena;  // where the matrices lie
  Linear embedding;              // [V, C], rows read one by one
  Linear head;                   // [V, C], empty when tied
  Buffer<float> final_norm;      // [C]
  std::vector<LayerWeights> layers;

  const Linear& output() const { return head.empty() ? embedding : head; }
  int64_t bytes() const;
};

// The smallest format that keeps what `file` holds: int4 where the layers' matrices are Q4_1, whose
// groups it stores as they are; int8 where they are quantised otherwise; else bf16.
WeightFormat FormatFor(const ModelFile& file);

// Reads and converts every tensor of `file`. The embedding and the head are never stored below 8
// bits: at 4 they cost more quality than all other weights. Errors: ModelFile::Read's and
// PrepareLinear's.
Expected<ModelWeights> LoadWeights(const ExecContext& ctx, const ModelFile& file,
                                   WeightFormat format);

// One layer of an adapter as the operators read it.
struct DslaLayer {
  DslaShape shape;
  LowRankDelta q_delta;  // [H D, C]
  LowRankDelta o_delta;  // [C, H D]
  Linear claim;          // [H, C] with bias; empty when W = 0
  Buffer<float> phi_q, phi_k, gate_weight, gate_bias;
  Buffer<float> mix;  // [H, states], after the softmax

  int64_t bytes() const;
  DslaParams params() const;  // without the rope table
};

// An adapter in the form that a model runs.
struct BoundAdapter {
  AdapterInfo info;
  std::unique_ptr<Arena> arena;  // where the matrices lie
  std::vector<DslaLayer> layers;
  int64_t slot_bytes = 0;  // of the largest layer's slot
};

// The adapter's matrices are small and stay in 16 bits where the model's have fewer.
BoundAdapter BindAdapter(const ModelConfig& config, const Adapter& adapter, WeightFormat format,
                         DType kv_dtype);

}  // namespace dsla
