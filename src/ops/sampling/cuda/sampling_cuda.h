// The choice of each row's token on an NVIDIA GPU, so that only a few bytes per row go to the host;
// conventions in ops/cuda/stream.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "ops/cuda/stream.h"
#include "ops/sampling/sampling_params.h"

namespace dsla::cuda {

inline constexpr int kMaxVocabulary = 1 << 19;  // vocabularies are below it

// The most of the likeliest tokens that are told of a row.
inline constexpr int kMostTop = 20;

// What sampling.h does to one row, as the kernels take it.
struct RowSampling {
  uint64_t seed = 0;
  int64_t position = 0;           // of the token to be drawn
  double min_p = 0;               // temperature * log(min_p); -inf: off
  float inverse_temperature = 0;  // 0: greedy, and nothing else counts
  float top_p = 1;
  int32_t top_k = 0;  // 0: off
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  int32_t first_edit = 0;  // of the row's in the array of all rows' edits
  int32_t edits = 0;
  int32_t ruled_out = 0;  // tokens; as int32 behind the row's edits
  int32_t allowed = 0;    // words of the mask of tokens that can be, behind those; 0: all can
  int32_t padding = 0;
  int32_t top = 0;  // how many of the likeliest to tell, at most kMostTop
};

inline RowSampling RowSamplingOf(const SamplingParams& params, int64_t position) {
  RowSampling row;
  row.repetition_penalty = params.repetition_penalty;
  row.presence_penalty = params.presence_penalty;
  row.frequency_penalty = params.frequency_penalty;
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

// The elements of the array of all rows' edits that one row's take.
inline int64_t EditElements(std::span<const LogitEdit> edits, std::span<const int32_t> ruled_out,
                            std::span<const uint32_t> allowed) {
  constexpr size_t kEach = sizeof(LogitEdit) / sizeof(int32_t);
  const size_t words = ruled_out.size() + allowed.size();
  return static_cast<int64_t>(edits.size() + (words + kEach - 1) / kEach);
}

// Puts a row's edits, what is ruled out and what is allowed from element `first` of `all` on.
// Tokens: each once among the edits.
inline void PackEdits(std::span<const LogitEdit> edits, std::span<const int32_t> ruled_out,
                      std::span<const uint32_t> allowed, LogitEdit* all, int64_t first,
                      RowSampling& row) {
  row.first_edit = static_cast<int32_t>(first);
  row.edits = static_cast<int32_t>(edits.size());
  row.ruled_out = static_cast<int32_t>(ruled_out.size());
  row.allowed = static_cast<int32_t>(allowed.size());
  LogitEdit* const behind = std::copy(edits.begin(), edits.end(), all + first);
  int32_t* const mask =
      std::copy(ruled_out.begin(), ruled_out.end(), reinterpret_cast<int32_t*>(behind));
  std::copy(allowed.begin(), allowed.end(), mask);
}

// The token and its log-probability under the softmax over all logits as given; broken: 1 if a
// logit is NaN or +inf, or if all are -inf, be it after step 3. All as Sampler::Sample says it.
struct RowChoice {
  int32_t token = 0;
  float logprob = 0;
  int32_t broken = 0;
};

struct ChooseArgs {
  float* logits =
      nullptr;  // [T, V] fp32, V below kMaxVocabulary; those of rows with edits are changed
  int T = 0, V = 0;
  const RowSampling* rows = nullptr;  // [T]
  LogitEdit* edits = nullptr;         // all rows'; null if none has any. `given` is written
  RowChoice* choices = nullptr;       // [T]
  // [T, kMostTop], null if no row asks: the likeliest under the softmax over all logits as given,
  // likeliest first, equals by lowest id; token -1 where fewer than `top` are above -inf. Rows that
  // are broken or do not ask are left as they are.
  TokenLogprob* top = nullptr;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
DSLA_CUDA_EXPORT int64_t ChooseWorkspaceBytes(int T, int V);
DSLA_CUDA_EXPORT int Choose(const ChooseArgs& args, Stream stream);

}  // namespace dsla::cuda
