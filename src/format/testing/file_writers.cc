#include "format/testing/file_writers.h"

#include <fmt/format.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "base/check.h"
#include "base/half.h"
#include "format/model_file.h"

namespace dsla::testing {
namespace {

std::string StringBytes(std::string_view text) {
  std::string out;
  AppendBytes<uint64_t>(&out, text.size());
  out += text;
  return out;
}

template <typename T>
std::string ArrayBytes(uint32_t type, const std::vector<T>& list) {
  std::string out;
  AppendBytes<uint32_t>(&out, type);
  AppendBytes<uint64_t>(&out, list.size());
  for (const T& value : list) {
    if constexpr (std::is_same_v<T, std::string>) {
      out += StringBytes(value);
    } else {
      AppendBytes(&out, value);
    }
  }
  return out;
}

// What the converter to GGUF does with q and k of a llama model: within a head, row i of the first
// half goes to 2i and row i of the second half to 2i + 1.
std::vector<float> Interleave(const std::vector<float>& values, int heads, size_t columns) {
  std::vector<float> out(values.size());
  const size_t rows = values.size() / columns, D = rows / static_cast<size_t>(heads);
  for (size_t row = 0; row < rows; ++row) {
    const size_t head = row / D, i = row % D;
    const size_t to = head * D + (i < D / 2 ? 2 * i : 2 * (i - D / 2) + 1);
    for (size_t c = 0; c < columns; ++c) out[to * columns + c] = values[row * columns + c];
  }
  return out;
}

const std::vector<std::pair<std::string, std::string>>& GgufSuffixes() {
  static const std::vector<std::pair<std::string, std::string>> kSuffixes = {
      {"input_layernorm", "attn_norm"},    {"self_attn.q_proj", "attn_q"},
      {"self_attn.k_proj", "attn_k"},      {"self_attn.v_proj", "attn_v"},
      {"self_attn.o_proj", "attn_output"}, {"self_attn.q_norm", "attn_q_norm"},
      {"self_attn.k_norm", "attn_k_norm"}, {"post_attention_layernorm", "ffn_norm"},
      {"mlp.gate_proj", "ffn_gate"},       {"mlp.up_proj", "ffn_up"},
      {"mlp.down_proj", "ffn_down"},
  };
  return kSuffixes;
}

std::string ToGgufName(std::string name) {
  if (name == "model.embed_tokens.weight") return "token_embd.weight";
  if (name == "model.norm.weight") return "output_norm.weight";
  if (name == "lm_head.weight") return "output.weight";
  name.replace(0, std::string("model.layers").size(), "blk");
  for (const auto& [hf, gguf] : GgufSuffixes()) {
    const size_t at = name.find("." + hf + ".");
    if (at != std::string::npos) return name.replace(at + 1, hf.size(), gguf);
  }
  DSLA_CHECK(false);
  return name;
}

}  // namespace

TempDir::TempDir() {
  std::string pattern = (std::filesystem::temp_directory_path() / "dsla_test_XXXXXX").string();
  DSLA_CHECK(::mkdtemp(pattern.data()) != nullptr);
  path_ = pattern;
}

TempDir::~TempDir() {
  std::error_code error;
  std::filesystem::remove_all(path_, error);
}

std::string TempDir::Write(const std::string& name, std::string_view content) const {
  const std::string path = path_ + "/" + name;
  std::ofstream file(path, std::ios::binary);
  file.write(content.data(), static_cast<std::streamsize>(content.size()));
  DSLA_CHECK(file.good());
  return path;
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream out;
  out << file.rdbuf();
  DSLA_CHECK(file.good());
  return out.str();
}

std::string FloatBytes(const std::vector<float>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * 4);
}

std::string Bf16Bytes(const std::vector<float>& values) {
  std::string out;
  for (const float value : values) AppendBytes(&out, ToBf16(value).bits);
  return out;
}

void GgufBuilder::Raw(const std::string& key, uint32_t type, std::string_view payload) {
  std::string bytes;
  AppendBytes(&bytes, type);
  bytes += payload;
  values.emplace_back(key, bytes);
}
void GgufBuilder::U32(const std::string& key, uint32_t value) {
  Raw(key, 4, {reinterpret_cast<const char*>(&value), 4});
}
void GgufBuilder::F32(const std::string& key, float value) {
  Raw(key, 6, {reinterpret_cast<const char*>(&value), 4});
}
void GgufBuilder::Bool(const std::string& key, bool value) {
  Raw(key, 7, std::string(1, value ? 1 : 0));
}
void GgufBuilder::String(const std::string& key, std::string_view value) {
  Raw(key, 8, StringBytes(value));
}
void GgufBuilder::Strings(const std::string& key, const std::vector<std::string>& list) {
  Raw(key, 9, ArrayBytes(8, list));
}
void GgufBuilder::I32s(const std::string& key, const std::vector<int32_t>& list) {
  Raw(key, 9, ArrayBytes(5, list));
}
void GgufBuilder::F32s(const std::string& key, const std::vector<float>& list) {
  Raw(key, 9, ArrayBytes(6, list));
}
void GgufBuilder::Remove(const std::string& key) {
  std::erase_if(values, [&](const auto& value) { return value.first == key; });
}

GgufBuilder::Tensor* GgufBuilder::Find(const std::string& name) {
  for (Tensor& tensor : tensors) {
    if (tensor.name == name) return &tensor;
  }
  DSLA_CHECK(false);
  return nullptr;
}

