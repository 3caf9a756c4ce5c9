// Hugging Face config.json -> ModelConfig. Defaults of absent keys are those of transformers.
#include <algorithm>
#include <array>
#include <optional>

#include "format/config.h"
#include "format/json.h"
#include "format/sampling_advice.h"

namespace dsla {
namespace {

using nlohmann::json;

constexpr int64_t kIntMax = 1 << 30;  // of any count; ValidateConfig is stricter

// What the architectures differ in.
struct Family {
  const char* architecture;
  bool attention_bias_key;  // attention_bias puts a bias on q, k, v and o
  bool qkv_bias;            // always a bias on q, k, v
  bool qk_norm;
  std::optional<int> head_dim;  // default of head_dim; none: hidden_size / heads
  std::optional<int> kv_heads;  // default of num_key_value_heads; none: all heads
};
constexpr std::array<Family, 4> kFamilies = {{
    {"LlamaForCausalLM", true, false, false, {}, {}},
    {"MistralForCausalLM", false, false, false, {}, 8},
    {"Qwen2ForCausalLM", false, true, false, {}, 32},
    {"Qwen3ForCausalLM", true, false, true, 128, 32},
}};

// Typed look-ups in one JSON object; absent and null are the same.
class Fields {
 public:
  Fields(const json& object, const std::string& path) : object_(object), path_(path) {}

  const json* Find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  bool Has(const char* key) const { return object_.contains(key); }
  Status Int(const char* key, std::optional<int64_t> fallback, int* out) const {
    const json* value = Find(key);
    if (value == nullptr && !fallback) return DataLoss("'{}': no {}", path_, key);
    int64_t number = fallback.value_or(0);
    if (value != nullptr) {
      const bool fits =
          value->is_number_unsigned() && value->get<uint64_t>() <= static_cast<uint64_t>(kIntMax);
      if (!fits) {
        return DataLoss("'{}': {} is not a whole number between 0 and {}", path_, key, kIntMax);
      }
      number = value->get<int64_t>();
    }
    *out = static_cast<int>(number);
    return Status::Ok();
  }
  Status Number(const char* key, std::optional<double> fallback, double* out) const {
    const json* value = Find(key);
    if (value == nullptr && !fallback) return DataLoss("'{}': no {}", path_, key);
    if (value != nullptr && !value->is_number()) {
      return DataLoss("'{}': {} is not a number", path_, key);
    }
    *out = value != nullptr ? value->get<double>() : *fallback;
    return Status::Ok();
  }
  Status Bool(const char* key, bool fallback, bool* out) const {
    const json* value = Find(key);
    if (value != nullptr && !value->is_boolean()) {
      return DataLoss("'{}': {} is neither true nor false", path_, key);
    }
    *out = value != nullptr ? value->get<bool>() : fallback;
    return Status::Ok();
  }
  Status String(const char* key, const char* fallback, std::string* out) const {
    const json* value = Find(key);
    if (value != nullptr && !value->is_string()) {
      return DataLoss("'{}': {} is not a string", path_, key);
    }
    *out = value != nullptr ? value->get<std::string>() : fallback;
    return Status::Ok();
  }

