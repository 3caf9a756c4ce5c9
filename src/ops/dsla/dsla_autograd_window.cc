// Window attention with sinks.
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logaddexp.h>

#include <cmath>
#include <limits>

#include "ops/dsla/dsla_autograd.h"
#include "ops/dsla/dsla_autograd_util.h"

namespace dsla {
namespace autograd {
namespace {

// Window attention, in blocks of C queries. Block b reads the keys of the C positions that it
// covers and of the `reach` (W rounded up to whole blocks) before them, and the sinks.
struct WindowPlan {
  static constexpr int64_t C = 64;
  int64_t B, T, TK, H, Hkv, G, D, window, sinks;
  int64_t reach, prefix, segment;
  double scale;

  WindowPlan(const Tensor& q, const Tensor& k, int64_t window, int64_t sinks, int64_t segment)
      : B(q.size(0)),
        T(q.size(1)),
        TK(k.size(1)),
        H(q.size(2)),
        Hkv(k.size(2)),
        G(H / Hkv),
        D(q.size(3)),
        window(window),
        sinks(std::min(sinks, TK)),
        reach((window + C - 1) / C * C),
        prefix(TK - T),
        segment((segment + C - 1) / C * C),
        scale(1 / std::sqrt(static_cast<double>(D))) {}

  int64_t end(int64_t begin) const { return std::min(begin + segment, (T + C - 1) / C * C); }
};

struct WindowSegment {
  Tensor q;       // [B, n, Hkv, G C, D]
  Tensor k, v;    // [B, n, Hkv, S + reach + C, D]: sinks first
  Tensor p, lse;  // probabilities [B, n, Hkv, G C, S + reach + C], [B, n, Hkv, G C], sum type
};

// [B, n C, H, D] -> [B, n, Hkv, G C, D]
Tensor QueryBlocks(const WindowPlan& w, const Tensor& rows) {
  return rows.unflatten(1, {rows.size(1) / w.C, w.C})
      .transpose(2, 3)
      .reshape({w.B, rows.size(1) / w.C, w.Hkv, w.G * w.C, -1});
}
// The inverse.
Tensor BlockRows(const WindowPlan& w, const Tensor& x) {
  return x.reshape({w.B, x.size(1), w.H, w.C, -1}).transpose(2, 3).flatten(1, 2);
}

// The keys (or values) of the blocks of queries [begin, end).
Tensor KeyBlocks(const WindowPlan& w, const Tensor& x, int64_t begin, int64_t end) {
  const Rows rows{0, 0, w.TK};
  const Tensor band = rows.Take(x, w.prefix + begin - w.reach, w.prefix + end)
                          .unfold(1, w.reach + w.C, w.C)  // [B, n, Hkv, D, reach + C]
                          .transpose(3, 4);
  const Tensor first = x.narrow(1, 0, w.sinks).transpose(1, 2).unsqueeze(1);
  return at::cat({first.expand({w.B, band.size(1), w.Hkv, w.sinks, w.D}), band}, 3);
}

// Which keys the queries of blocks [begin, end) see: [n, 1, 1, C, S + reach + C].
Tensor WindowMask(const WindowPlan& w, int64_t begin, int64_t end, const at::TensorOptions& type) {
  const auto options = type.dtype(at::kLong);
  const Tensor block = at::arange(begin, end, w.C, options).add_(w.prefix).view({-1, 1, 1});
  const Tensor query = block + at::arange(w.C, options).view({1, -1, 1});
  const Tensor key = block + at::arange(-w.reach, w.C, options).view({1, 1, -1});
  const Tensor in_window =
      key.le(query).logical_and_(key.gt(query - w.window)).logical_and_(key.ge(w.sinks));
  const Tensor sink = at::arange(w.sinks, options).view({1, 1, -1}).le(query);
  return at::cat({sink, in_window}, 2).unsqueeze(1).unsqueeze(1);
}

WindowSegment LoadWindow(const WindowPlan& w, const Tensor& q, const Tensor& k, const Tensor& v,
                         int64_t begin, int64_t end) {
  WindowSegment s;
  s.q = QueryBlocks(w, Rows{0, 0, w.T}.Take(q, begin, end));
  s.k = KeyBlocks(w, k, begin, end);
  s.v = KeyBlocks(w, v, begin, end);
  s.p = Product(s.q, s.k.transpose(3, 4)).mul_(w.scale);
  s.p.unflatten(3, {w.G, w.C})
      .masked_fill_(WindowMask(w, begin, end, q.options()).logical_not_(),
                    -std::numeric_limits<double>::infinity());
  // Never empty: a query sees itself, those past the end too.
  s.lse = s.p.logsumexp(4, /*keepdim=*/false);
  s.p.sub_(s.lse.unsqueeze(4)).exp_();
  return s;
}

// Adds the gradient of KeyBlocks to dx [B, TK, Hkv, D]. d: as KeyBlocks returns.
void AddKeyBlocks(const WindowPlan& w, const Tensor& d, int64_t begin, int64_t end, Tensor* dx) {
  const int64_t n = d.size(1);
  if (w.sinks > 0) {
    dx->narrow(1, 0, w.sinks).add_(d.narrow(3, 0, w.sinks).sum(1).transpose(1, 2));
  }
  Tensor rows = at::zeros({w.B, n + w.reach / w.C, w.C, w.Hkv, w.D}, d.options());
  for (int64_t i = 0; i <= w.reach / w.C; ++i) {  // block b reads the row blocks b .. b + reach / C
    rows.narrow(1, i, n).add_(d.narrow(3, w.sinks + i * w.C, w.C).transpose(2, 3));
  }
  Rows{0, 0, w.TK}.Add(*dx, rows.flatten(1, 2), w.prefix + begin - w.reach, w.prefix + end);
}

class WindowFunction : public torch::autograd::Function<WindowFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, int64_t window, int64_t sinks, int64_t segment) {
    ctx->save_for_backward({q, k, v});
    ctx->saved_data["options"] = std::vector<int64_t>{window, sinks, segment};
    ctx->set_materialize_grads(false);
    const WindowPlan w(q, k, window, sinks, segment);
    const auto options = q.options().dtype(SumType(q));
    Tensor out = at::empty({w.B, w.T, w.H, w.D}, options),
           lse = at::empty({w.B, w.T, w.H}, options);
    const Rows rows{0, 0, w.T};
    for (int64_t begin = 0; begin < w.T; begin = w.end(begin)) {
      const int64_t end = w.end(begin);
      const WindowSegment s = LoadWindow(w, q, k, v, begin, end);
      rows.Put(out, BlockRows(w, Product(s.p.to(v.scalar_type()), s.v)), begin, end);
      rows.Put(lse, BlockRows(w, s.lse.unsqueeze(4)).squeeze(3), begin, end);
    }
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    CheckOnce("dsla window_attention");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2];
    const std::vector<int64_t> numbers = ctx->saved_data["options"].toIntVector();
    const WindowPlan w(q, k, numbers[0], numbers[1], numbers[2]);
    const at::ScalarType operand = q.scalar_type();
    const auto options = q.options().dtype(SumType(q));
    Tensor dq = at::empty_like(q), dk = at::zeros(k.sizes(), options),
           dv = at::zeros(v.sizes(), options);
    const Rows rows{0, 0, w.T};
    for (int64_t begin = 0; begin < w.T; begin = w.end(begin)) {
      const int64_t end = w.end(begin);
      const WindowSegment s = LoadWindow(w, q, k, v, begin, end);
      Tensor ds;  // dL/dp - sum(p dL/dp) + dlse
      if (grads[0].defined()) {
        const Tensor d_out = QueryBlocks(w, rows.Take(grads[0], begin, end)).to(operand);
        AddKeyBlocks(w, Product(s.p.to(operand).transpose(3, 4), d_out), begin, end, &dv);
        ds = Product(d_out, s.v.transpose(3, 4));
        ds.sub_((s.p * ds).sum(4, /*keepdim=*/true));
      } else {
        ds = at::zeros_like(s.p);
      }
      if (grads[1].defined()) {
        ds.add_(QueryBlocks(w, rows.Take(grads[1].unsqueeze(3), begin, end)));
      }
      const Tensor d_scores = ds.mul_(s.p).mul_(w.scale).to(operand);
      rows.Put(dq, BlockRows(w, Product(d_scores, s.k)), begin, end);
      AddKeyBlocks(w, Product(d_scores.transpose(3, 4), s.q), begin, end, &dk);
    }
    return {dq, dk.to(operand), dv.to(operand), Tensor(), Tensor(), Tensor()};
  }
};

