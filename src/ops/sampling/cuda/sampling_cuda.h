// The choice of each row's token on an NVIDIA GPU, so that only a few bytes per row go to the host;
// conventions in ops/cuda/stream.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "ops/cuda/stream.h"
#include "ops/sampling/sampling_params.h"

namespace dsla::cuda {

// Steps 4 to 7 of sampling.h and the draw, of one row, as the kernels take them.
struct RowSampling {
  uint64_t seed = 0;
  int64_t position = 0;           // of the token to be drawn
  double min_p = 0;               // temperature * log(min_p); -inf: off
  float inverse_temperature = 0;  // 0: greedy, and nothing else counts
  float top_p = 1;
  int32_t top_k = 0;  // 0: off
};

inline RowSampling RowSamplingOf(const SamplingParams& params, int64_t position) {
  RowSampling row;
  if (params.temperature < SamplingParams::kGreedyBelow) return row;
  row.seed = params.seed;
  row.position = position;
  row.min_p = params.min_p > 0 ? double{params.temperature} * std::log(double{params.min_p})
                               : -std::numeric_limits<double>::infinity();
  row.inverse_temperature = 1 / params.temperature;
  row.top_p = params.top_p;
  row.top_k = params.top_k;
  return row;
}

// The token and its log-probability under the softmax over all logits as given; broken: 1 if a
// logit is NaN or +inf, or if all are -inf. All as Sampler::Sample says it.
struct RowChoice {
  int32_t token = 0;
  float logprob = 0;
  int32_t broken = 0;
};
// logits: [T, V] fp32, V below 2^19. rows, choices: [T].
DSLA_CUDA_EXPORT int64_t ChooseWorkspaceBytes(int T, int V);
DSLA_CUDA_EXPORT int Choose(const float* logits, int T, int V, const RowSampling* rows,
                            RowChoice* choices, void* workspace, int64_t workspace_bytes,
                            Stream stream);

}  // namespace dsla::cuda
