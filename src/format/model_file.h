// ModelFile: one interface to a model's weights, from a GGUF file or a Hugging Face directory.
// Tensors carry canonical names (Hugging Face's for Llama-family models, see TensorNames below) and
// canonical layouts: q and k rows in rotate-half order (GGUF's permutation of the llama
// architecture is undone here). The file stays memory-mapped for the object's life; every offset
// and size was checked against the file when it was opened. Const methods are thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/half.h"
#include "base/status.h"
#include "format/config.h"
#include "format/tokenizer/tokenizer.h"

namespace dsla {

struct TensorInfo {
  std::string name;            // canonical
  std::vector<int64_t> shape;  // outermost first: [out, in] for a matrix
  std::string type;            // as stored: F32, F16, BF16, Q4_1, ...
  int64_t bytes = 0;           // as stored
};

class ModelFile {
 public:
  // `path`: a .gguf file, or a directory with config.json, *.safetensors and tokenizer.json. Checks
  // that exactly the tensors of the architecture are there, each with its shape.
  static Expected<std::unique_ptr<ModelFile>> Open(const std::string& path);
  virtual ~ModelFile() = default;

  virtual const ModelConfig& config() const = 0;
  virtual const std::string& path() const = 0;
  virtual const char* format() const = 0;  // "GGUF v3", "safetensors"
  virtual const std::vector<TensorInfo>& tensors() const = 0;

  // The whole tensor dequantised to fp32, row-major; `out` has exactly its size. kDataLoss if it
  // holds NaN or Inf.
  virtual Status Read(const std::string& name, std::span<float> out) const = 0;

  // Hex digest (SHA-256) over config and tensor bytes in canonical name order: the identity of a
  // base model. Adapters are bound to it. Computed at the first call (reads the whole file), then
  // kept.
  virtual Expected<std::string> Fingerprint() const = 0;

  virtual Expected<TokenizerData> ReadTokenizer() const = 0;
  virtual std::string chat_template() const = 0;  // Jinja source; empty when the files carry none

  bool HasTensor(const std::string& name) const;
};

// Canonical names of layer l: "model.layers.{l}." + one of input_layernorm.weight [C],
// self_attn.{q,k,v}_proj.weight [H*D | Hkv*D, C] (.bias), self_attn.{q,k}_norm.weight [D],
// self_attn.o_proj.weight [C, H*D] (.bias), post_attention_layernorm.weight [C],
// mlp.{gate,up}_proj.weight [ffn, C], mlp.down_proj.weight [C, ffn]. Others:
// model.embed_tokens.weight [V, C], model.norm.weight [C], lm_head.weight [V, C] unless tied.
std::string LayerTensorName(int layer, const char* suffix);

// Name -> shape of every tensor that a model of this config must have, in canonical order; nothing
// else may be there.
std::vector<std::pair<std::string, std::vector<int64_t>>> RequiredTensors(
    const ModelConfig& config);

}  // namespace dsla
