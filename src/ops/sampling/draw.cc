#include "ops/sampling/draw.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "base/check.h"

namespace dsla {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The least logit that min-p keeps.
float MinPThreshold(const SamplingParams& params, float max) {
  if (params.min_p <= 0) return -kInfinity;
  const double least =
      max + static_cast<double>(params.temperature) * std::log(static_cast<double>(params.min_p));
  const float rounded = static_cast<float>(least);
  return rounded < least ? std::nextafter(rounded, kInfinity) : rounded;
}

double Weight(float logit, float max, double temperature) {
  return std::exp((static_cast<double>(logit) - max) / temperature);
}

double Mass(std::span<const Candidate> candidates) {
  double mass = 0;
  for (const Candidate& c : candidates) mass += c.weight;
  return mass;
}

// No ranking needed: block sums find the block, its own terms the token.
int32_t DrawFromAll(const SamplingParams& params, std::span<const float> logits,
                    const LogitBlocks& blocks, double u) {
  const float threshold = MinPThreshold(params, blocks.max);
  double sums[LogitBlocks::kMaxBlocks];
  const double total = SumExp(logits, blocks, 1 / params.temperature, threshold, sums);
  double left = u * total;
  int block = -1;
  for (int b = 0; b < blocks.count; ++b) {
    if (sums[b] <= 0) continue;
    block = b;  // the last block with any mass, should rounding leave some over
    if (left < sums[b]) break;
    left -= sums[b];
  }
  DSLA_CHECK(block >= 0);
  const size_t begin = static_cast<size_t>(block * blocks.size);
  const size_t end = std::min(begin + static_cast<size_t>(blocks.size), logits.size());
  int32_t token = -1;
  for (size_t i = begin; i < end; ++i) {
    if (!(logits[i] >= threshold)) continue;
    const double weight = Weight(logits[i], blocks.max, params.temperature);
    if (weight <= 0) continue;
    token = static_cast<int32_t>(i);
    if (left < weight) break;
    left -= weight;
  }
  DSLA_CHECK(token >= 0);
  return token;
}

// The last candidate in the ranking that is kept if k are.
Candidate LastOfTopK(std::vector<Candidate> candidates, int64_t k) {
  const auto last = candidates.begin() + (k - 1);
  std::nth_element(candidates.begin(), last, candidates.end(), RanksBefore);
  return *last;
}

// The last candidate of the shortest prefix of the ranking whose weights reach `mass`. Halving
// with nth_element: linear on average, where a sort would be n log n.
Candidate LastOfMass(std::vector<Candidate> candidates, double mass) {
  auto low = candidates.begin(), high = candidates.end();
  double before = 0;  // weight of [begin, low), below `mass`
  while (high - low > 1) {
    const auto middle = low + (high - low) / 2;
    std::nth_element(low, middle, high, RanksBefore);
    const double half = Mass({low, middle});
    if (before + half >= mass) {
      high = middle;
    } else {
      before += half;
      low = middle;
    }
  }
  return *low;
}

void KeepUpTo(const Candidate& last, std::vector<Candidate>& candidates) {
  std::erase_if(candidates, [&](const Candidate& c) { return RanksBefore(last, c); });
}

// Candidates that hold all that top-p keeps: from a high threshold down until they reach its mass.
std::vector<Candidate> CollectMass(const SamplingParams& params, std::span<const float> logits,
                                   const LogitBlocks& blocks, double mass) {
  for (int64_t k = 64;; k *= 8) {
    const float threshold = TopThreshold(blocks, k);
    std::vector<Candidate> candidates = Collect(logits, blocks, threshold, params.temperature);
    if (threshold == -kInfinity || Mass(candidates) >= mass) return candidates;
  }
}

}  // namespace

float TopThreshold(const LogitBlocks& blocks, int64_t k) {
  if (k > blocks.count) return -kInfinity;
  float maxima[LogitBlocks::kMaxBlocks];
  std::copy(blocks.block_max, blocks.block_max + blocks.count, maxima);
  std::nth_element(maxima, maxima + (k - 1), maxima + blocks.count, std::greater<>());
  return maxima[k - 1];
}

std::vector<Candidate> Collect(std::span<const float> logits, const LogitBlocks& blocks,
                               float threshold, double temperature) {
  std::vector<Candidate> candidates;
  for (int b = 0; b < blocks.count; ++b) {
    if (blocks.block_max[b] < threshold) continue;
    const size_t begin = static_cast<size_t>(b * blocks.size);
    const size_t end = std::min(begin + static_cast<size_t>(blocks.size), logits.size());
    for (size_t i = begin; i < end; ++i) {
      if (logits[i] < threshold || logits[i] == -kInfinity) continue;
      candidates.push_back(
          {logits[i], static_cast<int32_t>(i), Weight(logits[i], blocks.max, temperature)});
    }
  }
  return candidates;
}

int32_t Draw(const SamplingParams& params, std::span<const float> logits, const LogitBlocks& blocks,
             double u) {
  const bool top_k = params.top_k > 0 && params.top_k < static_cast<int64_t>(logits.size());
  const bool top_p = params.top_p < 1;
  if (!top_k && !top_p) return DrawFromAll(params, logits, blocks, u);

  std::vector<Candidate> candidates;
  double total;  // of what top-p takes its share
  if (top_k) {
    candidates = Collect(logits, blocks, TopThreshold(blocks, params.top_k), params.temperature);
    if (static_cast<int64_t>(candidates.size()) > params.top_k)
      KeepUpTo(LastOfTopK(candidates, params.top_k), candidates);
    total = Mass(candidates);
  } else {
    double sums[LogitBlocks::kMaxBlocks];
    total = SumExp(logits, blocks, 1 / params.temperature, -kInfinity, sums);
    candidates = CollectMass(params, logits, blocks, params.top_p * total);
  }
  if (top_p) KeepUpTo(LastOfMass(candidates, params.top_p * total), candidates);
  const float least = MinPThreshold(params, blocks.max);
  std::erase_if(candidates, [&](const Candidate& c) { return c.logit < least; });

  double left = u * Mass(candidates);
  for (const Candidate& c : candidates) {
    if (left < c.weight) return c.token;
    left -= c.weight;
  }
  // Rounding left some over: the last token that can be drawn at all.
  const auto last = std::find_if(candidates.rbegin(), candidates.rend(),
                                 [](const Candidate& c) { return c.weight > 0; });
  DSLA_CHECK(last != candidates.rend());
  return last->token;
}

}  // namespace dsla
