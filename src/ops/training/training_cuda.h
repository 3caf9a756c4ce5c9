// Kernels of the training form on a GPU: what stands between the batched matrix products of a DSLA
// layer's forward and backward pass (the chunk form of dsla_autograd.cc), and the elementwise parts
// of the model around it. A table of functions, so that the trainer finds them in a library that is
// loaded where there is a GPU.
//
// Conventions: ops/cuda/stream.h. bf16 arrays are void*. Arrays are dense in the order given unless
// strides are. C is the chunk, 64 tokens; G = H / Hkv; K = states F, the key width; E = D + 8, the
// columns of the values [v, 1, 0 ..]. Every function returns a cudaError_t as int.
#pragma once

#include <cstdint>

#include "ops/cuda/stream.h"

namespace dsla::cuda {

inline constexpr int kTrainingChunk = 64;
inline constexpr int kTrainingMaxSinks = 8;

// A layer's pass. Keys enter the states `window` tokens late: both streams are laid out by time, in
// `chunks` chunks that begin where the first key enters, and end together.
struct TrainingShape {
  int B, T, TK, H, Hkv, D, F, states;
  int window, sinks;
  int chunks, query_chunks;  // the last query_chunks chunks have queries
  int key_at, query_at;      // where key 0 and query 0 would stand; queries before 0 see no state
  int first_key, last_key;   // keys first_key .. last_key - 1 enter
  float gate_floor;

