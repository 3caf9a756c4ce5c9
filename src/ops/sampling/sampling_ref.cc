#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <set>

#include "ops/sampling/philox.h"
#include "ops/sampling/sampling.h"

namespace dsla {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float Finite(double logit) {
  constexpr float kMax = std::numeric_limits<float>::max();
  return static_cast<float>(std::clamp<double>(logit, -kMax, kMax));
}

// Steps 1 to 3, and what is ruled out.
std::vector<float> Modified(const SamplingParams& params, std::span<const int32_t> prompt,
                            std::span<const int32_t> output, std::span<const float> logits,
                            std::span<const int32_t> ruled_out, std::span<const uint32_t> allowed) {
  std::vector<float> l(logits.begin(), logits.end());
  std::set<int32_t> seen(prompt.begin(), prompt.end());
  seen.insert(output.begin(), output.end());
  std::map<int32_t, int> counts;
  for (const int32_t token : output) ++counts[token];
  for (size_t i = 0; i < l.size(); ++i) {
    if (l[i] == -kInfinity) continue;
    const int32_t token = static_cast<int32_t>(i);
    float x = l[i];
    if (seen.count(token) > 0)
      x = x > 0 ? x / params.repetition_penalty : x * params.repetition_penalty;
    if (counts.count(token) > 0) {
      x = x - params.presence_penalty;
      x = x - params.frequency_penalty * static_cast<float>(counts[token]);
    }
    x = Finite(x);
    for (const auto& [id, bias] : params.logit_bias)
      if (id == token) x = Finite(x + bias);
    l[i] = x;
  }
  for (const int32_t token : ruled_out) l[static_cast<size_t>(token)] = -kInfinity;
  for (size_t i = 0; i < l.size() && !allowed.empty(); ++i)
    if ((allowed[i / 32] >> i % 32 & 1) == 0) l[i] = -kInfinity;
  return l;
}

}  // namespace

Expected<Sampler::Choice> SampleRef(const SamplingParams& params, std::span<const int32_t> prompt,
                                    std::span<const int32_t> output, std::span<const float> logits,
                                    int64_t position, double* margin,
                                    std::span<const int32_t> ruled_out,
                                    std::span<const uint32_t> allowed) {
  double total = 0, given_max = -kInfinity;
  for (const float l : logits) {
    if (std::isnan(l) || l == kInfinity)
      return Error(StatusCode::kInternal, "a logit is NaN or inf");
    given_max = std::max<double>(given_max, l);
  }
  if (given_max == -kInfinity) return Error(StatusCode::kInternal, "all logits are -inf");
  for (const float l : logits) total += std::exp(l - given_max);
  const auto choice = [&](int32_t token) {
    const double logprob = logits[static_cast<size_t>(token)] - given_max - std::log(total);
    return Sampler::Choice{token, static_cast<float>(logprob)};
  };

  const std::vector<float> l = Modified(params, prompt, output, logits, ruled_out, allowed);
  std::vector<int32_t> ranked(l.size());
  std::iota(ranked.begin(), ranked.end(), 0);
  const auto logit = [&](int32_t token) { return l[static_cast<size_t>(token)]; };
  std::stable_sort(ranked.begin(), ranked.end(),
                   [&](int32_t a, int32_t b) { return logit(a) > logit(b); });
  if (logit(ranked[0]) == -kInfinity) return Error(StatusCode::kInternal, "all logits are -inf");
  double nearest = 1;
  if (margin != nullptr) *margin = nearest;
  if (params.temperature < 1e-5f) return choice(ranked[0]);

  const double max = logit(ranked[0]), temperature = params.temperature;
  const auto weight = [&](int32_t token) { return std::exp((logit(token) - max) / temperature); };
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < ranked.size())
    ranked.resize(static_cast<size_t>(params.top_k));
  if (params.top_p < 1) {
    double mass = 0, cumulative = 0;
    for (const int32_t token : ranked) mass += weight(token);
    size_t kept = 0;
    while (kept < ranked.size() && cumulative < params.top_p * mass) {
      cumulative += weight(ranked[kept++]);
      nearest = std::min(nearest, std::abs(cumulative / mass - params.top_p));
    }
    ranked.resize(kept);
  }
  if (params.min_p > 0) {
    for (const int32_t token : ranked)
      if (token != ranked[0])
        nearest = std::min(nearest, std::abs(weight(token) - params.min_p) / params.min_p);
    std::erase_if(ranked, [&](int32_t token) { return weight(token) < params.min_p; });
  }

  std::sort(ranked.begin(), ranked.end());
  double mass = 0, cumulative = 0;
  for (const int32_t token : ranked) mass += weight(token);
  const double target = UniformAt(params.seed, position) * mass;
  int32_t drawn = -1;
  for (const int32_t token : ranked) {
    cumulative += weight(token);
    // The ends, at 0 and 1, cannot be crossed.
    if (token != ranked.back()) nearest = std::min(nearest, std::abs(cumulative - target) / mass);
    if (drawn < 0 && target < cumulative) drawn = token;
  }
  if (margin != nullptr) *margin = nearest;
  return choice(drawn < 0 ? ranked.back() : drawn);
}

}  // namespace dsla
