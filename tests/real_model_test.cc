// The default model with the shipped adapter: against transformers and against an independent
// implementation of the adapter's arithmetic.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/testing/default_model.h"
#include "engine/session.h"
#include "eval/divergence.h"
#include "format/adapter.h"
#include "format/model_file.h"
#include "model/testing/small_models.h"

namespace dsla {
namespace {

using testing_models::DataPath;
using testing_models::ReadRaw;

std::string ModelPath() {
  const std::string path = testing_base::DefaultModelFile(DSLA_SOURCE_DIR);
  if (path.empty()) {
    ADD_FAILURE() << "the default model is not installed: run ./test, which installs it";
  }
  return path;
}

class RealModelTest : public testing::Test {
 protected:
  void SetUp() override {
    auto file = ModelFile::Open(ModelPath());
    ASSERT_TRUE(file.ok()) << file.status().message();
    file_ = std::move(file).value();
    ctx_.threads = 2;
    ctx_.workspace = &workspace_;
    tokens_ = ReadRaw<int32_t>(DataPath("smollm2/tokens.i32"));
    ASSERT_EQ(tokens_.size(), 2048u);
  }

  void Load(DType dtype) {
    Load(dtype == DType::kF32 ? WeightFormat::kF32 : WeightFormat::kBF16, dtype);
  }

  void Load(WeightFormat weights, DType kv) {
    auto adapter = Adapter::Open(
        std::string(DSLA_SOURCE_DIR) + "/models/smollm2-135m-instruct.dsla.safetensors",
        file_->config());
    ASSERT_TRUE(adapter.ok()) << adapter.status().message();
    const auto fingerprint = file_->Fingerprint();
    ASSERT_TRUE(fingerprint.ok());
    ASSERT_TRUE((*adapter)->CheckBase(*fingerprint, file_->path()).ok());
    auto model =
        HybridModel::Load(ctx_, *file_, adapter->get(), {.weights = weights, .kv_dtype = kv});
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = std::move(model).value();
    auto pool = CachePool::Create(model_->cache_geometry(), int64_t{1} << 30);
    ASSERT_TRUE(pool.ok());
    pool_ = std::make_unique<CachePool>(std::move(pool).value());
  }

  // Per-token divergence of our logits from transformers' (its final hidden states times the
  // embedding, in fp32).
  std::vector<RowDivergence> AgainstTransformers(Products products = Products::kFastest) {
    const std::vector<float> hidden = ReadRaw<float>(DataPath("smollm2/hidden.f32"));
    const int64_t C = file_->config().C, V = file_->config().V;
    Buffer<float> embedding(V * C);
    EXPECT_TRUE(file_->Read("model.embed_tokens.weight", embedding.span()).ok());
    const Linear head(embedding.span(), V, C, WeightFormat::kF32);
    std::vector<RowDivergence> rows;
    SequenceCache cache = model_->NewSequence(*pool_, 0);
    constexpr int kChunk = 128;
    Buffer<float> want(kChunk * V), got;
    for (int begin = 0; begin < 2048; begin += kChunk) {
      head.Forward(ctx_, hidden.data() + begin * C, C, kChunk, want.data(), V);
      const auto tokens = std::span(tokens_).subspan(begin, kChunk);
      EXPECT_TRUE(model_->Append(ctx_, *pool_, cache, tokens, kChunk, got, products).ok());
      std::vector<RowDivergence> chunk(kChunk);
      ParallelFor(ctx_, kChunk, [&](int64_t t, int) {
        chunk[t] = Divergence(want.span().subspan(t * V, V), got.span().subspan(t * V, V));
      });
      rows.insert(rows.end(), chunk.begin(), chunk.end());
    }
    return rows;
  }

