// Dual-state linear attention for training: the operator of dsla.h in its chunked form as libtorch
// functions with hand-written, exact backward passes. Nothing elementwise is recorded: each
// function saves its inputs (or outputs that its consumer saves anyway) and recomputes the rest, in
// segments, so that neither the saved nor the temporary memory holds a state per token.
//
// Device-neutral (batched products and elementwise ATen calls): CPU and CUDA. Operand tensors are
// bf16, fp32 or fp64 (for gradient checks) and all of one type; "sum type" below means fp32, or
// fp64 for fp64 operands. Products round their operands to the operand type and accumulate in the
// sum type; gates, their sums and the states are always of the sum type. Gradients have the type of
// their input. Differentiable once: a backward under create_graph is refused.
//
// Thread-safe like any ATen call; nothing is kept between calls. A wrong shape or type throws
// c10::Error with a one-line message, as libtorch operators do.
//
// B sequences, T queries, TK >= T keys, H query heads, Hkv KV heads, D head dim, F features per
// state, states 1 or 2. The keys are those of a whole stream, positions 0 .. TK - 1, and the
// queries belong to its last T positions: with TK > T the first TK - T positions are a prefix that
// other layers' code has cached (training the switch of a running request), TK = T is the usual
// case.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace dsla {

struct DslaChunkedOptions {
  int64_t window = 0;  // W: token s enters the states at time s + W
  int64_t sinks = 0;   // S: the first S keys never enter
  // Tokens per chunk, even. exp(chunk / 2 * -a) must not overflow: with a >= -2.25, 64 is safe.
  int64_t chunk = 64;
  int64_t segment = 1024;  // tokens whose temporaries exist at a time, rounded up to whole chunks
  // Keys enter as (1 - e^a) phi_k. False: as phi_k, as in gated linear attention (Yang et al., ICML
  // 2024); phi_q and phi_k may then have any sign, and `den` says nothing.
  bool balanced = true;
};

struct DslaChunkedResult {
  at::Tensor num;    // [B, T, H, D] sum type: sum_i g_i phi_q^T S_i
  at::Tensor den;    // [B, T, H] sum type: sum_i g_i phi_q^T z_i
  at::Tensor state;  // [B, Hkv, states * F, D] sum type: after the last position
  at::Tensor norm;   // [B, Hkv, states * F] sum type: likewise, z
};

// phi_q [B, T, H, F]; mix [H, states] sum type; phi_k [B, TK, Hkv, F]; a [B, TK, Hkv, states, F]
// sum type, the natural log of the gates, <= 0; v [B, TK, Hkv, D]; state [B, Hkv, states * F, D]
// and norm [B, Hkv, states * F], sum type, both given or both undefined (zero): the states before
// position 0, from tokens that all have entered. Every input and output is differentiable.
DslaChunkedResult DslaChunked(const at::Tensor& phi_q, const at::Tensor& mix,
                              const at::Tensor& phi_k, const at::Tensor& a, const at::Tensor& v,
                              const at::Tensor& state = {}, const at::Tensor& norm = {},
                              const DslaChunkedOptions& options = {});

// phi(u) = softmax(y), or [softmax(y), softmax(-y)] if two_sided, y_e = sum_d u_d map[d, e].
// u [B, T, h, D], map [h, D, D] sum type. Returns [B, T, h, F] of u's type.
at::Tensor DslaFeatures(const at::Tensor& u, const at::Tensor& map, bool two_sided);

// a = max(logsigmoid(k~ U + b) / 16, floor); no gradient where the floor holds. k [B, T, Hkv, D]:
// k~, the keys with RoPE undone; weight U [states, Hkv, D, F] and bias b [states, Hkv, F], sum
// type. Computed in the sum type throughout, as serving does: a rounding of U would shift every
// gate. Returns [B, T, Hkv, states, F] of the sum type.
at::Tensor DslaGates(const at::Tensor& k, const at::Tensor& weight, const at::Tensor& bias,
                     double floor);

// Rotates (or, with `inverse`, undoes the rotation of) the pairs (d, d + D/2) of x [B, T, h, D].
// cos, sin [T, D/2] sum type: the rows of the positions in x, constants. Returns x's type, rounded
// once.
at::Tensor DslaRope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                    bool inverse = false);

struct DslaWindowResult {
  at::Tensor out;  // [B, T, H, D] sum type
  at::Tensor lse;  // [B, T, H] sum type: natural log of the sum of exp(q.k / sqrt(D))
};

// Softmax attention with scale 1/sqrt(D) of the query at position t over the keys t - window + 1 ..
// t and the first `sinks` keys of the stream, each once. q [B, T, H, D], k, v [B, TK, Hkv, D];
// window >= 1.
DslaWindowResult DslaWindowAttention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                     int64_t window, int64_t sinks, int64_t segment = 1024);

// out = w lin + (1 - w) win, lin = num / (den + 1e-6), w = sigmoid(claim - lse), 0 where den <
// 1e-6. num, win [B, T, H, D], den, lse, claim [B, T, H], sum type. With win, lse and claim
// undefined (W = 0), out = lin. Returns the sum type.
at::Tensor DslaMerge(const at::Tensor& num, const at::Tensor& den, const at::Tensor& win = {},
                     const at::Tensor& lse = {}, const at::Tensor& claim = {});

// The trained parameters of one layer's operator, sum type.
struct DslaLayerParams {
  at::Tensor phi_q;        // [H, D, D]
  at::Tensor phi_k;        // [Hkv, D, D]
  at::Tensor gate_weight;  // [states, Hkv, D, F], F = D or 2D
  at::Tensor gate_bias;    // [states, Hkv, F]
  at::Tensor mix;          // [H, states], before the softmax over states
};

struct DslaLayerOptions {
  DslaChunkedOptions chunked;  // window and sinks are the layer's
  double gate_floor = -2.25;
};

// The whole operator between the projections: features, gates, states, window, sinks, merge.
// q [B, T, H, D] rotated; k [B, TK, Hkv, D] rotated, as a cache would hold it; k_plain [B, TK, Hkv,
// D] the same with RoPE undone, of k's type or of the sum type (more exact gates); v [B, TK, Hkv,
// D]; claim [B, T, H] sum type, undefined if window = 0. Returns [B, T, H, D] of q's type. On a GPU
// in bf16 it is one function with fused kernels where those of ops/training are built.
at::Tensor DslaLayer(const at::Tensor& q, const at::Tensor& k, const at::Tensor& k_plain,
                     const at::Tensor& v, const at::Tensor& claim, const DslaLayerParams& params,
                     const DslaLayerOptions& options);

}  // namespace dsla
