// Sampling: from the logits of one position to one token.
//
// Order of the steps, that of transformers and vLLM; V logits l, fp32:
//   1. repetition penalty r over the distinct tokens of prompt and output: l > 0 ? l / r : l * r
//   2. presence p and frequency f over the output's tokens (OpenAI): l -= p; l -= f * count
//   3. logit bias: l += b
//   4. temperature: probabilities proportional to exp(l / temperature); 0 takes the largest l
//   5. top-k: the k likeliest
//   6. top-p: of those, renormalised, the fewest likeliest whose probabilities reach top_p
//   7. min-p: those with at least min_p times the largest probability
// Steps 5 to 7 keep the first tokens of one ranking, by logit and among equals by lowest id, and
// always at least one; the greedy choice is the first of it. Steps 1 to 3 saturate at the finite
// range, so that a finite logit stays finite; -inf (a token that is ruled out) stays -inf. Tokens
// that the caller rules out for one draw, by name or by a mask of those allowed, get -inf after
// them.
//
// The draw inverts the cumulative distribution in the order of ids at u in [0, 1), 53 bits of
// Philox4x32-10 with the seed as key and the position as counter (philox.h): it depends on (seed,
// position) alone, never on the batch, threads or earlier draws.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "ops/sampling/sampling_params.h"

namespace dsla {

// Error: kInvalidArgument, naming the field, its value and the range.
Status Validate(const SamplingParams& params, int64_t V);

// One per request. Not thread-safe; different samplers are independent. Holds the tokens whose
// logits steps 1 to 3 change, and next to nothing else.
class Sampler {
 public:
  using Choice = TokenLogprob;

  // `params` must be valid for V.
  Sampler(const SamplingParams& params, int64_t V);

  // What steps 1 to 3 change for the next token, each token once, until AddPrompt or Accept.
  std::span<const LogitEdit> edits() const { return edits_; }
  // Whether Accept changes the edits: those of a token are not known before all tokens before it.
  bool counts_output() const { return penalties_; }

  // Tokens that count for the repetition penalty alone.
  void AddPrompt(std::span<const int32_t> tokens);

  // logits: [V]; changed while it runs, the same afterwards. position: of the token to be drawn.
  // ruled_out: tokens that cannot be. allowed: [ceil(V / 32)], bit i % 32 of word i / 32 says
  // whether token i can be; empty: all. Errors: kInternal if a logit is NaN or +inf: the model is
  // broken; or if all are -inf, be it after step 3.
  Expected<Choice> Sample(std::span<float> logits, int64_t position,
                          std::span<const int32_t> ruled_out = {},
                          std::span<const uint32_t> allowed = {}) const;

  // The token that became part of the output: usually, but not always, the one chosen.
  void Accept(int32_t token);

 private:
  LogitEdit& EditOf(int32_t token);
  float Edited(const LogitEdit& edit, float logit) const;
  // Returns the logits that were there, of the edits and then of those ruled out.
  std::vector<float> Modify(std::span<float> logits, std::span<const int32_t> ruled_out) const;
  void Restore(std::span<float> logits, std::span<const int32_t> ruled_out,
               std::span<const float> before) const;

  SamplingParams params_;
  int64_t V_;
  bool penalties_;
  std::vector<LogitEdit> edits_;
  std::unordered_map<int32_t, size_t> index_;  // token -> place in edits_
};

// The n likeliest tokens under the softmax over the logits as given, likeliest first, equals by
// lowest id; fewer where fewer than n logits are above -inf. Errors as Sampler::Sample.
Expected<std::vector<Sampler::Choice>> TopLogprobs(std::span<const float> logits, int n);

// The token and its log-probability, the same value as TopLogprobs and Sampler::Sample give it.
Expected<Sampler::Choice> LogprobOf(std::span<const float> logits, int32_t token);

// The oracle: the steps above with full sorts, in fp64 from step 4 on. margin, where not null, is
// how far (as a share of the probability) the nearest decision was from falling the other way.
Expected<Sampler::Choice> SampleRef(const SamplingParams& params, std::span<const int32_t> prompt,
                                    std::span<const int32_t> output, std::span<const float> logits,
                                    int64_t position, double* margin = nullptr,
                                    std::span<const int32_t> ruled_out = {},
                                    std::span<const uint32_t> allowed = {});

}  // namespace dsla