// On a GPU in bf16 the window is FlashAttention's (Dao, ICLR 2024; libtorch's own kernels), which
// never writes scores to memory, and the sinks behind it are a few columns beside it, joined by
// log-sum-exp. Its backward pass takes the joined output and log-sum-exp, with which its
// probabilities are those of the whole softmax. It knows no gradient of the log-sum-exp, dS = p (dp
// - delta + dlse): an extra value column of ones, whose output it is told was 0, carries dlse.
class FlashWindowFunction : public torch::autograd::Function<FlashWindowFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, int64_t window, int64_t sinks) {
    const FlashPlan w(q, k, window, sinks);
    auto [own, own_lse, seed, offset, mask] = at::_flash_attention_forward(
        q, k, v, std::nullopt, std::nullopt, w.T, w.TK, 0.0, /*is_causal=*/false,
        /*return_debug_mask=*/false, w.scale, window - 1, 0);
    Tensor out = own.to(at::kFloat), lse = own_lse;  // [B, T, H, D], [B, H, T]
    if (w.sinks > 0) {
      const Tensor scores = w.SinkScores(q, k);  // [B, H, T, S]
      lse = at::logaddexp(own_lse, scores.logsumexp(3)).contiguous();
      const Tensor p = (scores - lse.unsqueeze(3)).exp_().to(v.scalar_type());
      out.mul_((own_lse - lse).exp_().transpose(1, 2).unsqueeze(3)).add_(w.SinkOutput(p, v));
    }
    ctx->save_for_backward({q, k, v, out.to(q.scalar_type()), lse, seed, offset});
    ctx->saved_data["options"] = std::vector<int64_t>{window, sinks};
    ctx->set_materialize_grads(false);
    return {out, lse.transpose(1, 2).contiguous()};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    CheckOnce("dsla window_attention");
    constexpr int64_t kExtra = 8;  // head sizes are multiples of 8
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    const std::vector<int64_t> numbers = ctx->saved_data["options"].toIntVector();
    const FlashPlan w(q, k, numbers[0], numbers[1]);
    Tensor d_out = at::zeros({w.B, w.T, w.H, w.D + kExtra}, q.options());
    if (grads[0].defined()) d_out.narrow(3, 0, w.D).copy_(grads[0]);
    if (grads[1].defined()) d_out.select(3, w.D).copy_(grads[1]);
    const auto widen = [&](const Tensor& x) { return at::constant_pad_nd(x, {0, kExtra}); };
    Tensor ve = widen(v);
    ve.select(3, w.D).fill_(1);
    auto [dq, dk, dv] = at::_flash_attention_backward(
        d_out, widen(q), widen(k), ve, widen(out), lse, Tensor(), Tensor(), w.T, w.TK, 0.0,
        /*is_causal=*/false, saved[5], saved[6], w.scale, numbers[0] - 1, 0);
    dq = dq.narrow(3, 0, w.D), dk = dk.narrow(3, 0, w.D), dv = dv.narrow(3, 0, w.D);
    if (w.sinks > 0) {
      const Tensor p = (w.SinkScores(q, k) - lse.unsqueeze(3)).exp_();
      const Tensor d = d_out.narrow(3, 0, w.D);
      const Tensor delta =
          (d.to(at::kFloat) * out).sum(3).sub_(d_out.select(3, w.D)).transpose(1, 2).unsqueeze(3);
      const Tensor ds = w.SinkProduct(d, v).sub_(delta).mul_(p).mul_(w.scale).to(q.scalar_type());
      dq = dq + w.SinkOutput(ds, k);
      dk.narrow(1, 0, w.sinks).add_(w.SinkGradient(ds, q));
      dv.narrow(1, 0, w.sinks).add_(w.SinkGradient(p.to(v.scalar_type()), d));
    }
    return {dq.to(q.scalar_type()), dk, dv, Tensor(), Tensor()};
  }

  static bool Takes(const Tensor& q) {
    return q.is_cuda() && q.scalar_type() == at::kBFloat16 && q.size(3) % 8 == 0 &&
           q.size(3) <= 128;
  }

 private:
  struct FlashPlan : WindowPlan {
    FlashPlan(const Tensor& q, const Tensor& k, int64_t window, int64_t sinks)
        : WindowPlan(q, k, window, sinks, 1) {}

    // [B, t, h, D] -> [B, Hkv, (h / Hkv) t, D]
    Tensor ByKvHead(const Tensor& x) const {
      return x.transpose(1, 2).reshape({B, Hkv, -1, x.size(3)});
    }
    // x times the sinks' rows of y: [B, H, T, S] sum type.
    Tensor SinkProduct(const Tensor& x, const Tensor& y) const {
      const Tensor first = y.narrow(1, 0, sinks).permute({0, 2, 3, 1});  // [B, Hkv, D, S]
      return Product(ByKvHead(x), first).view({B, H, T, sinks});
    }
    // -inf while the sink is in the window, where the window's part counts it.
    Tensor SinkScores(const Tensor& q, const Tensor& k) const {
      const auto options = q.options().dtype(at::kLong);
      const Tensor position = at::arange(prefix, TK, options).unsqueeze(1);
      const Tensor seen = (at::arange(sinks, options).unsqueeze(0) + window).gt(position);
      return SinkProduct(q, k).mul_(scale).masked_fill_(seen,
                                                        -std::numeric_limits<double>::infinity());
    }
    // weights [B, H, T, S] times the sinks' rows of y: [B, T, H, D] sum type.
    Tensor SinkOutput(const Tensor& weights, const Tensor& y) const {
      const Tensor first = y.narrow(1, 0, sinks).transpose(1, 2);  // [B, Hkv, S, D]
      return Product(weights.view({B, Hkv, G * T, sinks}), first)
          .view({B, H, T, D})
          .transpose(1, 2);
    }
    // Its gradient by those rows: [B, S, Hkv, D].
    Tensor SinkGradient(const Tensor& weights, const Tensor& d) const {
      return Product(weights.view({B, Hkv, G * T, sinks}).transpose(2, 3), ByKvHead(d))
          .transpose(1, 2);
    }
  };
};

}  // namespace
}  // namespace autograd

