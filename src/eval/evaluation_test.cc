#include "eval/evaluation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "eval/divergence.h"
#include "eval/evaluation_report.h"
#include "model/testing/small_models.h"

namespace dsla {
namespace {

using testing::HasSubstr;
using testing::Not;
using testing_models::SmallModel;

constexpr int64_t kMemory = int64_t{64} << 20;

class EvaluationTest : public testing::Test {
 protected:
  std::vector<int32_t> Text(int count, uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<int32_t> tokens(count);
    for (int32_t& token : tokens)
      token = static_cast<int32_t>(random() % small_.model().config().V);
    return tokens;
  }

  Evaluation Measure(const std::vector<std::vector<int32_t>>& documents,
                     EvaluationOptions options) {
    options.control_memory_bytes = kMemory;
    auto found =
        Evaluate(small_.ctx(), small_.model(), adapter(), small_.pool(), documents, options);
    EXPECT_TRUE(found.ok()) << found.status().message();
    return std::move(found).value();
  }

  // The sums of one document at a level of `adapter` on this model's weights.
  SubjectSums Compare(std::shared_ptr<const Adapter> adapter, int level,
                      const std::vector<int32_t>& text) {
    const auto model = small_.model().WithAdapter(*adapter).value();
    auto pool = CachePool::Create(model->cache_geometry(), kMemory);
    EXPECT_TRUE(pool.ok());
    const Subject subjects[] = {{model.get(), &*pool, level}};
    auto sums = CompareDocument(small_.ctx(), small_.model(), small_.pool(), text, subjects, {});
    EXPECT_TRUE(sums.ok()) << sums.status().message();
    return sums->subjects[0];
  }

  std::shared_ptr<const Adapter> Changed(const Adapter& adapter, Control control) {
    auto changed = ControlAdapter(adapter, small_.model().config(), control);
    EXPECT_TRUE(changed.ok()) << changed.status().message();
    return *changed;
  }

