// Tests only: builds small model files, honest or lying, byte by byte, without the readers' code.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "format/config.h"

namespace dsla::testing {

// A fresh directory, removed with its contents at the end.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::string& path() const { return path_; }
  // Writes a file in it and returns its path.
  std::string Write(const std::string& name, std::string_view content) const;

 private:
  std::string path_;
};

std::string ReadFile(const std::string& path);

template <typename T>
void AppendBytes(std::string* out, T value) {
  out->append(reinterpret_cast<const char*>(&value), sizeof(T));
}
std::string FloatBytes(const std::vector<float>& values);  // F32
std::string Bf16Bytes(const std::vector<float>& values);

// A GGUF file in parts, each of which may be made to lie.
struct GgufBuilder {
  struct Tensor {
    std::string name;
    std::vector<int64_t> shape;  // outermost first
    uint32_t type = 0;           // GGUF's number; 0 = F32
    std::string data;
    std::optional<uint64_t> offset;  // instead of the true one
  };

  std::string magic = "GGUF";
  uint32_t version = 3;
  uint64_t alignment = 32;  // used for the layout; add the metadata key for others than 32
  std::optional<uint64_t> tensor_count, value_count;        // instead of the true ones
  std::vector<std::pair<std::string, std::string>> values;  // key, type and payload
  std::vector<Tensor> tensors;

  void U32(const std::string& key, uint32_t value);
  void F32(const std::string& key, float value);
  void Bool(const std::string& key, bool value);
  void String(const std::string& key, std::string_view value);
  void Strings(const std::string& key, const std::vector<std::string>& list);
  void I32s(const std::string& key, const std::vector<int32_t>& list);
  void F32s(const std::string& key, const std::vector<float>& list);
  void Raw(const std::string& key, uint32_t type, std::string_view payload);
  void Remove(const std::string& key);
  Tensor* Find(const std::string& name);

  std::string Build() const;
};

// Length, header, data.
std::string SafetensorsBytes(std::string_view header, std::string_view data);

// Canonical name -> values of a model's every tensor, random with a fixed seed.
using Weights = std::map<std::string, std::vector<float>>;
Weights RandomWeights(const ModelConfig& config, uint64_t seed);

// L 2, C 8, H 2, Hkv 1, D 4, ffn 12, V 16, nothing special; architecture as given.
ModelConfig TinyConfig(const std::string& architecture);

// The model as a GGUF file (q and k rows permuted for "llama"), with a byte-level vocabulary.
GgufBuilder TinyGguf(const ModelConfig& config, const Weights& weights);

// config.json of a model with an HF architecture.
std::string TinyConfigJson(const ModelConfig& config);
// All tensors of the model as one safetensors file of F32; `names` limits it to these.
std::string TinySafetensors(const ModelConfig& config, const Weights& weights,
                            const std::vector<std::string>* names = nullptr);

}  // namespace dsla::testing
