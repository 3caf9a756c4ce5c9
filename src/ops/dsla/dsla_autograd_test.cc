// The chunked training form against the recurrence, token by token, in fp64 under plain autograd,
// and against finite differences; its memory.
#include <ATen/core/grad_mode.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <gmock/gmock.h>

#include <memory>
#include <utility>

#include "ops/dsla/dsla_autograd_testing.h"

namespace dsla {
namespace {

std::vector<Case> Cases() {
  return {
      {},
      {.H = 3, .Hkv = 3, .F = 12, .states = 1},
      {.T = 40, .H = 6, .Hkv = 2},
      {.window = 8},
      {.window = 8, .sinks = 3},
      {.states = 1, .window = 5, .sinks = 2, .initial = true},
      {.initial = true},
      {.T = 19, .prefix = 30, .window = 8, .sinks = 3},
      {.T = 19, .prefix = 30, .window = 8, .initial = true},
      {.T = 1, .prefix = 20, .initial = true},
      {.T = 1},
      {.T = 5, .window = 8, .sinks = 2},               // nothing enters
      {.T = 5, .window = 8, .initial = true},          // likewise, over a state
      {.T = 9, .prefix = 2, .window = 8, .sinks = 2},  // one token enters
      {.T = 30, .window = 25, .sinks = 1, .chunk = 2, .segment = 2},
      {.T = 50, .window = 3, .initial = true, .chunk = 64, .segment = 1024},
      {.T = 40, .balanced = false},
      {.H = 3, .Hkv = 3, .states = 1, .window = 5, .sinks = 2, .initial = true, .balanced = false},
  };
}

// A scalar of all four outputs with fixed random weights.
Tensor Loss(const DslaChunkedResult& r) {
  at::manual_seed(kSeed + 1);
  Tensor loss = at::zeros({}, r.num.options());
  for (const Tensor& x : {r.num, r.den, r.state, r.norm}) {
    loss = loss + (x * at::randn(x.sizes(), at::kDouble).to(x.scalar_type())).sum();
  }
  return loss;
}

TEST(DslaChunked, EqualsTheRecurrence) {
  for (const Case& c : Cases()) {
    const Inputs in = MakeInputs(c);
    const DslaChunkedResult got = Chunked(c, in), want = Naive(c, in);
    ExpectTensorClose(got.num, want.num, 1e-12, c10::str("num ", c.name()));
    ExpectTensorClose(got.den, want.den, 1e-12, c10::str("den ", c.name()));
    ExpectTensorClose(got.state, want.state, 1e-12, c10::str("state ", c.name()));
    ExpectTensorClose(got.norm, want.norm, 1e-12, c10::str("norm ", c.name()));
  }
}

TEST(DslaChunked, GradientsEqualAutogradThroughTheRecurrence) {
  for (const Case& c : Cases()) {
    const Inputs in = MakeInputs(c);
    RequireGrad(in);
    const std::vector<Tensor> got = Grads(Loss(Chunked(c, in)), in.All());
    const std::vector<Tensor> want = Grads(Loss(Naive(c, in)), in.All());
    for (size_t i = 0; i < got.size(); ++i) {
      // Where nothing enters, the recurrence does not use the keys at all: their gradient is 0.
      const Tensor expected = want[i].defined() ? want[i] : at::zeros_like(in.All()[i]);
      ExpectTensorClose(got[i], expected, 1e-9, c10::str("d", Inputs::kNames[i], " ", c.name()));
    }
  }
}

TEST(DslaChunked, GradientsEqualFiniteDifferences) {
  for (const Case& c : {Case{.B = 1, .T = 21, .window = 4, .sinks = 2},
                        Case{.B = 1, .T = 21, .prefix = 6, .window = 3, .initial = true},
                        Case{.B = 1, .T = 21, .balanced = false}}) {
    const Inputs in = MakeInputs(c);
    RequireGrad(in);
    const std::vector<Tensor> all = in.All(), grads = Grads(Loss(Chunked(c, in)), all);
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < all.size(); ++i) {
      Tensor x = all[i].detach().flatten();  // shares memory with the input
      const Tensor grad = grads[i].contiguous().flatten();
      const double scale = grad.abs().max().item<double>();
      for (int64_t j = 0; j < x.numel(); j += 1 + x.numel() / 23) {
        double* value = x.data_ptr<double>() + j;
        const double saved = *value, h = 1e-5;
        *value = saved + h;
        const double up = Loss(Chunked(c, in)).item<double>();
        *value = saved - h;
        const double down = Loss(Chunked(c, in)).item<double>();
        *value = saved;
        EXPECT_NEAR(grad[j].item<double>(), (up - down) / (2 * h), 1e-7 * scale)
            << Inputs::kNames[i] << "[" << j << "] " << c.name();
      }
    }
  }
}

TEST(DslaChunked, DoesNotDependOnChunkOrSegment) {
  Case c{.T = 150, .window = 8, .sinks = 3};
  const Inputs in = MakeInputs(c);
  RequireGrad(in);
  c.chunk = 64, c.segment = 1024;
  const DslaChunkedResult want = Chunked(c, in);
  const std::vector<Tensor> want_grads = Grads(Loss(want), in.All());
  for (const auto& [chunk, segment] : {std::pair{2, 7}, {16, 16}, {32, 64}, {64, 64}, {128, 1}}) {
    c.chunk = chunk, c.segment = segment;
    const DslaChunkedResult got = Chunked(c, in);
    ExpectTensorClose(got.num, want.num, 1e-12, c.name());
    const std::vector<Tensor> grads = Grads(Loss(got), in.All());
    for (size_t i = 0; i < grads.size(); ++i)
      ExpectTensorClose(grads[i], want_grads[i], 1e-10, c10::str(Inputs::kNames[i], " ", c.name()));
  }
}

TEST(DslaChunked, OnlyTheGradientsThatAreAskedFor) {
  const Case c{.window = 8, .initial = true};
  const Inputs in = MakeInputs(c);
  for (size_t i = 0; i < in.All().size(); ++i) {
    RequireGrad(in);
    const Tensor want = Grads(Loss(Naive(c, in)), in.All())[i];
    for (const Tensor& x : in.All()) x.set_requires_grad(false);
    in.All()[i].set_requires_grad(true);
    ExpectTensorClose(Grads(Loss(Chunked(c, in)), {in.All()[i]})[0], want, 1e-9, Inputs::kNames[i]);
  }
  // A loss of one output only: the others' gradients are undefined in the backward pass.
  RequireGrad(in);
  for (int output = 0; output < 4; ++output) {
    auto pick = [&](const DslaChunkedResult& r) {
      return (output == 0   ? r.num
              : output == 1 ? r.den
              : output == 2 ? r.state
                            : r.norm)
          .square()
          .sum();
    };
    const auto got = Grads(pick(Chunked(c, in)), in.All()),
               want = Grads(pick(Naive(c, in)), in.All());
    for (size_t i = 0; i < got.size(); ++i)
      ExpectTensorClose(got[i], want[i].defined() ? want[i] : at::zeros_like(in.All()[i]), 1e-9,
                        c10::str(output, " ", Inputs::kNames[i]));
  }
}

// Chunks of 64 with every gate at a floor whose half-chunk sum is e^72 and e^80: the exponents of
// fp32 hold it.
TEST(DslaChunked, GatesAtTheFloor) {
  for (const double floor : {-2.25, -2.5}) {
    const Case c{.B = 1, .T = 200, .D = 16, .F = 16, .window = 8, .chunk = 64};
    const Inputs in = MakeInputs(c, at::kFloat, floor), exact = ToDouble(in);
    RequireGrad(in);
    RequireGrad(exact);
    const DslaChunkedResult got = Chunked(c, in), want = Naive(c, exact);
    ExpectTensorClose(got.num, want.num, 2e-5, "num");
    ExpectTensorClose(got.den, want.den, 2e-5, "den");
    const auto grads = Grads(Loss(got), in.All()), want_grads = Grads(Loss(want), exact.All());
    for (size_t i = 0; i < grads.size(); ++i)
      ExpectTensorClose(grads[i], want_grads[i], 1e-4, Inputs::kNames[i]);
  }
}

TEST(DslaChunked, ErrorsAreThoseOfTheOperandType) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const Case c{
        .T = 512, .H = 6, .Hkv = 2, .D = 32, .F = 32, .window = 8, .sinks = 2, .chunk = 64};
    const Inputs in = MakeInputs(c, type), exact = ToDouble(in);
    RequireGrad(in);
    RequireGrad(exact);
    const DslaChunkedResult got = Chunked(c, in), want = Naive(c, exact);
    EXPECT_EQ(got.num.scalar_type(), at::kFloat);
    const bool bf16 = type == at::kBFloat16;
    // bf16 keeps 8 bits: two rounded factors give an error of 2-3e-3. Much less would mean that the
    // operands were not rounded.
    for (const double error :
         {RelativeRms(got.num, want.num), RelativeRms(got.state, want.state)}) {
      EXPECT_LT(error, bf16 ? 3.5e-3 : 1e-6);
      if (bf16) {
        EXPECT_GT(error, 5e-4);
      }
    }
    const auto grads = Grads(Loss(got), in.All()), want_grads = Grads(Loss(want), exact.All());
    for (size_t i = 0; i < grads.size(); ++i) {
      EXPECT_EQ(grads[i].scalar_type(), in.All()[i].scalar_type());
      const double error = RelativeRms(grads[i], want_grads[i]);
      EXPECT_LT(error, bf16 ? 6e-3 : 3e-6) << Inputs::kNames[i];
    }
  }
}
// Counts the CPU allocations of a thread.
class Meter : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override {
    live_ += size;
    peak_ = std::max(peak_, live_);
  }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t live() const { return live_; }
  int64_t TakePeak() { return std::exchange(peak_, live_); }

 private:
  int64_t live_ = 0, peak_ = 0;
};