  SmallModel small_{"smollm2", true};  // two layers, W = 8, S = 2, two states of F = 32
  const Adapter& adapter() { return *small_.adapter(); }
};

TEST_F(EvaluationTest, ASwitchAtTheStartIsTheStart) {
  const std::vector<std::vector<int32_t>> documents = {Text(200, 1), Text(90, 2)};
  EvaluationOptions options;
  options.levels = {1, 2};
  options.switches = {0, .25, .77};
  const Evaluation found = Measure(documents, options);
  EXPECT_EQ(found.documents, 2);
  EXPECT_EQ(found.tokens, 290);
  ASSERT_EQ(found.subjects.size(), 2u);
  for (const SubjectResult& subject : found.subjects) {
    EXPECT_EQ(subject.tokens, 290);
    EXPECT_GT(subject.kl.mean, 0);
    EXPECT_LE(subject.kl.low, subject.kl.mean);
    EXPECT_GE(subject.kl.high, subject.kl.mean);
    ASSERT_EQ(subject.switches.size(), 3u);
    EXPECT_EQ(subject.switches[0].tokens, 290);
    EXPECT_NEAR(subject.switches[0].kl_switched.mean, subject.kl.mean, 1e-6);
    EXPECT_NEAR(subject.switches[0].kl_start.mean, subject.kl.mean, 1e-12);
    EXPECT_EQ(subject.switches[1].tokens, 150 + 68);
    EXPECT_EQ(subject.switches[2].tokens, 200 - 154 + 90 - 69);
    EXPECT_GT(std::abs(subject.switches[1].kl_switched.mean - subject.kl.mean), 1e-6);
  }
}

// A raise at the switch does what the runs of the cache's own tests do: fold the sequence itself.
TEST_F(EvaluationTest, ASwitchedRunIsARaisedSequence) {
  const std::vector<int32_t> text = Text(150, 3);
  constexpr int kAt = 100;
  const Subject subjects[] = {{&small_.model(), &small_.pool(), 2}};
  const auto found = CompareDocument(small_.ctx(), small_.model(), small_.pool(), text, subjects,
                                     {.switches = {kAt / 150. + 1e-9}, .chunk = 32});
  ASSERT_TRUE(found.ok());
  SequenceCache teacher = small_.NewSequence(0), raised = small_.NewSequence(0);
  small_.Run(teacher, {text.begin(), text.begin() + kAt});
  small_.Run(raised, {text.begin(), text.begin() + kAt});
  ASSERT_TRUE(small_.model().Raise(small_.ctx(), small_.pool(), raised, 2).ok());
  const auto p = small_.Run(teacher, {text.begin() + kAt, text.end()});
  const auto q = small_.Run(raised, {text.begin() + kAt, text.end()});
  const int64_t V = small_.model().config().V;
  double kl = 0;
  for (int64_t t = 0; t < 150 - kAt; ++t)
    kl += Divergence(std::span(p).subspan(t * V, V), std::span(q).subspan(t * V, V)).kl;
  EXPECT_EQ(found->subjects[0].switches[0].tokens, 150 - kAt);
  EXPECT_NEAR(found->subjects[0].switches[0].kl_switched, kl, 1e-4 * kl);
}

TEST_F(EvaluationTest, LevelZeroLosesNothing) {
  const Subject subjects[] = {{&small_.model(), &small_.pool(), 0}};
  const std::vector<int32_t> text = Text(60, 1);
  const auto found = CompareDocument(small_.ctx(), small_.model(), small_.pool(), text, subjects,
                                     {.switches = {.5}});
  ASSERT_TRUE(found.ok());
  const PositionSums all = found->subjects[0].Total(), teacher = found->teacher.Total();
  EXPECT_NEAR(all.kl, 0, 1e-9);
  EXPECT_EQ(all.agree, 60);
  EXPECT_EQ(all.targets, 59);
  EXPECT_NEAR(all.loss, teacher.loss, 1e-9);
  SequenceCache cache = small_.NewSequence(0);
  const std::vector<float> logits = small_.Run(cache, text);
  const int V = small_.model().config().V;
  double loss = 0;
  for (int t = 0; t < 59; ++t) {
    double sum = 0;
    for (int v = 0; v < V; ++v) sum += std::exp(double{logits[t * V + v]});
    loss += std::log(sum) - logits[t * V + text[t + 1]];
  }
  EXPECT_NEAR(teacher.loss, loss, 1e-3);
}

TEST_F(EvaluationTest, TheWindowOfEqualBytesIsLevelZeroWhileAllFits) {
  const std::shared_ptr<const Adapter> window = Changed(adapter(), Control::kWindow);
  EXPECT_EQ(window->layers[0].window, 8 + 2 * 32);
  EXPECT_NEAR(Compare(window, 2, Text(72, 1)).Total().kl, 0, 1e-6);
  EXPECT_GT(Compare(window, 2, Text(200, 1)).Total().kl, 1e-3);
  // The adapter itself is another thing, within the window too.
  EXPECT_GT(Compare(testing_models::RandomAdapter(small_.model().config(), {}, 5), 2, Text(72, 1))
                .Total()
                .kl,
            1e-3);
}

TEST_F(EvaluationTest, ZeroedStatesCannotBeSeen) {
  auto other = std::make_shared<Adapter>(adapter());
  for (AdapterLayer& layer : other->layers)
    for (float& value : layer.phi_q) value = -value;
  const std::vector<int32_t> text = Text(120, 4);
  const double own = Compare(std::make_shared<Adapter>(adapter()), 2, text).Total().kl;
  EXPECT_NE(Compare(other, 2, text).Total().kl, own);
  const double zeroed = Compare(Changed(adapter(), Control::kZeroed), 2, text).Total().kl;
  EXPECT_EQ(Compare(Changed(*other, Control::kZeroed), 2, text).Total().kl, zeroed);
  EXPECT_NE(zeroed, own);
}

// One state alone is an adapter that has no other.
TEST_F(EvaluationTest, AStateAloneIsAnAdapterOfOneState) {
  const std::vector<int32_t> text = Text(120, 5);
  for (const int state : {0, 1}) {
    SCOPED_TRACE(state);
    auto single = std::make_shared<Adapter>(adapter());
    for (AdapterLayer& layer : single->layers) {
      const auto keep = [&](std::vector<float>& values) {
        const auto half = static_cast<ptrdiff_t>(values.size() / 2);
        values =
            std::vector<float>(values.begin() + state * half, values.begin() + (state + 1) * half);
      };
      layer.states = 1;
      keep(layer.gate_weight);
      keep(layer.gate_bias);
      layer.mix.assign(small_.model().config().H, 0);
    }
    const Control control = state == 0 ? Control::kHistory : Control::kRecency;
    const double want = Compare(single, 2, text).Total().kl;
    EXPECT_NEAR(Compare(Changed(adapter(), control), 2, text).Total().kl, want, 1e-4 * want);
    EXPECT_THAT(ControlAdapter(*single, small_.model().config(), control).status().message(),
                HasSubstr("has one state"));
  }
}

// With every layer bypassed a token knows nothing of those before it.
TEST_F(EvaluationTest, BypassedLayersSeeNoContext) {
  const auto model = small_.model().WithAdapter(*Changed(adapter(), Control::kBypass)).value();
  auto pool = CachePool::Create(model->cache_geometry(), kMemory);
  ASSERT_TRUE(pool.ok());
  std::vector<std::vector<float>> last;
  for (const uint32_t seed : {1, 2}) {
    std::vector<int32_t> text = Text(50, seed);
    text.back() = 7;
    SequenceCache cache = model->NewSequence(*pool, 2);
    Buffer<float> logits;
    ASSERT_TRUE(model->Append(small_.ctx(), *pool, cache, text, 1, logits).ok());
    last.emplace_back(logits.data(), logits.data() + logits.size());
    text = {7};  // and the recurrent form gives the same
    ASSERT_TRUE(model->Append(small_.ctx(), *pool, cache, text, 1, logits).ok());
    last.emplace_back(logits.data(), logits.data() + logits.size());
  }
  for (size_t i = 1; i < last.size(); ++i)
    for (size_t v = 0; v < last[0].size(); ++v) EXPECT_NEAR(last[i][v], last[0][v], 1e-5);
}

TEST_F(EvaluationTest, AnotherOrderConvertsOtherLayersFirst) {
  auto first = WithOrder(adapter(), std::vector<int>{0});
  ASSERT_TRUE(first.ok());
  EXPECT_EQ((*first)->ladder, (std::vector<int>{0, 1}));
  const std::vector<int32_t> text = Text(100, 6);
  const auto own = std::make_shared<Adapter>(adapter());
  EXPECT_NE(Compare(*first, 1, text).Total().kl, Compare(own, 1, text).Total().kl);
  EXPECT_EQ(Compare(*first, 2, text).Total().kl, Compare(own, 2, text).Total().kl);
  EXPECT_THAT(WithOrder(adapter(), std::vector<int>{2}).status().message(),
              HasSubstr("no layer 2, only 0 to 1"));
  EXPECT_THAT(WithOrder(adapter(), std::vector<int>{1, 1}).status().message(),
              HasSubstr("layer 1 comes twice"));
  std::vector<int> order = RandomLayerOrder(30, 1);
  EXPECT_EQ(order, RandomLayerOrder(30, 1));
  EXPECT_NE(order, RandomLayerOrder(30, 2));
  std::sort(order.begin(), order.end());
  for (int l = 0; l < 30; ++l) EXPECT_EQ(order[l], l);
}

TEST_F(EvaluationTest, TheEntropyIsThatOfTheAttentionItself) {
  const std::vector<int32_t> one = {5}, text = Text(40, 8);
  const auto entropy = [&](std::span<const int32_t> tokens) {
    const std::span<const int32_t> texts[] = {tokens};
    auto found = AttentionEntropy(small_.ctx(), small_.model(), small_.pool(), texts);
    EXPECT_TRUE(found.ok());
    return std::move(found).value();
  };
  EXPECT_THAT(entropy(one), testing::Each(testing::DoubleNear(0, 1e-9)));
  const std::vector<double> got = entropy(text);
  // From the weights' definition: layer 0's K and V stand in the cache, its queries are visited.
  SequenceCache cache = small_.NewSequence(0);
  small_.Run(cache, {text.begin(), text.end() - 1});
  const ModelConfig& c = small_.model().config();
  std::vector<double> want(c.L, 0);
  ASSERT_TRUE(small_.model()
                  .AppendVisiting(small_.ctx(), small_.pool(), cache, text.back(),
                                  [&](int layer, std::span<const float> q) {
                                    const PagedKvView kv = small_.pool().pages();
                                    for (int h = 0; h < c.H; ++h) {
                                      std::vector<double> p;
                                      double sum = 0;
                                      for (int t = 0; t < 40; ++t) {
                                        const float* k =
                                            static_cast<const float*>(kv.k) +
                                            cache.pages(layer)[t / 16] * kv.page_stride +
                                            ((h / 3) * 16 + t % 16) * c.D;
                                        double dot = 0;
                                        for (int d = 0; d < c.D; ++d)
                                          dot += double{q[h * c.D + d]} * k[d];
                                        p.push_back(std::exp(dot / 4));
                                        sum += p.back();
                                      }
                                      for (const double e : p)
                                        want[layer] -= e / sum * std::log2(e / sum) / c.H;
                                    }
                                  })
                  .ok());
  for (int l = 0; l < c.L; ++l) {
    EXPECT_NEAR(got[l], want[l], 1e-6);
    EXPECT_GT(got[l], 0);
    EXPECT_LT(got[l], std::log2(40.));
  }
  EXPECT_EQ(OrderBy(std::vector<double>{3, 1, 2, 1}), (std::vector<int>{1, 3, 2, 0}));
}

TEST_F(EvaluationTest, TheReportHoldsEveryPart) {
  EvaluationOptions options;
  options.levels = {1, 2};
  options.switches = {.5, .25};
  options.controls = ControlsOf(adapter());
  options.controls.push_back(Control::kGivenOrder);
  options.order = {0, 1};
  options.measure_recall = options.measure_generation = true;
  options.recall.gaps = {64};
  options.recall.lengths = {256};
  options.recall.depths = {0, 1};
  options.recall.texts = 1;
  options.recall.write = true;
  options.generation.prompt = 30;
  options.generation.tokens = 8;
  const Evaluation found = Measure({Text(120, 1), Text(80, 2)}, options);
  ASSERT_EQ(found.subjects.size(), 2u * 9);
  EXPECT_EQ(found.subjects[2].Title(), "level 1, window");
  EXPECT_EQ(found.subjects[0].layer_tokens, 2 * 32 + 8 + 2);
  EXPECT_EQ(found.subjects[2].layer_tokens, found.subjects[0].layer_tokens);
  const EvaluationReportOptions report{.data = "a <b>", .by_position = true};
  const nlohmann::json json = EvaluationJson(found, options, report);
  EXPECT_EQ(json["switch_at"], .5);
  ASSERT_EQ(json["levels"].size(), 2u);
  ASSERT_EQ(json["controls"].size(), 16u);
  for (const char* key : {"level", "kl", "kl_low", "kl_high", "loss_gap", "agreement", "tokens",
                          "kl_suffix", "kl_switched", "suffix_tokens", "switches", "positions"})
    EXPECT_TRUE(json["levels"][0].contains(key)) << key;
  EXPECT_EQ(json["levels"][0]["positions"][0]["tokens"], 200);
  EXPECT_EQ(json["controls"][15]["control"], "given-order");
  EXPECT_EQ(json["controls"][15]["order"], (std::vector<int>{0, 1}));
  EXPECT_FALSE(json["controls"][0].contains("kl_switched"));
  EXPECT_EQ(json["recall"].size(), 5u);
  EXPECT_EQ(json["recall"][0]["levels"].size(), 18u);
  EXPECT_TRUE(json["recall"][0]["teacher"].contains("written"));
  EXPECT_EQ(json["generation"]["levels"][0]["level"], 1);
  const ReportDocument document = EvaluationDocument(found, options, report);
  for (const char* part : {"level 2, bypass", "## Switched in mid-document", "## By position",
                           "## Recall", "## Writing", "copy, gap 64", "depth 1", "a <b>"})
    EXPECT_THAT(document.markdown(), HasSubstr(part));
  const std::string html = document.html("T");
  EXPECT_THAT(html, HasSubstr("</svg>"));
  EXPECT_THAT(html, HasSubstr("a &lt;b&gt;"));
  EXPECT_THAT(html, Not(HasSubstr("<script")));
  EXPECT_THAT(html, Not(HasSubstr("src=")));
}

TEST_F(EvaluationTest, WhatCannotBeMeasuredIsNamed) {
  const std::vector<std::vector<int32_t>> documents = {Text(20, 1)};
  const auto message = [&](const EvaluationOptions& options) {
    return Evaluate(small_.ctx(), small_.model(), adapter(), small_.pool(), documents, options)
        .status()
        .message();
  };
  EvaluationOptions options;
  EXPECT_EQ(message(options), "no levels to measure");
  options.levels = {3};
  EXPECT_EQ(message(options), "level 3: the adapter has levels 0 to 2");
  options.levels = {2};
  options.switches = {1};
  EXPECT_THAT(message(options), HasSubstr("switch at 1: must be a share"));
  EXPECT_THAT(ParseControl("none").status().message(),
              HasSubstr("control 'none' is not one of window, zeroed, history"));
  const SmallModel no_window("qwen2", true, {.window = 0, .sinks = 0});
  EXPECT_THAT(ControlAdapter(*no_window.adapter(), no_window.model().config(), Control::kZeroed)
                  .status()
                  .message(),
              HasSubstr("has no window"));
  EXPECT_THAT(ControlsOf(*no_window.adapter()), Not(testing::Contains(Control::kZeroed)));
}

TEST(BootstrapTest, IntervalsAreOverDocumentsByTheirWeight) {
  const Estimate one = Bootstrap(std::vector<double>{3}, std::vector<double>{2}, 1);
  EXPECT_EQ(one.mean, 1.5);
  EXPECT_EQ(one.low, 1.5);
  EXPECT_EQ(one.high, 1.5);
  const Estimate none = Bootstrap({}, {}, 1);
  EXPECT_EQ(none.mean, 0);
  // A document without weight does not count.
  EXPECT_EQ(Bootstrap(std::vector<double>{3, 0}, std::vector<double>{2, 0}, 1).high, 1.5);
  // 100 documents of 0 and 1: the standard error of the mean is .05, the interval 1.96 of it.
  std::vector<double> values(100, 0), weights(100, 1);
  std::fill(values.begin(), values.begin() + 50, 1);
  const Estimate half = Bootstrap(values, weights, 1);
  EXPECT_EQ(half.mean, .5);
  EXPECT_NEAR(half.low, .5 - 1.96 * .05, .015);
  EXPECT_NEAR(half.high, .5 + 1.96 * .05, .015);
}

}  // namespace
}  // namespace dsla