DslaWindowResult DslaWindowAttention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                     int64_t window, int64_t sinks, int64_t segment) {
  constexpr char kOp[] = "dsla window_attention";
  autograd::CheckOperand(kOp, "q", q, 4);
  autograd::CheckOperand(kOp, "k", k, 4);
  const int64_t B = q.size(0), H = q.size(2), D = q.size(3), TK = k.size(1), Hkv = k.size(2);
  TORCH_CHECK(Hkv > 0 && H % Hkv == 0, kOp, ": ", H, " query heads are no multiple of ", Hkv,
              " KV heads");
  TORCH_CHECK(q.size(1) > 0 && TK >= q.size(1), kOp, ": ", TK, " keys for ", q.size(1), " queries");
  TORCH_CHECK(window >= 1 && sinks >= 0 && segment > 0, kOp, ": window ", window, ", sinks ", sinks,
              ", segment ", segment, " out of range");
  autograd::CheckTensor(kOp, "k", k, {B, TK, Hkv, D}, q.scalar_type(), q);
  autograd::CheckTensor(kOp, "v", v, {B, TK, Hkv, D}, q.scalar_type(), q);
  if (autograd::FlashWindowFunction::Takes(q)) {
    auto out = autograd::FlashWindowFunction::apply(q, k, v, window, sinks);
    return {out[0], out[1]};
  }
  auto out = autograd::WindowFunction::apply(q, k, v, window, sinks, segment);
  return {out[0], out[1]};
}

}  // namespace dsla