 private:
  const json& object_;
  const std::string& path_;
};

// eos_token_id is a number or a list of them. Ids are range-checked by ValidateConfig.
Status AddTokenIds(const Fields& fields, const char* key, const std::string& path,
                   std::vector<int32_t>* ids) {
  const json* value = fields.Find(key);
  if (value == nullptr) return Status::Ok();
  const json list = value->is_array() ? *value : json::array({*value});
  for (const json& item : list) {
    if (!item.is_number_unsigned() || item.get<uint64_t>() > static_cast<uint64_t>(kIntMax)) {
      return DataLoss("'{}': {} is neither a token id nor a list of them", path, key);
    }
    const auto id = item.get<int32_t>();
    if (std::find(ids->begin(), ids->end(), id) == ids->end()) ids->push_back(id);
  }
  return Status::Ok();
}

Status ReadBos(const Fields& fields, const std::string& path, int32_t* bos) {
  std::vector<int32_t> ids;
  DSLA_RETURN_IF_ERROR(AddTokenIds(fields, "bos_token_id", path, &ids));
  if (!ids.empty()) *bos = ids.front();
  return Status::Ok();
}

Status AdviceOf(const Fields& fields, const std::string& path, SamplingAdvice* advice) {
  constexpr SamplingKeys kKeys{.temperature = "temperature",
                               .top_k = "top_k",
                               .top_p = "top_p",
                               .min_p = "min_p",
                               .repetition_penalty = "repetition_penalty"};
  const auto read = [&](const char* key) -> Expected<std::optional<double>> {
    if (fields.Find(key) == nullptr) return std::optional<double>();
    double value = 0;
    DSLA_RETURN_IF_ERROR(fields.Number(key, {}, &value));
    return std::optional(value);
  };
  DSLA_ASSIGN_OR_RETURN(*advice, ReadSamplingAdvice(kKeys, path, read));
  if (fields.Find("do_sample") == nullptr) return Status::Ok();
  bool sample = false;
  DSLA_RETURN_IF_ERROR(fields.Bool("do_sample", false, &sample));
  if (!sample) {
    advice->temperature = 0;
  } else if (!advice->temperature) {
    advice->temperature = 1;
  }
  return Status::Ok();
}

class HfConfigParser {
 public:
  HfConfigParser(const json& object, const std::string& path)
      : fields_(object, path), path_(path) {}

  Expected<ModelConfig> Run() {
    DSLA_RETURN_IF_ERROR(Architecture());
    DSLA_RETURN_IF_ERROR(Refuse());
    DSLA_RETURN_IF_ERROR(Sizes());
    DSLA_RETURN_IF_ERROR(Biases());
    DSLA_RETURN_IF_ERROR(Rope());
    DSLA_RETURN_IF_ERROR(SlidingWindow());
    DSLA_RETURN_IF_ERROR(AddTokenIds(fields_, "eos_token_id", path_, &config_.eos_ids));
    DSLA_RETURN_IF_ERROR(ReadBos(fields_, path_, &config_.bos_id));
    DSLA_RETURN_IF_ERROR(ValidateConfig(config_, path_));
    return config_;
  }

 private:
  Status Architecture() {
    if (const json* map = fields_.Find("auto_map"); map != nullptr && !map->empty()) {
      return Unsupported("'{}': the model brings its own code (auto_map), which is never run",
                         path_);
    }
    const json* list = fields_.Find("architectures");
    if (list == nullptr || !list->is_array() || list->size() != 1 || !(*list)[0].is_string()) {
      return DataLoss("'{}': architectures is not a list of one name", path_);
    }
    config_.architecture = (*list)[0].get<std::string>();
    std::string known;
    for (const Family& family : kFamilies) {
      if (config_.architecture == family.architecture) family_ = &family;
      known += (known.empty() ? "" : ", ") + std::string(family.architecture);
    }
    if (family_ == nullptr) {
      return Unsupported("'{}': unknown architecture '{}' (known: {})", path_,
                         Printable(config_.architecture), known);
    }
    return Status::Ok();
  }

  // What would change the computation and that this build does not do.
  Status Refuse() {
    if (const json* q = fields_.Find("quantization_config"); q != nullptr && !q->empty()) {
      return Unsupported("'{}': quantization_config (weights must be F32, F16 or BF16)", path_);
    }
    std::string act;
    DSLA_RETURN_IF_ERROR(fields_.String("hidden_act", "silu", &act));
    if (act != "silu") {
      return Unsupported("'{}': hidden_act '{}' (known: silu)", path_, Printable(act));
    }
    for (const char* key : {"mlp_bias", "rope_interleaved"}) {
      bool value = false;
      DSLA_RETURN_IF_ERROR(fields_.Bool(key, false, &value));
      if (value) return Unsupported("'{}': {} (not supported)", path_, key);
    }
    double rotated = 1;
    DSLA_RETURN_IF_ERROR(fields_.Number("partial_rotary_factor", 1.0, &rotated));
    if (rotated != 1)
      return Unsupported("'{}': partial_rotary_factor {} (not supported)", path_, rotated);
    return Status::Ok();
  }

