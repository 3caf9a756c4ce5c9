// The parts around the chunked form, and the whole layer operator, against plain compositions and
// against the serving operator's reference.
#include <cmath>

#include "ops/dsla/dsla.h"
#include "ops/dsla/dsla_autograd_testing.h"

namespace dsla {
namespace {

Tensor Leaf(at::IntArrayRef shape, double scale = 1) {
  return (at::randn(shape, at::kDouble) * scale).set_requires_grad(true);
}

Tensor PlainFeatures(const Tensor& u, const Tensor& map, bool two_sided) {
  const Tensor y = at::einsum("bthd,hde->bthe", {u, map});
  return two_sided ? at::cat({y.softmax(-1), (-y).softmax(-1)}, -1) : y.softmax(-1);
}

Tensor PlainGates(const Tensor& k, const Tensor& weight, const Tensor& bias, double floor) {
  const Tensor z = at::einsum("bthd,shdf->bthsf", {k, weight}) + bias.transpose(0, 1);
  return (at::log_sigmoid(z) / 16).clamp_min(floor);
}

DslaWindowResult PlainWindow(const Tensor& q, const Tensor& k, const Tensor& v, int64_t W,
                             int64_t S) {
  const int64_t T = q.size(1), TK = k.size(1), G = q.size(2) / k.size(2);
  const Tensor kk = k.repeat_interleave(G, 2), vv = v.repeat_interleave(G, 2);
  const Tensor key = at::arange(TK).unsqueeze(0), query = at::arange(TK - T, TK).unsqueeze(1);
  const Tensor seen = (key <= query) & ((key > query - W) | (key < S));
  const Tensor scores = (at::einsum("bihd,bjhd->bhij", {q, kk}) / std::sqrt(q.size(3)))
                            .masked_fill(seen.logical_not(), -INFINITY);
  return {at::einsum("bhij,bjhd->bihd", {scores.softmax(-1), vv}),
          scores.logsumexp(-1).transpose(1, 2)};
}

Tensor PlainMerge(const Tensor& num, const Tensor& den, const DslaWindowResult& win,
                  const Tensor& claim) {
  const Tensor w = at::where(den < 1e-6, at::zeros_like(den), (claim - win.lse).sigmoid());
  return w.unsqueeze(3) * num / (den + 1e-6).unsqueeze(3) + (1 - w).unsqueeze(3) * win.out;
}

TEST(DslaFeatures, GradientsEqualPlainAutograd) {
  at::manual_seed(kSeed);
  const Tensor u = Leaf({2, 7, 3, 6}), map = Leaf({3, 6, 6});
  for (const bool two_sided : {false, true}) {
    ExpectSameGradients(DslaFeatures(u, map, two_sided), PlainFeatures(u, map, two_sided), {u, map},
                        1e-12, c10::str("two_sided ", two_sided));
  }
}

TEST(DslaGates, GradientsEqualPlainAutogradAndVanishAtTheFloor) {
  at::manual_seed(kSeed);
  const Tensor k = Leaf({2, 9, 3, 5}), weight = Leaf({2, 3, 5, 10}, 3), bias = Leaf({2, 3, 10});
  const double floor = -0.25;  // reached by about a third
  const Tensor a = DslaGates(k, weight, bias, floor);
  const double share = a.eq(floor).to(at::kDouble).mean().item<double>();
  EXPECT_GT(share, 0.1);
  EXPECT_LT(share, 0.9);
  ExpectSameGradients(a, PlainGates(k, weight, bias, floor), {k, weight, bias}, 1e-11, "gates");
  // All at the floor: nothing passes.
  const Tensor low = Leaf({2, 3, 10}, 0);
  const Tensor clamped = DslaGates(k, weight, low - 1e4, floor);
  for (const Tensor& g : Grads(clamped.sum(), {k, weight, low}))
    EXPECT_EQ(g.abs().max().item<double>(), 0);
}

TEST(DslaRope, UndoesItselfAndItsGradientIsTheInverse) {
  at::manual_seed(kSeed);
  const Tensor x = Leaf({2, 5, 3, 8}), angle = at::randn({5, 4}, at::kDouble);
  const Tensor c = angle.cos(), s = angle.sin();
  const Tensor turned = at::view_as_complex(at::stack({x.narrow(3, 0, 4), x.narrow(3, 4, 4)}, -1)) *
                        at::complex(c, s).unsqueeze(1);
  const Tensor want = at::cat({at::real(turned), at::imag(turned)}, 3);
  ExpectSameGradients(DslaRope(x, c, s), want, {x}, 1e-12, "rope");
  ExpectSameGradients(DslaRope(DslaRope(x, c, s), c, s, true), x * 1, {x}, 1e-12, "inverse");
}

TEST(DslaWindowAttention, GradientsEqualPlainAttention) {
  struct WindowCase {
    int64_t T, prefix, W, S, segment;
  };
  for (const auto& [T, prefix, W, S, segment] : std::vector<WindowCase>{{1, 0, 8, 2, 64},
                                                                        {90, 0, 8, 3, 64},
                                                                        {150, 0, 100, 0, 64},
                                                                        {70, 33, 64, 4, 1024},
                                                                        {5, 90, 3, 4, 1024},
                                                                        {3, 0, 70, 8, 1024}}) {
    at::manual_seed(kSeed);
    const Tensor q = Leaf({2, T, 4, 6}), k = Leaf({2, T + prefix, 2, 6}),
                 v = Leaf({2, T + prefix, 2, 6});
    const DslaWindowResult got = DslaWindowAttention(q, k, v, W, S, segment),
                           want = PlainWindow(q, k, v, W, S);
    const std::string what = c10::str("T=", T, " prefix=", prefix, " W=", W, " S=", S);
    ExpectTensorClose(got.lse, want.lse, 1e-12, what);
    ExpectSameGradients(got.out * got.lse.unsqueeze(3), want.out * want.lse.unsqueeze(3), {q, k, v},
                        1e-11, what);
    ExpectSameGradients(got.out, want.out, {q, k, v}, 1e-11, what);  // no gradient of lse
  }
}

TEST(DslaMerge, GradientsEqualPlainAutogradAndNothingIsClaimedOverAnEmptyState) {
  at::manual_seed(kSeed);
  const Tensor num = Leaf({2, 5, 3, 4}), win = Leaf({2, 5, 3, 4}), lse = Leaf({2, 5, 3}),
               claim = Leaf({2, 5, 3});
  Tensor den = at::rand({2, 5, 3}, at::kDouble);
  den.select(1, 0).fill_(0);
  den.set_requires_grad(true);
  const Tensor got = DslaMerge(num, den, win, lse, claim);
  ExpectSameGradients(got, PlainMerge(num, den, {win, lse}, claim), {num, den, win, lse, claim},
                      1e-11, "merge");
  EXPECT_TRUE(at::equal(got.select(1, 0), win.select(1, 0)));
  const Tensor positive = at::rand({2, 5, 3}, at::kDouble).add_(0.5).set_requires_grad(true);
  ExpectSameGradients(DslaMerge(num, positive), num / (positive + 1e-6).unsqueeze(3),
                      {num, positive}, 1e-12, "no window");
}

struct Layer {
  Tensor q, k_plain, k, v, claim, cos, sin;
  DslaLayerParams params;
  DslaLayerOptions options;

