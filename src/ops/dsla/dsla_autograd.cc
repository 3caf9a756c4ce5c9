#include "ops/dsla/dsla_autograd.h"

#include <ATen/ops/addcmul.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>

#include "ops/dsla/dsla_autograd_util.h"

// The chunk form, per chunk with inclusive gate sums G, its middle row R and its last row L, key
// width K = states * F, and the denominator as one more column of the values, Ve = [V, 1]:
//   Q~ = g phi_q e^{G-R}   K~ = (1 - e^a) phi_k e^{R-G}   A = tril(Q~ K~^T)
//   P = e^R S + K~^T Ve    O = Q~ (e^R S) + A Ve          S' = e^{L-R} P
// Backward, with dP = e^{L-R} dS':
//   dA = tril(dO Ve^T)   dQ~ = dA K~ + dO (e^R S)^T   dK~ = dA^T Q~ + Ve dP^T
//   dV = A^T dO + K~ dP  dS = e^R (dP + Q~^T dO)
// and, as nothing depends on the choice of R, for the gates of the chunk's row t
//   da_t = sum_{s >= t in the chunk} (Q~ dQ~ - K~ dK~)_s + sum over columns of S' dS' - e^{a_t}
//   phi_k dk'_t
// where dk' = dK~ e^{R-G}; keys that are not balanced have K~ = phi_k e^{R-G} and not the last
// term. It is the formula for the whole sequence, cut at the chunk's end, which is the same in
// exact arithmetic and does not carry the rounding of bf16 operands along the sequence (relative
// error of da at 4,096 tokens: 3e-3, against 1.4e-2 uncut).
namespace dsla {
namespace autograd {
namespace {

// Columns of Ve, [V, 1, 0 ...]: a multiple of 8 keeps bf16 products on tensor cores.
int64_t ValueColumns(int64_t D) { return (D + 1 + 7) / 8 * 8; }

// Where keys and queries stand in the stream of whole chunks that is processed: both end at its
// end, the keys W earlier than their own position, and what lies before them is zero.
struct Plan {
  int64_t B, T, H, Hkv, G, D, F, states, K, E, C;
  int64_t length, segment;     // tokens, multiples of C
  int64_t begin, first_query;  // multiples of C: nothing to do before `begin`; states only before
                               // `first_query`
  Rows keys, queries;
  bool balanced;
  at::ScalarType operand, sum;

  Plan(const Tensor& phi_q, const Tensor& phi_k, const Tensor& a, const Tensor& v, bool initial,
       const DslaChunkedOptions& options) {
    B = phi_q.size(0), T = phi_q.size(1), H = phi_q.size(2), F = phi_q.size(3);
    Hkv = phi_k.size(2), G = H / Hkv, D = v.size(3), states = a.size(3), K = states * F;
    E = ValueColumns(D), C = options.chunk, balanced = options.balanced;
    operand = phi_q.scalar_type(), sum = SumType(phi_q);
    const int64_t enter = phi_k.size(1) - options.window;  // keys before this one enter
    const int64_t tokens = std::max(enter, T);
    length = (tokens + C - 1) / C * C;
    segment = (options.segment + C - 1) / C * C;
    keys = {length - enter, options.sinks, std::max(enter, options.sinks)};
    queries = {length - T, 0, T};
    first_query = queries.at / C * C;
    const int64_t first_key = keys.first < keys.last ? (keys.at + keys.first) / C * C : length;
    begin = initial ? 0 : std::min(first_key, length);
  }