  Status Sizes() {
    ModelConfig& c = config_;
    DSLA_RETURN_IF_ERROR(fields_.String("_name_or_path", "", &c.name));
    DSLA_RETURN_IF_ERROR(fields_.Int("num_hidden_layers", {}, &c.L));
    DSLA_RETURN_IF_ERROR(fields_.Int("hidden_size", {}, &c.C));
    DSLA_RETURN_IF_ERROR(fields_.Int("intermediate_size", {}, &c.ffn));
    DSLA_RETURN_IF_ERROR(fields_.Int("vocab_size", {}, &c.V));
    DSLA_RETURN_IF_ERROR(fields_.Int("max_position_embeddings", {}, &c.max_position));
    DSLA_RETURN_IF_ERROR(fields_.Int("num_attention_heads", {}, &c.H));
    DSLA_RETURN_IF_ERROR(
        fields_.Int("num_key_value_heads", family_->kv_heads.value_or(c.H), &c.Hkv));
    if (c.H < 1) return DataLoss("'{}': num_attention_heads is 0", path_);
    if (fields_.Find("head_dim") == nullptr && !family_->head_dim && c.C % c.H != 0) {
      return DataLoss("'{}': hidden_size {} is not a multiple of {} heads", path_, c.C, c.H);
    }
    DSLA_RETURN_IF_ERROR(fields_.Int("head_dim", family_->head_dim.value_or(c.C / c.H), &c.D));
    double eps = 0;
    DSLA_RETURN_IF_ERROR(fields_.Number("rms_norm_eps", 1e-6, &eps));
    c.norm_eps = static_cast<float>(eps);
    return fields_.Bool("tie_word_embeddings", false, &c.tied_embeddings);
  }

  Status Biases() {
    bool bias = false;
    DSLA_RETURN_IF_ERROR(fields_.Bool("attention_bias", false, &bias));
    if (bias && !family_->attention_bias_key) {
      return Unsupported("'{}': attention_bias for {} (not supported)", path_,
                         config_.architecture);
    }
    config_.qkv_bias = bias || family_->qkv_bias;
    config_.o_bias = bias;
    config_.qk_norm = family_->qk_norm;
    return Status::Ok();
  }

  // rope_parameters (transformers 5: rope_theta inside) or rope_scaling beside rope_theta.
  Status Rope() {
    RopeConfig& rope = config_.rope;
    DSLA_RETURN_IF_ERROR(fields_.Number("rope_theta", 10000.0, &rope.theta));
    const json* parameters = fields_.Find("rope_parameters");
    const char* key = parameters != nullptr ? "rope_parameters" : "rope_scaling";
    if (parameters == nullptr) parameters = fields_.Find("rope_scaling");
    if (parameters == nullptr) return Status::Ok();
    if (!parameters->is_object()) return DataLoss("'{}': {} is not an object", path_, key);
    for (const auto& item : parameters->items()) {
      if (item.value().is_object()) {
        return Unsupported("'{}': {} that differ between layers (not supported)", path_, key);
      }
    }
    const Fields scaling(*parameters, path_);
    DSLA_RETURN_IF_ERROR(scaling.Number("rope_theta", rope.theta, &rope.theta));
    double rotated = 1;
    DSLA_RETURN_IF_ERROR(scaling.Number("partial_rotary_factor", 1.0, &rotated));
    if (rotated != 1)
      return Unsupported("'{}': partial_rotary_factor {} (not supported)", path_, rotated);
    std::string type;
    DSLA_RETURN_IF_ERROR(scaling.String("type", "default", &type));
    DSLA_RETURN_IF_ERROR(scaling.String("rope_type", type.c_str(), &type));
    if (type == "default") return Status::Ok();
    if (type != "linear" && type != "llama3") {
      return Unsupported("'{}': RoPE scaling '{}' (known: default, linear, llama3)", path_,
                         Printable(type));
    }
    DSLA_RETURN_IF_ERROR(scaling.Number("factor", {}, &rope.factor));
    rope.scaling = RopeScaling::kLinear;
    if (type == "linear") return Status::Ok();
    rope.scaling = RopeScaling::kLlama3;
    DSLA_RETURN_IF_ERROR(scaling.Number("low_freq_factor", {}, &rope.low_freq_factor));
    DSLA_RETURN_IF_ERROR(scaling.Number("high_freq_factor", {}, &rope.high_freq_factor));
    return scaling.Int("original_max_position_embeddings", config_.max_position,
                       &rope.original_max_position);
  }