std::string GgufBuilder::Build() const {
  std::string out = magic;
  AppendBytes(&out, version);
  AppendBytes<uint64_t>(&out, tensor_count.value_or(tensors.size()));
  AppendBytes<uint64_t>(&out, value_count.value_or(values.size()));
  for (const auto& [key, value] : values) out += StringBytes(key) + value;
  const auto padded = [this](uint64_t n) { return (n + alignment - 1) / alignment * alignment; };
  uint64_t at = 0;
  for (const Tensor& tensor : tensors) {
    out += StringBytes(tensor.name);
    AppendBytes<uint32_t>(&out, static_cast<uint32_t>(tensor.shape.size()));
    for (size_t d = tensor.shape.size(); d-- > 0;) AppendBytes<int64_t>(&out, tensor.shape[d]);
    AppendBytes(&out, tensor.type);
    AppendBytes<uint64_t>(&out, tensor.offset.value_or(at));
    at = padded(at + tensor.data.size());
  }
  for (const Tensor& tensor : tensors) {
    out.resize(padded(out.size()), '\0');
    out += tensor.data;
  }
  return out;
}

std::string SafetensorsBytes(std::string_view header, std::string_view data) {
  std::string out = StringBytes(header);
  out += data;
  return out;
}

Weights RandomWeights(const ModelConfig& config, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.f, 0.5f);
  Weights out;
  for (const auto& [name, shape] : RequiredTensors(config)) {
    int64_t elements = 1;
    for (const int64_t size : shape) elements *= size;
    std::vector<float> values(static_cast<size_t>(elements));
    for (float& value : values) value = normal(random);
    out[name] = std::move(values);
  }
  return out;
}

ModelConfig TinyConfig(const std::string& architecture) {
  ModelConfig config;
  config.architecture = architecture;
  config.L = 2;
  config.C = 8;
  config.H = 2;
  config.Hkv = 1;
  config.D = 4;
  config.ffn = 12;
  config.V = 16;
  config.max_position = 64;
  config.norm_eps = 1e-5f;
  return config;
}

GgufBuilder TinyGguf(const ModelConfig& config, const Weights& weights) {
  GgufBuilder out;
  const std::string& a = config.architecture;
  out.String("general.architecture", a);
  out.String("general.name", "Tiny");
  out.U32(a + ".block_count", static_cast<uint32_t>(config.L));
  out.U32(a + ".context_length", static_cast<uint32_t>(config.max_position));
  out.U32(a + ".embedding_length", static_cast<uint32_t>(config.C));
  out.U32(a + ".feed_forward_length", static_cast<uint32_t>(config.ffn));
  out.U32(a + ".attention.head_count", static_cast<uint32_t>(config.H));
  out.U32(a + ".attention.head_count_kv", static_cast<uint32_t>(config.Hkv));
  out.U32(a + ".attention.key_length", static_cast<uint32_t>(config.D));
  out.U32(a + ".attention.value_length", static_cast<uint32_t>(config.D));
  out.F32(a + ".attention.layer_norm_rms_epsilon", config.norm_eps);
  out.F32(a + ".rope.freq_base", static_cast<float>(config.rope.theta));
  std::vector<std::string> tokens = {"a", "b", "ab"};
  while (static_cast<int>(tokens.size()) < config.V) {
    tokens.push_back(fmt::format("<{}>", tokens.size()));
  }
  out.String("tokenizer.ggml.model", "gpt2");
  out.String("tokenizer.ggml.pre", "smollm");
  out.Strings("tokenizer.ggml.tokens", tokens);
  out.I32s("tokenizer.ggml.token_type", std::vector<int32_t>(static_cast<size_t>(config.V), 1));
  out.Strings("tokenizer.ggml.merges", {"a b"});
  for (const auto& [name, shape] : RequiredTensors(config)) {
    std::vector<float> values = weights.at(name);
    const size_t columns = shape.size() > 1 ? static_cast<size_t>(shape[1]) : 1;
    if (a == "llama" && name.find(".q_proj.") != std::string::npos) {
      values = Interleave(values, config.H, columns);
    }
    if (a == "llama" && name.find(".k_proj.") != std::string::npos) {
      values = Interleave(values, config.Hkv, columns);
    }
    out.tensors.push_back({ToGgufName(name), shape, 0, FloatBytes(values), {}});
  }
  return out;
}

std::string TinyConfigJson(const ModelConfig& config) {
  const nlohmann::json out = {
      {"architectures", {config.architecture}},
      {"num_hidden_layers", config.L},
      {"hidden_size", config.C},
      {"num_attention_heads", config.H},
      {"num_key_value_heads", config.Hkv},
      {"head_dim", config.D},
      {"intermediate_size", config.ffn},
      {"vocab_size", config.V},
      {"max_position_embeddings", config.max_position},
      {"rms_norm_eps", 1e-5},
      {"rope_theta", config.rope.theta},
      {"tie_word_embeddings", config.tied_embeddings},
      {"attention_bias", config.o_bias},
  };
  return out.dump();
}

std::string TinySafetensors(const ModelConfig& config, const Weights& weights,
                            const std::vector<std::string>* names) {
  nlohmann::json header = nlohmann::json::object();
  std::string data;
  for (const auto& [name, shape] : RequiredTensors(config)) {
    if (names != nullptr && std::find(names->begin(), names->end(), name) == names->end()) continue;
    const size_t begin = data.size();
    data += FloatBytes(weights.at(name));
    header[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, data.size()}}};
  }
  return SafetensorsBytes(header.dump(), data);
}

}  // namespace dsla::testing
