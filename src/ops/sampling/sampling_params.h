// What sampling.h is asked for; apart from it for those that cannot include its errors, as nvcc.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace dsla {

struct SamplingParams {
  // Below it exp(l / temperature) of the second token is nothing next to the first's.
  static constexpr float kGreedyBelow = 1e-5f;

  float temperature = 1;                                   // [0, 100]; below kGreedyBelow is greedy
  int32_t top_k = 0;                                       // >= 0; 0 = off
  float top_p = 1;                                         // (0, 1]; 1 = off
  float min_p = 0;                                         // [0, 1]; 0 = off
  float repetition_penalty = 1;                            // (0, 100]; 1 = off
  float presence_penalty = 0;                              // [-2, 2]
  float frequency_penalty = 0;                             // [-2, 2]
  std::vector<std::pair<int32_t, float>> logit_bias = {};  // distinct ids in [0, V), [-100, 100]
  uint64_t seed = 0;
};

// What steps 1 to 3 of sampling.h do to the logit of one token.
struct alignas(16) LogitEdit {
  static constexpr int32_t kUnseen = -1;

  int32_t token = 0;
  int32_t outputs = kUnseen;  // times in the output, or kUnseen: in the prompt neither
  float bias = 0;
  float given = 0;  // room for the logit as it was
};

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0;  // natural log of the softmax over the logits as given, before steps 1 to 7
};

}  // namespace dsla
