// The teacher's layers and a DSLA layer's around them as libtorch functions. Internal to the room.
// Shapes: x [B, T, C]; heads [B, T, h, D]; the "compute type" is the weights' (fp32 or bf16).
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "distill/parameters.h"
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
  Operator kind = Operator::kDsla;
  Tensor q_a, q_b, o_a, o_b;  // undefined if the rank is 0
  DslaLayerParams op;
  Tensor claim, claim_bias;  // undefined without a window
  // Of Operator::kPaper: deltas of K and V; gates; the log of each head's output scale [H].
  Tensor k_a, k_b, v_a, v_b;
  Tensor gate_a, gate_b;  // [states, r, C], [states, Hkv D, r]; bias and mix [1, states] lie in op
  Tensor log_scale;
};

struct RopeTables {
  Tensor cos, sin;  // [T, D / 2] fp32
};

// q, k rotated (q of Operator::kPaper is not); k_plain before RoPE.
struct Heads {
  Tensor q_plain;  // the projection alone, without delta, norm and RoPE
  Tensor q, k, k_plain, v;
};

// Keys and values of earlier positions, from the teacher's own pass.
struct Prefix {
  Tensor k, k_plain, v;  // [B, s, Hkv, D]; undefined: none
};

// Whether the kernels of ops/training take x: on a GPU, in bf16, where they are built.
bool HasTrainingKernels(const Tensor& x);

Tensor Norm(const Tensor& x, const Tensor& weight, double eps);
// The projections of the normed input x; with `adapter`, q has its delta.
Heads Project(const Teacher& teacher, const TeacherLayer& layer, const Tensor& x,
              const RopeTables& rope, const AdapterTensors* adapter);
// The same from the teacher's heads of the same x, so that nothing is projected twice.
Heads WithDelta(const Teacher& teacher, const TeacherLayer& layer, const Heads& heads,
                const Tensor& x, const RopeTables& rope, const AdapterTensors& adapter);
// Causal attention of the last T positions of the stream. [B, T, H D].
Tensor SoftmaxAttention(const Heads& heads, const Prefix& prefix);
// The natural log of a converted layer's gates [B, T, Hkv, states, F]; it has states.
Tensor LogGates(const Heads& heads, const Tensor& x, const AdapterTensors& adapter,
                const DslaLayerOptions& options);
// A converted layer's attention, of whatever operator. [B, T, H D]. Operator::kPaper takes no
// prefix.
Tensor DslaAttention(const Heads& heads, const Prefix& prefix, const Tensor& x,
                     const AdapterTensors& adapter, const DslaLayerOptions& options);
// The output projection of attention's output [B, T, H D]; with `adapter`, its delta.
Tensor OutputProjection(const TeacherLayer& layer, const Tensor& out,
                        const AdapterTensors* adapter);
// x + MLP(norm(x)).
Tensor MlpBlock(const Teacher& teacher, const TeacherLayer& layer, const Tensor& x);

}  // namespace dsla::distill
