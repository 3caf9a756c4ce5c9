// The greedy choice of each row on an NVIDIA GPU, so that only a few bytes per row go to the host;
// conventions in ops/cuda/stream.h.
#pragma once

#include <cstdint>

#include "ops/cuda/stream.h"

namespace dsla::cuda {

// The largest logit's token, the lowest id among equals; its log-probability under the softmax over
// all logits; broken: 1 if a logit is NaN or +inf, or if all are -inf (as Sampler::Sample says).
struct GreedyChoice {
  int32_t token = 0;
  float logprob = 0;
  int32_t broken = 0;
};
// logits: [T, V] fp32. choices: [T].
DSLA_CUDA_EXPORT int64_t GreedyWorkspaceBytes(int T, int V);
DSLA_CUDA_EXPORT int Greedy(const float* logits, int T, int V, GreedyChoice* choices,
                            void* workspace, int64_t workspace_bytes, Stream stream);

}  // namespace dsla::cuda
