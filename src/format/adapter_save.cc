#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "format/adapter.h"
#include "format/adapter_layout.h"
#include "format/dequant.h"
#include "format/safetensors_writer.h"

namespace dsla {
namespace {

using nlohmann::json;

Status Invalid(const Status& status) {
  return Status(StatusCode::kInvalidArgument, status.message());
}

// The base model's dimensions, from the sizes of a layer's tensors. CheckLayer then compares every
// size with them, so that an inconsistent layer is refused.
AdapterDims InferDims(const AdapterLayer& layer) {
  AdapterDims dims;
  const auto size = [](const std::vector<float>& v) { return static_cast<int64_t>(v.size()); };
  dims.H = size(layer.mix) / std::max(layer.states, 1);
  if (dims.H == 0) return {};
  dims.D = std::llround(std::sqrt(static_cast<double>(size(layer.phi_q) / dims.H)));
  if (dims.D == 0) return {};
  dims.Hkv = size(layer.phi_k) / (dims.D * dims.D);
  dims.C = layer.rank > 0 ? size(layer.q_a) / layer.rank : size(layer.claim) / dims.H;
  return dims;
}

Status CheckLayer(const AdapterLayer& layer, const AdapterDims& dims, const std::string& where) {
  DSLA_RETURN_IF_ERROR(CheckAdapterSettings(layer, dims, where));
  size_t total = 0;
  for (const AdapterTensor& tensor : AdapterTensors(layer, dims)) {
    const std::vector<float>& values = layer.*tensor.values;
    size_t elements = 1;
    for (const int64_t n : tensor.shape) elements *= static_cast<size_t>(n);
    if (values.size() != elements || elements == 0) {
      return InvalidArgument("{}: {} has {} elements, expected {}", where, tensor.suffix,
                             values.size(), elements);
    }
    if (!AllFinite(values)) {
      return InvalidArgument("{}: {} holds NaN or Inf", where, tensor.suffix);
    }
    total += elements;
  }
  const size_t present = layer.q_a.size() + layer.q_b.size() + layer.o_a.size() + layer.o_b.size() +
                         layer.phi_q.size() + layer.phi_k.size() + layer.gate_weight.size() +
                         layer.gate_bias.size() + layer.mix.size() + layer.claim.size() +
                         layer.claim_bias.size();
  if (present != total) {
    return InvalidArgument("{}: has tensors that its settings do not call for", where);
  }
  return Status::Ok();
}

json Settings(const AdapterLayer& layer) {
  // As a double the shortest text of the float, so that -2.3 stays -2.3.
  return {{"window", layer.window}, {"sinks", layer.sinks},
          {"states", layer.states}, {"features", layer.features},
          {"rank", layer.rank},     {"gate_floor", std::stod(fmt::format("{}", layer.gate_floor))}};
}

// What differs from layer 0, whose settings stand for all.
json Overrides(const Adapter& adapter) {
  json out = json::object();
  const json common = Settings(adapter.layers[0]);
  for (size_t l = 1; l < adapter.layers.size(); ++l) {
    const json own = Settings(adapter.layers[l]);
    for (const auto& item : own.items()) {
      if (item.value() != common[item.key()]) out[std::to_string(l)][item.key()] = item.value();
    }
  }
  return out;
}

std::map<std::string, std::string> Metadata(const Adapter& adapter) {
  std::map<std::string, std::string> out = {
      {"format", kAdapterFormat},
      {"version", std::to_string(kAdapterVersion)},
      {"base_fingerprint", adapter.base_fingerprint},
      {"base_name", adapter.base_name},
      {"ladder", json(adapter.ladder).dump()},
      {"top_level", std::to_string(adapter.top_level)},
      {"gate_divisor", std::to_string(kGateDivisor)},
      {"feature_map", kFeatureMap},
  };
  const json common = Settings(adapter.layers[0]);
  for (const auto& item : common.items()) out[item.key()] = item.value().dump();
  if (const json overrides = Overrides(adapter); !overrides.empty()) {
    out["layers"] = overrides.dump();
  }
  return out;
}

}  // namespace

Status SaveAdapter(const Adapter& adapter, const std::string& path, DType dtype) {
  const std::string where = fmt::format("adapter for '{}'", path);
  const int L = static_cast<int>(adapter.layers.size());
  if (L == 0) return InvalidArgument("{}: no layers", where);
  if (const Status status = CheckLadder(adapter.ladder, adapter.top_level, L, where);
      !status.ok()) {
    return Invalid(status);
  }
  if (adapter.base_fingerprint.size() != 64) {
    return InvalidArgument("{}: no fingerprint of the base model", where);
  }
  AdapterDims dims = InferDims(adapter.layers[0]);
  for (const AdapterLayer& layer : adapter.layers) dims.C = std::max(dims.C, InferDims(layer).C);
  std::vector<TensorToWrite> tensors;
  for (int l = 0; l < L; ++l) {
    const AdapterLayer& layer = adapter.layers[static_cast<size_t>(l)];
    const Status status = CheckLayer(layer, dims, fmt::format("{}: layer {}", where, l));
    if (!status.ok()) return Invalid(status);
    for (const AdapterTensor& tensor : AdapterTensors(layer, dims)) {
      tensors.push_back(
          {fmt::format("layers.{}.{}", l, tensor.suffix), tensor.shape, layer.*tensor.values});
    }
  }
  return WriteSafetensors(path, Metadata(adapter), tensors, dtype);
}

}  // namespace dsla
