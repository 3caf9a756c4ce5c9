#include "distill/torch_layers.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <optional>

#include "format/adapter_layout.h"
#include "ops/training/training_kernels.h"

namespace dsla::distill {
namespace {

std::optional<Tensor> Given(const Tensor& x) {
  return x.defined() ? std::optional<Tensor>(x) : std::nullopt;
}

// (b a) x: two thin products instead of one wide.
Tensor LowRank(const Tensor& x, const Tensor& a, const Tensor& b) {
  const at::ScalarType type = x.scalar_type();
  return at::linear(at::linear(x, a.to(type)), b.to(type));
}

Tensor Behind(const Tensor& prefix, const Tensor& x) {
  return prefix.defined() ? at::cat({prefix, x}, 1) : x;
}

Tensor Queries(const Teacher& teacher, const TeacherLayer& layer, const Tensor& plain,
               const Tensor& x, const RopeTables& rope, const AdapterTensors* adapter) {
  const ModelConfig& c = teacher.config;
  Tensor q = plain;
  if (adapter != nullptr && adapter->q_a.defined()) q = q + LowRank(x, adapter->q_a, adapter->q_b);
  q = q.unflatten(2, {c.H, c.D});
  if (layer.q_norm.defined()) q = Norm(q, layer.q_norm, c.norm_eps);
  if (adapter != nullptr && adapter->kind == Operator::kPaper) return q;
  return DslaRope(q, rope.cos, rope.sin);
}

// x's part of K or V through the low rank a, b, behind `plain`.
Tensor WithLowRank(const Tensor& plain, const Tensor& x, const Tensor& a, const Tensor& b) {
  return a.defined() ? plain + LowRank(x, a, b).unflatten(2, {plain.size(2), plain.size(3)})
                     : plain;
}

// S_i = G_i S_i + k^T v, o = q (g S_1 + (1 - g) S_2), with the scale D^-1/2 and one of each head.
Tensor PaperAttention(const Heads& heads, const Tensor& x, const AdapterTensors& adapter,
                      const DslaLayerOptions& options) {
  const int64_t H = heads.q.size(2), D = heads.q.size(3);
  const Tensor k = WithLowRank(heads.k_plain, x, adapter.k_a, adapter.k_b),
               v = WithLowRank(heads.v, x, adapter.v_a, adapter.v_b);
  const Tensor mix = adapter.op.mix.softmax(1).expand({H, adapter.op.mix.size(1)}).contiguous();
  const Tensor q = heads.q * (1 / std::sqrt(static_cast<double>(D)));
  const DslaChunkedResult lin =
      DslaChunked(q, mix, k, LogGates(heads, x, adapter, options), v, {}, {}, options.chunked);
  return lin.num * adapter.log_scale.exp().unsqueeze(1);
}

// silu(g) u of [.., g u] in one pass, on a GPU.
class SwiGluFunction : public torch::autograd::Function<SwiGluFunction> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& given) {
    const Tensor gate_up = given.contiguous();
    ctx->save_for_backward({gate_up});
    std::vector<int64_t> shape(gate_up.sizes().begin(), gate_up.sizes().end());
    shape.back() /= 2;
    Tensor y = at::empty(shape, gate_up.options());
    DSLA_CHECK(TrainingKernels()->swiglu(Args(gate_up, {}, y), nullptr) == 0);
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const Tensor gate_up = ctx->get_saved_variables()[0], d = grads[0].contiguous();
    Tensor d_gate_up = at::empty_like(gate_up);
    DSLA_CHECK(TrainingKernels()->swiglu_backward(Args(gate_up, d, d_gate_up), nullptr) == 0);
    return {d_gate_up};
  }

 private:
  static cuda::TrainingSwiGluArgs Args(const Tensor& gate_up, const Tensor& d, Tensor& y) {
    const int64_t width = gate_up.size(-1) / 2;
    return {gate_up.const_data_ptr(), d.defined() ? d.const_data_ptr() : nullptr,
            y.mutable_data_ptr(), gate_up.numel() / (2 * width), static_cast<int>(width)};
  }
};

Tensor SwiGlu(const Tensor& gate_up) {
  if (HasTrainingKernels(gate_up) && gate_up.size(-1) % 16 == 0)
    return SwiGluFunction::apply(gate_up);
  const std::vector<Tensor> parts = gate_up.chunk(2, -1);
  return at::silu(parts[0]) * parts[1];
}

}  // namespace

bool HasTrainingKernels(const Tensor& x) {
  return x.is_cuda() && x.scalar_type() == at::kBFloat16 && TrainingKernels() != nullptr;
}

