// The parts of a layer's operator around the states: features, gates, RoPE, window attention,
// merge.
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/softmax.h>

#include "ops/dsla/dsla_autograd.h"
#include "ops/dsla/dsla_autograd_fused.h"
#include "ops/dsla/dsla_autograd_util.h"

namespace dsla {
namespace autograd {
namespace {

constexpr double kEpsilon = 1e-6;  // kDslaEpsilon of dsla.h
constexpr double kGateDivisor = 16;

class FeaturesFunction : public torch::autograd::Function<FeaturesFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& u, const Tensor& map, bool two_sided) {
    const Tensor y =
        FromPerHead(Product(PerHead(u), map.to(u.scalar_type())), u.size(0), u.size(1));
    Tensor phi = y.softmax(-1);
    if (two_sided) phi = at::cat({phi, y.neg().softmax(-1)}, -1);
    phi = phi.to(u.scalar_type()).contiguous();
    ctx->save_for_backward({u, map, phi});  // the chunked form saves phi too: no memory of our own
    return phi;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    CheckOnce("dsla features");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &u = saved[0], &map = saved[1];
    const int64_t D = u.size(3);
    const Tensor phi = saved[2].to(SumType(u));
    const Tensor weighted = phi * grads[0];
    Tensor dy = SoftmaxGrad(phi, weighted, 0, D);
    if (phi.size(3) == 2 * D) dy.sub_(SoftmaxGrad(phi, weighted, D, D));
    const Tensor dy_heads = PerHead(dy.to(u.scalar_type()));
    Tensor du, dmap;
    if (ctx->needs_input_grad(0)) {
      du = FromPerHead(Product(dy_heads, map.to(u.scalar_type()).transpose(1, 2)), u.size(0),
                       u.size(1))
               .to(u.scalar_type());
    }
    if (ctx->needs_input_grad(1)) dmap = Product(PerHead(u).transpose(1, 2), dy_heads);
    return {du, dmap, Tensor()};
  }

 private:
  // p dp - p sum(p dp) over the features [begin, begin + D).
  static Tensor SoftmaxGrad(const Tensor& phi, const Tensor& weighted, int64_t begin, int64_t D) {
    const Tensor p = phi.narrow(3, begin, D), w = weighted.narrow(3, begin, D);
    return w - p * w.sum(3, /*keepdim=*/true);
  }
};

class GatesFunction : public torch::autograd::Function<GatesFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& k, const Tensor& weight,
                        const Tensor& bias, double floor) {
    const int64_t states = weight.size(0), Hkv = weight.size(1), F = weight.size(3);
    Tensor z = Product(PerHead(k).to(weight.scalar_type()), JoinStates(weight));
    z.add_(bias.transpose(0, 1).reshape({Hkv, 1, states * F}));
    const Tensor a =
        FromPerHead(at::log_sigmoid(z).div_(kGateDivisor).clamp_min_(floor), k.size(0), k.size(1))
            .contiguous()
            .unflatten(3, {states, F});
    ctx->save_for_backward({k, weight, a});  // a is saved by the chunked form too
    ctx->saved_data["floor"] = floor;
    return a;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    CheckOnce("dsla gates");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &k = saved[0], &weight = saved[1], &a = saved[2];
    const int64_t states = weight.size(0), F = weight.size(3);
    // e^{16 a} = sigmoid(z), so d a / d z = sigmoid(-z) / 16 = -expm1(16 a) / 16 without z.
    Tensor dz = (a * kGateDivisor).expm1_().mul_(grads[0]).mul_(-1 / kGateDivisor);
    // The floor as a was clamped to it, in a's type.
    const double floor = ctx->saved_data["floor"].toDouble();
    dz.masked_fill_(a.le(at::full({}, floor, a.options())), 0);
    const Tensor dz_heads = PerHead(dz.flatten(3));  // [Hkv, B T, states F]
    Tensor dk, dweight;
    if (ctx->needs_input_grad(0)) {
      dk = FromPerHead(Product(dz_heads, JoinStates(weight).transpose(1, 2)), k.size(0), k.size(1))
               .to(k.scalar_type());
    }
    if (ctx->needs_input_grad(1)) {
      dweight = Product(PerHead(k).to(weight.scalar_type()).transpose(1, 2), dz_heads)
                    .unflatten(2, {states, F})
                    .permute({2, 0, 1, 3});
    }
    const Tensor dbias = dz_heads.sum(1).unflatten(1, {states, F}).transpose(0, 1);
    return {dk, dweight, dbias, Tensor()};
  }
};

