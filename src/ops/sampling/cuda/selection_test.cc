// The GPU's way to a cut (selection.h), with plain loops in place of a thread block, against the
// sampler's fp64 reference.
#include "ops/sampling/cuda/selection.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "ops/sampling/philox.h"
#include "ops/sampling/sampling.h"

namespace dsla::cuda {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class HostRow {
 public:
  static constexpr size_t kGroup = 16;

  HostRow(const std::vector<float>& logits, float temperature)
      : logits_(logits),
        largest_(*std::max_element(logits.begin(), logits.end())),
        inverse_(1 / temperature) {}

  int V() const { return static_cast<int>(logits_.size()); }
  float largest() const { return largest_; }
  float inverse_temperature() const { return inverse_; }
  double ExpOf(float logit) const { return std::exp((double{logit} - largest_) * inverse_); }
  uint32_t Weight(float logit, int exponent) const {
    return static_cast<uint32_t>(std::lrint(std::ldexp(ExpOf(logit), kWeightBits + exponent)));
  }

  Found InMaxima(Measure measure, uint64_t wanted, Cut cut) const {
    std::vector<float> maxima;
    for (size_t i = 0; i < logits_.size(); i += kGroup)
      maxima.push_back(*std::max_element(
          logits_.begin() + static_cast<int64_t>(i),
          logits_.begin() + static_cast<int64_t>(std::min(i + kGroup, logits_.size()))));
    return ByDistance(maxima, measure, wanted, cut, kLastCountedBucket);
  }
  Found InLogits(Measure measure, uint64_t wanted, Cut cut, int most) const {
    return ByDistance(logits_, measure, wanted, cut, most);
  }
  uint32_t LowestKey(int bucket) const {
    uint32_t low = 0, high = KeyOf(largest_);  // of the first bucket
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      if (BucketOf(FromKey(middle), largest_, inverse_) > bucket)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
  void Collect(uint32_t, uint32_t) const {}
  Found InKeys(Measure measure, uint64_t wanted, uint32_t low, uint32_t high, int shift,
               int exponent) const {
    std::vector<uint64_t> sums(kBuckets);
    for (const float logit : logits_) {
      const uint32_t key = KeyOf(logit);
      if (key < low || key >= high) continue;
      sums.at((high - 1 - key) >> shift) +=
          measure == Measure::kCount ? 1 : Weight(logit, exponent);
    }
    return Reached(sums, wanted);
  }
  bool Keeps(Cut cut, float logit, int& ties) const {
    return logit > cut.above || (logit == cut.above && ties++ < cut.ties);
  }
  double Mass(Cut cut) const {
    double mass = 0;
    int ties = 0;
    for (const float logit : logits_)
      if (Keeps(cut, logit, ties)) mass += ExpOf(logit);
    return mass;
  }
  int Draw(Cut cut, double u) const {
    double left = u * Mass(cut);
    int token = -1, ties = 0;
    for (size_t i = 0; i < logits_.size(); ++i) {
      const double weight = Keeps(cut, logits_[i], ties) ? ExpOf(logits_[i]) : 0;
      if (weight <= 0) continue;
      token = static_cast<int>(i);
      if (left < weight) break;
      left -= weight;
    }
    return token;
  }

 private:
  static Found Reached(const std::vector<uint64_t>& sums, uint64_t wanted) {
    Found found;
    for (size_t i = 0; i < sums.size(); ++i) {
      if (found.bucket < 0 && wanted <= found.total + sums[i]) {
        found.bucket = static_cast<int>(i);
        found.before = found.total;
      }
      found.total += sums[i];
    }
    return found;
  }
  Found ByDistance(const std::vector<float>& logits, Measure measure, uint64_t wanted, Cut cut,
                   int most) const {
    std::vector<uint64_t> sums(kBuckets);
    for (const float logit : logits) {
      if (!(logit > cut.above)) continue;
      const int bucket = BucketOf(logit, largest_, inverse_);
      if (bucket <= most)
        sums[static_cast<size_t>(bucket)] +=
            measure == Measure::kCount ? 1 : Weight(logit, ExponentOf(bucket));
    }
    if (measure == Measure::kMass)
      for (int i = 0; i < kBuckets; ++i)
        sums[static_cast<size_t>(i)] = MassOf(sums[static_cast<size_t>(i)], ExponentOf(i));
    return Reached(sums, wanted);
  }

  const std::vector<float>& logits_;
  const float largest_, inverse_;
};

TEST(LogitOrderTest, KeysRiseWithLogits) {
  const float logits[] = {-kInfinity, -3e38f, -1, -1e-45f, 0, 1e-45f, 1, 3e38f, kInfinity};
  for (size_t i = 0; i < std::size(logits); ++i) {
    EXPECT_EQ(FromKey(KeyOf(logits[i])), logits[i]);
    if (i > 0) {
      EXPECT_LT(KeyOf(logits[i - 1]), KeyOf(logits[i]));
    }
  }
  EXPECT_EQ(KeyOf(-0.f), KeyOf(0.f));
}

TEST(LogitOrderTest, MinPRoundsUp) {
  EXPECT_EQ(LeastOfMinP(1, 0), 1);
  EXPECT_EQ(LeastOfMinP(1, -1), 0);
  EXPECT_EQ(LeastOfMinP(0, 1e-60), 0x1p-149f);
  EXPECT_EQ(LeastOfMinP(2, -1 + 1e-12), std::nextafter(1.f, 2.f));
  EXPECT_EQ(LeastOfMinP(-1, -1e-12), -1);
  EXPECT_EQ(LeastOfMinP(-3e38f, -1e39), std::numeric_limits<float>::lowest());
  EXPECT_EQ(LeastOfMinP(5, -double{kInfinity}), -kInfinity);
}

// Sums over a bucket lose nothing by the scale of its weights, which must not overflow either.
TEST(SelectionTest, WeightsFitTheirBuckets) {
  for (int bucket = 0; bucket <= kLastCountedBucket; ++bucket) {
    const double least = std::exp(-(bucket + 1.) / kBucketsPerUnit),
                 most = std::exp(-double(bucket) / kBucketsPerUnit);
    EXPECT_GT(std::ldexp(least, ExponentOf(bucket)), 0.47);
    EXPECT_LE(std::ldexp(most, ExponentOf(bucket)), 1);
  }
}

int Choose(const SamplingParams& params, const std::vector<float>& logits, int64_t position) {
  const RowSampling sampling = RowSamplingOf(params, position);
  HostRow row(logits, params.temperature);
  return row.Draw(Filter(row, sampling), UniformAt(sampling.seed, sampling.position));
}

TEST(SelectionTest, GreedyRowsNeedNoMore) {
  EXPECT_EQ(RowSamplingOf({.temperature = 0, .top_k = 3}, 5).inverse_temperature, 0);
  EXPECT_EQ(RowSamplingOf({.temperature = 9e-6f}, 5).inverse_temperature, 0);
  EXPECT_GT(RowSamplingOf({.temperature = 1.1e-5f}, 5).inverse_temperature, 0);
}

TEST(PackEditsTest, WhatIsRuledOutAndAllowedFollowsTheEdits) {
  const SamplingParams params{.temperature = 0,
                              .repetition_penalty = 2,
                              .presence_penalty = 0.5f,
                              .frequency_penalty = 0.25f};
  RowSampling row = RowSamplingOf(params, 5);
  EXPECT_EQ(row.repetition_penalty, 2);
  EXPECT_EQ(row.presence_penalty, 0.5f);
  EXPECT_EQ(row.frequency_penalty, 0.25f);
  EXPECT_EQ(row.edits + row.ruled_out + row.allowed + row.top, 0);

  const std::vector<LogitEdit> edits = {{.token = 9, .outputs = 3}, {.token = 4, .bias = 1.5f}};
  const std::vector<int32_t> ruled_out = {1, 2, 3, 4, 5};
  const std::vector<uint32_t> allowed = {6, 0, 0x80000000u, 8};
  EXPECT_EQ(EditElements({}, {}, {}), 0);
  EXPECT_EQ(EditElements(edits, {}, {}), 2);
  EXPECT_EQ(EditElements(edits, ruled_out, {}), 4);
  EXPECT_EQ(EditElements({}, {}, allowed), 1);
  ASSERT_EQ(EditElements(edits, ruled_out, allowed), 5);
  std::vector<LogitEdit> all(8);
  PackEdits(edits, ruled_out, allowed, all.data(), 3, row);
  EXPECT_EQ(row.first_edit, 3);
  EXPECT_EQ(row.edits, 2);
  EXPECT_EQ(row.ruled_out, 5);
  EXPECT_EQ(all[3].token, 9);
  EXPECT_EQ(all[3].outputs, 3);
  EXPECT_EQ(all[4].token, 4);
  EXPECT_EQ(all[4].outputs, LogitEdit::kUnseen);
  EXPECT_EQ(all[4].bias, 1.5f);
  const auto* const tokens = reinterpret_cast<const int32_t*>(all.data() + 5);
  EXPECT_EQ(std::vector(tokens, tokens + 5), ruled_out);
  EXPECT_EQ(row.allowed, 4);
  EXPECT_EQ(std::vector<uint32_t>(tokens + 5, tokens + 9), allowed);
}

// Equals at the cut: the lowest ids are kept, also where top-p ends among those that top-k kept.
TEST(SelectionTest, TiesAtTheCut) {
  const std::vector<float> equal(200, -0.25f);
  const auto kept = [&](const SamplingParams& params) {
    HostRow row(equal, params.temperature);
    return Filter(row, RowSamplingOf(params, 0));
  };
  const auto expect = [](Cut cut, float above, int ties) {
    EXPECT_EQ(cut.above, above);
    EXPECT_EQ(cut.ties, ties);
  };
  expect(kept({.top_k = 3}), -0.25f, 3);
  expect(kept({.top_p = 0.0101f}), -0.25f, 3);
  expect(kept({.top_p = 1e-30f}), -0.25f, 1);
  expect(kept({.top_k = 50, .top_p = 0.5f}), -0.25f, 25);
  expect(kept({.min_p = 1}), -0.25f, INT_MAX);
  expect(kept({}), -kInfinity, 0);
}

TEST(SelectionTest, EqualsReference) {
  std::mt19937 random(20250103);
  const auto uniform = [&](float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(random);
  };
  const auto one_in = [&](uint32_t n) { return random() % n == 0; };
  int compared = 0, skipped = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    const size_t V = trial % 100 == 0 ? 20000 : 1 + random() % 700;
    std::normal_distribution<float> normal(one_in(2) ? 0 : 15, one_in(3)   ? 0.3f
                                                               : one_in(6) ? 0.003f
                                                               : one_in(6) ? 40.f
                                                                           : 3.f);
    std::vector<float> logits(V);
    for (float& l : logits) l = normal(random);
    if (one_in(4))  // many equals, zeros of both signs among them
      for (float& l : logits) l = std::round(l * 2) / 2;
    if (one_in(5))
      for (size_t i = 1; i < V; i += 3) logits[i] = -kInfinity;
    if (one_in(40)) logits[random() % V] = 3e38f;
    SamplingParams params;
    params.temperature = one_in(10) ? 100 : one_in(10) ? 2e-5f : std::exp(uniform(-2, 1.5f));
    if (one_in(2)) params.top_k = one_in(4) ? 5000 : 1 + static_cast<int32_t>(random() % 60);
    if (one_in(2)) params.top_p = one_in(8) ? 1e-6f : one_in(8) ? 0.9999999f : uniform(0.01f, 1);
    if (one_in(3)) params.min_p = one_in(8) ? 1 : std::exp(uniform(-8, 0));
    params.seed = random() | uint64_t{random()} << 32;
    const auto position = static_cast<int64_t>(random());
    double margin = 0;
    const auto want = SampleRef(params, {}, {}, logits, position, &margin);
    ASSERT_TRUE(want.ok());
    if (margin < 2e-6) {
      ++skipped;
      continue;
    }
    ++compared;
    ASSERT_EQ(Choose(params, logits, position), want->token)
        << "trial " << trial << ", margin " << margin;
  }
  EXPECT_LT(skipped, 200);
  EXPECT_GT(compared, 1800);
}

}  // namespace
}  // namespace dsla::cuda