  constexpr int G() const { return H / Hkv; }
  constexpr int K() const { return states * F; }
  constexpr int E() const { return D + 8; }
};

// Whether the kernels are written for it: D 64 or 128, F = D or 2 D, 1 or 2 states, at most 8
// sinks.
constexpr bool TrainingTakes(int D, int F, int states, int sinks) {
  return (D == 64 || D == 128) && (F == D || F == 2 * D) && (states == 1 || states == 2) &&
         sinks <= kTrainingMaxSinks;
}

// What the forward pass makes of a layer's projections and the backward pass reads again. n is the
// chunk, over query_chunks where there is a G.
struct TrainingOperands {
  float* a;              // [n, B, Hkv, C, K] natural logs of the gates, 0 where no key enters
  void *phi_k, *phi_q;   // bf16 [n, B, Hkv, C, F], [n, B, Hkv, G, C, F]
  void *k, *q;           // K~, Q~: bf16 [n, B, Hkv, C, K], [n, B, Hkv, G C, K]
  void* ve;              // bf16 [n, B, Hkv, C, E]
  float *enter, *leave;  // e^R, e^{L-R} [n, B, Hkv, K]
};

struct TrainingPrepareArgs {
  TrainingShape shape;
  const float *y_q, *y_k;  // [H, B T, D], [Hkv, B TK, D]: what the feature maps' softmax is of
  const float* z;          // [Hkv, B TK, K]: gate logits without bias
  const float* bias;       // [Hkv, K]
  const float* mix;        // [H, states]
  const void* v;           // bf16 [B, TK, Hkv, D] with strides in elements, the last one 1
  int64_t v_batch, v_row, v_head;
  TrainingOperands out;
};

// The states through the chunks: products K~^T Ve on input, P = e^R S + K~^T Ve on output.
struct TrainingScanArgs {
  TrainingShape shape;
  const float *enter, *leave;
  float* products;  // [n, B, Hkv, K, E]
  void* entered;    // bf16, the same shape: e^R S
};

struct TrainingScanBackwardArgs {
  TrainingShape shape;
  const float *enter, *leave, *products;
  const float* from_queries;  // Q~^T dO [query_chunks, B, Hkv, K, E]
  void* d_products;           // dP, bf16 [n, B, Hkv, K, E]
  float* d_sums;              // sum over E of P dP [n, B, Hkv, K]
};

// x [count, rows, C] bf16: zeroes what stands after a row's own time, row r being at time r % C.
struct TrainingCausalArgs {
  void* x;
  int64_t count;
  int rows;
};

// The states' part, the window's (of FlashAttention, without sinks) and the sinks, joined.
struct TrainingMergeArgs {
  TrainingShape shape;
  const float* states;    // [query_chunks, B, Hkv, G C, E]: numerator, denominator
  const void *q, *k, *v;  // bf16 [B, T, H, D], dense; the sinks' rows of k and v with strides
  int64_t k_batch, k_row, k_head, v_batch, v_row, v_head;
  const float* claim;       // [B, T, H]; with window 0 neither it nor what follows is read
  const void* window_out;   // bf16 [B, T, H, D]
  const float* window_lse;  // [B, H, T]
  void* joined;             // bf16 [B, T, H, D]: window and sinks; written
  float* joined_lse;        // [B, H, T]; written
  void* out;                // bf16 [B, T, H, D]
};

struct TrainingMergeBackwardArgs {
  TrainingShape shape;
  const float* states;
  const void *q, *k, *v;
  int64_t k_batch, k_row, k_head, v_batch, v_row, v_head;
  const float* claim;
  const void* joined;
  const float* joined_lse;
  const void* d_out;  // bf16 [B, T, H, D]
  void* d_states;     // bf16 [query_chunks, B, Hkv, G C, E]
  float* d_claim;     // [B, T, H]
  void* d_window;     // bf16 [B, T, H, D]: gradient of the joined output
  void* shifted;      // bf16 [B, T, H, D]: the output whose product with d_window is what
                      // FlashAttention's backward pass subtracts, the gradient of lse included
  void* d_q;          // bf16 [B, T, H, D]: through the sinks' scores; null if there are none
  float* d_sinks;     // [blocks, B, Hkv, sinks, 2 D]: of keys, of values, to be summed over
                      // TrainingMergeBlocks(shape) blocks; null: not wanted
};
constexpr int TrainingFirstRow(const TrainingShape& s) {
  return s.query_at >= 0 ? s.query_at / kTrainingChunk * kTrainingChunk : s.query_at;
}
constexpr int TrainingMergeBlocks(const TrainingShape& s) {
  return (s.chunks * kTrainingChunk - TrainingFirstRow(s) + kTrainingChunk - 1) / kTrainingChunk;
}

struct TrainingGradientArgs {
  TrainingShape shape;
  TrainingOperands in;
  const float* mix;
  const float *d_q1, *d_q2;  // [query_chunks, B, Hkv, G C, K]: dQ~ is their sum
  const float *d_k1, *d_k2;  // [query_chunks, B, Hkv, C, K] (of scores), [n, B, Hkv, C, K]
  const float* d_sums;
  void *d_y_q, *d_y_k;  // bf16 [H, B T, D], [Hkv, B TK, D]; rows of no chunk are left alone
  float* d_z;           // [Hkv, B TK, K]; likewise
  float* d_mix;         // [query_chunks, B, Hkv, G, states], to be summed over the first two
};

// Rotates the pairs (d, d + D/2) of x [B, T, h, D] (strides in elements, the last one 1) to y,
// dense. cos, sin [T, D/2].
struct TrainingRopeArgs {
  const void* x;
  int64_t x_batch, x_row, x_head;
  const float *cos, *sin;
  void* y;
  int B, T, h, D;
  bool inverse;
};

// y = silu(g) u; gate_up [rows, 2 width] = [g, u], y [rows, width], all bf16, width a multiple
// of 8.
struct TrainingSwiGluArgs {
  const void* gate_up;
  const void* d_y;  // backward
  void* y;          // backward: gradient of gate_up
  int64_t rows;
  int width;
};

// KL(teacher || student) of each row's distributions; the student's logits are replaced by the
// gradient weight (p_s - p_t). V a multiple of 8.
struct TrainingKlArgs {
  const void* teacher;  // bf16 [rows, V]
  void* student;        // bf16 [rows, V]
  const float* weight;  // [rows]
  float* kl;            // [rows]
  int64_t rows;
  int V;
};

// Sums over counted rows of |y - o|^2 and |o|^2, in TrainingErrorBlocks parts; gradient = 2 scale
// (y - o) counted. y, o bf16 [rows, width], width a multiple of 8.
inline constexpr int kTrainingErrorBlocks = 512;
struct TrainingErrorArgs {
  const void *y, *o;
  const float* counted;  // [rows] or null: all
  float* parts;          // [kTrainingErrorBlocks, 2]
  const float* scale;    // [1]
  void* gradient;
  int64_t rows;
  int width;
};

struct TrainingKernels {
  int (*prepare)(const TrainingPrepareArgs&, Stream);
  int (*scan)(const TrainingScanArgs&, Stream);
  int (*causal)(const TrainingCausalArgs&, Stream);
  int (*merge)(const TrainingMergeArgs&, Stream);
  int (*merge_backward)(const TrainingMergeBackwardArgs&, Stream);
  int (*scan_backward)(const TrainingScanBackwardArgs&, Stream);
  int (*gradients)(const TrainingGradientArgs&, Stream);
  int (*rope)(const TrainingRopeArgs&, Stream);
  int (*swiglu)(const TrainingSwiGluArgs&, Stream);
  int (*swiglu_backward)(const TrainingSwiGluArgs&, Stream);
  int (*kl)(const TrainingKlArgs&, Stream);
  int (*error_sums)(const TrainingErrorArgs&, Stream);
  int (*error_gradient)(const TrainingErrorArgs&, Stream);
};

inline constexpr char kTrainingKernelsSymbol[] = "DslaTrainingKernels";

}  // namespace dsla::cuda

extern "C" DSLA_CUDA_EXPORT const dsla::cuda::TrainingKernels* DslaTrainingKernels();