Tensor Rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  if (FusedRopeTakes(x)) return FusedRotate(x, cos, sin, inverse);
  const int64_t half = x.size(3) / 2;
  const Tensor x1 = x.narrow(3, 0, half), x2 = x.narrow(3, half, half);
  const Tensor c = cos.unsqueeze(1), s = inverse ? sin.unsqueeze(1).neg() : sin.unsqueeze(1);
  return at::cat({x1 * c - x2 * s, x2 * c + x1 * s}, 3).to(x.scalar_type());
}

class RopeFunction : public torch::autograd::Function<RopeFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& cos, const Tensor& sin,
                        bool inverse) {
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["inverse"] = inverse;
    return Rotate(x, cos, sin, inverse);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    CheckOnce("dsla rope");
    const variable_list saved = ctx->get_saved_variables();
    // A rotation's transpose is its inverse.
    return {Rotate(grads[0], saved[0], saved[1], !ctx->saved_data["inverse"].toBool()), Tensor(),
            Tensor(), Tensor()};
  }
};

class MergeFunction : public torch::autograd::Function<MergeFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& num, const Tensor& den,
                        const std::optional<Tensor>& given_win,
                        const std::optional<Tensor>& given_lse,
                        const std::optional<Tensor>& given_claim) {
    const Tensor win = given_win.value_or(Tensor()), lse = given_lse.value_or(Tensor()),
                 claim = given_claim.value_or(Tensor());
    ctx->save_for_backward({num, den, win, lse, claim});
    const Tensor lin = num / (den + kEpsilon).unsqueeze(3);
    if (!win.defined()) return lin;
    const Tensor w = Share(den, lse, claim).unsqueeze(3);
    return (lin - win).mul_(w).add_(win);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    CheckOnce("dsla merge");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &num = saved[0], &den = saved[1], &win = saved[2];
    const Tensor inverse = (den + kEpsilon).reciprocal().unsqueeze(3);
    const Tensor lin = num * inverse;
    Tensor dlin = grads[0], dwin, dclaim, dlse;
    if (win.defined()) {
      const Tensor w = Share(den, saved[3], saved[4]);
      dwin = grads[0] * (1 - w).unsqueeze(3);
      dclaim = (grads[0] * (lin - win)).sum(3).mul_(w).mul_(1 - w);
      dlse = dclaim.neg();
      dlin = grads[0] * w.unsqueeze(3);
    }
    const Tensor dnum = dlin * inverse;
    const Tensor dden = (dnum * lin).sum(3).neg();
    return {dnum, dden, dwin, dlse, dclaim};
  }

 private:
  static Tensor Share(const Tensor& den, const Tensor& lse, const Tensor& claim) {
    return (claim - lse).sigmoid_().masked_fill_(den.lt(kEpsilon), 0);
  }
};

}  // namespace
}  // namespace autograd

using autograd::CheckOperand;
using autograd::CheckTensor;
using autograd::SumType;

at::Tensor DslaFeatures(const at::Tensor& u, const at::Tensor& map, bool two_sided) {
  CheckOperand("dsla features", "u", u, 4);
  const int64_t D = u.size(3);
  CheckTensor("dsla features", "map", map, {u.size(2), D, D}, SumType(u), u);
  return autograd::FeaturesFunction::apply(u, map, two_sided);
}

at::Tensor DslaGates(const at::Tensor& k, const at::Tensor& weight, const at::Tensor& bias,
                     double floor) {
  constexpr char kOp[] = "dsla gates";
  CheckOperand(kOp, "k", k, 4);
  CheckOperand(kOp, "weight", weight, 4);
  const int64_t states = weight.size(0), F = weight.size(3);
  CheckTensor(kOp, "weight", weight, {states, k.size(2), k.size(3), F}, SumType(k), k);
  CheckTensor(kOp, "bias", bias, {states, k.size(2), F}, SumType(k), k);
  TORCH_CHECK(floor < 0, kOp, ": floor ", floor, ", expected below 0");
  return autograd::GatesFunction::apply(k, weight, bias, floor);
}

