// The dual-state operator on an NVIDIA GPU (compute capability 8.0 and later): decode, chunked
// prefill and fold, with the meaning that ops/dsla/dsla.h states.
//
// Memory: every pointer in these structs is a device pointer, those of RaggedRows, PageTables and
// `slots` included. Slots have the layout of MakeSlotLayout, so a slot may be copied between the
// host and the device as bytes; the pool's base is 64-byte aligned.
// Types: q, k, v, out, pages, ring and sinks are bf16; states, norms and all gate arithmetic fp32.
// Weights are rounded to bf16 when they are packed; the un-rotated key that the gates read is split
// into two bf16 terms, so that a gate's error is that of 16 bits of mantissa, not of 8.
// Streams: everything is enqueued on `stream`; nothing is allocated, nothing waits. Calls on
// different streams may run at once if they share neither workspace nor slots.
// Results are run-to-run identical and do not depend on the other sequences of a call.
// Errors: a broken argument is our own bug and aborts (DSLA_CHECK); what the CUDA runtime reports
// at a launch is returned as the value of its cudaError_t, 0 being success.
#pragma once

#include <cstdint>

#include "ops/cuda/stream.h"
#include "ops/dsla/dsla.h"

namespace dsla::cuda {

// What the kernels cannot do of a shape that an adapter may have, on the current device, in a few
// words; null where they can do it all.
DSLA_CUDA_EXPORT const char* Limitation(const DslaShape& shape);

// One layer's adapter in the form that the kernels read.
struct DslaWeights {
  const void* packed = nullptr;     // made by PackWeights
  const float* mix = nullptr;       // [H, states], after the softmax over states
  const float* rope_cos = nullptr;  // [positions, D/2]
  const float* rope_sin = nullptr;  // [positions, D/2]
};

// Packs phi_q, phi_k, gate_weight and gate_bias of `params` (device pointers, shapes as in
// DslaParams) into `packed`, 16-byte aligned, PackedWeightBytes long.
DSLA_CUDA_EXPORT int64_t PackedWeightBytes(const DslaShape& shape);
DSLA_CUDA_EXPORT int PackWeights(const DslaShape& shape, const DslaParams& params, void* packed,
                                 Stream stream);

struct DslaCudaArgs {
  DslaShape shape;        // D 64 or 128; kv_dtype bf16
  DslaSlotLayout layout;  // MakeSlotLayout(shape)
  DslaWeights weights;
  RaggedRows rows;                 // device arrays; decode reads only pos
  int T = 0;                       // rows in all, row_start[N]; in decode T = N
  const int32_t* slots = nullptr;  // [N]; in decode a negative slot marks a padding row
  DslaStateView states;
  const void* q = nullptr;  // [T, H, D] bf16, rotated, low-rank delta included
  const void* k = nullptr;  // [T, Hkv, D] bf16, rotated, as a cache would hold it
  const void* v = nullptr;  // [T, Hkv, D]
  // Elements between rows, multiples of 8, so that q, k, v may lie in the output of one projection.
  int64_t q_stride = 0, k_stride = 0, v_stride = 0;
  const float* claim = nullptr;  // [T, H]; null when W = 0
  void* out = nullptr;           // [T, H, D] bf16, dense, 16-byte aligned
  void* workspace = nullptr;     // 256-byte aligned
  int64_t workspace_bytes = 0;
  // Of prefill: the workspace was last used for the same rows and shape, and has their plan.
  bool has_plan = false;
};

// One new row per sequence: row n belongs to sequence n. One launch, or two where rows are many;
// safe in a CUDA graph.
// Programmatic dependent launch: weights, rows.pos, slots and the slots themselves are read before
// the kernels launched just before have ended, so they must come from a copy, or from a kernel that
// has ended by then. A copy to the device between two steps, as of their tables, sees to that: so
// two calls in a row with nothing but kernels between must have different slots. All else is
// awaited, and nothing is written before. The kernel launched next may start as early.
DSLA_CUDA_EXPORT int64_t DecodeWorkspaceBytes(const DslaShape& shape, int N);
DSLA_CUDA_EXPORT int Decode(const DslaCudaArgs& args, Stream stream);

// Any number of new rows per sequence. The chunks of 64 entering tokens are done in waves that fit
// the workspace; results do not depend on its size. PrefillWorkspaceBytes tells what `chunks`
// chunks per wave take on the current device (at least 1; where sequences are cut into segments, no
// fewer than two of these, 4 to 64 chunks, are done at a time), or with 0 as many as fill a GPU, in
// 512 MiB at most or what 128 chunks take; MaxChunks what all of a call's need.
DSLA_CUDA_EXPORT int MaxChunks(int N, int64_t T);
DSLA_CUDA_EXPORT int64_t PrefillWorkspaceBytes(const DslaShape& shape, int N, int64_t T,
                                               int chunks = 0);
DSLA_CUDA_EXPORT int Prefill(const DslaCudaArgs& args, Stream stream);

// Builds slots from the first pos[n] tokens of paged caches (DslaFoldArgs says what a slot holds
// afterwards). T bounds the sum of pos. The workspace is that of the current device, as are waves:
// on compute capability 9.0 a fold keeps no chunks, and `chunks` of them stand for as many bytes.
struct DslaCudaFoldArgs {
  DslaShape shape;
  DslaSlotLayout layout;
  DslaWeights weights;
  RaggedRows rows;  // pos alone is read
  int64_t T = 0;
  PageTables tables;
  PagedKvView kv;
  const int32_t* slots = nullptr;
  DslaStateView states;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
DSLA_CUDA_EXPORT int64_t FoldWorkspaceBytes(const DslaShape& shape, int N, int64_t T,
                                            int chunks = 0);
DSLA_CUDA_EXPORT int Fold(const DslaCudaFoldArgs& args, Stream stream);

}  // namespace dsla::cuda
