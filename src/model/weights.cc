#include "model/weights.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <new>
#include <utility>

namespace dsla {
namespace {

Status ReadInto(const ModelFile& file, const std::string& name, Buffer<float>& out, int64_t size) {
  out.Resize(size);
  return file.Read(name, out.span());
}

// Stacks [out_i, in] weights of one layer (and their biases) into one Linear.
Status LoadStacked(const ModelFile& file, int layer,
                   std::span<const std::pair<const char*, int64_t>> parts, int64_t in, bool bias,
                   WeightFormat format, Arena* arena, Linear& linear) {
  int64_t out = 0;
  for (const auto& [suffix, rows] : parts) out += rows;
  Buffer<float> weight(out * in), biases(bias ? out : 0);
  int64_t row = 0;
  for (const auto& [suffix, rows] : parts) {
    const std::string name = LayerTensorName(layer, suffix);
    DSLA_RETURN_IF_ERROR(file.Read(name + ".weight", weight.span().subspan(row * in, rows * in)));
    if (bias) DSLA_RETURN_IF_ERROR(file.Read(name + ".bias", biases.span().subspan(row, rows)));
    row += rows;
  }
  linear = Linear(weight.span(), out, in, format, biases.span(), arena);
  return Status::Ok();
}

Status LoadLayer(const ModelFile& file, int l, WeightFormat format, Arena* arena,
                 LayerWeights& layer) {
  const ModelConfig& c = file.config();
  DSLA_RETURN_IF_ERROR(
      ReadInto(file, LayerTensorName(l, "input_layernorm.weight"), layer.attn_norm, c.C));
  DSLA_RETURN_IF_ERROR(
      ReadInto(file, LayerTensorName(l, "post_attention_layernorm.weight"), layer.mlp_norm, c.C));
  if (c.qk_norm) {
    DSLA_RETURN_IF_ERROR(
        ReadInto(file, LayerTensorName(l, "self_attn.q_norm.weight"), layer.q_norm, c.D));
    DSLA_RETURN_IF_ERROR(
        ReadInto(file, LayerTensorName(l, "self_attn.k_norm.weight"), layer.k_norm, c.D));
  }
  const int64_t q = int64_t{c.H} * c.D, kv = int64_t{c.Hkv} * c.D;
  const std::pair<const char*, int64_t> qkv[] = {
      {"self_attn.q_proj", q}, {"self_attn.k_proj", kv}, {"self_attn.v_proj", kv}};
  const std::pair<const char*, int64_t> o[] = {{"self_attn.o_proj", c.C}};
  const std::pair<const char*, int64_t> gate_up[] = {{"mlp.gate_proj", c.ffn},
                                                     {"mlp.up_proj", c.ffn}};
  const std::pair<const char*, int64_t> down[] = {{"mlp.down_proj", c.C}};
  DSLA_RETURN_IF_ERROR(LoadStacked(file, l, qkv, c.C, c.qkv_bias, format, arena, layer.qkv));
  DSLA_RETURN_IF_ERROR(LoadStacked(file, l, o, q, c.o_bias, format, arena, layer.o));
  DSLA_RETURN_IF_ERROR(LoadStacked(file, l, gate_up, c.C, false, format, arena, layer.gate_up));
  return LoadStacked(file, l, down, c.ffn, false, format, arena, layer.down);
}

Buffer<float> Copy(const std::vector<float>& from) {
  Buffer<float> to(static_cast<int64_t>(from.size()));
  std::copy(from.begin(), from.end(), to.data());
  return to;
}

}  // namespace

int64_t ModelWeights::bytes() const {
  int64_t bytes = embedding.bytes() + head.bytes() + 4 * final_norm.size();
  for (const LayerWeights& layer : layers) {
    bytes += layer.qkv.bytes() + layer.o.bytes() + layer.gate_up.bytes() + layer.down.bytes();
    bytes += 4 * (layer.attn_norm.size() + layer.mlp_norm.size() + layer.q_norm.size() +
                  layer.k_norm.size());
  }
  return bytes;
}

WeightFormat FormatFor(const ModelFile& file) {
  bool all_q4_1 = true;
  for (const TensorInfo& tensor : file.tensors()) {
    if (tensor.shape.size() != 2 || !tensor.name.starts_with("model.layers.")) continue;
    if (tensor.type == "F32" || tensor.type == "F16" || tensor.type == "BF16")
      return WeightFormat::kBF16;
    all_q4_1 = all_q4_1 && tensor.type == "Q4_1";
  }
  return all_q4_1 ? WeightFormat::kInt4 : WeightFormat::kInt8;
}

Expected<ModelWeights> LoadWeights(const ExecContext& ctx, const ModelFile& file,
                                   WeightFormat format) {
  const ModelConfig& config = file.config();
  ModelWeights weights;
  weights.arena = std::make_unique<Arena>();
  weights.layers.resize(config.L);
  std::mutex mutex;
  Status first_error;
  const auto load = [&](int64_t task) -> Status {
    if (task >= 2) {
      const int l = static_cast<int>(task) - 2;
      return LoadLayer(file, l, format, weights.arena.get(), weights.layers[l]);
    }
    const bool head = task == 1;
    if (head && config.tied_embeddings) return Status::Ok();
    Buffer<float> weight(int64_t{config.V} * config.C);
    DSLA_RETURN_IF_ERROR(
        file.Read(head ? "lm_head.weight" : "model.embed_tokens.weight", weight.span()));
    (head ? weights.head : weights.embedding) = Linear(
        weight.span(), config.V, config.C,
        format == WeightFormat::kInt4 ? WeightFormat::kInt8 : format, {}, weights.arena.get());
    return Status::Ok();
  };
  // One task per layer, and one each for the embedding and the head: dequantising is the slow part.
  ParallelFor(ctx, config.L + 2, [&](int64_t task, int) {
    Status status;
    try {  // nothing may leave a parallel section by exception
      status = load(task);
    } catch (const std::bad_alloc&) {
      status = ResourceExhausted("'{}': out of memory while its weights were read", file.path());
    }
    if (status.ok()) return;
    const std::lock_guard lock(mutex);
    if (first_error.ok()) first_error = status;
  });
  DSLA_RETURN_IF_ERROR(first_error);
  DSLA_RETURN_IF_ERROR(ReadInto(file, "model.norm.weight", weights.final_norm, config.C));
  return weights;
}

int64_t DslaLayer::bytes() const {
  return q_delta.bytes() + o_delta.bytes() + claim.bytes() +
         4 * (phi_q.size() + phi_k.size() + gate_weight.size() + gate_bias.size() + mix.size());
}

DslaParams DslaLayer::params() const {
  DslaParams params;
  params.phi_q = phi_q.data();
  params.phi_k = phi_k.data();
  params.gate_weight = gate_weight.data();
  params.gate_bias = gate_bias.data();
  params.mix = mix.data();
  return params;
}

BoundAdapter BindAdapter(const ModelConfig& config, std::shared_ptr<const Adapter> adapter,
                         WeightFormat format, DType kv_dtype) {
  if (format != WeightFormat::kF32) format = WeightFormat::kBF16;
  BoundAdapter bound;
  bound.arena = std::make_unique<Arena>();
  Arena* const arena = bound.arena.get();
  const int64_t q = int64_t{config.H} * config.D;
  for (const AdapterLayer& from : adapter->layers) {
    DslaLayer layer;
    layer.shape = {.H = config.H,
                   .Hkv = config.Hkv,
                   .D = config.D,
                   .F = from.features,
                   .states = from.states,
                   .window = from.window,
                   .sinks = from.sinks,
                   .kv_dtype = DslaRowType(kv_dtype),
                   .gate_floor = from.gate_floor};
    if (from.rank > 0) {
      layer.q_delta = LowRankDelta(from.q_a, from.q_b, from.rank, config.C, q, format, arena);
      layer.o_delta = LowRankDelta(from.o_a, from.o_b, from.rank, q, config.C, format, arena);
    }
    if (from.window > 0)
      layer.claim = Linear(from.claim, config.H, config.C, format, from.claim_bias, arena);
    layer.phi_q = Copy(from.phi_q);
    layer.phi_k = Copy(from.phi_k);
    layer.gate_weight = Copy(from.gate_weight);
    layer.gate_bias = Copy(from.gate_bias);
    layer.mix.Resize(int64_t{config.H} * from.states);
    for (int h = 0; h < config.H; ++h) {
      const float* logits = from.mix.data() + h * from.states;
      const float max = *std::max_element(logits, logits + from.states);
      float sum = 0;
      for (int i = 0; i < from.states; ++i) sum += std::exp(logits[i] - max);
      for (int i = 0; i < from.states; ++i)
        layer.mix[h * from.states + i] = std::exp(logits[i] - max) / sum;
    }
    bound.slot_bytes = std::max(bound.slot_bytes, MakeSlotLayout(layer.shape).bytes);
    bound.layers.push_back(std::move(layer));
  }
  bound.adapter = std::move(adapter);
  return bound;
}

}  // namespace dsla