  std::unique_ptr<ModelFile> file_;
  Workspace workspace_;
  ExecContext ctx_;
  std::unique_ptr<HybridModel> model_;
  std::unique_ptr<CachePool> pool_;
  std::vector<int32_t> tokens_;
};

TEST_F(RealModelTest, LogitsEqualTransformersInFp32) {
  Load(DType::kF32);
  const auto rows = AgainstTransformers();
  double worst = 0;
  int64_t agree = 0;
  for (const RowDivergence& row : rows) {
    ASSERT_TRUE(std::isfinite(row.kl));
    worst = std::max(worst, std::abs(row.kl));
    agree += row.agree;
  }
  std::printf("max |KL| per token %.2e, top-1 equal on %lld of %zu\n", worst,
              static_cast<long long>(agree), rows.size());
  EXPECT_LT(worst, 1e-4);
  EXPECT_GT(static_cast<double>(agree), 0.999 * static_cast<double>(rows.size()));
}

TEST_F(RealModelTest, Bf16WeightsAndCacheStayClose) {
  Load(DType::kBF16);
  double sum = 0;
  const auto rows = AgainstTransformers();
  for (const RowDivergence& row : rows) sum += row.kl;
  std::printf("mean KL %.2e\n", sum / static_cast<double>(rows.size()));
  EXPECT_LT(sum / static_cast<double>(rows.size()), 2e-3);
}

// An int8 cache beside exact weights.
TEST_F(RealModelTest, AnInt8CacheStaysClose) {
  Load(WeightFormat::kF32, DType::kI8);
  double sum = 0;
  int64_t agree = 0;
  const auto rows = AgainstTransformers();
  for (const RowDivergence& row : rows) {
    sum += row.kl;
    agree += row.agree;
  }
  std::printf("mean KL %.2e, top-1 equal on %lld of %zu\n", sum / static_cast<double>(rows.size()),
              static_cast<long long>(agree), rows.size());
  EXPECT_LT(sum / static_cast<double>(rows.size()), 3e-3);
}

// Integers as decode uses them (kInvariant: activations rounded too) and as prompts may (kFastest),
// bf16 cache. The file is Q4_1 with a Q8_0 embedding, so its own groups are what int4 stores.
TEST_F(RealModelTest, IntegerWeightsStayClose) {
  for (const auto& [format, bound] :
       {std::pair(WeightFormat::kInt8, 1e-3), std::pair(WeightFormat::kInt4, 3e-3)}) {
    Load(format, DType::kBF16);
    for (const Products products : {Products::kInvariant, Products::kFastest}) {
      double sum = 0;
      int64_t agree = 0;
      const auto rows = AgainstTransformers(products);
      for (const RowDivergence& row : rows) {
        sum += row.kl;
        agree += row.agree;
      }
      std::printf("%s, %s: mean KL %.2e, top-1 equal on %lld of %zu, %.1f MB\n", Name(format),
                  products == Products::kFastest ? "prompts" : "decode",
                  sum / static_cast<double>(rows.size()), static_cast<long long>(agree),
                  rows.size(), 1e-6 * static_cast<double>(model_->weight_bytes(0)));
      EXPECT_LT(sum / static_cast<double>(rows.size()), bound);
    }
  }
}

// The trainer's forward (libtorch, fp32: none of serving's operators) gave these for the first
// 1,024 tokens; the switch is at 512.
TEST_F(RealModelTest, TheAdapterGivesTheFiguresOfAnIndependentImplementation) {
  Load(DType::kF32);
  const std::vector<std::vector<int32_t>> documents = {{tokens_.begin(), tokens_.begin() + 1024}};
  DivergenceOptions options;
  options.levels = {8, 15, 22, 30};
  const auto report = MeasureDivergence(ctx_, *model_, *pool_, documents, options);
  ASSERT_TRUE(report.ok()) << report.status().message();
  struct Want {
    double kl, agreement, kl_suffix, kl_switched;
  };
  const Want want[] = {{.001750, .9824, .002280, .002252},
                       {.005298, .9590, .006042, .005771},
                       {.007810, .9492, .009350, .008594},
                       {.020852, .9258, .030073, .029343}};
  for (size_t i = 0; i < options.levels.size(); ++i) {
    const LevelDivergence& got = report->levels[i];
    std::printf("level %d: KL %.5f, top-1 %.4f, suffix %.5f, switched %.5f\n", got.level, got.kl,
                got.agreement, got.kl_suffix, got.kl_switched);
    // The same arithmetic in another order: far inside the 10% that a wrong detail would leave.
    EXPECT_NEAR(got.kl, want[i].kl, 0.02 * want[i].kl);
    EXPECT_NEAR(got.kl_suffix, want[i].kl_suffix, 0.02 * want[i].kl_suffix);
    EXPECT_NEAR(got.kl_switched, want[i].kl_switched, 0.02 * want[i].kl_switched);
    EXPECT_NEAR(got.agreement, want[i].agreement, 3.0 / 1024);
  }
}

// The whole idea in one run: answer at level 0, switch in mid-answer, go on; pages are freed and
// nothing is recomputed.
TEST_F(RealModelTest, ARequestIsSwitchedInMidAnswer) {
  Load(DType::kBF16);
  Session session(model_.get(), pool_.get(), ctx_, {});
  ASSERT_TRUE(session.Prefill(std::span(tokens_).first(1500)).ok());
  const int64_t before = session.cache_bytes().total();
  GenerateOptions options;
  options.sampling.temperature = 0;
  options.max_tokens = 24;
  options.raises = {{.after_tokens = 8, .level = 22}};
  const auto result = session.Generate(options);
  ASSERT_TRUE(result.ok()) << result.status().message();
  EXPECT_EQ(result->tokens.size(), 24u);
  ASSERT_EQ(session.level_changes().size(), 1u);
  EXPECT_EQ(session.level_changes()[0].position, 1507);
  EXPECT_EQ(session.level(), 22);
  EXPECT_EQ(session.length(), 1523);
  EXPECT_LT(session.cache_bytes().total(), before / 2);
}

// Tier auto: where level 0 would run out of memory, layers convert, one after another, and the
// request goes on.
TEST_F(RealModelTest, TierAutoRaisesInsteadOfFailing) {
  Load(DType::kBF16);
  auto small =
      CachePool::Create(model_->cache_geometry(), int64_t{24} << 20);  // level 0 needs 33 MiB
  ASSERT_TRUE(small.ok());
  const auto prompt = std::span(tokens_).first(1500);
  {
    Session full(model_.get(), &small.value(), ctx_, {});
    EXPECT_EQ(full.Prefill(prompt).code(), StatusCode::kResourceExhausted);
  }
  EXPECT_EQ(small->ledger().used_bytes(), 0) << "a session that failed holds nothing";
  Session session(model_.get(), &small.value(), ctx_,
                  {.prefill_chunk = 256, .auto_raise = true, .auto_top_level = 22});
  const Status status = session.Prefill(prompt);
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_GT(session.level(), 0);
  EXPECT_LT(session.level(), 22) << "no further than needed";
  EXPECT_FALSE(session.level_changes().empty());
}

}  // namespace
}  // namespace dsla