  Tensor Run() const { return DslaLayer(q, k, k_plain, v, claim, params, options); }
  std::vector<Tensor> Trained() const {
    return {params.phi_q, params.phi_k, params.gate_weight, params.gate_bias, params.mix};
  }
};

Layer MakeLayer(const Case& c, at::ScalarType type) {
  at::manual_seed(kSeed);
  const auto f64 = at::TensorOptions(at::kDouble);
  const at::ScalarType sum = type == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t TK = c.T + c.prefix, half = c.D / 2;
  Layer l;
  const Tensor angle = at::arange(TK, f64).unsqueeze(1) *
                       at::pow(100., at::arange(half, f64) / -static_cast<double>(half));
  l.cos = angle.cos().to(sum), l.sin = angle.sin().to(sum);
  l.q = at::randn({c.B, c.T, c.H, c.D}, f64).to(type);
  l.k_plain = at::randn({c.B, TK, c.Hkv, c.D}, f64).to(type);
  l.k = DslaRope(l.k_plain, l.cos, l.sin).detach();
  l.v = at::randn({c.B, TK, c.Hkv, c.D}, f64).to(type);
  if (c.window > 0) l.claim = at::randn({c.B, c.T, c.H}, f64).to(sum);
  l.params.phi_q = (at::eye(c.D, f64) + 0.3 * at::randn({c.H, c.D, c.D}, f64)).to(sum);
  l.params.phi_k = (at::eye(c.D, f64) + 0.3 * at::randn({c.Hkv, c.D, c.D}, f64)).to(sum);
  l.params.gate_weight = at::randn({c.states, c.Hkv, c.D, c.F}, f64).to(sum);
  l.params.gate_bias = at::randn({c.states, c.Hkv, c.F}, f64).to(sum);
  l.params.mix = at::randn({c.H, c.states}, f64).to(sum);
  l.options = {c.options(), -0.2};
  return l;
}

std::vector<Case> LayerCases() {
  return {{.T = 45, .F = 12},
          {.T = 45, .states = 1, .window = 8},
          {.T = 45, .F = 12, .window = 8, .sinks = 3},
          {.T = 20, .prefix = 31, .F = 12, .window = 8, .sinks = 3}};
}

TEST(DslaLayer, GradientsEqualThePlainComposition) {
  for (const Case& c : LayerCases()) {
    const Layer l = MakeLayer(c, at::kDouble);
    std::vector<Tensor> inputs = l.Trained();
    inputs.insert(inputs.end(), {l.q, l.k, l.k_plain, l.v});
    if (c.window > 0) inputs.push_back(l.claim);
    for (const Tensor& x : inputs) x.set_requires_grad(true);
    const bool two = c.F == 2 * c.D;
    const Inputs in{PlainFeatures(l.q, l.params.phi_q, two),
                    l.params.mix.softmax(1),
                    PlainFeatures(l.k, l.params.phi_k, two),
                    PlainGates(l.k_plain, l.params.gate_weight, l.params.gate_bias, -0.2),
                    l.v,
                    {},
                    {}};
    const DslaChunkedResult lin = Naive(c, in);
    const Tensor want =
        c.window == 0
            ? lin.num / (lin.den + 1e-6).unsqueeze(3)
            : PlainMerge(lin.num, lin.den, PlainWindow(l.q, l.k, l.v, c.window, c.sinks), l.claim);
    ExpectSameGradients(l.Run(), want, inputs, 1e-9, c.name());
  }
}

// The training form and the serving operator are the same function.
TEST(DslaLayer, EqualsTheServingOperatorsReference) {
  for (Case c : LayerCases()) {
    c.B = 1, c.chunk = 64;
    c.F = 16 * (c.F / c.D), c.D = 16;  // what the serving operator is written for
    const Layer l = MakeLayer(c, at::kFloat);
    const int64_t TK = c.T + c.prefix;
    const Tensor mix = l.params.mix.softmax(1);
    // The reference takes every position as a query: those of the prefix are not compared.
    Tensor q = at::zeros({TK, c.H, c.D}), claim = at::zeros({TK, c.H}), out = at::empty_like(q);
    q.narrow(0, c.prefix, c.T).copy_(l.q[0]);
    if (c.window > 0) claim.narrow(0, c.prefix, c.T).copy_(l.claim[0]);
    DslaArgs args;
    args.shape = {static_cast<int>(c.H),
                  static_cast<int>(c.Hkv),
                  static_cast<int>(c.D),
                  static_cast<int>(c.F),
                  static_cast<int>(c.states),
                  static_cast<int>(c.window),
                  static_cast<int>(c.sinks),
                  DType::kF32,
                  -0.2f};
    auto data = [](const Tensor& x) { return x.const_data_ptr<float>(); };
    args.params = {data(l.params.phi_q),
                   data(l.params.phi_k),
                   data(l.params.gate_weight),
                   data(l.params.gate_bias),
                   data(mix),
                   data(l.cos),
                   data(l.sin)};
    const int32_t row_start[] = {0, static_cast<int32_t>(TK)}, pos[] = {0}, slots[] = {0};
    args.rows = {1, row_start, pos};
    args.slots = slots;
    const int64_t bytes = MakeSlotLayout(args.shape).bytes;
    Tensor pool = at::empty({bytes / 4});
    args.states = {reinterpret_cast<std::byte*>(pool.data_ptr<float>()), bytes};
    DslaResetSlot(args.shape, args.states, 0);
    args.q = data(q), args.q_stride = c.H * c.D;
    args.k = data(l.k), args.v = data(l.v);
    args.claim = c.window > 0 ? data(claim) : nullptr;
    args.out = out.data_ptr<float>();
    DslaForwardRef(args);
    ExpectTensorClose(l.Run()[0], out.narrow(0, c.prefix, c.T), 1e-5, c.name());
  }
}

TEST(DslaLayer, Bf16TrainsEveryParameter) {
  const Case c{.T = 200, .H = 4, .Hkv = 2, .D = 32, .F = 64, .window = 16, .sinks = 4, .chunk = 64};
  const Layer l = MakeLayer(c, at::kBFloat16);
  Layer exact = l;
  for (Tensor* x : {&exact.q, &exact.k, &exact.k_plain, &exact.v, &exact.claim, &exact.params.phi_q,
                    &exact.params.phi_k, &exact.params.gate_weight, &exact.params.gate_bias,
                    &exact.params.mix}) {
    *x = x->to(at::kDouble);
  }
  for (const Layer* x : {&l, static_cast<const Layer*>(&exact)})
    for (const Tensor& p : x->Trained()) p.set_requires_grad(true);
  const Tensor got = l.Run(), want = exact.Run();
  EXPECT_LT(RelativeRms(got, want), 6e-3);
  at::manual_seed(kSeed);
  const Tensor weights = at::randn(want.sizes(), at::kDouble);
  const auto grads = Grads((got * weights.to(at::kFloat)).sum(), l.Trained()),
             want_grads = Grads((want * weights).sum(), exact.Trained());
  for (size_t i = 0; i < grads.size(); ++i) {
    EXPECT_EQ(grads[i].scalar_type(), at::kFloat);
    EXPECT_LT(RelativeRms(grads[i], want_grads[i]), 1e-2) << i;
  }
}

}  // namespace
}  // namespace dsla
