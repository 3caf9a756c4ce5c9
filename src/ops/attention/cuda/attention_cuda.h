// Causal softmax attention over a paged bf16 cache on an NVIDIA GPU (compute capability 8.0 and
// later), with the meaning that ops/attention/attention.h states; conventions in
// ops/cuda/stream.h. K and V of the new rows are already in the pages.
#pragma once

#include <cstdint>

#include "ops/cuda/stream.h"
#include "ops/views.h"

namespace dsla::cuda {

// One query row per sequence: row n attends to the tokens [max(0, t - sliding_window + 1), t],
// t = pos[n]. What is read from device memory may change between replays of a CUDA graph: pos,
// tables and *rows.
struct DecodeAttentionArgs {
  int N = 0;                      // rows that the grid has room for
  const int32_t* rows = nullptr;  // [1] rows of this call, at most N; the others leave at once
  const int32_t* pos = nullptr;   // [N]
  PageTables tables;              // page_start: [N + 1]
  PagedKvView kv;                 // bf16, D 64 or 128
  int H = 0;
  float scale = 0;
  int sliding_window = 0;   // 0 = all
  const void* q = nullptr;  // [N, H, D] bf16
  int64_t q_stride = 0;     // elements between rows, a multiple of 8
  void* out = nullptr;      // [N, H, D] bf16, dense
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
// Does not depend on the lengths, so that a graph's launches fit any, and does for fewer rows, too.
DSLA_CUDA_EXPORT int64_t DecodeAttentionWorkspaceBytes(int N, int H, int Hkv, int D);
DSLA_CUDA_EXPORT int DecodeAttention(const DecodeAttentionArgs& args, Stream stream);

// Which kernels prefill. kHopper needs compute capability 9.0 (PrefillOnHopper) and no sliding
// window. kChoose takes it there for sequences of 128 new rows on in the mean; with cached tokens
// only if the rows also fill the device.
enum class PrefillForm { kChoose, kFa2, kHopper };
DSLA_CUDA_EXPORT bool PrefillOnHopper();  // whether the current device can run kHopper

// Any number of rows per sequence. The plan depends on rows alone, so that all layers which have
// the same sequences share one.
struct PrefillAttentionArgs {
  RaggedRows rows;                          // device arrays
  const int32_t* host_row_start = nullptr;  // [N + 1] the same on the host
  const int32_t* host_pos = nullptr;        // [N]
  PageTables tables;
  PagedKvView kv;  // bf16, D 64 or 128
  int H = 0;
  float scale = 0;
  int sliding_window = 0;
  const void* q = nullptr;  // [T, H, D] bf16
  int64_t q_stride = 0;
  // Optional: K and V of the new rows, [T, Hkv, D] bf16, the same values as in the pages. kHopper
  // reads them in place of the pages, which is faster, if there is one sequence (N = 1) and it
  // begins at position 0.
  const void* k = nullptr;
  const void* v = nullptr;
  int64_t k_stride = 0;  // elements between rows, a multiple of 8
  int64_t v_stride = 0;
  void* out = nullptr;  // [T, H, D] bf16, dense
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
  PrefillForm form = PrefillForm::kChoose;
};
DSLA_CUDA_EXPORT int64_t PrefillAttentionWorkspaceBytes(int N, int64_t T, int H, int Hkv, int D);
// Plans on the host, copies what the kernel needs of the plan into the workspace, and launches.
// new_plan false: the rows are those of the last call with this workspace, whose plan is used
// again.
DSLA_CUDA_EXPORT int PrefillAttention(const PrefillAttentionArgs& args, bool new_plan,
                                      Stream stream);

}  // namespace dsla::cuda
