// ModelConfig: what a model's own files say about its shape, whichever format they are in. Every
// field is validated (positive, mutually consistent, within the limits below) before anyone sees
// it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"

namespace dsla {

class GgufFile;

enum class RopeScaling {
  kNone,
  kLinear,  // all frequencies divided by factor
  kLlama3,  // low frequencies divided by factor, high ones kept, those between interpolated
  kTable,   // each frequency divided by its own entry: how GGUF files store llama3 scaling
};

struct RopeConfig {
  double theta = 10000.0;
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1.0;  // linear and llama3: positions (or low frequencies) are divided by it
  double low_freq_factor = 1.0;   // llama3
  double high_freq_factor = 4.0;  // llama3
  int original_max_position = 0;  // llama3: the context length before scaling
  std::vector<float> divisors;    // table: [D / 2]

  // Angle per position of each of the D/2 rotated pairs, scaling applied: angle(t, i) = t *
  // frequencies[i]. The formulas are those of transformers (modeling_rope_utils), in fp64.
  std::vector<double> Frequencies(int D) const;
};

// How the model's makers advise to draw its tokens, in the ranges of ops/sampling; absent: they say
// nothing.
struct SamplingAdvice {
  std::optional<double> temperature;  // 0: greedily
  std::optional<int> top_k;           // 0: of all tokens
  std::optional<double> top_p, min_p, repetition_penalty;

  // What there is, by the names that requests use.
  std::vector<std::pair<const char*, double>> Given() const;
};

struct ModelConfig {
  std::string architecture;  // as the file names it: LlamaForCausalLM, llama, qwen2, ...
  std::string name;          // for people
  int L = 0;                 // layers
  int C = 0;                 // model width
  int H = 0;                 // query heads
  int Hkv = 0;               // KV heads; H is a multiple of it
  int D = 0;                 // head dim, even
  int ffn = 0;               // MLP width
  int V = 0;                 // vocabulary
  int max_position = 0;      // context length
  float norm_eps = 1e-5f;
  RopeConfig rope;
  bool tied_embeddings = false;  // the head is the token embedding
  bool qkv_bias = false;         // Qwen2
  bool o_bias = false;           // attention_bias of Llama configs
  bool qk_norm = false;          // Qwen3: RMSNorm over D of each query and key head, before RoPE
  int sliding_window = 0;        // keys a query sees, itself included; 0 = all max_position
  std::vector<int32_t> eos_ids;  // any of these ends a reply
  int32_t bos_id = -1;           // -1: none
  SamplingAdvice sampling;

  int G() const { return H / Hkv; }
};

// HF config.json -> ModelConfig. `path` is for messages. Errors: kDataLoss for malformed JSON or
// fields, kUnsupported for architectures, activations, RoPE kinds or `auto_map` code that this
// build does not run.
Expected<ModelConfig> ParseHfConfig(std::string_view json, const std::string& path);

// Adds what an HF generation_config.json says: end-of-reply and start tokens, and how to sample
// (do_sample false: greedily; true without a temperature: at 1, as transformers does).
Status MergeGenerationConfig(std::string_view json, const std::string& path, ModelConfig* config);

// The metadata of a GGUF file (and which optional tensors it has) -> ModelConfig; errors likewise.
Expected<ModelConfig> ParseGgufConfig(const GgufFile& gguf);

// Checks the limits and the fields against each other. Both parsers call it.
Status ValidateConfig(const ModelConfig& config, const std::string& path);

}  // namespace dsla
