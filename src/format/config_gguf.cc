// GGUF metadata -> ModelConfig.
#include <algorithm>
#include <cmath>

#include "format/config.h"
#include "format/gguf.h"
#include "format/json.h"
#include "format/sampling_advice.h"

namespace dsla {
namespace {

constexpr int64_t kIntMax = 1 << 30;  // of any count in the metadata; ValidateConfig is stricter

const GgufTensor* FindTensor(const GgufFile& gguf, std::string_view name) {
  const auto& tensors = gguf.tensors();
  const auto it = std::find_if(tensors.begin(), tensors.end(),
                               [&](const GgufTensor& t) { return t.name == name; });
  return it == tensors.end() ? nullptr : &*it;
}

class GgufConfigParser {
 public:
  explicit GgufConfigParser(const GgufFile& gguf) : gguf_(gguf), path_(gguf.path()) {}

  Expected<ModelConfig> Run() {
    DSLA_RETURN_IF_ERROR(Identity());
    DSLA_RETURN_IF_ERROR(Refuse());
    DSLA_RETURN_IF_ERROR(Sizes());
    DSLA_RETURN_IF_ERROR(Rope());
    DSLA_RETURN_IF_ERROR(SlidingWindow());
    DSLA_RETURN_IF_ERROR(Tokens());
    DSLA_RETURN_IF_ERROR(Sampling());
    const bool qwen2 = config_.architecture == "qwen2";
    config_.qkv_bias = qwen2 || FindTensor(gguf_, "blk.0.attn_q.bias") != nullptr;
    config_.o_bias = FindTensor(gguf_, "blk.0.attn_output.bias") != nullptr;
    config_.qk_norm = config_.architecture == "qwen3";
    config_.tied_embeddings = FindTensor(gguf_, "output.weight") == nullptr;
    DSLA_RETURN_IF_ERROR(ValidateConfig(config_, path_));
    return config_;
  }

 private:
  std::string Key(const char* suffix) const { return config_.architecture + "." + suffix; }

  Status Identity() {
    DSLA_ASSIGN_OR_RETURN(const auto split, gguf_.Integer("split.count"));
    if (split.value_or(1) > 1) {
      return Unsupported("'{}': one of {} split files; merge them into one first", path_, *split);
    }
    DSLA_ASSIGN_OR_RETURN(const auto architecture, gguf_.String("general.architecture"));
    if (!architecture) return DataLoss("'{}': no general.architecture in the metadata", path_);
    if (*architecture != "llama" && *architecture != "qwen2" && *architecture != "qwen3") {
      return Unsupported("'{}': unknown architecture '{}' (known: llama, qwen2, qwen3)", path_,
                         Printable(*architecture));
    }
    config_.architecture = *architecture;
    DSLA_ASSIGN_OR_RETURN(const auto name, gguf_.String("general.name"));
    config_.name = name ? Printable(*name) : path_.substr(path_.find_last_of('/') + 1);
    return Status::Ok();
  }

  // What would change the computation and that this build does not do.
  Status Refuse() {
    DSLA_ASSIGN_OR_RETURN(const auto experts, gguf_.Integer(Key("expert_count")));
    if (experts.value_or(0) > 0) {
      return Unsupported("'{}': mixture of {} experts (not supported)", path_, *experts);
    }
    for (const char* suffix : {"logit_scale", "embedding_scale", "residual_scale",
                               "attention.scale", "attention.sliding_window_pattern",
                               "attn_logit_softcapping", "final_logit_softcapping"}) {
      if (gguf_.Has(Key(suffix)))
        return Unsupported("'{}': metadata '{}' (not supported)", path_, Key(suffix));
    }
    DSLA_ASSIGN_OR_RETURN(const auto causal, gguf_.Bool(Key("attention.causal")));
    if (!causal.value_or(true)) return Unsupported("'{}': attention is not causal", path_);
    return Status::Ok();
  }

