#include "distill/parameters.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "base/random.h"
#include "format/adapter_layout.h"

namespace dsla {
namespace {

// Log-spaced half-lives as gate biases, in random order.
std::vector<float> SpreadBiases(double first, double last, int64_t n, Random& random) {
  std::vector<float> biases(n);
  for (int64_t i = 0; i < n; ++i) {
    const double share = n > 1 ? static_cast<double>(i) / static_cast<double>(n - 1) : 0.5;
    biases[i] = static_cast<float>(GateBias(first * std::pow(last / first, share)));
  }
  for (int64_t i = n - 1; i > 0; --i)
    std::swap(biases[i], biases[static_cast<int64_t>(random.Below(static_cast<uint64_t>(i) + 1))]);
  return biases;
}

}  // namespace

double GateBias(double half_life) {
  const double log_gate = -std::numbers::ln2 / half_life * kGateDivisor;  // logsigmoid(b)
  return -std::log(std::expm1(-log_gate));
}

AdapterLayer ParameterLayout::EmptyLayer() const {
  AdapterLayer layer;
  layer.features = static_cast<int>(settings_.features_per_channel * D_);
  layer.states = settings_.states;
  layer.window = settings_.window;
  layer.sinks = settings_.sinks;
  layer.rank = settings_.rank;
  layer.gate_floor = static_cast<float>(settings_.gate_floor);
  return layer;
}

void ParameterLayout::Add(const std::string& name, std::vector<int64_t> shape) {
  const int64_t size =
      std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
  tensors_.push_back({name, std::move(shape), row_, size});
  row_ += size;
}

Expected<ParameterLayout> ParameterLayout::Create(const ModelConfig& config,
                                                  const AdapterSettings& settings) {
  ParameterLayout layout;
  layout.settings_ = settings;
  layout.layers_ = config.L;
  layout.C_ = config.C, layout.H_ = config.H, layout.Hkv_ = config.Hkv, layout.D_ = config.D;
  const AdapterDims dims{config.C, config.H, config.Hkv, config.D};
  const AdapterLayer layer = layout.EmptyLayer();
  if (const Status status = CheckAdapterSettings(layer, dims, "adapter settings"); !status.ok())
    return InvalidArgument("{}", status.message());
  const bool control = settings.op != Operator::kDsla;
  for (const AdapterTensor& tensor : AdapterTensors(layer, dims)) {
    const bool low_rank = tensor.suffix[0] == 'q' || tensor.suffix[0] == 'o';
    if (control && !low_rank) continue;
    layout.Add(tensor.suffix, tensor.shape);
    if (low_rank) layout.low_rank_ = layout.row_;
  }
  if (settings.op != Operator::kPaper) return layout;
  const int64_t kv = config.Hkv * config.D, r = settings.rank, states = settings.states;
  for (const char* name : {"k", "v"}) {
    if (r == 0) break;
    layout.Add(fmt::format("{}_a", name), {r, config.C});
    layout.Add(fmt::format("{}_b", name), {kv, r});
  }
  layout.low_rank_ = layout.row_;
  layout.Add("gate_a", {states, kPaperGateRank, config.C});
  layout.Add("gate_b", {states, kv, kPaperGateRank});
  layout.Add("gate_bias", {states, config.Hkv, config.D});
  layout.Add("mix", {1, states});
  layout.Add("log_scale", {config.H});
  return layout;
}

const ParameterTensor* ParameterLayout::Find(const std::string& name) const {
  for (const ParameterTensor& tensor : tensors_)
    if (tensor.name == name) return &tensor;
  return nullptr;
}

std::vector<float> ParameterLayout::Start(const HalfLives& half_lives, uint64_t seed) const {
  std::vector<float> values(size(), 0.0f);
  for (int l = 0; l < layers_; ++l) {
    Random random(seed, {static_cast<uint64_t>(l)});
    for (const ParameterTensor& tensor : tensors_) {
      float* const to = values.data() + l * row_ + tensor.offset;
      if (tensor.name.ends_with("_a")) {
        const double scale = 1 / std::sqrt(static_cast<double>(tensor.shape.back()));
        for (int64_t i = 0; i < tensor.size; ++i)
          to[i] = static_cast<float>(random.Normal() * scale);
      } else if (tensor.name == "phi_q" || tensor.name == "phi_k") {
        for (int64_t h = 0; h < tensor.shape[0]; ++h)
          for (int64_t d = 0; d < D_; ++d) to[(h * D_ + d) * D_ + d] = 1;
      } else if (tensor.name == "gate_bias") {
        const int64_t F = tensor.shape[2];
        for (int64_t i = 0; i < tensor.size / F; ++i) {
          const bool history = i < Hkv_;
          // A single state covers both ranges.
          const double first =
              settings_.states == 1 || !history ? half_lives.recency_min : half_lives.history_min;
          const double last = history ? half_lives.history_max : half_lives.recency_max;
          const std::vector<float> biases = SpreadBiases(first, last, F, random);
          std::copy(biases.begin(), biases.end(), to + i * F);
        }
      }
    }
  }
  return values;
}

Adapter ParameterLayout::ToAdapter(std::span<const float> values) const {
  DSLA_CHECK(settings_.op == Operator::kDsla && static_cast<int64_t>(values.size()) == size());
  Adapter adapter;
  for (int l = 0; l < layers_; ++l) {
    AdapterLayer layer = EmptyLayer();
    const AdapterDims dims{C_, H_, Hkv_, D_};
    int64_t offset = l * row_;
    for (const AdapterTensor& tensor : AdapterTensors(layer, dims)) {
      const int64_t n = Find(tensor.suffix)->size;
      layer.*tensor.values = {values.begin() + offset, values.begin() + offset + n};
      offset += n;
    }
    adapter.layers.push_back(std::move(layer));
  }
  return adapter;
}

Expected<std::vector<float>> ParameterLayout::FromAdapter(const Adapter& adapter,
                                                          const std::string& path) const {
  DSLA_CHECK(settings_.op == Operator::kDsla);
  const AdapterLayer want = EmptyLayer();
  if (static_cast<int>(adapter.layers.size()) != layers_)
    return InvalidArgument("'{}' has {} layers, the model {}", path, adapter.layers.size(),
                           layers_);
  std::vector<float> values;
  values.reserve(size());
  for (int l = 0; l < layers_; ++l) {
    const AdapterLayer& layer = adapter.layers[l];
    const auto differs = [&](const char* key, auto have, auto wanted) {
      return InvalidArgument("'{}': layer {} has {} {}, the settings say {}", path, l, key, have,
                             wanted);
    };
    if (layer.window != want.window) return differs("window", layer.window, want.window);
    if (layer.sinks != want.sinks) return differs("sinks", layer.sinks, want.sinks);
    if (layer.states != want.states) return differs("states", layer.states, want.states);
    if (layer.features != want.features) return differs("features", layer.features, want.features);
    if (layer.rank != want.rank) return differs("rank", layer.rank, want.rank);
    if (layer.gate_floor != want.gate_floor)
      return differs("gate_floor", layer.gate_floor, want.gate_floor);
    for (const AdapterTensor& tensor : AdapterTensors(layer, {C_, H_, Hkv_, D_}))
      values.insert(values.end(), (layer.*tensor.values).begin(), (layer.*tensor.values).end());
  }
  DSLA_CHECK(static_cast<int64_t>(values.size()) == size());
  return values;
}

}  // namespace dsla
