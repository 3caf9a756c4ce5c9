// A model of random numbers with the shape that a config names: for measuring speed and memory
// where the weights themselves cannot be had, or make no difference.
#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/mapped_file.h"
#include "format/model_file.h"
#include "format/sha256.h"

namespace dsla {
namespace {

namespace fs = std::filesystem;

// splitmix64's step: a good 64-bit hash of a counter.
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint64_t NameSeed(const std::string& name) {
  uint64_t seed = 0;
  for (const char c : name) seed = Mix(seed ^ static_cast<unsigned char>(c));
  return seed;
}

class RandomModel : public ModelFile {
 public:
  RandomModel(std::string path, ModelConfig config)
      : path_(std::move(path)), config_(std::move(config)) {
    for (auto& [name, shape] : RequiredTensors(config_)) {
      int64_t bytes = 2;
      for (const int64_t size : shape) bytes *= size;
      tensors_.push_back({.name = name, .shape = shape, .type = "BF16", .bytes = bytes});
    }
  }

  const ModelConfig& config() const override { return config_; }
  const std::string& path() const override { return path_; }
  const char* format() const override { return "random numbers"; }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  const TensorInfo* FindTensor(const std::string& name) const override {
    for (const TensorInfo& tensor : tensors_)
      if (tensor.name == name) return &tensor;
    return nullptr;
  }

  // Norms are 1 and biases 0; a matrix is uniform with the deviation that keeps its input's scale.
  Status ReadRows(const std::string& name, int64_t begin, int64_t end,
                  std::span<float> out) const override {
    const TensorInfo* info = FindTensor(name);
    if (info == nullptr) return NotFound("'{}': no tensor '{}'", path_, name);
    if (info->shape.size() == 1) {
      std::fill(out.begin(), out.end(), name.ends_with("norm.weight") ? 1.f : 0.f);
      return Status::Ok();
    }
    const int64_t in = info->shape[1];
    const float scale = std::sqrt(3.f / static_cast<float>(in)) / static_cast<float>(1 << 23);
    const uint64_t seed = NameSeed(name);
    const int64_t first = begin * in, count = (end - begin) * in;
    for (int64_t i = 0; i < count; ++i) {
      const auto bits = static_cast<int32_t>(Mix(seed + static_cast<uint64_t>(first + i)) >> 40);
      out[static_cast<size_t>(i)] = static_cast<float>(bits - (1 << 23)) * scale;
    }
    return Status::Ok();
  }

  Expected<std::string> Fingerprint() const override {
    Sha256 hash;
    hash.Update("random numbers in the shape of " + path_);
    return hash.HexDigest();
  }

  Expected<TokenizerData> ReadTokenizer() const override {
    return NotFound("'{}': a model of random numbers has no tokenizer", path_);
  }
  std::string chat_template() const override { return ""; }
  std::string tool_chat_template() const override { return ""; }

 private:
  std::string path_;
  ModelConfig config_;
  std::vector<TensorInfo> tensors_;
};

}  // namespace

Expected<std::unique_ptr<ModelFile>> ModelFile::OpenRandom(const std::string& path) {
  const std::string config_path =
      fs::is_directory(path) ? (fs::path(path) / "config.json").string() : path;
  constexpr size_t kMaxConfigBytes = 1 << 20;
  DSLA_ASSIGN_OR_RETURN(const std::string json, ReadTextFile(config_path, kMaxConfigBytes));
  DSLA_ASSIGN_OR_RETURN(ModelConfig config, ParseHfConfig(json, config_path));
  return std::unique_ptr<ModelFile>(std::make_unique<RandomModel>(config_path, std::move(config)));
}

std::shared_ptr<const Adapter> RandomAdapter(const ModelConfig& config,
                                             const RandomAdapterShape& shape) {
  uint64_t counter = 0;
  const auto uniform = [&](int64_t n, float scale) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) {
      const auto bits = static_cast<int32_t>(Mix(++counter) >> 40);
      value = static_cast<float>(bits - (1 << 23)) / static_cast<float>(1 << 23) * scale;
    }
    return values;
  };
  auto adapter = std::make_shared<Adapter>();
  adapter->id = "random";
  for (int layer = config.L - 1; layer >= 0; --layer) adapter->ladder.push_back(layer);
  adapter->top_level = config.L * 3 / 4;
  const int64_t C = config.C, D = config.D, q = int64_t{config.H} * D, F = int64_t{shape.features};
  const float in = 1.f / std::sqrt(static_cast<float>(C));
  for (int l = 0; l < config.L; ++l) {
    AdapterLayer layer;
    layer.features = shape.features;
    layer.states = shape.states;
    layer.window = shape.window;
    layer.sinks = shape.sinks;
    layer.rank = shape.rank;
    layer.gate_floor = -2.25f;
    layer.q_a = uniform(shape.rank * C, in);
    layer.q_b = uniform(q * shape.rank, 0.1f);
    layer.o_a = uniform(shape.rank * q, in);
    layer.o_b = uniform(C * shape.rank, 0.1f);
    const float feature = 1.f / std::sqrt(static_cast<float>(D));
    layer.phi_q = uniform(config.H * D * D, feature);
    layer.phi_k = uniform(config.Hkv * D * D, feature);
    layer.gate_weight = uniform(shape.states * config.Hkv * D * F, 0.1f);
    layer.gate_bias = uniform(shape.states * config.Hkv * F, 4.f);
    layer.mix = uniform(config.H * shape.states, 1.f);
    if (shape.window > 0) {
      layer.claim = uniform(config.H * C, in);
      layer.claim_bias = uniform(config.H, 1.f);
    }
    adapter->layers.push_back(std::move(layer));
  }
  return adapter;
}

}  // namespace dsla
