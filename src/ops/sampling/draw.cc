#include "ops/sampling/draw.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>

#include "base/check.h"
#include "ops/sampling/logit_order.h"

namespace dsla {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The least logit that min-p keeps.
float MinPThreshold(const SamplingParams& params, float max) {
  if (params.min_p <= 0) return -kInfinity;
  return LeastOfMinP(
      max, static_cast<double>(params.temperature) * std::log(static_cast<double>(params.min_p)));
}

double Weight(float logit, float max, double temperature) {
  return std::exp((static_cast<double>(logit) - max) / temperature);
}

double Mass(std::span<const Candidate> candidates) {
  double mass = 0;
  for (const Candidate& c : candidates) mass += c.weight;
  return mass;
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

// Top-k, then top-p and min-p among the k: all on a short list.
int32_t DrawFromTopK(const SamplingParams& params, std::span<const float> logits,
                     const LogitBlocks& blocks, double u) {
  std::vector<Candidate> candidates =
      Collect(logits, blocks, TopThreshold(blocks, params.top_k), params.temperature);
  if (static_cast<int64_t>(candidates.size()) > params.top_k)
    KeepUpTo(LastOfTopK(candidates, params.top_k), candidates);
  if (params.top_p < 1)
    KeepUpTo(LastOfMass(candidates, params.top_p * Mass(candidates)), candidates);
  const float least = MinPThreshold(params, blocks.max);
  std::erase_if(candidates, [&](const Candidate& c) { return c.logit < least; });

  double left = u * Mass(candidates);
  int32_t token = -1;
  for (const Candidate& c : candidates) {
    if (c.weight <= 0) continue;
    token = c.token;  // the last with any weight, should rounding leave some over
    if (left < c.weight) break;
    left -= c.weight;
  }
  DSLA_CHECK(token >= 0);
  return token;
}

// What is kept of all tokens: logits above `above`, and of those equal to it the `ties`.
struct Cut {
  float above = -kInfinity;
  std::vector<Candidate> ties;
};

// Top-p without a list of all tokens: bucket sums say in which narrow band of logits the mass is
// reached, and only that band is ranked.
Cut TopPCut(const SamplingParams& params, std::span<const float> logits,
            const LogitBlocks& blocks) {
  const float inverse = 1 / params.temperature;
  double mass[kBuckets], total = 0, before = 0;
  SumExpByBucket(logits, blocks, inverse, mass);
  for (const double m : mass) total += m;
  const double wanted = params.top_p * total;
  int bucket = 0;
  while (bucket < kBuckets && before + mass[bucket] < wanted) before += mass[bucket++];
  if (bucket == kBuckets) return {};  // rounding: all are needed

  std::vector<Candidate> band;
  for (int b = 0; b < blocks.count; ++b) {
    if (BucketOf(blocks.block_max[b], blocks.max, inverse) > bucket) continue;
    const size_t begin = static_cast<size_t>(b * blocks.size);
    const size_t end = std::min(begin + static_cast<size_t>(blocks.size), logits.size());
    for (size_t i = begin; i < end; ++i) {
      if (BucketOf(logits[i], blocks.max, inverse) != bucket || logits[i] == -kInfinity) continue;
      band.push_back(
          {logits[i], static_cast<int32_t>(i), Weight(logits[i], blocks.max, params.temperature)});
    }
  }
  const Candidate last = LastOfMass(band, wanted - before);
  std::erase_if(band,
                [&](const Candidate& c) { return c.logit != last.logit || c.token > last.token; });
  return {last.logit, std::move(band)};
}

Cut MakeCut(const SamplingParams& params, std::span<const float> logits,
            const LogitBlocks& blocks) {
  Cut cut;
  if (params.top_p < 1) cut = TopPCut(params, logits, blocks);
  const float least = MinPThreshold(params, blocks.max);
  if (least > cut.above) return {std::nextafter(least, -kInfinity), {}};
  return cut;
}

// The CDF over all tokens: block sums find the block, its own terms the token.
int32_t DrawFromAll(const SamplingParams& params, std::span<const float> logits,
                    const LogitBlocks& blocks, double u) {
  const Cut cut = MakeCut(params, logits, blocks);
  double sums[LogitBlocks::kMaxBlocks];
  double total = SumExp(logits, blocks, 1 / params.temperature, cut.above, sums);
  for (const Candidate& tie : cut.ties) {
    sums[tie.token / blocks.size] += tie.weight;
    total += tie.weight;
  }
  double left = u * total;
  int block = -1;
  for (int b = 0; b < blocks.count; ++b) {
    if (sums[b] <= 0) continue;
    block = b;  // the last with any mass, should rounding leave some over
    if (left < sums[b]) break;
    left -= sums[b];
  }
  DSLA_CHECK(block >= 0);
  const int32_t last_tie = cut.ties.empty() ? -1 : cut.ties.back().token;
  const size_t begin = static_cast<size_t>(block * blocks.size);
  const size_t end = std::min(begin + static_cast<size_t>(blocks.size), logits.size());
  int32_t token = -1;
  for (size_t i = begin; i < end; ++i) {
    const int32_t id = static_cast<int32_t>(i);
    if (!(logits[i] > cut.above || (logits[i] == cut.above && id <= last_tie))) continue;
    const double weight = Weight(logits[i], blocks.max, params.temperature);
    if (weight <= 0) continue;  // what has a weight in fp32 has one in fp64
    token = id;
    if (left < weight) break;
    left -= weight;
  }
  DSLA_CHECK(token >= 0);
  return token;
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
  return top_k ? DrawFromTopK(params, logits, blocks, u) : DrawFromAll(params, logits, blocks, u);
}

}  // namespace dsla
