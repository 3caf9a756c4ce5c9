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
#include "distill/torch_device.h"
#include "distill/torch_layers.h"
#include "distill/torch_loss.h"
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

Expected<Tensor> ReadTensor(const ModelFile& file, const std::string& name, const TensorInfo& info,
                            at::Device device, at::ScalarType type) {
  Tensor host = at::empty(info.shape, at::kFloat);
  DSLA_RETURN_IF_ERROR(
      file.Read(name, {host.mutable_data_ptr<float>(), static_cast<size_t>(host.numel())}));
  return host.to(device, type);
}

// What one layer of the teacher holds, from the file's tensors.
Expected<TeacherLayer> ReadLayer(const ModelFile& file, int l, at::Device device,
                                 at::ScalarType type) {
  Status status;
  const auto read = [&](const char* suffix) {
    const std::string name = LayerTensorName(l, suffix);
    const TensorInfo* info = file.FindTensor(name);
    if (info == nullptr || !status.ok()) return Tensor();
    auto tensor = ReadTensor(file, name, *info, device, type);
    if (!tensor.ok()) return status = tensor.status(), Tensor();
    return std::move(tensor).value();
  };
  TeacherLayer layer;
  layer.attn_norm = read("input_layernorm.weight");
  layer.mlp_norm = read("post_attention_layernorm.weight");
  layer.q_norm = read("self_attn.q_norm.weight");
  layer.k_norm = read("self_attn.k_norm.weight");
  const std::vector<Tensor> qkv = {read("self_attn.q_proj.weight"), read("self_attn.k_proj.weight"),
                                   read("self_attn.v_proj.weight")};
  const std::vector<Tensor> bias = {read("self_attn.q_proj.bias"), read("self_attn.k_proj.bias"),
                                    read("self_attn.v_proj.bias")};
  layer.o = read("self_attn.o_proj.weight");
  layer.o_bias = read("self_attn.o_proj.bias");
  const std::vector<Tensor> gate_up = {read("mlp.gate_proj.weight"), read("mlp.up_proj.weight")};
  layer.down = read("mlp.down_proj.weight");
  DSLA_RETURN_IF_ERROR(status);
  layer.qkv = at::cat(qkv);
  if (bias[0].defined()) layer.qkv_bias = at::cat(bias);
  layer.gate_up = at::cat(gate_up);
  return layer;
}

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

  const ModelConfig& config() const { return teacher.config; }
  at::TensorOptions fp32() const { return at::TensorOptions(at::kFloat).device(device); }

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
  Tensor ForEachLayer(const Tensor& ids, Body&& body);
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
Tensor Network::Impl::ForEachLayer(const Tensor& ids, Body&& body) {
  const RopeTables rope = Rope(0, ids.size(1));
  Tensor h = at::embedding(teacher.embedding, ids);
  for (int l = 0; l < config().L; ++l) {
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

// The hybrid's hidden states from `switch_at` on. Below `entry_layer` it is the teacher.
Tensor Network::Impl::RunHybrid(const TeacherPass& pass, const Tensor& ids,
                                const std::vector<bool>& converted,
                                const std::vector<bool>& trained, int switch_at, int entry_layer,
                                std::vector<std::pair<int, Tensor>>* outputs,
                                std::vector<Tensor>* cosines) {
  const int64_t T = ids.size(1);
  const RopeTables rope = Rope(switch_at, T);
  Tensor h = pass.entry.narrow(1, switch_at, T - switch_at);
  for (int l = entry_layer; l < config().L; ++l) {
    const TeacherLayer& layer = teacher.layers[l];
    const AdapterTensors* adapter = !converted[l] ? nullptr : trained[l] ? &leaves[l] : &frozen[l];
    const Tensor x = distill::Norm(h, layer.attn_norm, config().norm_eps);
    const Heads heads = distill::Project(teacher, layer, x, rope, adapter);
    Prefix prefix;
    if (switch_at > 0) {
      const Prefix& keys = pass.keys[l];
      prefix = {keys.k.narrow(1, 0, switch_at), keys.k_plain.narrow(1, 0, switch_at),
                keys.v.narrow(1, 0, switch_at)};
    }
    const Tensor attention = adapter == nullptr
                                 ? distill::SoftmaxAttention(heads, prefix)
                                 : distill::DslaAttention(heads, prefix, x, *adapter, op_options);
    const Tensor out = distill::OutputProjection(layer, attention, adapter);
    if (adapter != nullptr && outputs != nullptr) outputs->emplace_back(l, out);
    if (adapter != nullptr && cosines != nullptr && adapter->op.mix.size(1) == 2) {
      const Tensor gates = DslaGates(heads.k_plain, adapter->op.gate_weight, adapter->op.gate_bias,
                                     op_options.gate_floor)
                               .exp();
      cosines->push_back(at::cosine_similarity(gates.select(3, 0), gates.select(3, 1), -1).mean());
    }
    h = distill::MlpBlock(teacher, layer, h + out);
  }
  return distill::Norm(h, teacher.final_norm, config().norm_eps);
}

Network::Network(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Network::~Network() = default;

Expected<std::unique_ptr<Network>> Network::Create(const ModelFile& file,
                                                   const ParameterLayout& layout,
                                                   const NetworkOptions& options) {
  auto impl = std::make_unique<Impl>(layout);
  const ModelConfig& config = file.config();
  if (config.sliding_window > 0)
    return Unsupported("'{}' has a sliding window of {} tokens, which the trainer does not know",
                       file.path(), config.sliding_window);
  DSLA_ASSIGN_OR_RETURN(impl->device, distill::OpenDevice(options.device));
  const bool bf16 = options.dtype == "bf16" || (options.dtype == "auto" && !impl->device.is_cpu());
  if (!bf16 && options.dtype != "fp32" && options.dtype != "auto")
    return InvalidArgument("dtype '{}' is not one of auto, fp32, bf16", options.dtype);
  impl->type = bf16 ? at::kBFloat16 : at::kFloat;
  at::set_num_threads(ThreadCount(options.threads));
  if (!impl->device.is_cpu()) {
    int64_t weights = 0;
    for (const auto& [name, shape] : RequiredTensors(config)) {
      int64_t numel = bf16 ? 2 : 4;
      for (const int64_t n : shape) numel *= n;
      weights += numel;
    }
    const int64_t need = weights + 16 * layout.size(), free = distill::FreeMemory(impl->device);
    if (need > free)
      return ResourceExhausted(
          "'{}' needs {:.1f} GiB for weights and optimiser, {} has {:.1f} free", file.path(),
          static_cast<double>(need) / (1 << 30), options.device,
          static_cast<double>(free) / (1 << 30));
  }
  Teacher& teacher = impl->teacher;
  teacher.config = config;
  const auto read = [&](const char* name, Tensor* to) -> Status {
    const TensorInfo* info = file.FindTensor(name);
    if (info == nullptr) return NotFound("'{}' has no tensor {}", file.path(), name);
    DSLA_ASSIGN_OR_RETURN(*to, ReadTensor(file, name, *info, impl->device, impl->type));
    return Status::Ok();
  };
  DSLA_RETURN_IF_ERROR(read("model.embed_tokens.weight", &teacher.embedding));
  DSLA_RETURN_IF_ERROR(read("model.norm.weight", &teacher.final_norm));
  teacher.head = teacher.embedding;
  if (!config.tied_embeddings) DSLA_RETURN_IF_ERROR(read("lm_head.weight", &teacher.head));
  for (int l = 0; l < config.L; ++l) {
    DSLA_ASSIGN_OR_RETURN(TeacherLayer layer, ReadLayer(file, l, impl->device, impl->type));
    teacher.layers.push_back(std::move(layer));
  }
  impl->frequencies = config.rope.Frequencies(config.D);
  const AdapterSettings& settings = layout.settings();
  impl->op_options.chunked.window = settings.window;
  impl->op_options.chunked.sinks = settings.sinks;
  // A GPU has the memory for a whole sequence's temporaries, and wants few large kernels.
  if (!impl->device.is_cpu()) impl->op_options.chunked.segment = 8192;
  impl->op_options.gate_floor = settings.gate_floor;
  impl->BindParameters();
  return std::unique_ptr<Network>(new Network(std::move(impl)));
}

const ParameterLayout& Network::layout() const { return impl_->layout; }

std::string Network::device_name() const {
  return impl_->device.str() + (impl_->type == at::kBFloat16 ? ", bf16" : ", fp32");
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

std::vector<float> Network::MeanWindowLse(const TokenBatch& batch) {
  const at::NoGradGuard no_grad;
  Impl& n = *impl_;
  const AdapterSettings& settings = n.layout.settings();
  Tensor mean = at::zeros({n.config().L, n.config().H}, n.fp32());
  if (settings.window == 0) return ToHost(mean);
  n.ForEachLayer(n.Ids(batch), [&](int l, const Tensor&, const Tensor&, const Heads& heads,
                                   const Tensor&, const RopeTables&) {
    const DslaWindowResult window =
        DslaWindowAttention(heads.q, heads.k, heads.v, settings.window, settings.sinks);
    mean.select(0, l).copy_(window.lse.permute({2, 0, 1}).flatten(1).mean(1));
  });
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
    total.add_(distill::NormalisedError(y, out, counted, &gradient));
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
    total.add_(distill::NormalisedError(y, out, counted, nullptr));
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
    const Tensor kl =
        distill::KlGradient(n.teacher.head, hidden, pass.hidden.narrow(1, begin, length), counted,
                            step.kl_weight, &gradient);
    loss.add_(kl, step.kl_weight);
    roots.push_back(hidden);
    gradients.push_back(gradient);
    const double share = 1.0 / static_cast<double>(step.converted.size());
    for (const auto& [l, y] : outputs) {
      Tensor d;
      loss.add_(distill::NormalisedError(y, pass.outputs[l].narrow(1, begin, length), counted, &d),
                step.align_weight * share);
      if (!y.requires_grad()) continue;
      roots.push_back(y);
      gradients.push_back(d.mul_(step.align_weight * share));
    }
    for (const Tensor& cos : cosines) {
      loss.add_(cos.detach(), step.cosine_weight * share);
      if (!cos.requires_grad()) continue;
      roots.push_back(cos);
      gradients.push_back(at::zeros({}, cos.options()).add_(step.cosine_weight * share));
    }
  }
  torch::autograd::backward(roots, gradients);
  for (const int l : trained) n.touched[l] = true;
  n.losses.push_back(loss);
}

void Network::Update(const UpdateOptions& options) {
  Impl& n = *impl_;
  const at::NoGradGuard no_grad;
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
  const std::vector<double> losses = ToDoubles(at::stack(impl_->losses));
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