int64_t Bytes(const std::vector<Tensor>& tensors) {
  int64_t bytes = 0;
  for (const Tensor& x : tensors) bytes += static_cast<int64_t>(x.nbytes());
  return bytes;
}

// The function saves its inputs and nothing else; what it needs while it runs does not grow with
// the sequence, and is far from a state per token (T * states F * D).
TEST(DslaChunked, Memory) {
  std::vector<int64_t> forward_temporaries, backward_temporaries;
  for (const int64_t T : {2048, 4096}) {
    const Case c{.B = 1,
                 .T = T,
                 .H = 2,
                 .Hkv = 1,
                 .D = 16,
                 .F = 16,
                 .window = 64,
                 .sinks = 4,
                 .chunk = 64,
                 .segment = 256};
    const Inputs in = MakeInputs(c, at::kFloat);
    RequireGrad(in);
    const auto meter = std::make_shared<Meter>();
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, meter);
    const DslaChunkedResult r = Chunked(c, in);
    const int64_t outputs = Bytes({r.num, r.den, r.state, r.norm});
    EXPECT_GE(meter->live(), outputs);
    EXPECT_LE(meter->live(), outputs + 4096) << "saved besides the inputs";
    forward_temporaries.push_back(meter->TakePeak() - outputs);
    const Tensor loss = r.num.sum() + r.den.sum();
    const int64_t before = meter->live();
    meter->TakePeak();
    const std::vector<Tensor> grads = Grads(loss, in.All());
    backward_temporaries.push_back(meter->TakePeak() - before - Bytes(grads));
    const int64_t state_per_token = T * c.states * c.F * c.D * 4;
    EXPECT_LT(forward_temporaries.back(), state_per_token / 4);
    EXPECT_LT(backward_temporaries.back(), state_per_token / 2);
  }
  EXPECT_LT(forward_temporaries[1], 1.1 * forward_temporaries[0]);
  EXPECT_LT(backward_temporaries[1], 1.1 * backward_temporaries[0]);
}

