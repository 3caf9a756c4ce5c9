// What the trainer's kernels compute on a GPU, against libtorch on the CPU from the same numbers.
// Skipped where libtorch's CUDA part, a GPU or the kernels are not there.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "distill/torch_device.h"
#include "distill/torch_layers.h"
#include "distill/torch_loss.h"

namespace dsla::distill {
namespace {

constexpr int64_t kSeed = 3;

double RelativeRms(const Tensor& got, const Tensor& want) {
  const Tensor d = got.cpu().to(at::kDouble) - want.to(at::kDouble);
  return (d.square().sum() / want.to(at::kDouble).square().sum()).sqrt().item<double>();
}

class TorchGpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto device = OpenDevice("cuda");
    if (!device.ok()) GTEST_SKIP() << device.status().message();
    const auto bf16 = at::TensorOptions(at::kBFloat16).device(*device);
    if (!HasTrainingKernels(at::empty({1}, bf16))) GTEST_SKIP() << "no training kernels";
    at::manual_seed(kSeed);
  }
  // Random numbers that bf16 holds, on the CPU in fp32.
  static Tensor Random(at::IntArrayRef shape, double scale = 1) {
    return (at::randn(shape) * scale).to(at::kBFloat16).to(at::kFloat);
  }
  static Tensor ToGpu(const Tensor& x) { return x.to(at::kCUDA, at::kBFloat16); }
};

TEST_F(TorchGpuTest, KlAndItsGradient) {
  const int64_t B = 2, T = 70, C = 64, V = 1000;
  const Tensor head = Random({V, C}, 0.5), hidden = Random({B, T, C}), teacher = Random({B, T, C});
  const Tensor counted = at::rand({B, T}).gt(0.3).to(at::kFloat);
  Tensor want_gradient, gradient;
  const Tensor want = KlGradient(head, hidden, teacher, counted, 0, 0.7, &want_gradient);
  const Tensor got = KlGradient(ToGpu(head), ToGpu(hidden), ToGpu(teacher), counted.to(at::kCUDA),
                                0, 0.7, &gradient);
  // Logits are bf16 there: 2^-9 of numbers around 4.
  EXPECT_LT(RelativeRms(got, want), 5e-3);
  EXPECT_LT(RelativeRms(gradient, want_gradient), 2e-2);
}

TEST_F(TorchGpuTest, NormalisedErrorAndItsGradient) {
  const Tensor y = Random({3, 50, 64}), o = Random({3, 50, 64});
  for (const Tensor& counted : {Tensor(), at::rand({3, 50}).gt(0.5).to(at::kFloat)}) {
    Tensor want_gradient, gradient;
    const Tensor want = NormalisedError(y, o, counted, nullptr, &want_gradient);
    const Tensor got =
        NormalisedError(ToGpu(y), ToGpu(o), counted.defined() ? counted.to(at::kCUDA) : counted,
                        nullptr, &gradient);
    EXPECT_LT(RelativeRms(got, want), 1e-5);
    EXPECT_LT(RelativeRms(gradient, want_gradient), 3e-3);
  }
}

TEST_F(TorchGpuTest, MlpAndRope) {
  const int64_t C = 64, ffn = 96;
  Teacher teacher;
  teacher.config.norm_eps = 1e-5f;
  TeacherLayer layer, on_gpu;
  layer.mlp_norm = Random({C}), layer.gate_up = Random({2 * ffn, C}, 0.3);
  layer.down = Random({C, ffn}, 0.3);
  on_gpu.mlp_norm = ToGpu(layer.mlp_norm), on_gpu.gate_up = ToGpu(layer.gate_up);
  on_gpu.down = ToGpu(layer.down);
  const Tensor x = Random({2, 33, C}), d = Random({2, 33, C});
  const Tensor want_x = x.clone().set_requires_grad(true), got_x = ToGpu(x).set_requires_grad(true);
  const Tensor want = MlpBlock(teacher, layer, want_x), got = MlpBlock(teacher, on_gpu, got_x);
  torch::autograd::backward({want}, {d});
  torch::autograd::backward({got}, {ToGpu(d)});
  EXPECT_LT(RelativeRms(got.detach(), want.detach()), 1e-2);
  EXPECT_LT(RelativeRms(got_x.grad(), want_x.grad()), 1e-2);

  const Tensor angle = at::randn({33, 8}), heads = Random({2, 33, 4, 16});
  // A view of wider rows, as projections are.
  const Tensor wide = at::cat({heads, heads}, 2).narrow(2, 4, 4);
  for (const bool inverse : {false, true}) {
    const Tensor turned = DslaRope(ToGpu(wide.contiguous()), angle.cos().to(at::kCUDA),
                                   angle.sin().to(at::kCUDA), inverse),
                 strided = DslaRope(ToGpu(at::cat({heads, heads}, 2)).narrow(2, 4, 4),
                                    angle.cos().to(at::kCUDA), angle.sin().to(at::kCUDA), inverse);
    EXPECT_LT(RelativeRms(turned, DslaRope(heads, angle.cos(), angle.sin(), inverse)), 3e-3);
    EXPECT_TRUE(at::equal(turned, strided));
  }
}

}  // namespace
}  // namespace dsla::distill