at::Tensor DslaRope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                    bool inverse) {
  constexpr char kOp[] = "dsla rope";
  CheckOperand(kOp, "x", x, 4);
  TORCH_CHECK(x.size(3) % 2 == 0, kOp, ": head dimension ", x.size(3), " is odd");
  CheckTensor(kOp, "cos", cos, {x.size(1), x.size(3) / 2}, SumType(x), x);
  CheckTensor(kOp, "sin", sin, {x.size(1), x.size(3) / 2}, SumType(x), x);
  return autograd::RopeFunction::apply(x, cos, sin, inverse);
}

at::Tensor DslaMerge(const at::Tensor& num, const at::Tensor& den, const at::Tensor& win,
                     const at::Tensor& lse, const at::Tensor& claim) {
  constexpr char kOp[] = "dsla merge";
  CheckOperand(kOp, "num", num, 4);
  const at::IntArrayRef heads = num.sizes().slice(0, 3);
  const at::ScalarType sum = SumType(num);
  CheckTensor(kOp, "num", num, num.sizes(), sum, num);
  CheckTensor(kOp, "den", den, heads, sum, num);
  TORCH_CHECK(win.defined() == lse.defined() && win.defined() == claim.defined(), kOp,
              ": win, lse and claim must be given together or not at all");
  if (win.defined()) {
    CheckTensor(kOp, "win", win, num.sizes(), sum, num);
    CheckTensor(kOp, "lse", lse, heads, sum, num);
    CheckTensor(kOp, "claim", claim, heads, sum, num);
  }
  return autograd::MergeFunction::apply(num, den, autograd::Given(win), autograd::Given(lse),
                                        autograd::Given(claim));
}

at::Tensor DslaLayer(const at::Tensor& q, const at::Tensor& k, const at::Tensor& k_plain,
                     const at::Tensor& v, const at::Tensor& claim, const DslaLayerParams& params,
                     const DslaLayerOptions& options) {
  constexpr char kOp[] = "dsla layer";
  CheckOperand(kOp, "q", q, 4);
  CheckOperand(kOp, "gate_weight", params.gate_weight, 4);
  CheckOperand(kOp, "mix", params.mix, 2);
  const int64_t D = q.size(3), F = params.gate_weight.size(3), W = options.chunked.window;
  TORCH_CHECK(F == D || F == 2 * D, kOp, ": ", F, " features per state, expected ", D, " or ",
              2 * D);
  TORCH_CHECK(W > 0 || options.chunked.sinks == 0, kOp, ": ", options.chunked.sinks,
              " sinks need a window");
  TORCH_CHECK((W > 0) == claim.defined(), kOp,
              ": claim must be given exactly if there is a window");
  // Half a chunk at the floor must stay inside the exponent range of fp32 (e^88).
  TORCH_CHECK(options.chunked.chunk / 2 * -options.gate_floor <= 80, kOp, ": chunk ",
              options.chunked.chunk, " is too long for gate floor ", options.gate_floor);
  if (autograd::FusedLayerTakes(q, params, options))
    return autograd::FusedLayer(q, k, k_plain, v, claim, params, options);
  const at::Tensor phi_q = DslaFeatures(q, params.phi_q, F == 2 * D);
  const at::Tensor phi_k = DslaFeatures(k, params.phi_k, F == 2 * D);
  const at::Tensor a = DslaGates(k_plain, params.gate_weight, params.gate_bias, options.gate_floor);
  const DslaChunkedResult lin =
      DslaChunked(phi_q, params.mix.softmax(1), phi_k, a, v, {}, {}, options.chunked);
  if (W == 0) return DslaMerge(lin.num, lin.den).to(q.scalar_type());
  const DslaWindowResult win =
      DslaWindowAttention(q, k, v, W, options.chunked.sinks, options.chunked.segment);
  return DslaMerge(lin.num, lin.den, win.out, win.lse, claim).to(q.scalar_type());
}

}  // namespace dsla
