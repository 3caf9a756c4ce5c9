// The operators that are controls against their equations, and the control set on a tiny model.
#include "distill/controls.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "distill/checkpoint.h"
#include "distill/distill_testing.h"
#include "distill/torch_layers.h"

namespace dsla {
namespace {

using at::Tensor;
using ::testing::HasSubstr;
using testing::TempDir;

double RelativeError(const Tensor& got, const Tensor& want) {
  return ((got - want).norm() / want.norm()).item().toDouble();
}

// S_i = diag(G_i) S_i + k^T v, o = e^{scale} q (g S_1 + (1 - g) S_2) / sqrt(D), with the gates
// sigmoid(W_2 W_1 x + b)^(1/16), token after token in fp64.
TEST(PaperOperatorTest, EqualsItsEquations) {
  constexpr int64_t B = 2, T = 150, C = 12, H = 4, Hkv = 2, D = 6, r = 3, states = 2;
  at::manual_seed(5);
  const auto normal = [](std::vector<int64_t> shape) { return at::randn(shape, at::kFloat); };
  distill::Heads heads;
  heads.q = normal({B, T, H, D});
  heads.k_plain = normal({B, T, Hkv, D}), heads.v = normal({B, T, Hkv, D});
  const Tensor x = normal({B, T, C});
  distill::AdapterTensors adapter;
  adapter.kind = Operator::kPaper;
  adapter.k_a = normal({r, C}), adapter.k_b = normal({Hkv * D, r}) * 0.1;
  adapter.v_a = normal({r, C}), adapter.v_b = normal({Hkv * D, r}) * 0.1;
  adapter.gate_a = normal({states, r, C}), adapter.gate_b = normal({states, Hkv * D, r});
  adapter.op.gate_bias = normal({states, Hkv, D}) + 2;
  adapter.op.mix = normal({1, states});
  adapter.log_scale = normal({H});
  DslaLayerOptions options;
  options.chunked.balanced = false;
  const Tensor got = distill::DslaAttention(heads, {}, x, adapter, options).to(at::kDouble);

  const auto wide = [](const Tensor& t) { return t.to(at::kDouble); };
  const auto low_rank = [&](const Tensor& a, const Tensor& b) {
    return wide(x).matmul(wide(a).t()).matmul(wide(b).t()).view({B, T, Hkv, D});
  };
  const Tensor k = wide(heads.k_plain) + low_rank(adapter.k_a, adapter.k_b),
               v = wide(heads.v) + low_rank(adapter.v_a, adapter.v_b);
  std::vector<Tensor> gates, S;
  for (int64_t i = 0; i < states; ++i) {
    gates.push_back((low_rank(adapter.gate_a[i], adapter.gate_b[i]) + wide(adapter.op.gate_bias)[i])
                        .sigmoid()
                        .pow(1.0 / 16));
    S.push_back(at::zeros({B, Hkv, D, D}, at::kDouble));
  }
  const Tensor g = wide(adapter.op.mix).softmax(1);
  std::vector<Tensor> out;
  for (int64_t t = 0; t < T; ++t) {
    Tensor mixed = at::zeros({B, Hkv, D, D}, at::kDouble);
    for (int64_t i = 0; i < states; ++i) {
      S[i] = S[i] * gates[i].select(1, t).unsqueeze(3) +
             k.select(1, t).unsqueeze(3) * v.select(1, t).unsqueeze(2);
      mixed = mixed + S[i] * g[0][i];
    }
    const Tensor q = wide(heads.q).select(1, t).view({B, Hkv, H / Hkv, D});
    out.push_back(at::matmul(q, mixed).view({B, H, D}) *
                  wide(adapter.log_scale).exp().unsqueeze(1) / std::sqrt(double(D)));
  }
  EXPECT_LT(RelativeError(got, at::stack(out, 1).flatten(2)), 1e-5);
}

TEST(ControlsTest, KeepEqualBytes) {
  ModelConfig model = testing::TrainingModel();  // D 8
  model.max_position = 8192;
  DistillConfig config;
  config.adapter = {.window = 256, .sinks = 4, .states = 2};
  config.cosine_weight = 0.1;
  const auto control = [&](const char* name) {
    DistillConfig changed = config;
    EXPECT_TRUE(ApplyControl(name, model, &changed).ok()) << name;
    EXPECT_TRUE(CompleteConfig(model, &changed).ok()) << name;
    return changed;
  };
  EXPECT_EQ(control("ours").adapter, config.adapter);
  EXPECT_EQ(control("window").adapter.window, 256 + 2 * 8);
  EXPECT_EQ(control("window").adapter.op, Operator::kWindow);
  EXPECT_EQ(control("single-state").adapter.states, 1);
  EXPECT_EQ(control("single-state").adapter.features_per_channel, 2);
  EXPECT_EQ(control("random-order").order_method, "random");
  for (const char* paper : {"paper-recipe", "paper-operator"}) {
    const DistillConfig c = control(paper);
    EXPECT_EQ(c.adapter.window, 0);
    EXPECT_EQ(c.adapter.states, 2);
    EXPECT_EQ(c.order_method, "entropy");
    EXPECT_EQ(c.chain_method, "chained");
    EXPECT_EQ(c.kl_weight, 1);
    EXPECT_GT(c.cosine_weight, 0);
    EXPECT_EQ(c.adapter.op,
              std::string(paper) == "paper-recipe" ? Operator::kDsla : Operator::kPaper);
  }
  EXPECT_TRUE(IsControlOf("single-state", config));
  EXPECT_FALSE(IsControlOf("dual-state", config));
  EXPECT_THAT(ApplyControl("dual-state", model, &config).message(), HasSubstr("equal bytes"));
  DistillConfig single = config;
  single.adapter.states = 1;
  EXPECT_FALSE(IsControlOf("single-state", single));
  DistillConfig dual = single;
  ASSERT_TRUE(ApplyControl("dual-state", model, &dual).ok());
  EXPECT_EQ(dual.adapter.states, 2);
  EXPECT_EQ(TokenBytes(dual, model), TokenBytes(single, model));
  config.adapter.features_per_channel = 2;
  EXPECT_THAT(ApplyControl("single-state", model, &config).message(), HasSubstr("equal bytes"));
  EXPECT_THAT(ApplyControl("best", model, &config).message(),
              HasSubstr("control 'best' is not one of ours, single-state, dual-state, window"));
}

TEST(ControlsTest, RunToOneTable) {
  TempDir folder;
  testing::WriteTrainingFiles(folder);
  auto model = ModelFile::Open(folder.path() + "/m.gguf");
  ASSERT_TRUE(model.ok()) << model.status().message();
  const ExecContext ctx{.threads = 1};
  DistillJob job = testing::TrainingJob(folder.path(), "c.safetensors");
  job.config.align_tokens = 300 * 2;
  job.config.chain_tokens = 300 * 4;
  int runs = 1;
  for (int asked = 0;; ++runs) {  // cut short now and then
    ASSERT_LT(runs, 20);
    job.interrupted = [&] { return ++asked % 12 == 0; };
    const auto outcome = RunControls(ctx, **model, job, {});
    ASSERT_TRUE(outcome.ok()) << outcome.status().message();
    if (outcome->finished) break;
  }
  EXPECT_GT(runs, 2);
  const std::string at = job.out + ".controls";
  const std::string table = testing::ReadFile(at + "/controls.md");
  const auto json = nlohmann::json::parse(testing::ReadFile(at + "/controls.json"));
  std::vector<std::string> names;  // of controls of two states
  for (const Control& control : Controls())
    if (IsControlOf(control.name, job.config)) names.push_back(control.name);
  EXPECT_EQ(names.size() + 1, Controls().size());
  ASSERT_EQ(json.size(), names.size());
  for (size_t i = 0; i < json.size(); ++i) {
    const std::string& name = names[i];
    EXPECT_EQ(json[i]["control"], name);
    EXPECT_THAT(table, HasSubstr("| " + name + " |"));
    EXPECT_EQ(json[i]["token_bytes"], name.starts_with("paper") ? 16 : 8 + 2 + 16) << name;
    for (const auto& level : json[i]["evaluation"]["levels"])
      EXPECT_TRUE(std::isfinite(level["kl"].get<double>())) << name;
    // Only what can be served is exported; only what can be folded is switched.
    const bool served = name != "window" && name != "paper-operator";
    EXPECT_EQ(std::filesystem::exists(at + "/" + name + "/adapter.safetensors"), served) << name;
    EXPECT_EQ(json[i]["evaluation"]["levels"][0]["kl_switched"].is_null(),
              name == "paper-operator");
  }
  EXPECT_THAT(testing::ReadFile(at + "/controls.svg"), HasSubstr("<svg"));
  // Orders differ in their order alone.
  const auto ours = LoadCheckpoint(at + "/ours", "align"),
             random = LoadCheckpoint(at + "/random-order", "align");
  ASSERT_TRUE(ours.ok() && *ours && random.ok() && *random);
  EXPECT_EQ((*ours)->state.values, (*random)->state.values);
  EXPECT_EQ((*ours)->seconds, (*random)->seconds);
  job.ranks.ranks = 2;
  EXPECT_THAT(RunControls(ctx, **model, job, {}).status().message(), HasSubstr("one rank"));
  EXPECT_THAT(RunControls(ctx, **model, job, {"x"}).status().message(), HasSubstr("one rank"));
}

}  // namespace
}  // namespace dsla