  // A count; an array of equal counts, one per layer, is the same.
  Expected<std::optional<int64_t>> Count(const std::string& key) {
    if (!gguf_.IsArray(key)) return gguf_.Integer(key);
    DSLA_ASSIGN_OR_RETURN(const auto values, gguf_.Integers(key));
    if (values.empty()) return DataLoss("'{}': metadata '{}' is empty", path_, key);
    for (const int64_t value : values) {
      if (value != values.front()) {
        return Unsupported("'{}': metadata '{}' differs between layers (not supported)", path_,
                           key);
      }
    }
    return std::optional(values.front());
  }

  Status ReadInt(const char* suffix, std::optional<int64_t> fallback, int* out) {
    const std::string key = Key(suffix);
    DSLA_ASSIGN_OR_RETURN(auto value, Count(key));
    if (!value) value = fallback;
    if (!value) return DataLoss("'{}': no {} in the metadata", path_, key);
    if (*value < 0 || *value > kIntMax) {
      return DataLoss("'{}': metadata '{}' is {}", path_, key, *value);
    }
    *out = static_cast<int>(*value);
    return Status::Ok();
  }

  Status Sizes() {
    ModelConfig& c = config_;
    DSLA_RETURN_IF_ERROR(ReadInt("block_count", {}, &c.L));
    DSLA_RETURN_IF_ERROR(ReadInt("embedding_length", {}, &c.C));
    DSLA_RETURN_IF_ERROR(ReadInt("feed_forward_length", {}, &c.ffn));
    DSLA_RETURN_IF_ERROR(ReadInt("context_length", {}, &c.max_position));
    DSLA_RETURN_IF_ERROR(ReadInt("attention.head_count", {}, &c.H));
    DSLA_RETURN_IF_ERROR(ReadInt("attention.head_count_kv", c.H, &c.Hkv));
    if (c.H < 1) return DataLoss("'{}': metadata '{}' is 0", path_, Key("attention.head_count"));
    if (!gguf_.Has(Key("attention.key_length")) && c.C % c.H != 0) {
      return DataLoss("'{}': embedding length {} is not a multiple of {} heads", path_, c.C, c.H);
    }
    int value_length = 0, rotated = 0;
    DSLA_RETURN_IF_ERROR(ReadInt("attention.key_length", c.C / c.H, &c.D));
    DSLA_RETURN_IF_ERROR(ReadInt("attention.value_length", c.C / c.H, &value_length));
    DSLA_RETURN_IF_ERROR(ReadInt("rope.dimension_count", c.D, &rotated));
    if (value_length != c.D) {
      return Unsupported("'{}': keys of {} and values of {} channels (not supported)", path_, c.D,
                         value_length);
    }
    if (rotated != c.D) {
      return Unsupported("'{}': RoPE over {} of {} channels (not supported)", path_, rotated, c.D);
    }
    DSLA_RETURN_IF_ERROR(VocabularySize());
    const std::string eps = Key("attention.layer_norm_rms_epsilon");
    DSLA_ASSIGN_OR_RETURN(const auto epsilon, gguf_.Number(eps));
    if (!epsilon) return DataLoss("'{}': no {} in the metadata", path_, eps);
    c.norm_eps = static_cast<float>(*epsilon);
    return Status::Ok();
  }

  // The key is optional; the embedding's shape, which is checked against V later, decides.
  Status VocabularySize() {
    const GgufTensor* embedding = FindTensor(gguf_, "token_embd.weight");
    const int64_t rows = embedding != nullptr ? embedding->shape.front() : 0;
    DSLA_RETURN_IF_ERROR(ReadInt("vocab_size", std::min(rows, kIntMax), &config_.V));
    if (embedding == nullptr) return DataLoss("'{}': no tensor 'token_embd.weight'", path_);
    return Status::Ok();
  }

