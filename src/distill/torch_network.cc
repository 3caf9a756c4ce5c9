#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cosine_similarity.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

#include "base/exec.h"
#include "distill/network.h"
#include "distill/torch_layers.h"
#include "distill/torch_loss.h"
#include "distill/torch_recompute.h"
#include "distill/torch_teacher.h"
#include "format/sha256.h"

namespace dsla {

using at::Tensor;
using distill::AdapterTensors;
using distill::Heads;
using distill::Prefix;
using distill::RopeTables;
using distill::Teacher;
using distill::TeacherLayer;

namespace {

std::vector<float> ToHost(const Tensor& x) {
  const Tensor host = x.detach().to(at::kCPU, at::kFloat).contiguous();
  return {host.const_data_ptr<float>(), host.const_data_ptr<float>() + host.numel()};
}

std::vector<double> ToDoubles(const Tensor& x) {
  const std::vector<float> host = ToHost(x);
  return {host.begin(), host.end()};
}

// The teacher's pass over a batch, and of it what was asked for.
struct TeacherPass {
  std::vector<Prefix> keys;     // by layer
  std::vector<Tensor> outputs;  // by layer: attention after its projection
  Tensor entry;                 // the residual stream before layer `entry_layer`
  Tensor hidden;                // after the final norm
};

}  // namespace

struct Network::Impl {
  Impl(ParameterLayout layout) : layout(std::move(layout)) {}

  ParameterLayout layout;
  Teacher teacher;
  at::Device device = at::kCPU;
  at::ScalarType type = at::kFloat;
  std::vector<double> frequencies;
  DslaLayerOptions op_options;

  Tensor values, grads, first, second;         // [L, P]
  Tensor steps;                                // [L]
  std::vector<AdapterTensors> leaves, frozen;  // the same memory, with and without gradients
  std::vector<bool> touched;                   // layers with gradients since the last update
  std::vector<Tensor> losses;
  Ranks* ranks = nullptr;
  int checkpoint_layers = 0;

  const ModelConfig& config() const { return teacher.config; }
  at::TensorOptions fp32() const { return at::TensorOptions(at::kFloat).device(device); }

  struct Hybrid;

  void BindParameters();
  AdapterTensors Bind(int layer, bool leaf);

