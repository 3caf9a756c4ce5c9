#include "format/adapter_layout.h"

namespace dsla {

std::vector<AdapterTensor> AdapterTensors(const AdapterLayer& layer, const AdapterDims& dims) {
  const auto [C, H, Hkv, D] = dims;
  const int64_t r = layer.rank, states = layer.states, F = layer.features;
  std::vector<AdapterTensor> out;
  if (r > 0) {
    out.push_back({"q_a", &AdapterLayer::q_a, {r, C}});
    out.push_back({"q_b", &AdapterLayer::q_b, {H * D, r}});
    out.push_back({"o_a", &AdapterLayer::o_a, {r, H * D}});
    out.push_back({"o_b", &AdapterLayer::o_b, {C, r}});
  }
  out.push_back({"phi_q", &AdapterLayer::phi_q, {H, D, D}});
  out.push_back({"phi_k", &AdapterLayer::phi_k, {Hkv, D, D}});
  out.push_back({"gate_weight", &AdapterLayer::gate_weight, {states, Hkv, D, F}});
  out.push_back({"gate_bias", &AdapterLayer::gate_bias, {states, Hkv, F}});
  out.push_back({"mix", &AdapterLayer::mix, {H, states}});
  if (layer.window > 0) {
    out.push_back({"claim", &AdapterLayer::claim, {H, C}});
    out.push_back({"claim_bias", &AdapterLayer::claim_bias, {H}});
  }
  return out;
}

Status CheckAdapterSettings(const AdapterLayer& layer, const AdapterDims& dims,
                            const std::string& where) {
  constexpr int kMaxWindow = 65536, kMaxSinks = 1024;  // far above what can pay off
  if (layer.states != 1 && layer.states != 2) {
    return DataLoss("{}: {} states, allowed are 1 and 2", where, layer.states);
  }
  if (layer.features != dims.D && layer.features != 2 * dims.D) {
    return DataLoss("{}: {} features, allowed are {} and {} (the head size and twice that)", where,
                    layer.features, dims.D, 2 * dims.D);
  }
  if (layer.window < 0 || layer.window > kMaxWindow) {
    return DataLoss("{}: window {}, allowed are 0 to {}", where, layer.window, kMaxWindow);
  }
  if (layer.sinks < 0 || layer.sinks > kMaxSinks) {
    return DataLoss("{}: {} sinks, allowed are 0 to {}", where, layer.sinks, kMaxSinks);
  }
  if (layer.window == 0 && layer.sinks != 0) {
    return DataLoss("{}: {} sinks without a window", where, layer.sinks);
  }
  if (layer.rank < 0 || layer.rank > 32768) {
    return DataLoss("{}: rank {}, allowed are 0 to 32768", where, layer.rank);
  }
  // Written so that NaN fails.
  if (!(layer.gate_floor >= kMinGateFloor && layer.gate_floor < 0)) {
    return DataLoss("{}: gate floor {}, allowed are {} to below 0", where, layer.gate_floor,
                    kMinGateFloor);
  }
  return Status::Ok();
}

Status CheckLadder(const std::vector<int>& ladder, int top_level, int L, const std::string& where) {
  if (static_cast<int>(ladder.size()) != L) {
    return DataLoss("{}: a ladder of {} layers for a model of {}", where, ladder.size(), L);
  }
  std::vector<bool> seen(ladder.size());
  for (const int layer : ladder) {
    if (layer < 0 || layer >= L) {
      return DataLoss("{}: the ladder names layer {} of {}", where, layer, L);
    }
    if (seen[static_cast<size_t>(layer)]) {
      return DataLoss("{}: the ladder names layer {} twice", where, layer);
    }
    seen[static_cast<size_t>(layer)] = true;
  }
  if (top_level < 0 || top_level > L) {
    return DataLoss("{}: top level {}, allowed are 0 to {}", where, top_level, L);
  }
  return Status::Ok();
}

}  // namespace dsla
