// The training form on a GPU in bf16, FlashAttention's window included, against fp64 on the CPU.
// Skipped where libtorch's CUDA part or a GPU is not there.
#include <ATen/Context.h>
#include <dlfcn.h>

#include <filesystem>

#include "ops/dsla/dsla_autograd_testing.h"

namespace dsla {
namespace {

bool HasGpu() {
  Dl_info cpu_part{};
  if (::dladdr(reinterpret_cast<void*>(&at::globalContext), &cpu_part) == 0) return false;
  const auto folder = std::filesystem::path(cpu_part.dli_fname).parent_path();
  return ::dlopen((folder / "libtorch_cuda.so").c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr &&
         at::hasCUDA() && at::getNumGPUs() > 0;
}

// The relative error; absolute where nothing is expected, as of the mix of a single state.
double Error(const Tensor& got, const Tensor& want) {
  if (want.count_nonzero().item<int64_t>() > 0) return RelativeRms(got, want);
  return got.to(at::kDouble).square().mean().sqrt().item<double>();
}

struct LayerCase {
  int64_t B, T, prefix, H, Hkv, D, F, states, window, sinks;
  int64_t chunk = 64;  // fused kernels know 64 alone
};

class AutogradGpuTest : public ::testing::TestWithParam<LayerCase> {
 protected:
  void SetUp() override {
    if (!HasGpu()) GTEST_SKIP() << "no GPU, or no CUDA part of libtorch";
  }
};

TEST_P(AutogradGpuTest, LayerAndGradientsAsInFp64) {
  const LayerCase c = GetParam();
  at::manual_seed(kSeed);
  const auto f64 = at::TensorOptions(at::kDouble);
  const int64_t TK = c.T + c.prefix;
  // Rounded to bf16 first, so that both sides start from the same numbers.
  const auto operand = [&](at::IntArrayRef shape) {
    return at::randn(shape, f64).to(at::kBFloat16).to(at::kDouble);
  };
  std::vector<Tensor> reference = {operand({c.B, c.T, c.H, c.D}), operand({c.B, TK, c.Hkv, c.D}),
                                   operand({c.B, TK, c.Hkv, c.D})};
  const Tensor k_plain = operand({c.B, TK, c.Hkv, c.D});
  const auto parameter = [&](at::IntArrayRef shape, double scale, double mean) {
    reference.push_back((at::randn(shape, f64) * scale + mean).to(at::kFloat).to(at::kDouble));
  };
  parameter({c.H, c.D, c.D}, 0.3, 0);
  parameter({c.Hkv, c.D, c.D}, 0.3, 0);
  parameter({c.states, c.Hkv, c.D, c.F}, 0.1, 0);
  parameter({c.states, c.Hkv, c.F}, 2, 0);
  parameter({c.H, c.states}, 0.5, 0);
  if (c.window > 0) parameter({c.B, c.T, c.H}, 1, 3);
  const Tensor weights = operand({c.B, c.T, c.H, c.D});

  const auto run = [&](bool gpu, Tensor* out) {
    std::vector<Tensor> inputs;
    for (size_t i = 0; i < reference.size(); ++i) {
      Tensor x = reference[i];
      if (gpu) x = x.to(at::kCUDA, i < 3 ? at::kBFloat16 : at::kFloat);
      inputs.push_back(x.detach().set_requires_grad(true));
    }
    const DslaLayerParams params{inputs[3], inputs[4], inputs[5], inputs[6], inputs[7]};
    const Tensor plain = gpu ? k_plain.to(at::kCUDA, at::kBFloat16) : k_plain;
    *out = DslaLayer(inputs[0], inputs[1], plain, inputs[2], c.window > 0 ? inputs[8] : Tensor(),
                     params, {.chunked = {.window = c.window, .sinks = c.sinks, .chunk = c.chunk}});
    const Tensor w = weights.to(out->device(), out->scalar_type());
    return Grads((*out * w).sum(), inputs);
  };
  Tensor want, got;
  const std::vector<Tensor> want_grads = run(false, &want), got_grads = run(true, &got);
  // Operands of 8 bits, 2^-9 each, through three products and a backward pass.
  EXPECT_LT(RelativeRms(got.cpu(), want), 1e-2);
  const char* const names[] = {"q",           "k",         "v",   "phi_q", "phi_k",
                               "gate_weight", "gate_bias", "mix", "claim"};
  for (size_t i = 0; i < want_grads.size(); ++i) {
    const double error = Error(got_grads[i].cpu(), want_grads[i]);
    std::printf("%s %.4f\n", names[i], error);
    EXPECT_LT(error, 3e-2) << names[i];
  }
}

// Without gradients of what the teacher's weights made, as the first stage of training runs.
TEST_P(AutogradGpuTest, ParametersAlone) {
  const LayerCase c = GetParam();
  at::manual_seed(kSeed);
  const auto bf16 = at::TensorOptions(at::kBFloat16).device(at::kCUDA);
  const auto fp32 = bf16.dtype(at::kFloat);
  const int64_t TK = c.T + c.prefix;
  const Tensor q = at::randn({c.B, c.T, c.H, c.D}, bf16),
               k = at::randn({c.B, TK, c.Hkv, c.D}, bf16),
               v = at::randn({c.B, TK, c.Hkv, c.D}, bf16), weights = at::randn_like(q);
  const Tensor claim = c.window > 0 ? at::randn({c.B, c.T, c.H}, fp32) : Tensor();
  const auto grads = [&](bool inputs) {
    at::manual_seed(kSeed);
    const auto leaf = [&](at::IntArrayRef shape) {
      return (at::randn(shape, fp32) * 0.3).set_requires_grad(true);
    };
    const std::vector<Tensor> leaves = {leaf({c.H, c.D, c.D}), leaf({c.Hkv, c.D, c.D}),
                                        leaf({c.states, c.Hkv, c.D, c.F}),
                                        leaf({c.states, c.Hkv, c.F}), leaf({c.H, c.states})};
    const auto given = [&](const Tensor& x) {
      return x.detach().clone().set_requires_grad(inputs);
    };
    const Tensor out =
        DslaLayer(given(q), given(k), k, given(v), claim,
                  {leaves[0], leaves[1], leaves[2], leaves[3], leaves[4]},
                  {.chunked = {.window = c.window, .sinks = c.sinks, .chunk = c.chunk}});
    return Grads((out * weights).sum(), leaves);
  };
  const std::vector<Tensor> with = grads(true), without = grads(false);
  for (size_t i = 0; i < with.size(); ++i) EXPECT_TRUE(at::equal(with[i], without[i])) << i;
}

INSTANTIATE_TEST_SUITE_P(Shapes, AutogradGpuTest,
                         ::testing::Values(LayerCase{2, 200, 0, 4, 2, 64, 64, 2, 32, 4},
                                           LayerCase{2, 200, 0, 4, 2, 64, 64, 2, 32, 4, 32},
                                           LayerCase{1, 300, 130, 6, 2, 64, 128, 2, 64, 4},
                                           LayerCase{1, 300, 130, 6, 2, 64, 128, 2, 64, 4, 32},
                                           LayerCase{2, 250, 0, 4, 4, 128, 128, 1, 100, 0},
                                           LayerCase{1, 150, 0, 4, 1, 128, 256, 2, 20, 8},
                                           LayerCase{2, 200, 0, 3, 1, 64, 64, 2, 0, 0},
                                           LayerCase{3, 129, 64, 9, 3, 64, 64, 1, 256, 4},
                                           LayerCase{1, 1, 0, 3, 1, 64, 64, 2, 16, 4},
                                           LayerCase{1, 1, 200, 3, 1, 64, 64, 2, 16, 4},
                                           LayerCase{2, 100, 0, 3, 1, 64, 64, 2, 128, 4}));

}  // namespace
}  // namespace dsla