Tensor LogGates(const Heads& heads, const Tensor& x, const AdapterTensors& adapter,
                const DslaLayerOptions& options) {
  if (adapter.kind != Operator::kPaper)
    return DslaGates(heads.k_plain, adapter.op.gate_weight, adapter.op.gate_bias,
                     options.gate_floor);
  const Tensor wide = x.to(at::kFloat);
  std::vector<Tensor> logits;
  for (int64_t i = 0; i < adapter.gate_a.size(0); ++i)
    logits.push_back(at::linear(at::linear(wide, adapter.gate_a[i]), adapter.gate_b[i])
                         .unflatten(2, {heads.v.size(2), heads.v.size(3)}) +
                     adapter.op.gate_bias[i]);
  return (at::log_sigmoid(at::stack(logits, 3)) / kGateDivisor).clamp_min(options.gate_floor);
}

Tensor Norm(const Tensor& x, const Tensor& weight, double eps) {
  return at::rms_norm(x, {x.size(-1)}, weight, eps);
}

Heads WithDelta(const Teacher& teacher, const TeacherLayer& layer, const Heads& heads,
                const Tensor& x, const RopeTables& rope, const AdapterTensors& adapter) {
  Heads result = heads;
  result.q = Queries(teacher, layer, heads.q_plain, x, rope, &adapter);
  return result;
}

Heads Project(const Teacher& teacher, const TeacherLayer& layer, const Tensor& x,
              const RopeTables& rope, const AdapterTensors* adapter) {
  const ModelConfig& c = teacher.config;
  const int64_t q_rows = int64_t{c.H} * c.D, kv_rows = int64_t{c.Hkv} * c.D;
  const Tensor qkv = at::linear(x, layer.qkv, Given(layer.qkv_bias));
  Heads heads;
  heads.q_plain = qkv.narrow(2, 0, q_rows);
  heads.k_plain = qkv.narrow(2, q_rows, kv_rows).unflatten(2, {c.Hkv, c.D});
  heads.v = qkv.narrow(2, q_rows + kv_rows, kv_rows).unflatten(2, {c.Hkv, c.D});
  if (layer.k_norm.defined()) heads.k_plain = Norm(heads.k_plain, layer.k_norm, c.norm_eps);
  heads.k = DslaRope(heads.k_plain, rope.cos, rope.sin);
  heads.q = Queries(teacher, layer, heads.q_plain, x, rope, adapter);
  return heads;
}

Tensor SoftmaxAttention(const Heads& heads, const Prefix& prefix) {
  const Tensor k = Behind(prefix.k, heads.k).transpose(1, 2);
  const Tensor v = Behind(prefix.v, heads.v).transpose(1, 2);
  const int64_t T = heads.q.size(1), before = k.size(2) - T;
  std::optional<Tensor> mask;
  if (before > 0)  // the causal flag would align the corner at the start
    mask = at::ones({T, before + T}, heads.q.options().dtype(at::kBool)).tril(before);
  const Tensor out = at::scaled_dot_product_attention(heads.q.transpose(1, 2), k, v, mask, 0.0,
                                                      /*is_causal=*/before == 0, std::nullopt,
                                                      /*enable_gqa=*/true);
  return out.transpose(1, 2).flatten(2);
}

Tensor DslaAttention(const Heads& heads, const Prefix& prefix, const Tensor& x,
                     const AdapterTensors& adapter, const DslaLayerOptions& options) {
  if (adapter.kind == Operator::kPaper) {
    DSLA_CHECK(!prefix.k.defined());
    return PaperAttention(heads, x, adapter, options).to(x.scalar_type()).flatten(2);
  }
  if (adapter.kind == Operator::kWindow)
    return DslaWindowAttention(heads.q, Behind(prefix.k, heads.k), Behind(prefix.v, heads.v),
                               options.chunked.window, options.chunked.sinks,
                               options.chunked.segment)
        .out.to(x.scalar_type())
        .flatten(2);
  Tensor claim;
  if (adapter.claim.defined()) {
    claim = at::linear(x, adapter.claim.to(x.scalar_type())).to(at::kFloat) + adapter.claim_bias;
  }
  const Tensor out =
      DslaLayer(heads.q, Behind(prefix.k, heads.k), Behind(prefix.k_plain, heads.k_plain),
                Behind(prefix.v, heads.v), claim, adapter.op, options);
  return out.to(x.scalar_type()).flatten(2);
}

Tensor OutputProjection(const TeacherLayer& layer, const Tensor& out,
                        const AdapterTensors* adapter) {
  const Tensor y = at::linear(out, layer.o, Given(layer.o_bias));
  if (adapter == nullptr || !adapter->o_a.defined()) return y;
  return y + LowRank(out, adapter->o_a, adapter->o_b);
}

Tensor MlpBlock(const Teacher& teacher, const TeacherLayer& layer, const Tensor& x) {
  const Tensor gate_up =
      at::linear(Norm(x, layer.mlp_norm, teacher.config.norm_eps), layer.gate_up);
  return x + at::linear(SwiGlu(gate_up), layer.down);
}

}  // namespace dsla::distill