  Tensor Ids(const TokenBatch& batch) const;
  Tensor Counted(const TokenBatch& batch) const;
  RopeTables Rope(int64_t begin, int64_t end) const;
  TeacherPass RunTeacher(const Tensor& ids, bool keep_keys, bool keep_outputs, int entry_layer);
  Tensor RunHybrid(const TeacherPass& pass, const Tensor& ids, const std::vector<bool>& converted,
                   const std::vector<bool>& trained, int switch_at, int entry_layer,
                   std::vector<std::pair<int, Tensor>>* outputs, std::vector<Tensor>* cosines);
  // Calls body(layer, x, heads, out): the teacher's stream through one layer after another.
  template <typename Body>
  Tensor ForEachLayer(const Tensor& ids, Body&& body, const Stop& stop = {});
  std::vector<bool> Mask(const std::vector<int>& layers) const {
    std::vector<bool> mask(config().L, false);
    for (const int l : layers) mask[l] = true;
    return mask;
  }
};

AdapterTensors Network::Impl::Bind(int layer, bool leaf) {
  const auto view = [&](const char* name) {
    const ParameterTensor* tensor = layout.Find(name);
    if (tensor == nullptr) return Tensor();
    const Tensor at = values.select(0, layer).narrow(0, tensor->offset, tensor->size);
    Tensor bound = at.view(tensor->shape).detach();
    if (leaf) {
      bound.set_requires_grad(true);
      bound.mutable_grad() =
          grads.select(0, layer).narrow(0, tensor->offset, tensor->size).view(tensor->shape);
    }
    return bound;
  };
  AdapterTensors bound;
  bound.kind = layout.settings().op;
  bound.k_a = view("k_a"), bound.k_b = view("k_b"), bound.v_a = view("v_a"),
  bound.v_b = view("v_b"), bound.gate_a = view("gate_a"), bound.gate_b = view("gate_b"),
  bound.log_scale = view("log_scale");
  bound.q_a = view("q_a"), bound.q_b = view("q_b"), bound.o_a = view("o_a"),
  bound.o_b = view("o_b");
  bound.op = {view("phi_q"), view("phi_k"), view("gate_weight"), view("gate_bias"), view("mix")};
  bound.claim = view("claim"), bound.claim_bias = view("claim_bias");
  return bound;
}

void Network::Impl::BindParameters() {
  const int64_t L = config().L;
  for (Tensor* x : {&values, &grads, &first, &second}) *x = at::zeros({L, layout.row()}, fp32());
  steps = at::zeros({L}, fp32());
  touched.assign(L, false);
  for (int l = 0; l < L; ++l) {
    leaves.push_back(Bind(l, true));
    frozen.push_back(Bind(l, false));
  }
}

Tensor Network::Impl::Ids(const TokenBatch& batch) const {
  DSLA_CHECK(static_cast<int64_t>(batch.ids.size()) == int64_t{batch.rows} * batch.length);
  const Tensor host =
      at::from_blob(const_cast<int32_t*>(batch.ids.data()), {batch.rows, batch.length}, at::kInt);
  return host.to(device, at::kLong);
}

// [B, T] 1 where the position counts; undefined if all do.
Tensor Network::Impl::Counted(const TokenBatch& batch) const {
  if (batch.counts.empty() && batch.count_from == 0) return {};
  const std::vector<int32_t> all(batch.rows, batch.length);
  const Tensor ends =
      at::tensor(at::ArrayRef<int32_t>(batch.counts.empty() ? all : batch.counts), at::kLong)
          .to(device)
          .unsqueeze(1);
  const Tensor position = at::arange(batch.length, ends.options()).unsqueeze(0);
  return position.lt(ends).logical_and_(position.ge(batch.count_from)).to(at::kFloat);
}

RopeTables Network::Impl::Rope(int64_t begin, int64_t end) const {
  const Tensor positions = at::arange(begin, end, at::kDouble);
  const Tensor angles = at::outer(positions, at::tensor(at::ArrayRef<double>(frequencies)));
  return {angles.cos().to(device, at::kFloat), angles.sin().to(device, at::kFloat)};
}

template <typename Body>
Tensor Network::Impl::ForEachLayer(const Tensor& ids, Body&& body, const Stop& stop) {
  const RopeTables rope = Rope(0, ids.size(1));
  Tensor h = at::embedding(teacher.embedding, ids);
  for (int l = 0; l < config().L; ++l) {
    if (stop && stop()) return {};
    const TeacherLayer& layer = teacher.layers[l];
    const Tensor x = distill::Norm(h, layer.attn_norm, config().norm_eps);
    const Heads heads = distill::Project(teacher, layer, x, rope, nullptr);
    const Tensor out =
        distill::OutputProjection(layer, distill::SoftmaxAttention(heads, {}), nullptr);
    body(l, h, x, heads, out, rope);
    h = distill::MlpBlock(teacher, layer, h + out);
  }
  return distill::Norm(h, teacher.final_norm, config().norm_eps);
}

TeacherPass Network::Impl::RunTeacher(const Tensor& ids, bool keep_keys, bool keep_outputs,
                                      int entry_layer) {
  const at::NoGradGuard no_grad;
  TeacherPass pass;
  pass.hidden = ForEachLayer(ids, [&](int l, const Tensor& h, const Tensor&, const Heads& heads,
                                      const Tensor& out, const RopeTables&) {
    if (l == entry_layer) pass.entry = h;
    if (keep_keys) pass.keys.push_back({heads.k, heads.k_plain, heads.v});
    if (keep_outputs) pass.outputs.push_back(out);
  });
  return pass;
}

// One pass of a hybrid. The backward pass may run layers again (Recompute), so nothing here refers
// to what dies before.
struct Network::Impl::Hybrid {
  const Impl* n;
  const TeacherPass* teacher;  // of the whole step
  RopeTables rope;
  std::vector<bool> converted, trained;
  int switch_at;
  bool want_outputs, want_cosines;

