// Schemas of all operators, and the ones that are compositions or carry their own autograd: they
// run on any device. The CPU operators are in cpu_ops.cc.
#include "ops/torch/register.h"

#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "ops/dsla/dsla_autograd.h"
#include "ops/torch/rope_table.h"

namespace dsla {

void RegisterTorchOps() {}

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor OrUndefined(const OptionalTensor& x) { return x.value_or(Tensor()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> Chunked(const Tensor& phi_q, const Tensor& mix,
                                                   const Tensor& phi_k, const Tensor& a,
                                                   const Tensor& v, const OptionalTensor& state,
                                                   const OptionalTensor& norm, int64_t window,
                                                   int64_t sinks, int64_t chunk, int64_t segment) {
  DslaChunkedResult r =
      DslaChunked(phi_q, mix, phi_k, a, v, OrUndefined(state), OrUndefined(norm),
                  {.window = window, .sinks = sinks, .chunk = chunk, .segment = segment});
  return {r.num, r.den, r.state, r.norm};
}

std::tuple<Tensor, Tensor> WindowAttention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           int64_t window, int64_t sinks, int64_t segment) {
  DslaWindowResult r = DslaWindowAttention(q, k, v, window, sinks, segment);
  return {r.out, r.lse};
}

Tensor Merge(const Tensor& num, const Tensor& den, const OptionalTensor& win,
             const OptionalTensor& lse, const OptionalTensor& claim) {
  return DslaMerge(num, den, OrUndefined(win), OrUndefined(lse), OrUndefined(claim));
}

Tensor Layer(const Tensor& q, const Tensor& k, const Tensor& k_plain, const Tensor& v,
             const OptionalTensor& claim, const Tensor& phi_q, const Tensor& phi_k,
             const Tensor& gate_weight, const Tensor& gate_bias, const Tensor& mix, int64_t window,
             int64_t sinks, double gate_floor, int64_t chunk, int64_t segment) {
  return DslaLayer(
      q, k, k_plain, v, OrUndefined(claim), {phi_q, phi_k, gate_weight, gate_bias, mix},
      {{.window = window, .sinks = sinks, .chunk = chunk, .segment = segment}, gate_floor});
}

// x W^T + bias + (x A^T) B^T.
Tensor LinearDelta(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& delta_a, const OptionalTensor& delta_b) {
  constexpr char kOp[] = "dsla::linear";
  TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1), kOp, ": x is ",
              x.sizes(), ", weight is ", weight.sizes(), ", expected [..., in] and [out, in]");
  TORCH_CHECK(delta_a.has_value() == delta_b.has_value(), kOp,
              ": delta_a and delta_b must be given together or not at all");
  const Tensor y = at::linear(x, weight, bias);
  if (!delta_a) return y;
  TORCH_CHECK(delta_a->dim() == 2 && delta_b->dim() == 2 && delta_a->size(1) == weight.size(1) &&
                  delta_b->size(0) == weight.size(0) && delta_a->size(0) == delta_b->size(1),
              kOp, ": delta_a is ", delta_a->sizes(), ", delta_b is ", delta_b->sizes(),
              ", expected [r, ", weight.size(1), "] and [", weight.size(0), ", r]");
  return y.add(at::linear(at::linear(x, *delta_a), *delta_b));
}

TORCH_LIBRARY(dsla, m) {
  m.class_<TorchRopeTable>("RopeTable")
      .def(torch::init<const Tensor&, int64_t>())
      .def("positions", &TorchRopeTable::positions)
      .def("cos", &TorchRopeTable::Cos)
      .def("sin", &TorchRopeTable::Sin);

  // With autograd, any device.
  m.def(
      "chunked(Tensor phi_q, Tensor mix, Tensor phi_k, Tensor a, Tensor v, Tensor? state=None, "
      "Tensor? norm=None, int window=0, int sinks=0, int chunk=64, int segment=1024) -> "
      "(Tensor num, Tensor den, Tensor state, Tensor norm)",
      Chunked);
  m.def("features(Tensor u, Tensor map, bool two_sided) -> Tensor", DslaFeatures);
  m.def("gates(Tensor k, Tensor weight, Tensor bias, float floor) -> Tensor", DslaGates);
  m.def("rotate(Tensor x, Tensor cos, Tensor sin, bool inverse=False) -> Tensor", DslaRope);
  m.def(
      "window_attention(Tensor q, Tensor k, Tensor v, int window, int sinks=0, int segment=1024) "
      "-> (Tensor out, Tensor lse)",
      WindowAttention);
  m.def(
      "merge(Tensor num, Tensor den, Tensor? win=None, Tensor? lse=None, Tensor? claim=None) -> "
      "Tensor",
      Merge);
  m.def(
      "layer(Tensor q, Tensor k, Tensor k_plain, Tensor v, Tensor? claim, Tensor phi_q, Tensor "
      "phi_k, Tensor gate_weight, Tensor gate_bias, Tensor mix, int window, int sinks, float "
      "gate_floor, int chunk=64, int segment=1024) -> Tensor",
      Layer);
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? delta_a=None, Tensor? "
      "delta_b=None) -> Tensor",
      LinearDelta);

  // The serving operators, CPU, no autograd.
  m.def(
      "slot_bytes(int H, int Hkv, int D, int F, int states, int window, int sinks, ScalarType "
      "kv_dtype) -> int");
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor? claim, Tensor(a!) states, Tensor slots, "
      "Tensor row_start, Tensor pos, Tensor phi_q, Tensor phi_k, Tensor gate_weight, Tensor "
      "gate_bias, Tensor mix, Tensor rope_cos, Tensor rope_sin, int window, int sinks, float "
      "gate_floor) -> Tensor");
  m.def(
      "fold(Tensor k_pages, Tensor v_pages, Tensor page_start, Tensor pages, Tensor pos, "
      "Tensor(a!) states, Tensor slots, Tensor phi_q, Tensor phi_k, Tensor gate_weight, Tensor "
      "gate_bias, Tensor mix, Tensor rope_cos, Tensor rope_sin, int window, int sinks, float "
      "gate_floor) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_start, Tensor pages, "
      "Tensor row_start, Tensor pos, float scale, int sliding_window=0) -> (Tensor out, Tensor "
      "lse)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def(
      "rope(Tensor(a!) x, Tensor positions, __torch__.torch.classes.dsla.RopeTable table, Tensor? "
      "norm_weight=None, float norm_eps=0.) -> ()");
  m.def(
      "sample(Tensor logits, Tensor seeds, Tensor positions, float temperature=1., int top_k=0, "
      "float top_p=1., float min_p=0.) -> (Tensor tokens, Tensor logprobs)");
}

}  // namespace
}  // namespace dsla