TEST(DslaChunked, RefusesWhatDoesNotFit) {
  const Case c{.initial = true};
  const Inputs in = MakeInputs(c);
  auto error = [&](auto&& change, DslaChunkedOptions options = {}) -> std::string {
    Inputs x = in;
    change(x);
    try {
      DslaChunked(x.phi_q, x.mix, x.phi_k, x.a, x.v, x.state, x.norm, options);
    } catch (const c10::Error& e) {
      return e.what_without_backtrace();
    }
    return "none";
  };
  using ::testing::HasSubstr;
  auto nothing = [](Inputs&) {};
  EXPECT_EQ(error(nothing), "none");
  EXPECT_THAT(error([](Inputs& x) { x.v = x.v.narrow(1, 1, 5); }), HasSubstr("v is [2, 5, 2, 6]"));
  EXPECT_THAT(error([](Inputs& x) { x.a = x.a.to(at::kFloat); }), HasSubstr("a is Float"));
  EXPECT_THAT(error([](Inputs& x) { x.phi_q = x.phi_q.narrow(2, 0, 3); }),
              HasSubstr("3 query heads are no multiple of 2 KV heads"));
  EXPECT_THAT(error([](Inputs& x) { x.norm = Tensor(); }), HasSubstr("given together"));
  EXPECT_THAT(error([](Inputs& x) { x.phi_k = x.phi_k.narrow(1, 0, 3); }),
              HasSubstr("3 keys for 37 queries"));
  EXPECT_THAT(error([](Inputs& x) { x.mix = Tensor(); }), HasSubstr("mix is not given"));
  EXPECT_THAT(error(nothing, {.chunk = 63}), HasSubstr("chunk must be even"));
  EXPECT_THAT(error(nothing, {.window = -1}), HasSubstr("window -1"));

  RequireGrad(in);
  EXPECT_THROW(torch::autograd::grad({Loss(Chunked(c, in))}, in.All(), {}, std::nullopt,
                                     /*create_graph=*/true),
               c10::Error);
}

}  // namespace
}  // namespace dsla