  // Calls body(begin, end) for the segments in order: none holds both chunks with and without
  // queries.
  template <typename Body>
  void ForEachSegment(Body&& body) const {
    for (int64_t t = begin; t < length;) {
      int64_t end = std::min(t + segment, length);
      if (t < first_query) end = std::min(end, first_query);
      body(t, end);
      t = end;
    }
  }
};

// [B, n C, h, ...] -> [B, n, h, C, ...] dense.
Tensor ToChunks(const Tensor& rows, int64_t C) {
  return rows.unflatten(1, {rows.size(1) / C, C}).transpose(2, 3).contiguous();
}
// The inverse, as a view or a copy.
Tensor FromChunks(const Tensor& chunks) { return chunks.transpose(2, 3).flatten(1, 2); }

// The recomputable part of a segment of n chunks.
struct Segment {
  int64_t n;
  bool has_queries;
  Tensor phi_k, a;      // [B, n, Hkv, C, 1, F] operand, [B, n, Hkv, C, states, F]
  Tensor ve;            // [B, n, Hkv, C, E] operand
  Tensor fall, rise;    // e^{R-G}, e^{G-R} [B, n, Hkv, C, K]
  Tensor enter, leave;  // e^R, e^{L-R} [B, n, Hkv, K, 1]
  Tensor kt, qt;        // K~ [B, n, Hkv, C, K], Q~ [B, n, Hkv, G C, K] operand
  Tensor phi_q;         // [B, n, Hkv, G, C, 1, F] operand
  Tensor mask, scores;  // [C, C]; A [B, n, Hkv, G C, C] operand
};

Segment LoadKeys(const Plan& p, const Tensor& phi_k, const Tensor& a, const Tensor& v,
                 int64_t begin, int64_t end) {
  Segment s;
  s.n = (end - begin) / p.C;
  s.has_queries = false;
  s.phi_k = ToChunks(p.keys.Take(phi_k, begin, end), p.C).unsqueeze(4);
  s.a = ToChunks(p.keys.Take(a, begin, end), p.C);
  s.ve = at::zeros({p.B, s.n, p.Hkv, p.C, p.E}, v.options());
  s.ve.narrow(4, 0, p.D).copy_(ToChunks(p.keys.Take(v, begin, end), p.C));
  s.ve.select(4, p.D).fill_(1);
  const Tensor sums = s.a.flatten(4).cumsum(3);          // G
  const Tensor middle = sums.narrow(3, p.C / 2 - 1, 1);  // R
  const Tensor last = sums.narrow(3, p.C - 1, 1);        // L
  const Tensor offset = sums - middle;
  s.rise = offset.exp();
  s.fall = offset.neg().exp();
  s.enter = middle.exp().transpose(3, 4);
  s.leave = (last - middle).exp().transpose(3, 4);
  // One rounding: the product is formed in the sum type.
  s.kt = p.balanced ? at::expm1(s.a).mul_(s.phi_k).neg_().flatten(4).mul_(s.fall).to(p.operand)
                    : s.fall.view(s.a.sizes()).mul(s.phi_k).flatten(4).to(p.operand);
  return s;
}

// [H, states] -> [Hkv, G, 1, states, 1]
Tensor MixView(const Plan& p, const Tensor& mix) {
  return mix.reshape({p.Hkv, p.G, 1, p.states, 1});
}

void LoadQueries(const Plan& p, const Tensor& phi_q, const Tensor& mix, int64_t begin, int64_t end,
                 Segment* s) {
  s->has_queries = true;
  // [B, n C, H, F] -> [B, n, H, C, F] -> [B, n, Hkv, G, C, 1, F]
  s->phi_q =
      ToChunks(p.queries.Take(phi_q, begin, end), p.C).view({p.B, s->n, p.Hkv, p.G, p.C, 1, p.F});
  const Tensor rise = s->rise.view({p.B, s->n, p.Hkv, 1, p.C, p.states, p.F});
  s->qt = (s->phi_q * MixView(p, mix))
              .mul_(rise)
              .to(p.operand)
              .view({p.B, s->n, p.Hkv, p.G * p.C, p.K});
  const Tensor index = at::arange(p.C, phi_q.options().dtype(at::kLong));
  s->mask = index.unsqueeze(1).ge(index.unsqueeze(0));
  s->scores = Product(s->qt, s->kt.transpose(3, 4));
}

// x where the key is not after the query, 0 elsewhere. By selection: the products above the
// diagonal may be infinite. x: [B, n, Hkv, G C, C].
Tensor Causal(const Plan& p, const Segment& s, const Tensor& x) {
  const Tensor zero = at::zeros({}, x.options());
  return at::where(s.mask, x.view({p.B, s.n, p.Hkv, p.G, p.C, p.C}), zero)
      .to(p.operand)
      .view(x.sizes());
}

// The states through a segment. entered[n] = e^R S before chunk n, [B, n, Hkv, K, E]; products:
// K~^T Ve on input, P on output. *state is moved to the segment's end. One kernel a chunk, S' =
// e^{L-R} K~^T Ve + e^L S; everything else is done for all chunks at once.
Tensor Scan(const Segment& s, Tensor* products, Tensor* state) {
  Tensor entered = at::empty(products->sizes(), products->options());
  const Tensor added = *products * s.leave, keep = s.enter * s.leave;
  entered.select(1, 0).copy_(*state);
  for (int64_t n = 0; n < s.n; ++n) {
    Tensor next = n + 1 < s.n ? entered.select(1, n + 1) : at::empty_like(*state);
    at::addcmul_out(next, added.select(1, n), keep.select(1, n), entered.select(1, n));
    if (n + 1 == s.n) *state = next;
  }
  products->add_(entered.mul_(s.enter));
  return entered;
}

Tensor PackState(const Plan& p, const Tensor& state, const Tensor& norm,
                 const at::TensorOptions& options) {
  Tensor packed = at::zeros({p.B, p.Hkv, p.K, p.E}, options.dtype(p.sum));
  if (state.defined()) packed.narrow(3, 0, p.D).copy_(state);
  if (norm.defined()) packed.select(3, p.D).copy_(norm);
  return packed;
}

// [B, n, Hkv, G C, E] -> rows [B, n C, H, E]
Tensor QueryRows(const Plan& p, const Tensor& x, int64_t n) {
  return x.view({p.B, n, p.Hkv, p.G, p.C, -1})
      .permute({0, 1, 4, 2, 3, 5})
      .reshape({p.B, n * p.C, p.H, -1});
}

// Gradients of Q~, K~, Ve and the gates of one segment, from dO [B, n, Hkv, G C, E] (undefined
// where there are no queries) and *dstate at its end, which is moved to its start.
struct SegmentGrads {
  Tensor dqt, dkt, dve, da;
};

SegmentGrads SegmentBackward(const Plan& p, const Segment& s, const Tensor& entered,
                             const Tensor& p_states, const Tensor& d_out, bool need_v,
                             Tensor* dstate) {
  SegmentGrads g;
  Tensor from_queries;
  if (s.has_queries) from_queries = Product(s.qt.transpose(3, 4), d_out);
  // dS' of every chunk: dS = e^L dS' + e^R Q~^T dO.
  Tensor dp = at::empty(p_states.sizes(), p_states.options());
  const Tensor keep = s.enter * s.leave;
  if (s.has_queries) from_queries.mul_(s.enter);
  dp.select(1, s.n - 1).copy_(*dstate);
  for (int64_t n = s.n - 1; n >= 0; --n) {
    Tensor before = n > 0 ? dp.select(1, n - 1) : at::empty_like(*dstate);
    if (s.has_queries)
      at::addcmul_out(before, from_queries.select(1, n), keep.select(1, n), dp.select(1, n));
    else
      at::mul_out(before, keep.select(1, n), dp.select(1, n));
    if (n == 0) *dstate = before;
  }
  dp.mul_(s.leave);
  const Tensor dp_operand = dp.to(p.operand);
  g.dkt = Product(s.ve, dp_operand.transpose(3, 4));
  if (need_v) g.dve = Product(s.kt, dp_operand);
  if (s.has_queries) {
    const Tensor d_scores = Causal(p, s, Product(d_out, s.ve.transpose(3, 4)));
    g.dqt = Product(d_scores, s.kt).add_(Product(d_out, entered.to(p.operand).transpose(3, 4)));
    g.dkt.add_(Product(d_scores.transpose(3, 4), s.qt));
    if (need_v) {
      g.dve.add_(Product(Causal(p, s, s.scores).transpose(3, 4), d_out));
    }
  }
  Tensor moved = (s.kt * g.dkt).neg_();  // [B, n, Hkv, C, K]
  if (s.has_queries) moved.add_((s.qt * g.dqt).view({p.B, s.n, p.Hkv, p.G, p.C, p.K}).sum(3));
  // P dP = S' dS'
  g.da = moved.flip(3).cumsum(3).flip(3).add_((p_states * dp).sum(4).unsqueeze(3));
  return g;
}

void Check(const Tensor& phi_q, const Tensor& mix, const Tensor& phi_k, const Tensor& a,
           const Tensor& v, const Tensor& state, const Tensor& norm,
           const DslaChunkedOptions& options) {
  constexpr char kOp[] = "dsla chunked";
  CheckOperand(kOp, "phi_q", phi_q, 4);
  CheckOperand(kOp, "phi_k", phi_k, 4);
  CheckOperand(kOp, "a", a, 5);
  CheckOperand(kOp, "v", v, 4);
  const int64_t B = phi_q.size(0), T = phi_q.size(1), H = phi_q.size(2), F = phi_q.size(3);
  const int64_t TK = phi_k.size(1), Hkv = phi_k.size(2), D = v.size(3), states = a.size(3);
  const at::ScalarType operand = phi_q.scalar_type(), sum = SumType(phi_q);
  TORCH_CHECK(B > 0 && T > 0 && H > 0 && F > 0 && D > 0, kOp, ": phi_q is ", phi_q.sizes(),
              ", v is ", v.sizes(), ": empty");
  TORCH_CHECK(Hkv > 0 && H % Hkv == 0, kOp, ": ", H, " query heads are no multiple of ", Hkv,
              " KV heads");
  TORCH_CHECK(TK >= T, kOp, ": ", TK, " keys for ", T, " queries");
  TORCH_CHECK(states == 1 || states == 2, kOp, ": ", states, " states, expected 1 or 2");
  TORCH_CHECK(options.window >= 0 && options.sinks >= 0, kOp, ": window ", options.window,
              ", sinks ", options.sinks, ": negative");
  TORCH_CHECK(options.chunk >= 2 && options.chunk % 2 == 0 && options.segment > 0, kOp, ": chunk ",
              options.chunk, ", segment ", options.segment, ": chunk must be even, both positive");
  CheckTensor(kOp, "phi_k", phi_k, {B, TK, Hkv, F}, operand, phi_q);
  CheckTensor(kOp, "v", v, {B, TK, Hkv, D}, operand, phi_q);
  CheckTensor(kOp, "mix", mix, {H, states}, sum, phi_q);
  CheckTensor(kOp, "a", a, {B, TK, Hkv, states, F}, sum, phi_q);
  TORCH_CHECK(state.defined() == norm.defined(), kOp,
              ": state and norm must be given together or not at all");
  if (!state.defined()) return;
  CheckTensor(kOp, "state", state, {B, Hkv, states * F, D}, sum, phi_q);
  CheckTensor(kOp, "norm", norm, {B, Hkv, states * F}, sum, phi_q);
}

class ChunkedFunction : public torch::autograd::Function<ChunkedFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& phi_q, const Tensor& mix,
                               const Tensor& phi_k, const Tensor& a, const Tensor& v,
                               const std::optional<Tensor>& initial_state,
                               const std::optional<Tensor>& initial_norm,
                               const DslaChunkedOptions& options) {
    const Tensor state = initial_state.value_or(Tensor()), norm = initial_norm.value_or(Tensor());
    ctx->save_for_backward({phi_q, mix, phi_k, a, v, state, norm});
    ctx->saved_data["options"] = std::vector<int64_t>{options.window, options.sinks, options.chunk,
                                                      options.segment, options.balanced ? 1 : 0};
    ctx->set_materialize_grads(false);
    const Plan p(phi_q, phi_k, a, v, state.defined(), options);
    Tensor num = at::zeros({p.B, p.T, p.H, p.D}, a.options());
    Tensor den = at::zeros({p.B, p.T, p.H}, a.options());
    Tensor s0 = PackState(p, state, norm, a.options());
    p.ForEachSegment([&](int64_t begin, int64_t end) {
      Segment s = LoadKeys(p, phi_k, a, v, begin, end);
      Tensor products = Product(s.kt.transpose(3, 4), s.ve);
      const Tensor entered = Scan(s, &products, &s0);
      if (begin < p.first_query) return;
      LoadQueries(p, phi_q, mix, begin, end, &s);
      const Tensor out = QueryRows(
          p, Product(Causal(p, s, s.scores), s.ve).add_(Product(s.qt, entered.to(p.operand))), s.n);
      p.queries.Put(num, out.narrow(3, 0, p.D), begin, end);
      p.queries.Put(den, out.select(3, p.D), begin, end);
    });
    return {num, den, s0.narrow(3, 0, p.D).contiguous(), s0.select(3, p.D).contiguous()};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    CheckOnce("dsla chunked");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &phi_q = saved[0], &mix = saved[1], &phi_k = saved[2], &a = saved[3],
                 &v = saved[4];
    const std::vector<int64_t> numbers = ctx->saved_data["options"].toIntVector();
    const DslaChunkedOptions options{numbers[0], numbers[1], numbers[2], numbers[3],
                                     numbers[4] != 0};
    const Plan p(phi_q, phi_k, a, v, saved[5].defined(), options);
    const bool need_v = ctx->needs_input_grad(4);

    // The states at the start of every segment; within a segment they are recomputed.
    std::vector<std::pair<int64_t, int64_t>> ranges;
    variable_list starts;
    Tensor state = PackState(p, saved[5], saved[6], a.options());
    p.ForEachSegment([&](int64_t begin, int64_t end) {
      ranges.emplace_back(begin, end);
      starts.push_back(state);
      if (end == p.length) return;
      const Segment s = LoadKeys(p, phi_k, a, v, begin, end);
      Tensor products = Product(s.kt.transpose(3, 4), s.ve);
      Scan(s, &products, &state);
    });

    Tensor dphi_q = at::zeros_like(phi_q), dphi_k = at::zeros_like(phi_k), da = at::zeros_like(a);
    Tensor dmix = at::zeros({p.Hkv, p.G, p.states}, mix.options());
    Tensor dv = need_v ? at::zeros_like(v) : Tensor();
    Tensor dstate = PackState(p, grads[2], grads[3], a.options());
    for (size_t i = ranges.size(); i-- > 0;) {
      const auto [begin, end] = ranges[i];
      Segment s = LoadKeys(p, phi_k, a, v, begin, end);
      Tensor products = Product(s.kt.transpose(3, 4), s.ve);
      const Tensor entered = Scan(s, &products, &starts[i]);
      Tensor d_out;
      if (begin >= p.first_query) {
        LoadQueries(p, phi_q, mix, begin, end, &s);
        d_out = OutputGrad(p, grads[0], grads[1], a.options(), begin, end);
      }
      const SegmentGrads g = SegmentBackward(p, s, entered, products, d_out, need_v, &dstate);
      if (need_v) p.keys.Put(dv, FromChunks(g.dve.narrow(4, 0, p.D)), begin, end);
      const Tensor dk = g.dkt.mul_(s.fall).view(s.a.sizes());  // dk'
      Tensor dgates = g.da.view(s.a.sizes());
      if (p.balanced) dgates.sub_(s.a.exp().mul_(s.phi_k).mul_(dk));
      p.keys.Put(da, FromChunks(dgates), begin, end);
      const Tensor dkeys = p.balanced ? at::expm1(s.a).mul_(dk).neg_() : dk;
      p.keys.Put(dphi_k, FromChunks(dkeys.sum(4)), begin, end);
      if (!s.has_queries) continue;
      const Tensor dq = g.dqt.view({p.B, s.n, p.Hkv, p.G, p.C, p.states, p.F})
                            .mul_(s.rise.view({p.B, s.n, p.Hkv, 1, p.C, p.states, p.F}));
      dmix.add_((dq * s.phi_q).sum({0, 1, 4, 6}));
      const Tensor dphi = dq.mul_(MixView(p, mix)).sum(5);  // [B, n, Hkv, G, C, F]
      p.queries.Put(dphi_q, QueryRows(p, dphi.flatten(3, 4), s.n), begin, end);
    }
    Tensor dstate0, dnorm0;
    if (saved[5].defined()) dstate0 = dstate.narrow(3, 0, p.D), dnorm0 = dstate.select(3, p.D);
    return {dphi_q, dmix.view({p.H, p.states}), dphi_k, da, dv, dstate0, dnorm0, Tensor()};
  }

