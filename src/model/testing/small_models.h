// Small models for tests: the random ones under tests/data/models, with random adapters, and a
// model with its pool ready to run.
#pragma once

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cache/cache_pool.h"
#include "format/adapter.h"
#include "format/model_file.h"
#include "model/hybrid_model.h"

namespace dsla::testing_models {

inline std::string DataPath(const std::string& name) {
  return std::string(DSLA_SOURCE_DIR) + "/tests/data/" + name;
}

// A file of raw T.
template <typename T>
std::vector<T> ReadRaw(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file) << path;
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<T> values(bytes.size() / sizeof(T));
  std::copy_n(bytes.data(), values.size() * sizeof(T), reinterpret_cast<char*>(values.data()));
  return values;
}

// 1, 2, 3 and so on.
inline std::vector<int32_t> CountingTokens(int count) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  std::iota(tokens.begin(), tokens.end(), 1);
  return tokens;
}

struct AdapterShape {
  int features_per_dim = 2;  // F = this times D
  int states = 2;
  int window = 8;
  int sinks = 2;
  int rank = 3;
};

// Random parameters with gates spread over short and long half-lives; the ladder goes from the last
// layer to the first.
inline std::shared_ptr<const Adapter> RandomAdapter(const ModelConfig& config,
                                                    const AdapterShape& shape, uint32_t seed) {
  std::mt19937 random(seed);
  const auto normal = [&](int64_t n, float scale, float mean = 0) {
    std::normal_distribution<float> distribution(mean, scale);
    std::vector<float> values(n);
    for (float& value : values) value = distribution(random);
    return values;
  };
  auto adapter = std::make_shared<Adapter>();
  adapter->id = "test";
  for (int layer = config.L - 1; layer >= 0; --layer) adapter->ladder.push_back(layer);
  adapter->top_level = config.L;
  const int64_t C = config.C, q = int64_t{config.H} * config.D, D = config.D,
                F = shape.features_per_dim * D;
  for (int l = 0; l < config.L; ++l) {
    AdapterLayer layer;
    layer.features = static_cast<int>(F);
    layer.states = shape.states;
    layer.window = shape.window;
    layer.sinks = shape.sinks;
    layer.rank = shape.rank;
    layer.gate_floor = -2.25f;
    layer.q_a = normal(shape.rank * C, 0.2f);
    layer.q_b = normal(q * shape.rank, 0.2f);
    layer.o_a = normal(shape.rank * q, 0.2f);
    layer.o_b = normal(C * shape.rank, 0.2f);
    layer.phi_q = normal(config.H * D * D, 0.4f);
    layer.phi_k = normal(config.Hkv * D * D, 0.4f);
    layer.gate_weight = normal(shape.states * config.Hkv * D * F, 0.3f);
    layer.gate_bias = normal(shape.states * config.Hkv * F, 2.0f);
    layer.mix = normal(config.H * shape.states, 0.5f);
    if (shape.window > 0) {
      layer.claim = normal(config.H * C, 0.2f);
      layer.claim_bias = normal(config.H, 1.0f);
    }
    adapter->layers.push_back(std::move(layer));
  }
  return adapter;
}

// A model with what it needs to run.
class SmallModel {
 public:
  explicit SmallModel(const std::string& family, bool with_adapter = false,
                      const AdapterShape& shape = {},
                      ModelOptions options = {.weights = WeightFormat::kF32,
                                              .kv_dtype = DType::kF32,
                                              .page_size = 16}) {
    auto file = ModelFile::Open(DataPath("models/" + family));
    EXPECT_TRUE(file.ok()) << file.status().message();
    file_ = std::move(file).value();
    if (with_adapter) adapter_ = RandomAdapter(file_->config(), shape, 5);
    ctx_.threads = 2;
    ctx_.workspace = &workspace_;
    auto model = HybridModel::Load(ctx_, *file_, adapter_.get(), options);
    EXPECT_TRUE(model.ok()) << model.status().message();
    model_ = std::move(model).value();
    auto pool = CachePool::Create(model_->cache_geometry(), int64_t{64} << 20);
    EXPECT_TRUE(pool.ok()) << pool.status().message();
    pool_ = std::make_unique<CachePool>(std::move(pool).value());
  }

  const HybridModel& model() const { return *model_; }
  const Adapter* adapter() const { return adapter_.get(); }  // null: none
  CachePool& pool() { return *pool_; }
  ExecContext& ctx() { return ctx_; }
  SequenceCache NewSequence(int level) { return model_->NewSequence(*pool_, level); }

  // Runs several sequences' tokens as one batch; each sequence's logits of all its rows.
  struct Rows {
    SequenceCache* cache;
    std::vector<int32_t> tokens;
  };
  std::vector<std::vector<float>> Run(const std::vector<Rows>& rows) {
    std::vector<SequenceRows> batch;
    for (const Rows& sequence : rows) {
      const Status reserved = sequence.cache->Reserve(static_cast<int>(sequence.tokens.size()));
      EXPECT_TRUE(reserved.ok()) << reserved.message();
      batch.push_back({.cache = sequence.cache,
                       .tokens = sequence.tokens,
                       .logits_rows = static_cast<int>(sequence.tokens.size())});
    }
    Buffer<float> logits;
    model_->Forward(ctx_, *pool_, batch, logits);
    std::vector<std::vector<float>> result;
    const float* next = logits.data();
    for (const Rows& sequence : rows) {
      const int64_t count = static_cast<int64_t>(sequence.tokens.size()) * model_->config().V;
      result.emplace_back(next, next + count);
      next += count;
      sequence.cache->Commit(static_cast<int>(sequence.tokens.size()));
    }
    return result;
  }
  std::vector<float> Run(SequenceCache& cache, const std::vector<int32_t>& tokens) {
    return Run({{&cache, tokens}})[0];
  }

 private:
  std::unique_ptr<ModelFile> file_;
  std::shared_ptr<const Adapter> adapter_;
  Workspace workspace_;
  ExecContext ctx_;
  std::unique_ptr<HybridModel> model_;
  std::unique_ptr<CachePool> pool_;
};

}  // namespace dsla::testing_models
