// Dual-state linear attention (DSLA) of one layer over a ragged batch: chunked prefill, recurrent
// decode and the fold of a paged KV cache into states. After Ro et al., "On-the-Fly Adaptive
// Distillation of Transformer to Dual-State Linear Attention for Long-Context LLM Serving", ICML
// 2025, with positive features and a denominator, gates computed from the cached keys (so that a
// cache can be folded) and an exact softmax window and sinks merged in by log-sum-exp.
//
// Per KV head, with k~_t the cached key with RoPE undone at its absolute position, i = 0 history,
// 1 recency:
//
//   a_{i,t} = max(logsigmoid(k~_t U_i + b_i) / 16, floor)                    [F]    log of the gate
//   S_{i,t} = diag(e^{a_{i,t}}) S_{i,t-1} + ((1 - e^{a_{i,t}}) * phi_k(k_t)) v_t^T   [F, D]
//   z_{i,t} = the same with v_t replaced by 1                                [F]
//
// per query head:
//
//   lin_t  = sum_i g_i phi_q(q_t)^T S_{i,t} / (sum_i g_i phi_q(q_t)^T z_{i,t} + 1e-6)
//   phi(u) = [softmax(y), softmax(-y)] if F = 2D, softmax(y) if F = D;  y_e = sum_d u_d M[d, e]
//
// With a window W > 0 token s enters the states at time s + W, if s >= S (sinks never enter),
// before the output of that time; (win_t, lse_t) is softmax attention with scale 1/sqrt(D) over the
// sinks and the tokens t-W+1 .. t, each once;
//
//   w = sigmoid(claim_t - lse_t), 0 while the denominator is under 1e-6
//   out_t = w lin_t + (1 - w) win_t
//
// With W = 0, out_t = lin_t and every token enters the states at its own time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/exec.h"
#include "ops/views.h"

namespace dsla {

// Added to the denominator, and the least one that may claim a share.
inline constexpr float kDslaEpsilon = 1e-6f;
// Of the logsigmoid.
inline constexpr float kDslaGateDivisor = 16.f;
// Tokens per chunk that gate_floor is bounded for (half a chunk of gates at the floor must stay in
// fp32's range); an implementation may cut finer chunks, of a length that divides it.
inline constexpr int kDslaChunk = 64;

// What the slots beside a paged cache hold their rows in.
constexpr DType DslaRowType(DType cache) { return cache == DType::kI8 ? DType::kBF16 : cache; }

// Dimensions of one layer's operator.
struct DslaShape {
  int H = 0, Hkv = 0, D = 0;
  int F = 0;                      // features per state: D or 2D
  int states = 0;                 // 1 or 2
  int window = 0;                 // W
  int sinks = 0;                  // S
  DType kv_dtype = DType::kBF16;  // of k, v, ring and sinks: fp32 or bf16
  float gate_floor = 0;

  int G() const { return H / Hkv; }
  int SF() const { return states * F; }  // key width of the concatenated states
};

// One layer's adapter parameters as the operator reads them, fp32.
struct DslaParams {
  const float* phi_q = nullptr;        // [H, D, D]
  const float* phi_k = nullptr;        // [Hkv, D, D]
  const float* gate_weight = nullptr;  // [states, Hkv, D, F]
  const float* gate_bias = nullptr;    // [states, Hkv, F]
  const float* mix = nullptr;          // [H, states], after the softmax over states
  const float* rope_cos = nullptr;  // [positions, D/2], to undo RoPE (rotate-half pairs d, d + D/2)
  const float* rope_sin = nullptr;  // [positions, D/2]
};

// Layout of one state slot (one layer of one sequence), offsets in bytes from the slot's start,
// each 64-byte aligned.
struct DslaSlotLayout {
  int64_t state = 0;   // fp32 [Hkv, states * F, D]
  int64_t norm = 0;    // fp32 [Hkv, states * F]: z
  int64_t ring_k = 0;  // kv_dtype [Hkv, W, D]: token s at index s % W, rotated
  int64_t ring_v = 0;
  int64_t sink_k = 0;  // kv_dtype [Hkv, S, D]
  int64_t sink_v = 0;
  int64_t bytes = 0;  // of a slot
};
DslaSlotLayout MakeSlotLayout(const DslaShape& shape);

// The state pool: slot i starts at base + i * slot_bytes.
struct DslaStateView {
  std::byte* base = nullptr;
  int64_t slot_bytes = 0;  // >= MakeSlotLayout(shape).bytes
};

struct DslaArgs {
  DslaShape shape;
  DslaParams params;
  RaggedRows rows;
  const int32_t* slots = nullptr;  // [N] state slot of each sequence; two sequences never share one
  DslaStateView states;      // updated in place: afterwards they stand at pos[n] + count(n) tokens
  const float* q = nullptr;  // [T, H, D] rotated, low-rank delta included
  int64_t q_stride = 0;      // floats between rows of q
  const void* k =
      nullptr;  // [T, Hkv, D] dense, kv_dtype: rotated, as a cache of that type would hold it
  const void* v = nullptr;       // [T, Hkv, D] dense, kv_dtype
  const float* claim = nullptr;  // [T, H]: claim . x_t + c; null when W = 0
  float* out = nullptr;          // [T, H, D] dense
};

// Sequences with one row take the recurrent form, longer ones the chunked form, whose chunks are
// cut at absolute positions of the stream of entering tokens and which, on CPUs that multiply bf16,
// rounds the queries and weights of a bf16 window to it. Deterministic; a sequence's result does
// not depend on threads or on the other sequences. A new sequence (pos 0) needs DslaResetSlot
// first; D must be a multiple of 16, at most 256.
void DslaForwardCpu(const ExecContext& ctx, const DslaArgs& args);
// The oracle: the recurrence above in fp64, token by token, scalar (states are read and written as
// fp32).
void DslaForwardRef(const DslaArgs& args);

// A slot as it stands before any token: all its bytes zero.
void DslaResetSlot(const DslaShape& shape, const DslaStateView& states, int32_t slot);

// Builds the states, rings and sinks of N sequences from the first pos[n] tokens of their paged
// caches (rows.row_start is not read): afterwards slot n stands exactly where a DSLA layer that had
// processed those K and V stands, on the CPU bit for bit if it took them in one call of several
// tokens. What the slot held before is overwritten.
struct DslaFoldArgs {
  DslaShape shape;
  DslaParams params;
  RaggedRows rows;
  PageTables tables;
  PagedKvView kv;  // its rows count as rounded to shape.kv_dtype, which is DslaRowType(kv.dtype)
  const int32_t* slots = nullptr;  // [N]
  DslaStateView states;
};
void DslaFoldCpu(const ExecContext& ctx, const DslaFoldArgs& args);
void DslaFoldRef(const DslaFoldArgs& args);

}  // namespace dsla
