// Steps 4 to 7 of sampling.h and the draw, over logits already penalised. Internal to this folder.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ops/sampling/sampling.h"
#include "ops/sampling/sampling_kernels.h"

namespace dsla {

struct Candidate {
  float logit;
  int32_t token;
  double weight;  // exp((logit - max) / temperature)
};

// The ranking: likelier first, equals by lowest id.
inline bool RanksBefore(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

// A logit that at least min(k, V) logits reach.
float TopThreshold(const LogitBlocks& blocks, int64_t k);

// The candidates with logit >= threshold and above -inf, in the order of ids.
std::vector<Candidate> Collect(std::span<const float> logits, const LogitBlocks& blocks,
                               float threshold, double temperature);

// The token at u in [0, 1) of the distribution that params leave.
int32_t Draw(const SamplingParams& params, std::span<const float> logits, const LogitBlocks& blocks,
             double u);

}  // namespace dsla
