// Vectorised passes over the V logits. Internal to this folder.
#pragma once

#include <cstdint>
#include <span>

namespace dsla {

// The logits cut into at most kMaxBlocks blocks, with the largest logit of each. The k-th largest
// of the block maxima is at most the k-th largest logit, as k blocks hold one such logit each:
// whoever looks for the k largest need only look at logits from there on, in the blocks that
// reach it.
struct LogitBlocks {
  static constexpr int kMaxBlocks = 1024;  // small enough for the stack

  int64_t size = 0;  // logits per block, the last may be shorter
  int count = 0;
  float max = 0;         // of all
  bool has_nan = false;  // then the maxima mean nothing
  float block_max[kMaxBlocks];
};

void FindBlocks(std::span<const float> logits, LogitBlocks& blocks);

// sums[b] = sum over block b of exp((l - max) * inverse_temperature) where l >= threshold. Returns
// their sum. The terms are fp32, the sums fp64.
double SumExp(std::span<const float> logits, const LogitBlocks& blocks, float inverse_temperature,
              float threshold, double* sums);

}  // namespace dsla
