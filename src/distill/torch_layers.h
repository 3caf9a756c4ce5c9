// The teacher's layers and a DSLA layer's around them as libtorch functions. Internal to the room.
// Shapes: x [B, T, C]; heads [B, T, h, D]; the "compute type" is the weights' (fp32 or bf16).
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "format/config.h"
#include "ops/dsla/dsla_autograd.h"

namespace dsla::distill {

using at::Tensor;

struct TeacherLayer {
  Tensor attn_norm, mlp_norm;  // [C]
  Tensor q_norm, k_norm;       // [D], undefined unless the family has them
  Tensor qkv, qkv_bias;        // [(H + 2 Hkv) D, C]; bias undefined unless the family has one
  Tensor o, o_bias;            // [C, H D]
  Tensor gate_up;              // [2 ffn, C]
  Tensor down;                 // [C, ffn]
};

struct Teacher {
  ModelConfig config;
  Tensor embedding, head;  // [V, C]; one tensor when tied
  Tensor final_norm;       // [C]
  std::vector<TeacherLayer> layers;
};

// The adapter's parameters of one layer, fp32, as leaves or views of the flat array.
struct AdapterTensors {
  Tensor q_a, q_b, o_a, o_b;  // undefined if the rank is 0
  DslaLayerParams op;
  Tensor claim, claim_bias;  // undefined without a window
};

struct RopeTables {
  Tensor cos, sin;  // [T, D / 2] fp32
};

// q, k rotated; k_plain before RoPE.
struct Heads {
  Tensor q_plain;  // the projection alone, without delta, norm and RoPE
  Tensor q, k, k_plain, v;
};

// Keys and values of earlier positions, from the teacher's own pass.
struct Prefix {
  Tensor k, k_plain, v;  // [B, s, Hkv, D]; undefined: none
};

Tensor Norm(const Tensor& x, const Tensor& weight, double eps);
// The projections of the normed input x; with `adapter`, q has its delta.
Heads Project(const Teacher& teacher, const TeacherLayer& layer, const Tensor& x,
              const RopeTables& rope, const AdapterTensors* adapter);
// The same from the teacher's heads of the same x, so that nothing is projected twice.
Heads WithDelta(const Teacher& teacher, const TeacherLayer& layer, const Heads& heads,
                const Tensor& x, const RopeTables& rope, const AdapterTensors& adapter);
// Causal attention of the last T positions of the stream. [B, T, H D].
Tensor SoftmaxAttention(const Heads& heads, const Prefix& prefix);
Tensor DslaAttention(const Heads& heads, const Prefix& prefix, const Tensor& x,
                     const AdapterTensors& adapter, const DslaLayerOptions& options);
// The output projection of attention's output [B, T, H D]; with `adapter`, its delta.
Tensor OutputProjection(const TeacherLayer& layer, const Tensor& out,
                        const AdapterTensors* adapter);
// x + MLP(norm(x)).
Tensor MlpBlock(const Teacher& teacher, const TeacherLayer& layer, const Tensor& x);

}  // namespace dsla::distill
