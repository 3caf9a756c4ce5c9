#include "distill/torch_teacher.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <utility>
#include <vector>

#include "distill/torch_device.h"

namespace dsla::distill {
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

}  // namespace

Expected<Placement> Place(const std::string& device, const std::string& dtype) {
  Placement placement;
  DSLA_ASSIGN_OR_RETURN(placement.device, OpenDevice(device));
  if (dtype != "fp32" && dtype != "bf16" && dtype != "auto")
    return InvalidArgument("dtype '{}' is not one of auto, fp32, bf16", dtype);
  const bool bf16 = dtype == "bf16" || (dtype == "auto" && !placement.device.is_cpu());
  placement.type = bf16 ? at::kBFloat16 : at::kFloat;
  return placement;
}

Expected<Teacher> ReadTeacher(const ModelFile& file, const Placement& placement, int64_t more) {
  const ModelConfig& config = file.config();
  if (config.sliding_window > 0)
    return Unsupported("'{}' has a sliding window of {} tokens, which the trainer does not know",
                       file.path(), config.sliding_window);
  if (!placement.device.is_cpu()) {
    int64_t weights = 0;
    for (const auto& [name, shape] : RequiredTensors(config)) {
      int64_t numel = placement.type == at::kBFloat16 ? 2 : 4;
      for (const int64_t n : shape) numel *= n;
      weights += numel;
    }
    const int64_t need = weights + more, free = FreeMemory(placement.device);
    if (need > free)
      return ResourceExhausted(
          "'{}' needs {:.1f} GiB for weights and optimiser, {} has {:.1f} free", file.path(),
          static_cast<double>(need) / (1 << 30), placement.device.str(),
          static_cast<double>(free) / (1 << 30));
  }
  Teacher teacher;
  teacher.config = config;
  const auto read = [&](const char* name, Tensor* to) -> Status {
    const TensorInfo* info = file.FindTensor(name);
    if (info == nullptr) return NotFound("'{}' has no tensor {}", file.path(), name);
    DSLA_ASSIGN_OR_RETURN(*to, ReadTensor(file, name, *info, placement.device, placement.type));
    return Status::Ok();
  };
  DSLA_RETURN_IF_ERROR(read("model.embed_tokens.weight", &teacher.embedding));
  DSLA_RETURN_IF_ERROR(read("model.norm.weight", &teacher.final_norm));
  teacher.head = teacher.embedding;
  if (!config.tied_embeddings) DSLA_RETURN_IF_ERROR(read("lm_head.weight", &teacher.head));
  for (int l = 0; l < config.L; ++l) {
    DSLA_ASSIGN_OR_RETURN(TeacherLayer layer, ReadLayer(file, l, placement.device, placement.type));
    teacher.layers.push_back(std::move(layer));
  }
  return teacher;
}

}  // namespace dsla::distill
