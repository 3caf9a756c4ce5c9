// Steps 1 to 3 of sampling.h: the few logits of a row that a request changes are changed where they
// lie, each by one thread, which keeps what was there; then those that cannot be become -inf.
#pragma once

#include <cfloat>

#include "ops/sampling/cuda/row_layout.cuh"

namespace dsla::cuda {

// As Sampler does it: no operations are fused, so that the bits are the same.
__device__ __forceinline__ float Edited(const RowSampling& row, const LogitEdit& edit) {
  if (edit.given == -kInfinity) return edit.given;
  const auto finite = [](float l) { return fminf(fmaxf(l, -FLT_MAX), FLT_MAX); };
  float l = edit.given;
  if (edit.outputs >= 0)
    l = l > 0 ? __fdiv_rn(l, row.repetition_penalty) : __fmul_rn(l, row.repetition_penalty);
  if (edit.outputs > 0) {
    l = __fsub_rn(l, row.presence_penalty);
    l = __fsub_rn(l, __fmul_rn(row.frequency_penalty, static_cast<float>(edit.outputs)));
  }
  return finite(__fadd_rn(finite(l), edit.bias));
}

// Of the tokens in [begin, begin + kPart), below V. All threads of a block call it together;
// afterwards they see the changed logits.
__device__ __forceinline__ void EditPart(const RowSampling& row, LogitEdit* all, float* logits,
                                         int V, int begin) {
  LogitEdit* const edits = all + row.first_edit;
#pragma unroll 1
  for (int i = threadIdx.x; i < row.edits; i += kPartThreads) {
    LogitEdit edit = edits[i];
    if (edit.token - begin < 0 || edit.token - begin >= kPart) continue;
    edits[i].given = edit.given = logits[edit.token];
    logits[edit.token] = Edited(row, edit);
  }
  __syncthreads();  // a token may be among both
  const auto* const ruled_out = reinterpret_cast<const int32_t*>(edits + row.edits);
#pragma unroll 1
  for (int i = threadIdx.x; i < row.ruled_out; i += kPartThreads) {
    const int token = ruled_out[i];
    if (token - begin >= 0 && token - begin < kPart) logits[token] = -kInfinity;
  }
  if (row.allowed > 0) {
    const int32_t* const allowed = ruled_out + row.ruled_out;
    const int end = min(begin + kPart, V);
#pragma unroll 1
    for (int token = begin + threadIdx.x; token < end; token += kPartThreads)
      if ((allowed[token / 32] >> token % 32 & 1) == 0) logits[token] = -kInfinity;
  }
  __syncthreads();
}

// Sets `logit`, shared by the block of kThreads, to what the logit of `token` was if it is among
// the edits. What is ruled out is never asked for.
template <int kThreads>
__device__ __forceinline__ void FindGiven(const RowSampling& row, const LogitEdit* all, int token,
                                          float& logit) {
  const LogitEdit* const edits = all + row.first_edit;
#pragma unroll 4
  for (int i = threadIdx.x; i < row.edits; i += kThreads)
    if (edits[i].token == token) logit = edits[i].given;
}

}  // namespace dsla::cuda
