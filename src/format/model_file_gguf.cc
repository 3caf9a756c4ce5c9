// A model in one GGUF file.
#include <array>
#include <utility>

#include "format/gguf.h"
#include "format/model_file_impl.h"

namespace dsla {
namespace {

// The file's name of a canonical tensor.
std::string GgufName(const std::string& name) {
  if (name == "model.embed_tokens.weight") return "token_embd.weight";
  if (name == "model.norm.weight") return "output_norm.weight";
  if (name == "lm_head.weight") return "output.weight";
  constexpr std::string_view kLayers = "model.layers.";
  const size_t dot = name.find('.', kLayers.size());
  const std::string layer = name.substr(kLayers.size(), dot - kLayers.size());
  const size_t kind = name.rfind('.');  // .weight or .bias
  const std::string_view part = std::string_view(name).substr(dot + 1, kind - dot - 1);
  static constexpr std::array<std::pair<std::string_view, const char*>, 11> kParts = {{
      {"input_layernorm", "attn_norm"},
      {"self_attn.q_proj", "attn_q"},
      {"self_attn.k_proj", "attn_k"},
      {"self_attn.v_proj", "attn_v"},
      {"self_attn.o_proj", "attn_output"},
      {"self_attn.q_norm", "attn_q_norm"},
      {"self_attn.k_norm", "attn_k_norm"},
      {"post_attention_layernorm", "ffn_norm"},
      {"mlp.gate_proj", "ffn_gate"},
      {"mlp.up_proj", "ffn_up"},
      {"mlp.down_proj", "ffn_down"},
  }};
  for (const auto& [hf, gguf] : kParts) {
    if (hf == part) return "blk." + layer + "." + gguf + name.substr(kind);
  }
  DSLA_CHECK(false && "a required tensor has a name in GGUF");
  return {};
}

class GgufModel final : public StoredModel {
 public:
  static Expected<std::unique_ptr<ModelFile>> Make(GgufFile gguf) {
    auto model = std::make_unique<GgufModel>();
    model->gguf_ = std::move(gguf);
    DSLA_RETURN_IF_ERROR(model->Init());
    return std::unique_ptr<ModelFile>(std::move(model));
  }

  const char* format() const override { return gguf_.version() == 2 ? "GGUF v2" : "GGUF v3"; }
  Expected<TokenizerData> ReadTokenizer() const override {
    DSLA_ASSIGN_OR_RETURN(GgufVocab vocab, ReadVocab());
    return CheckTokenizer(FromGgufVocab(std::move(vocab)));
  }

 private:
  Status Init() {
    path_ = gguf_.path();
    DSLA_ASSIGN_OR_RETURN(config_, ParseGgufConfig(gguf_));
    // Only this architecture's converter permutes, for the other RoPE convention.
    permuted_qk_ = config_.architecture == "llama";
    DSLA_ASSIGN_OR_RETURN(const auto chat_template, gguf_.String("tokenizer.chat_template"));
    chat_template_ = chat_template.value_or("");
    DSLA_ASSIGN_OR_RETURN(const auto with_tools, gguf_.String("tokenizer.chat_template.tool_use"));
    tool_chat_template_ = with_tools.value_or("");
    std::vector<StoredTensor> stored;
    for (const GgufTensor& t : gguf_.tensors()) {
      stored.push_back({t.name, t.shape, t.type, t.data});
    }
    return Bind(std::move(stored), GgufName,
                [](const StoredTensor& t) { return t.name == "rope_freqs.weight"; });
  }

  Expected<GgufVocab> ReadVocab() const {
    GgufVocab vocab;
    vocab.source = path_;
    DSLA_ASSIGN_OR_RETURN(const auto model, gguf_.String("tokenizer.ggml.model"));
    DSLA_ASSIGN_OR_RETURN(const auto tokens, gguf_.Strings("tokenizer.ggml.tokens"));
    if (!model || tokens.empty()) return DataLoss("'{}': no tokenizer in the metadata", path_);
    DSLA_ASSIGN_OR_RETURN(const auto pre, gguf_.String("tokenizer.ggml.pre"));
    DSLA_ASSIGN_OR_RETURN(const auto merges, gguf_.Strings("tokenizer.ggml.merges"));
    DSLA_ASSIGN_OR_RETURN(const auto types, gguf_.Integers("tokenizer.ggml.token_type"));
    DSLA_ASSIGN_OR_RETURN(vocab.scores, gguf_.Numbers("tokenizer.ggml.scores"));
    vocab.model = *model;
    vocab.pre = pre.value_or("");
    vocab.tokens.assign(tokens.begin(), tokens.end());
    vocab.merges.assign(merges.begin(), merges.end());
    for (const int64_t type : types) {
      if (type < 0 || type > 255) return DataLoss("'{}': token type {}", path_, type);
      vocab.types.push_back(static_cast<int32_t>(type));
    }
    DSLA_RETURN_IF_ERROR(ReadId("bos", &vocab.bos_id));
    DSLA_RETURN_IF_ERROR(ReadId("eos", &vocab.eos_id));
    DSLA_RETURN_IF_ERROR(ReadId("padding", &vocab.pad_id));
    DSLA_RETURN_IF_ERROR(ReadId("unknown", &vocab.unk_id));
    DSLA_ASSIGN_OR_RETURN(vocab.add_bos, gguf_.Bool("tokenizer.ggml.add_bos_token"));
    DSLA_ASSIGN_OR_RETURN(vocab.add_eos, gguf_.Bool("tokenizer.ggml.add_eos_token"));
    DSLA_ASSIGN_OR_RETURN(vocab.add_space_prefix, gguf_.Bool("tokenizer.ggml.add_space_prefix"));
    return vocab;
  }

  Status ReadId(const char* name, std::optional<int32_t>* out) const {
    const std::string key = fmt::format("tokenizer.ggml.{}_token_id", name);
    DSLA_ASSIGN_OR_RETURN(const auto id, gguf_.Integer(key));
    if (!id || *id == -1 || *id == 0xffffffff) return Status::Ok();  // "none"
    if (*id < 0 || *id >= config_.V) {
      return DataLoss("'{}': metadata '{}' is {}, outside the vocabulary of {}", path_, key, *id,
                      config_.V);
    }
    *out = static_cast<int32_t>(*id);
    return Status::Ok();
  }

  GgufFile gguf_;
};

}  // namespace

Expected<std::unique_ptr<ModelFile>> OpenGgufModel(const std::string& path) {
  DSLA_ASSIGN_OR_RETURN(GgufFile gguf, GgufFile::Open(path));
  return MakeGgufModel(std::move(gguf));
}

Expected<std::unique_ptr<ModelFile>> MakeGgufModel(GgufFile gguf) {
  return GgufModel::Make(std::move(gguf));
}

}  // namespace dsla