  // The stream h behind layer l. `extras` gets the layer's attention output, then the cosine of its
  // gates, as far as they are wanted and the layer has them.
  Tensor Layer(int l, const Tensor& h, std::vector<Tensor>* extras) const {
    const TeacherLayer& layer = n->teacher.layers[l];
    const AdapterTensors* adapter = !converted[l] ? nullptr
                                    : trained[l]  ? &n->leaves[l]
                                                  : &n->frozen[l];
    const Tensor x = distill::Norm(h, layer.attn_norm, n->config().norm_eps);
    const Heads heads = distill::Project(n->teacher, layer, x, rope, adapter);
    Prefix prefix;
    if (switch_at > 0) {
      const Prefix& keys = teacher->keys[l];
      prefix = {keys.k.narrow(1, 0, switch_at), keys.k_plain.narrow(1, 0, switch_at),
                keys.v.narrow(1, 0, switch_at)};
    }
    const Tensor attention =
        adapter == nullptr ? distill::SoftmaxAttention(heads, prefix)
                           : distill::DslaAttention(heads, prefix, x, *adapter, n->op_options);
    const Tensor out = distill::OutputProjection(layer, attention, adapter);
    if (HasOutput(l)) extras->push_back(out);
    if (HasCosine(l)) {
      const Tensor gates = distill::LogGates(heads, x, *adapter, n->op_options).exp();
      extras->push_back(at::cosine_similarity(gates.select(3, 0), gates.select(3, 1), -1).mean());
    }
    return distill::MlpBlock(n->teacher, layer, h + out);
  }
  bool HasOutput(int l) const { return converted[l] && want_outputs; }
  bool HasCosine(int l) const {
    return converted[l] && want_cosines && n->layout.settings().states == 2 &&
           n->layout.Find("gate_bias") != nullptr;
  }
};

// The hybrid's hidden states from `switch_at` on. Below `entry_layer` it is the teacher. `pass`
// must live until the backward pass is over.
Tensor Network::Impl::RunHybrid(const TeacherPass& pass, const Tensor& ids,
                                const std::vector<bool>& converted,
                                const std::vector<bool>& trained, int switch_at, int entry_layer,
                                std::vector<std::pair<int, Tensor>>* outputs,
                                std::vector<Tensor>* cosines) {
  const int64_t T = ids.size(1);
  const auto hybrid =
      std::make_shared<const Hybrid>(Hybrid{this, &pass, Rope(switch_at, T), converted, trained,
                                            switch_at, outputs != nullptr, cosines != nullptr});
  Tensor h = pass.entry.narrow(1, switch_at, T - switch_at);
  for (int begin = entry_layer; begin < config().L;) {
    const int end = std::min(begin + std::max(1, checkpoint_layers), config().L);
    const auto body = [hybrid, begin, end](const Tensor& in) {
      std::vector<Tensor> all(1);
      Tensor out = in;
      for (int l = begin; l < end; ++l) out = hybrid->Layer(l, out, &all);
      all[0] = out;
      return all;
    };
    bool learns = h.requires_grad();
    for (int l = begin; l < end; ++l) learns = learns || trained[l];
    const std::vector<Tensor> all = learns && checkpoint_layers > 0 && at::GradMode::is_enabled()
                                        ? distill::Recompute(h, body)
                                        : body(h);
    h = all[0];
    auto extra = all.begin() + 1;
    for (int l = begin; l < end; ++l) {
      if (hybrid->HasOutput(l)) outputs->emplace_back(l, *extra++);
      if (hybrid->HasCosine(l)) cosines->push_back(*extra++);
    }
    begin = end;
  }
  return distill::Norm(h, teacher.final_norm, config().norm_eps);
}

Network::Network(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Network::~Network() = default;

Expected<std::unique_ptr<Network>> Network::Create(const ModelFile& file,
                                                   const ParameterLayout& layout,
                                                   const NetworkOptions& options) {
  auto impl = std::make_unique<Impl>(layout);
  DSLA_ASSIGN_OR_RETURN(const distill::Placement placement,
                        distill::Place(options.device, options.dtype));
  impl->device = placement.device, impl->type = placement.type;
  impl->ranks = options.ranks;
  impl->checkpoint_layers = options.checkpoint_layers;
  at::set_num_threads(ThreadCount(options.threads));
  // Parameters, gradients and two moments, fp32.
  DSLA_ASSIGN_OR_RETURN(impl->teacher, distill::ReadTeacher(file, placement, 16 * layout.size()));
  impl->frequencies = file.config().rope.Frequencies(file.config().D);
  const AdapterSettings& settings = layout.settings();
  impl->op_options.chunked.window = settings.window;
  impl->op_options.chunked.sinks = settings.sinks;
  // A GPU has the memory for a whole sequence's temporaries, and wants few large kernels.
  if (!impl->device.is_cpu()) impl->op_options.chunked.segment = 8192;
  impl->op_options.gate_floor = settings.gate_floor;
  impl->op_options.chunked.balanced = settings.op != Operator::kPaper;
  impl->BindParameters();
  return std::unique_ptr<Network>(new Network(std::move(impl)));
}

const ParameterLayout& Network::layout() const { return impl_->layout; }

std::string Network::device_name() const {
  const Tensor like = at::empty({1}, at::TensorOptions(impl_->type).device(impl_->device));
  return impl_->device.str() + (impl_->type == at::kBFloat16 ? ", bf16" : ", fp32") +
         (distill::HasTrainingKernels(like) ? ", fused kernels" : "");
}

std::string Network::TeacherHash() const {
  Sha256 hash;
  const auto add = [&](const Tensor& x) {
    if (!x.defined()) return;
    const Tensor host = x.to(at::kCPU).contiguous();
    hash.Update({static_cast<const std::byte*>(host.const_data_ptr()), host.nbytes()});
  };
  add(impl_->teacher.embedding), add(impl_->teacher.head), add(impl_->teacher.final_norm);
  for (const TeacherLayer& layer : impl_->teacher.layers)
    for (const Tensor* x :
         {&layer.attn_norm, &layer.mlp_norm, &layer.q_norm, &layer.k_norm, &layer.qkv,
          &layer.qkv_bias, &layer.o, &layer.o_bias, &layer.gate_up, &layer.down})
      add(*x);
  return hash.HexDigest();
}

OptimizerState Network::State() const {
  return {ToHost(impl_->values), ToHost(impl_->first), ToHost(impl_->second), ToHost(impl_->steps)};
}

void Network::SetState(const OptimizerState& state) {
  const at::NoGradGuard no_grad;
  const auto set = [](Tensor& to, const std::vector<float>& from) {
    DSLA_CHECK(static_cast<int64_t>(from.size()) == to.numel());
    to.copy_(at::from_blob(const_cast<float*>(from.data()), to.sizes(), at::kFloat));
  };
  set(impl_->values, state.values);
  set(impl_->first, state.first);
  set(impl_->second, state.second);
  set(impl_->steps, state.steps);
}

void Network::SetValues(std::span<const float> values) {
  OptimizerState state;
  state.values.assign(values.begin(), values.end());
  state.first.assign(values.size(), 0.0f);
  state.second.assign(values.size(), 0.0f);
  state.steps.assign(impl_->layout.layers(), 0.0f);
  SetState(state);
}

std::optional<std::vector<float>> Network::MeanWindowLse(const TokenBatch& batch,
                                                         const Stop& stop) {
  const at::NoGradGuard no_grad;
  Impl& n = *impl_;
  const AdapterSettings& settings = n.layout.settings();
  Tensor mean = at::zeros({n.config().L, n.config().H}, n.fp32());
  if (settings.window == 0) return ToHost(mean);
  const auto body = [&](int l, const Tensor&, const Tensor&, const Heads& heads, const Tensor&,
                        const RopeTables&) {
    const DslaWindowResult window =
        DslaWindowAttention(heads.q, heads.k, heads.v, settings.window, settings.sinks);
    mean.select(0, l).copy_(window.lse.permute({2, 0, 1}).flatten(1).mean(1));
  };
  if (!n.ForEachLayer(n.Ids(batch), body, stop).defined()) return std::nullopt;
  return ToHost(mean);
}

std::vector<double> Network::OutputScales(const TokenBatch& batch) {
  const at::NoGradGuard no_grad;
  Impl& n = *impl_;
  std::vector<Tensor> scales;
  n.ForEachLayer(n.Ids(batch), [&](int l, const Tensor&, const Tensor& x, const Heads& heads,
                                   const Tensor& out, const RopeTables& rope) {
    const AdapterTensors& adapter = n.frozen[l];
    const Heads own = distill::WithDelta(n.teacher, n.teacher.layers[l], heads, x, rope, adapter);
    const Tensor y = distill::OutputProjection(
                         n.teacher.layers[l],
                         distill::DslaAttention(own, {}, x, adapter, n.op_options), &adapter)
                         .to(at::kFloat);
    scales.push_back((y * out).sum() / y.square().sum().clamp_min(1e-20));
  });
  return ToDoubles(at::stack(scales));
}

std::optional<std::vector<float>> Network::LogHeadScales(const TokenBatch& batch,
                                                         const Stop& stop) {
  const at::NoGradGuard no_grad;
  Impl& n = *impl_;
  std::vector<Tensor> scales;
  const auto body = [&](int l, const Tensor&, const Tensor& x, const Heads& heads, const Tensor&,
                        const RopeTables& rope) {
    const AdapterTensors& adapter = n.frozen[l];
    const Heads own = distill::WithDelta(n.teacher, n.teacher.layers[l], heads, x, rope, adapter);
    const auto by_head = [&](const Tensor& y) {
      return y.to(at::kFloat).unflatten(2, {n.config().H, n.config().D});
    };
    const Tensor y = by_head(distill::DslaAttention(own, {}, x, adapter, n.op_options)),
                 o = by_head(distill::SoftmaxAttention(heads, {}));
    const Tensor scale = (y * o).sum({0, 1, 3}) / y.square().sum({0, 1, 3}).clamp_min(1e-20);
    scales.push_back(scale.clamp_min(1e-6).log());
  };
  if (!n.ForEachLayer(n.Ids(batch), body, stop).defined()) return std::nullopt;
  return ToHost(at::stack(scales));
}

std::vector<double> Network::AttentionEntropy(const TokenBatch& batch) {
  const at::NoGradGuard no_grad;
  Impl& n = *impl_;
  std::vector<Tensor> entropies;
  n.ForEachLayer(n.Ids(batch), [&](int, const Tensor&, const Tensor&, const Heads& heads,
                                   const Tensor&, const RopeTables&) {
    const int64_t T = heads.q.size(1), D = heads.q.size(3), Hkv = heads.k.size(2);
    const Tensor q = heads.q.narrow(1, T - 1, 1).to(at::kFloat).squeeze(1);  // [B, H, D]
    const Tensor grouped = q.unflatten(1, {Hkv, -1});                        // [B, Hkv, G, D]
    const Tensor k = heads.k.to(at::kFloat).permute({0, 2, 3, 1});           // [B, Hkv, D, T]
    const Tensor log_p =
        at::matmul(grouped, k).div_(std::sqrt(static_cast<double>(D))).log_softmax(-1);
    entropies.push_back((log_p.exp() * log_p).sum(-1).mean().neg() / std::log(2.0));
  });
  return ToDoubles(at::stack(entropies));
}

void Network::Align(const TokenBatch& batch) {
  Impl& n = *impl_;
  const at::NoGradGuard no_grad;
  const Tensor counted = n.Counted(batch);
  Tensor total = at::zeros({}, n.fp32());
  n.ForEachLayer(n.Ids(batch), [&](int l, const Tensor&, const Tensor& x, const Heads& heads,
                                   const Tensor& out, const RopeTables& rope) {
    const at::AutoGradMode with_grad(true);
    const AdapterTensors& adapter = n.leaves[l];
    const TeacherLayer& layer = n.teacher.layers[l];
    const Heads own = distill::WithDelta(n.teacher, layer, heads, x, rope, adapter);
    const Tensor y = distill::OutputProjection(
        layer, distill::DslaAttention(own, {}, x, adapter, n.op_options), &adapter);
    Tensor gradient;
    total.add_(distill::NormalisedError(y, out, counted, n.ranks, &gradient));
    torch::autograd::backward({y}, {gradient});
    n.touched[l] = true;
  });
  n.losses.push_back(total / n.config().L);
}

double Network::AlignmentError(const TokenBatch& batch) {
  Impl& n = *impl_;
  const at::NoGradGuard no_grad;
  const Tensor counted = n.Counted(batch);
  Tensor total = at::zeros({}, n.fp32());
  n.ForEachLayer(n.Ids(batch), [&](int l, const Tensor&, const Tensor& x, const Heads& heads,
                                   const Tensor& out, const RopeTables& rope) {
    const AdapterTensors& adapter = n.frozen[l];
    const TeacherLayer& layer = n.teacher.layers[l];
    const Heads own = distill::WithDelta(n.teacher, layer, heads, x, rope, adapter);
    const Tensor y = distill::OutputProjection(
        layer, distill::DslaAttention(own, {}, x, adapter, n.op_options), &adapter);
    total.add_(distill::NormalisedError(y, out, counted, nullptr, nullptr));
  });
  return total.item().toDouble() / n.config().L;
}

void Network::Chain(const TokenBatch& batch, const ChainStep& step) {
  DSLA_CHECK(!step.converted.empty() && step.switch_at < batch.length);
  Impl& n = *impl_;
  const Tensor ids = n.Ids(batch);
  const int64_t begin = step.switch_at, length = batch.length - begin;
  const int entry = *std::min_element(step.converted.begin(), step.converted.end());
  const bool align = step.align_weight > 0, cosine = step.cosine_weight > 0;
  const TeacherPass pass = n.RunTeacher(ids, begin > 0, align, entry);
  const std::vector<int>& trained = step.trained.empty() ? step.converted : step.trained;
  std::vector<std::pair<int, Tensor>> outputs;
  std::vector<Tensor> cosines;
  const Tensor hidden =
      n.RunHybrid(pass, ids, n.Mask(step.converted), n.Mask(trained), step.switch_at, entry,
                  align ? &outputs : nullptr, cosine ? &cosines : nullptr);
  Tensor counted = n.Counted(batch);
  if (counted.defined()) counted = counted.narrow(1, begin, length);

  std::vector<Tensor> roots, gradients;
  Tensor loss = at::zeros({}, n.fp32());
  {
    const at::NoGradGuard no_grad;
    Tensor gradient;
    const Tensor kl = distill::KlGradient(
        n.teacher.head, hidden, pass.hidden.narrow(1, begin, length), counted,
        batch.all_rows > 0 ? batch.Counted(step.switch_at) : 0, step.kl_weight, &gradient);
    loss.add_(kl, step.kl_weight);
    roots.push_back(hidden);
    gradients.push_back(gradient);
    const double share = 1.0 / static_cast<double>(step.converted.size());
    for (const auto& [l, y] : outputs) {
      Tensor d;
      loss.add_(distill::NormalisedError(y, pass.outputs[l].narrow(1, begin, length), counted,
                                         n.ranks, &d),
                step.align_weight * share);
      if (!y.requires_grad()) continue;
      roots.push_back(y);
      gradients.push_back(d.mul_(step.align_weight * share));
    }
    // A mean over rows: each rank's part of it.
    const double rows = batch.all_rows > 0 ? double(batch.rows) / batch.all_rows : 1.0;
    for (const Tensor& cos : cosines) {
      loss.add_(cos.detach(), step.cosine_weight * share * rows);
      if (!cos.requires_grad()) continue;
      roots.push_back(cos);
      gradients.push_back(at::zeros({}, cos.options()).add_(step.cosine_weight * share * rows));
    }
  }
  torch::autograd::backward(roots, gradients);
  for (const int l : trained) n.touched[l] = true;
  n.losses.push_back(loss);
}

void Network::Update(const UpdateOptions& options) {
  Impl& n = *impl_;
  const at::NoGradGuard no_grad;
  if (n.ranks != nullptr) n.ranks->Sum(n.grads);
  if (options.clip > 0) {
    const Tensor norms = n.grads.square().sum(1, /*keepdim=*/true);  // [L, 1]
    const Tensor norm = (options.clip_per_layer ? norms : norms.sum()).sqrt_();
    n.grads.mul_((norm + 1e-6).reciprocal_().mul_(options.clip).clamp_max_(1));
  }
  const int64_t P = n.layout.row(), low_rank = n.layout.low_rank();
  const auto update = [&](int64_t begin, int64_t end, double lr) {
    std::vector<Tensor> values, grads, first, second, steps;
    for (int64_t l = 0; l < n.config().L && begin < end; ++l) {
      if (!n.touched[l]) continue;
      const auto part = [&](const Tensor& x) {
        return x.select(0, l).narrow(0, begin, end - begin);
      };
      values.push_back(part(n.values)), grads.push_back(part(n.grads));
      first.push_back(part(n.first)), second.push_back(part(n.second));
      steps.push_back(n.steps.select(0, l));
    }
    if (values.empty()) return;
    at::_fused_adamw_(values, grads, first, second, {}, steps, lr, options.beta1, options.beta2,
                      options.weight_decay, options.epsilon, /*amsgrad=*/false,
                      /*maximize=*/false);
  };
  for (int64_t l = 0; l < n.config().L; ++l)
    if (n.touched[l]) n.steps.select(0, l).add_(1);
  update(0, low_rank, options.low_rank_lr);
  update(low_rank, P, options.lr);
  n.grads.zero_();
  n.touched.assign(n.touched.size(), false);
}

std::vector<float> Network::Gradients() const { return ToHost(impl_->grads); }

std::vector<double> Network::TakeLosses() {
  if (impl_->losses.empty()) return {};
  Tensor stacked = at::stack(impl_->losses);
  if (impl_->ranks != nullptr) impl_->ranks->Sum(stacked);
  const std::vector<double> losses = ToDoubles(stacked);
  impl_->losses.clear();
  return losses;
}

Divergence Network::Measure(const TokenBatch& batch, const std::vector<int>& converted,
                            int switch_at) {
  return Measure(batch, std::vector<std::vector<int>>{converted}, switch_at)[0];
}

std::vector<Divergence> Network::Measure(const TokenBatch& batch,
                                         const std::vector<std::vector<int>>& sets, int switch_at) {
  DSLA_CHECK(switch_at < batch.length);
  Impl& n = *impl_;
  const at::NoGradGuard no_grad;
  const Tensor ids = n.Ids(batch);
  int entry = n.config().L;
  for (const auto& set : sets)
    for (const int l : set) entry = std::min(entry, l);
  entry = std::min(entry, n.config().L - 1);
  const TeacherPass pass = n.RunTeacher(ids, switch_at > 0, false, entry);
  const int64_t length = batch.length - switch_at;
  Tensor counted = n.Counted(batch);
  if (counted.defined()) counted = counted.narrow(1, switch_at, length);
  Tensor targets;
  if (!batch.targets.empty()) {
    targets = at::from_blob(const_cast<int32_t*>(batch.targets.data()), {batch.rows, batch.length},
                            at::kInt)
                  .narrow(1, switch_at, length)
                  .to(n.device, at::kLong);
  }
  std::vector<Divergence> results;
  for (const auto& set : sets) {
    const Tensor hidden =
        n.RunHybrid(pass, ids, n.Mask(set), n.Mask({}), switch_at, entry, nullptr, nullptr);
    results.push_back(distill::MeasureDivergence(
        n.teacher.head, hidden, pass.hidden.narrow(1, switch_at, length), counted, targets));
  }
  return results;
}

}  // namespace dsla
