// What the tests of dsla_autograd.h share: cases, the plain recurrence, comparisons.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdio>
#include <string>
#include <vector>

#include "ops/dsla/dsla_autograd.h"
#include "ops/testing/expect_close.h"

namespace dsla {

using at::Tensor;
inline constexpr uint64_t kSeed = 20250731;

inline std::span<const double> Values(const Tensor& x) {
  return {x.const_data_ptr<double>(), static_cast<size_t>(x.numel())};
}

// Compares as ExpectClose does; shapes too.
inline void ExpectTensorClose(const Tensor& got, const Tensor& want, double tolerance,
                              const std::string& what) {
  SCOPED_TRACE(what);
  ASSERT_TRUE(got.defined() && want.defined());
  ASSERT_EQ(got.sizes().vec(), want.sizes().vec());
  const Tensor g = got.detach().to(at::kDouble).contiguous(),
               w = want.detach().to(at::kDouble).contiguous();
  EXPECT_TRUE(IsClose(Values(g), Values(w), Tolerance{tolerance}));
}

inline double RelativeRms(const Tensor& got, const Tensor& want) {
  const Tensor w = want.detach().to(at::kDouble);
  return ((got.detach().to(at::kDouble) - w).norm() / w.norm()).item<double>();
}

struct Case {
  int64_t B = 2, T = 37, prefix = 0, H = 4, Hkv = 2, D = 6, F = 6, states = 2, window = 0,
          sinks = 0;
  bool initial = false;
  int64_t chunk = 8, segment = 16;
  bool balanced = true;

  DslaChunkedOptions options() const { return {window, sinks, chunk, segment, balanced}; }
  std::string name() const {
    return c10::str("T=", T, " prefix=", prefix, " H=", H, " Hkv=", Hkv, " F=", F,
                    " states=", states, " W=", window, " S=", sinks, " initial=", initial,
                    " chunk=", chunk, " segment=", segment, " balanced=", balanced);
  }
};

struct Inputs {
  Tensor phi_q, mix, phi_k, a, v, state, norm;

  std::vector<Tensor> All() const {
    std::vector<Tensor> all = {phi_q, mix, phi_k, a, v};
    if (state.defined()) all.insert(all.end(), {state, norm});
    return all;
  }
  static constexpr const char* kNames[] = {"phi_q", "mix", "phi_k", "a", "v", "state", "norm"};
};

// As in a model: features are positive and sum to one, gates lie between the floor and near 0.
inline Inputs MakeInputs(const Case& c, at::ScalarType operand = at::kDouble, double floor = 0) {
  at::manual_seed(kSeed);
  const auto f64 = at::TensorOptions(at::kDouble);
  const at::ScalarType sum = operand == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t TK = c.T + c.prefix;
  Inputs in;
  in.phi_q = at::randn({c.B, c.T, c.H, c.F}, f64).softmax(-1).to(operand);
  in.mix = at::randn({c.H, c.states}, f64).softmax(-1).to(sum);
  in.phi_k = at::randn({c.B, TK, c.Hkv, c.F}, f64).softmax(-1).to(operand);
  in.a = floor < 0 ? at::full({c.B, TK, c.Hkv, c.states, c.F}, floor, f64).to(sum)
                   : (at::randn({c.B, TK, c.Hkv, c.states, c.F}, f64) * 1.5 - 2)
                         .exp()
                         .neg()
                         .clamp_min(-2.25)
                         .to(sum);
  in.v = at::randn({c.B, TK, c.Hkv, c.D}, f64).to(operand);
  if (c.initial) {
    in.state = at::randn({c.B, c.Hkv, c.states * c.F, c.D}, f64).to(sum);
    in.norm = at::rand({c.B, c.Hkv, c.states * c.F}, f64).to(sum);
  }
  return in;
}

inline Inputs ToDouble(const Inputs& x) {
  auto f64 = [](const Tensor& t) { return t.defined() ? t.detach().to(at::kDouble) : t; };
  return {f64(x.phi_q), f64(x.mix), f64(x.phi_k), f64(x.a), f64(x.v), f64(x.state), f64(x.norm)};
}

inline void RequireGrad(const Inputs& in) {
  for (const Tensor& x : in.All()) x.set_requires_grad(true);
}

inline DslaChunkedResult Chunked(const Case& c, const Inputs& in) {
  return DslaChunked(in.phi_q, in.mix, in.phi_k, in.a, in.v, in.state, in.norm, c.options());
}

// The recurrence of dsla.h, one token after another.
inline DslaChunkedResult Naive(const Case& c, const Inputs& in) {
  const int64_t G = c.H / c.Hkv, K = c.states * c.F;
  Tensor S = in.state.defined() ? in.state : at::zeros({c.B, c.Hkv, K, c.D}, in.v.options());
  Tensor z = in.norm.defined() ? in.norm : at::zeros({c.B, c.Hkv, K}, in.v.options());
  std::vector<Tensor> num, den;
  for (int64_t t = 0; t < c.prefix + c.T; ++t) {
    const int64_t s = t - c.window;
    if (s >= c.sinks) {
      const Tensor keep = in.a.select(1, s).exp();  // [B, Hkv, states, F]
      const Tensor entering = c.balanced ? 1 - keep : at::ones_like(keep);
      const Tensor k = (entering * in.phi_k.select(1, s).unsqueeze(2)).flatten(2);
      S = S * keep.flatten(2).unsqueeze(3) + k.unsqueeze(3) * in.v.select(1, s).unsqueeze(2);
      z = z * keep.flatten(2) + k;
    }
    if (t < c.prefix) continue;
    const Tensor q = (in.phi_q.select(1, t - c.prefix).unsqueeze(2) * in.mix.unsqueeze(2))
                         .flatten(2)
                         .view({c.B, c.Hkv, G, K});
    num.push_back(at::matmul(q, S).view({c.B, c.H, c.D}));
    den.push_back(at::matmul(q, z.unsqueeze(3)).view({c.B, c.H}));
  }
  return {at::stack(num, 1), at::stack(den, 1), S, z};
}

inline std::vector<Tensor> Grads(const Tensor& loss, const std::vector<Tensor>& inputs) {
  return torch::autograd::grad({loss}, inputs, {}, /*retain_graph=*/true, false,
                               /*allow_unused=*/true);
}

// The gradients of got and want, both functions of `inputs`, agree.
inline void ExpectSameGradients(const Tensor& got, const Tensor& want,
                                const std::vector<Tensor>& inputs, double tolerance,
                                const std::string& what) {
  ExpectTensorClose(got, want, tolerance, what);
  at::manual_seed(kSeed + 2);
  const Tensor weights = at::randn(got.sizes(), at::kDouble).to(got.scalar_type());
  const auto got_grads = Grads((got * weights).sum(), inputs),
             want_grads = Grads((want * weights.to(want.scalar_type())).sum(), inputs);
  for (size_t i = 0; i < inputs.size(); ++i)
    ExpectTensorClose(got_grads[i], want_grads[i], tolerance, c10::str(what, " input ", i));
}

// Small tensors: threads would only wait for each other.
class OneThread : public ::testing::Environment {
  void SetUp() override {
    at::set_num_threads(1);
    std::printf("seed %llu\n", static_cast<unsigned long long>(kSeed));
  }
};
inline const auto* const kOneThread = ::testing::AddGlobalTestEnvironment(new OneThread);

}  // namespace dsla