  Status SlidingWindow() {
    const bool mistral = config_.architecture == "MistralForCausalLM";
    const bool qwen = config_.qk_norm || family_->qkv_bias;
    int window = 0, full_layers = 0;
    bool used = true;
    DSLA_RETURN_IF_ERROR(fields_.Int("sliding_window", 0, &window));
    DSLA_RETURN_IF_ERROR(fields_.Bool("use_sliding_window", !qwen, &used));
    DSLA_RETURN_IF_ERROR(fields_.Int("max_window_layers", 28, &full_layers));
    // Absent means the class's default, null means none.
    if (mistral && !fields_.Has("sliding_window")) window = 4096;
    if (!used) window = 0;
    if (window > 0 && !mistral && !qwen) {
      return Unsupported("'{}': sliding_window for {} (not supported)", path_,
                         config_.architecture);
    }
    if (const json* types = fields_.Find("layer_types")) {
      DSLA_RETURN_IF_ERROR(LayerTypes(*types, &window));
    } else if (qwen && window > 0 && full_layers >= config_.L) {
      window = 0;
    } else if (qwen && window > 0 && full_layers > 0) {
      return Unsupported("'{}': sliding window in some layers only (max_window_layers {} of {})",
                         path_, full_layers, config_.L);
    }
    config_.sliding_window = window >= config_.max_position ? 0 : window;
    return Status::Ok();
  }

  Status LayerTypes(const json& types, int* window) {
    if (!types.is_array() || types.size() != static_cast<size_t>(config_.L)) {
      return DataLoss("'{}': layer_types is not a list of {} names", path_, config_.L);
    }
    size_t sliding = 0;
    for (const json& type : types) {
      if (type != "full_attention" && type != "sliding_attention") {
        return Unsupported("'{}': layer_types other than full_attention and sliding_attention",
                           path_);
      }
      if (type == "sliding_attention") ++sliding;
    }
    if (sliding == 0) *window = 0;
    if (sliding > 0 && sliding < types.size()) {
      return Unsupported("'{}': sliding window in some layers only (layer_types)", path_);
    }
    if (sliding > 0 && *window == 0) {
      return DataLoss("'{}': layer_types asks for a sliding window, but there is none", path_);
    }
    return Status::Ok();
  }

  const Fields fields_;
  const std::string& path_;
  const Family* family_ = nullptr;
  ModelConfig config_;
};

}  // namespace

Expected<ModelConfig> ParseHfConfig(std::string_view text, const std::string& path) {
  DSLA_ASSIGN_OR_RETURN(const json object, ParseJson(text, path));
  if (!object.is_object()) return DataLoss("'{}': not a JSON object", path);
  return HfConfigParser(object, path).Run();
}

Status MergeGenerationConfig(std::string_view text, const std::string& path, ModelConfig* config) {
  DSLA_ASSIGN_OR_RETURN(const json object, ParseJson(text, path));
  if (!object.is_object()) return DataLoss("'{}': not a JSON object", path);
  const Fields fields(object, path);
  DSLA_RETURN_IF_ERROR(AddTokenIds(fields, "eos_token_id", path, &config->eos_ids));
  DSLA_RETURN_IF_ERROR(ReadBos(fields, path, &config->bos_id));
  DSLA_RETURN_IF_ERROR(AdviceOf(fields, path, &config->sampling));
  return ValidateConfig(*config, path);
}

}  // namespace dsla
