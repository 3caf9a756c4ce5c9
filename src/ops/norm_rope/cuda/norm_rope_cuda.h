// The elementwise steps of a decoder layer on an NVIDIA GPU; conventions in ops/cuda/stream.h. Rows
// are the new tokens of a step, T of them; all statistics are computed in fp32. Dimensions of rows
// are multiples of 8, D an even number.
//
// The kernel launched next may start before those before these have ended (programmatic dependent
// launch); until it has waited it must read only constants, as in ops/linear/cuda/linear_cuda.h. So
// does RopeKv with its tables and angles: they must come from a copy, or from a kernel that has
// ended by then.
#pragma once

#include <cstdint>

#include "ops/cuda/stream.h"
#include "ops/views.h"

namespace dsla::cuda {

// hidden[t] = embedding[tokens[t]], or where feed[t] is not negative that of chosen[feed[t] *
// chosen_stride]; zeros where the token is negative.
struct EmbedRowsArgs {
  const int32_t* tokens = nullptr;  // [T]
  const int32_t* feed = nullptr;    // [T], or null: all of `tokens`
  const int32_t* chosen = nullptr;
  int chosen_stride = 1;            // elements
  const void* embedding = nullptr;  // [V, C]: bf16, or of 8 bits, a PackedShape's
  int bits = 16;
  int T = 0, C = 0;
  float* hidden = nullptr;  // [T, C]
};
DSLA_CUDA_EXPORT int EmbedRows(const EmbedRowsArgs& args, Stream stream);

inline constexpr int kMaxNormWidth = 16384;  // C of AddRmsNorm, at most

// hidden[t] += delta[t] + bias, then normed[t] = hidden[t] / rms(hidden[t]) * weight.
struct AddRmsNormArgs {
  float* hidden = nullptr;        // [T, C] the residual stream
  const void* delta = nullptr;    // [T, C] bf16, or null: nothing is added
  const float* bias = nullptr;    // [C], or null
  const float* weight = nullptr;  // [C]
  float eps = 0;
  int T = 0, C = 0;
  const int32_t* rows = nullptr;  // [T] or null: normed[t] is of hidden's row rows[t], which does
                                  // not change (delta's too is then read at rows[t])
  void* normed = nullptr;         // [T, C] bf16
};
DSLA_CUDA_EXPORT int AddRmsNorm(const AddRmsNormArgs& args, Stream stream);

// out[t, j] = silu(gate_up[t, j]) * gate_up[t, ffn + j]. gate_up: [T, 2 ffn], out: [T, ffn], bf16.
DSLA_CUDA_EXPORT int SiluMul(const void* gate_up, int T, int ffn, void* out, Stream stream);

// Of each row of qkv: adds the bias, normalises each head of q and k (Qwen3), rotates them, and
// writes them back rounded to bf16; K and V of the first *softmax_rows rows also go to their pages.
struct RopeKvArgs {
  void* qkv = nullptr;              // [T, (H + 2 Hkv) D] bf16, q then k then v, in place
  const float* bias = nullptr;      // [(H + 2 Hkv) D] or null
  const float* q_norm = nullptr;    // [D] or null
  const float* k_norm = nullptr;    // [D] or null
  float eps = 0;                    // of the two norms
  const float* rope_cos = nullptr;  // [positions, D/2]
  const float* rope_sin = nullptr;  // [positions, D/2]
  const int32_t* positions =
      nullptr;  // [T]; a negative one marks a padding row: nothing is written
  int T = 0, H = 0, Hkv = 0, D = 0;
  const int32_t* softmax_rows = nullptr;  // [1] rows [0, *softmax_rows) write to pages
  const int32_t* sequence = nullptr;      // [T] whose page table row t uses
  PageTables tables;
  PagedKvView kv;
};
DSLA_CUDA_EXPORT int RopeKv(const RopeKvArgs& args, Stream stream);

}  // namespace dsla::cuda