  Status Rope() {
    RopeConfig& rope = config_.rope;
    DSLA_ASSIGN_OR_RETURN(const auto theta, gguf_.Number(Key("rope.freq_base")));
    rope.theta = theta.value_or(10000.0);
    DSLA_ASSIGN_OR_RETURN(const auto type, gguf_.String(Key("rope.scaling.type")));
    DSLA_ASSIGN_OR_RETURN(const auto factor, gguf_.Number(Key("rope.scaling.factor")));
    DSLA_ASSIGN_OR_RETURN(const auto old_factor, gguf_.Number(Key("rope.scale_linear")));
    const double scale = factor ? *factor : old_factor.value_or(1.0);
    // Files from before rope.scaling.type have the factor alone and mean linear.
    const bool linear = type ? *type == "linear" : scale != 1.0;
    if (type && !linear && *type != "none") {
      return Unsupported("'{}': RoPE scaling '{}' (known: none, linear, rope_freqs.weight)", path_,
                         Printable(*type));
    }
    const GgufTensor* table = FindTensor(gguf_, "rope_freqs.weight");
    if (linear && table != nullptr) {
      return Unsupported(
          "'{}': linear RoPE scaling together with rope_freqs.weight (not supported)", path_);
    }
    if (linear) {
      rope.scaling = RopeScaling::kLinear;
      rope.factor = scale;
    }
    if (table != nullptr) {
      rope.scaling = RopeScaling::kTable;
      if (table->type != StorageType::kF32 || table->shape.size() != 1) {
        return DataLoss("'{}': tensor 'rope_freqs.weight' is not a vector of F32", path_);
      }
      if (table->shape[0] != config_.D / 2) {
        return DataLoss("'{}': tensor 'rope_freqs.weight' has shape [{}], expected [{}]", path_,
                        table->shape[0], config_.D / 2);
      }
      rope.divisors.resize(static_cast<size_t>(config_.D / 2));
      Dequantize(table->type, table->data, rope.divisors);
    }
    return Status::Ok();
  }

  Status SlidingWindow() {
    DSLA_RETURN_IF_ERROR(ReadInt("attention.sliding_window", 0, &config_.sliding_window));
    if (config_.sliding_window >= config_.max_position) config_.sliding_window = 0;
    return Status::Ok();
  }

  Status Tokens() {
    for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                            "tokenizer.ggml.eom_token_id"}) {
      DSLA_ASSIGN_OR_RETURN(const auto id, TokenId(key));
      auto& ids = config_.eos_ids;
      if (id && std::find(ids.begin(), ids.end(), *id) == ids.end()) ids.push_back(*id);
    }
    DSLA_ASSIGN_OR_RETURN(const auto bos, TokenId("tokenizer.ggml.bos_token_id"));
    config_.bos_id = bos.value_or(-1);
    return Status::Ok();
  }

  Status Sampling() {
    constexpr SamplingKeys kKeys{.temperature = "general.sampling.temp",
                                 .top_k = "general.sampling.top_k",
                                 .top_p = "general.sampling.top_p",
                                 .min_p = "general.sampling.min_p",
                                 .repetition_penalty = "general.sampling.penalty_repeat"};
    DSLA_ASSIGN_OR_RETURN(config_.sampling, ReadSamplingAdvice(kKeys, path_, [&](const char* key) {
                            return gguf_.Number(key);
                          }));
    return Status::Ok();
  }

  Expected<std::optional<int32_t>> TokenId(const char* key) {
    DSLA_ASSIGN_OR_RETURN(const auto id, gguf_.Integer(key));
    if (!id || *id == -1 || *id == 0xffffffff) return std::optional<int32_t>();  // "none"
    if (*id < 0 || *id >= config_.V) {
      return DataLoss("'{}': metadata '{}' is {}, outside the vocabulary of {}", path_, key, *id,
                      config_.V);
    }
    return std::optional(static_cast<int32_t>(*id));
  }

  const GgufFile& gguf_;
  const std::string& path_;
  ModelConfig config_;
};

}  // namespace

Expected<ModelConfig> ParseGgufConfig(const GgufFile& gguf) { return GgufConfigParser(gguf).Run(); }

}  // namespace dsla