 private:
  // [B, n, Hkv, G C, E] operand, from dnum and dden, either of which may be undefined.
  static Tensor OutputGrad(const Plan& p, const Tensor& dnum, const Tensor& dden,
                           const at::TensorOptions& options, int64_t begin, int64_t end) {
    Tensor d = at::zeros({p.B, end - begin, p.H, p.E}, options);
    if (dnum.defined()) d.narrow(3, 0, p.D).copy_(p.queries.Take(dnum, begin, end));
    if (dden.defined()) d.select(3, p.D).copy_(p.queries.Take(dden, begin, end));
    return ToChunks(d, p.C).to(p.operand).view({p.B, (end - begin) / p.C, p.Hkv, p.G * p.C, p.E});
  }
};

}  // namespace
}  // namespace autograd

DslaChunkedResult DslaChunked(const at::Tensor& phi_q, const at::Tensor& mix,
                              const at::Tensor& phi_k, const at::Tensor& a, const at::Tensor& v,
                              const at::Tensor& state, const at::Tensor& norm,
                              const DslaChunkedOptions& options) {
  autograd::Check(phi_q, mix, phi_k, a, v, state, norm, options);
  auto out = autograd::ChunkedFunction::apply(phi_q, mix, phi_k, a, v, autograd::Given(state),
                                              autograd::Given(norm), options);
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace dsla
