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
#include <utility>
#include <vector>

#include "base/status.h"
#include "format/adapter.h"
#include "format/config.h"
#include "format/tokenizer/tokenizer_data.h"

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
  // `path`: a config.json, or a directory with one. The weights are random numbers and there is no
  // tokenizer: for measuring speed and memory.
  static Expected<std::unique_ptr<ModelFile>> OpenRandom(const std::string& path);
  virtual ~ModelFile() = default;

  virtual const ModelConfig& config() const = 0;
  virtual const std::string& path() const = 0;
  virtual const char* format() const = 0;  // "GGUF v3", "safetensors"
  virtual const std::vector<TensorInfo>& tensors() const = 0;

  // The whole tensor dequantised to fp32, row-major; `out` has exactly its size. kDataLoss if it
  // holds NaN or Inf, kNotFound if there is no such tensor.
  Status Read(const std::string& name, std::span<float> out) const;

  // Rows [begin, end) of a matrix, so that a large one can be converted piece by piece; a vector
  // has one row.
  virtual Status ReadRows(const std::string& name, int64_t begin, int64_t end,
                          std::span<float> out) const = 0;

  // The identity of a base model, to which adapters are bound: hex SHA-256 over the numbers of the
  // config that change the computation and, for each required tensor in canonical order, its name,
  // shape, stored type and bytes. Tensors over 64 KiB are sampled: 16 blocks of 4 KiB spread
  // evenly, first and last included. Hashing all of an 8B model would read 16 GB from disk at every
  // start; retraining or requantising changes practically every block, so samples tell models apart
  // as well (they do not protect against someone who forges a model). Computed at the first call.
  virtual Expected<std::string> Fingerprint() const = 0;

  // The tensors were read and are not wanted again soon: their memory can be had.
  virtual void ReleasePages() const {}

  virtual Expected<TokenizerData> ReadTokenizer() const = 0;
  virtual std::string chat_template() const = 0;  // Jinja source; empty if there is none
  // The one for conversations with tools; the same where the file has no other.
  virtual std::string tool_chat_template() const = 0;

  // nullptr if there is none.
  virtual const TensorInfo* FindTensor(const std::string& name) const = 0;
  bool HasTensor(const std::string& name) const { return FindTensor(name) != nullptr; }
};

// Canonical names of layer l: "model.layers.{l}." + one of input_layernorm.weight [C],
// self_attn.{q,k,v}_proj.weight [H*D | Hkv*D, C] (.bias), self_attn.{q,k}_norm.weight [D],
// self_attn.o_proj.weight [C, H*D] (.bias), post_attention_layernorm.weight [C],
// mlp.{gate,up}_proj.weight [ffn, C], mlp.down_proj.weight [C, ffn]. Others:
// model.embed_tokens.weight [V, C], model.norm.weight [C], lm_head.weight [V, C] unless tied.
inline std::string LayerTensorName(int layer, const char* suffix) {
  return fmt::format("model.layers.{}.{}", layer, suffix);
}

// Name and shape of every tensor that a model of this config must have, in canonical order. Nothing
// else may be in the file but what never changes the computation: GGUF's rope_freqs.weight (read
// into the config), rotary_emb.inv_freq of old Hugging Face files, and lm_head.weight where the
// embeddings are tied.
std::vector<std::pair<std::string, std::vector<int64_t>>> RequiredTensors(
    const ModelConfig& config);

// An adapter of random numbers for a model of them; gates spread over short and long half-lives.
struct RandomAdapterShape {
  int features = 0;  // F: D or 2D
  int states = 2;
  int window = 256;
  int sinks = 4;
  int rank = 32;
};
std::shared_ptr<const Adapter> RandomAdapter(const ModelConfig& config,
                                             const RandomAdapterShape& shape);

}  // namespace dsla
