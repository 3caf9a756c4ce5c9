#include "format/model_file.h"

#include <filesystem>
#include <iterator>
#include <system_error>

#include "base/check.h"
#include "base/mapped_file.h"
#include "format/json.h"
#include "format/model_file_impl.h"
#include "format/sha256.h"

namespace dsla {
namespace {

std::string ShapeText(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

int64_t Elements(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

// What of the config changes the computation, in a form that is the same on every machine.
std::string CanonicalConfig(const ModelConfig& c) {
  const RopeConfig& r = c.rope;
  return fmt::format(
      "dsla-model-1\nL={} C={} H={} Hkv={} D={} ffn={} V={} eps={:.9g} tied={} qkv_bias={} "
      "o_bias={} qk_norm={} window={}\nrope theta={:.17g} scaling={} factor={:.17g} "
      "low={:.17g} high={:.17g} original={} divisors={:.9g}\n",
      c.L, c.C, c.H, c.Hkv, c.D, c.ffn, c.V, c.norm_eps, c.tied_embeddings, c.qkv_bias, c.o_bias,
      c.qk_norm, c.sliding_window, r.theta, static_cast<int>(r.scaling), r.factor,
      r.low_freq_factor, r.high_freq_factor, r.original_max_position, fmt::join(r.divisors, ","));
}

void HashSampled(std::span<const std::byte> data, Sha256* hash) {
  constexpr size_t kWhole = 64 << 10, kBlock = 4 << 10, kBlocks = 16;
  if (data.size() <= kWhole) return hash->Update(data);
  for (size_t i = 0; i < kBlocks; ++i) {
    const size_t offset = (data.size() - kBlock) * i / (kBlocks - 1);
    hash->Update(data.subspan(offset, kBlock));
  }
}

// "meta-llama/Llama-3.2-1B", a name on the Hugging Face Hub as other servers take it.
bool IsHubName(const std::filesystem::path& path) {
  return std::distance(path.begin(), path.end()) == 2 && path.is_relative() &&
         !path.string().starts_with('.') && path.extension() != ".gguf";
}

// A shard, a tokenizer or the like beside the config.json of its model.
bool IsPartOfHfModel(const std::filesystem::path& path) {
  std::error_code error;
  return (path.extension() == ".safetensors" || path.extension() == ".json") &&
         std::filesystem::exists(path.parent_path() / "config.json", error);
}

}  // namespace

std::vector<std::pair<std::string, std::vector<int64_t>>> RequiredTensors(
    const ModelConfig& config) {
  const int64_t C = config.C, D = config.D, ffn = config.ffn, V = config.V;
  const int64_t q = config.H * D, kv = config.Hkv * D;
  std::vector<std::pair<std::string, std::vector<int64_t>>> out;
  out.push_back({"model.embed_tokens.weight", {V, C}});
  for (int l = 0; l < config.L; ++l) {
    const auto add = [&](const char* suffix, std::vector<int64_t> shape) {
      out.push_back({LayerTensorName(l, suffix), std::move(shape)});
    };
    add("input_layernorm.weight", {C});
    add("self_attn.q_proj.weight", {q, C});
    add("self_attn.k_proj.weight", {kv, C});
    add("self_attn.v_proj.weight", {kv, C});
    add("self_attn.o_proj.weight", {C, q});
    if (config.qkv_bias) {
      add("self_attn.q_proj.bias", {q});
      add("self_attn.k_proj.bias", {kv});
      add("self_attn.v_proj.bias", {kv});
    }
    if (config.o_bias) add("self_attn.o_proj.bias", {C});
    if (config.qk_norm) {
      add("self_attn.q_norm.weight", {D});
      add("self_attn.k_norm.weight", {D});
    }
    add("post_attention_layernorm.weight", {C});
    add("mlp.gate_proj.weight", {ffn, C});
    add("mlp.up_proj.weight", {ffn, C});
    add("mlp.down_proj.weight", {C, ffn});
  }
  out.push_back({"model.norm.weight", {C}});
  if (!config.tied_embeddings) out.push_back({"lm_head.weight", {V, C}});
  return out;
}

Expected<std::unique_ptr<ModelFile>> ModelFile::Open(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) {
    return NotFound("cannot open '{}': {}{}", Printable(path),
                    error ? error.message() : std::string("No such file or directory"),
                    IsHubName(path) ? " (models are read from files, none is downloaded)" : "");
  }
  if (std::filesystem::is_directory(status)) return OpenHfModel(path);
  if (!std::filesystem::is_regular_file(status)) {
    return InvalidArgument("'{}' is neither a file nor a directory", path);
  }
  if (IsPartOfHfModel(path)) {
    return InvalidArgument("'{}' is one file of a Hugging Face model: its directory is the model",
                           path);
  }
  return OpenGgufModel(path);
}

Status ModelFile::Read(const std::string& name, std::span<float> out) const {
  const TensorInfo* info = FindTensor(name);
  if (info == nullptr) return NotFound("'{}': no tensor '{}'", path(), Printable(name));
  return ReadRows(name, 0, info->shape.size() > 1 ? info->shape[0] : 1, out);
}

void StoredModel::ReleasePages() const {
  for (const Bound& bound : bound_) dsla::ReleasePages(bound.stored.data);
}

Status StoredModel::Bind(std::vector<StoredTensor> stored,
                         const std::function<std::string(const std::string&)>& file_name,
                         const std::function<bool(const StoredTensor&)>& ignored) {
  std::unordered_map<std::string, size_t> by_name;
  for (size_t i = 0; i < stored.size(); ++i) by_name[stored[i].name] = i;
  for (auto& [name, shape] : RequiredTensors(config_)) {
    const std::string own = file_name(name);
    const auto it = by_name.find(own);
    if (it == by_name.end()) return DataLoss("'{}': tensor '{}' is missing", path_, own);
    Bound bound{std::move(stored[it->second])};
    by_name.erase(it);
    if (bound.stored.shape != shape) {
      return DataLoss("'{}': tensor '{}' has shape {}, expected {}", path_, own,
                      ShapeText(bound.stored.shape), ShapeText(shape));
    }
    if (permuted_qk_ && name.find(".q_proj.") != std::string::npos) bound.heads = config_.H;
    if (permuted_qk_ && name.find(".k_proj.") != std::string::npos) bound.heads = config_.Hkv;
    index_[name] = infos_.size();
    infos_.push_back({name, shape, Traits(bound.stored.type).name,
                      static_cast<int64_t>(bound.stored.data.size())});
    bound_.push_back(std::move(bound));
  }
  // In the file's order, so that the message does not depend on hashing.
  for (const StoredTensor& tensor : stored) {
    if (by_name.contains(tensor.name) && !ignored(tensor)) {
      return DataLoss("'{}': unexpected tensor '{}' for architecture {}", path_,
                      Printable(tensor.name), config_.architecture);
    }
  }
  return Status::Ok();
}

const TensorInfo* StoredModel::FindTensor(const std::string& name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &infos_[it->second];
}

Status StoredModel::ReadRows(const std::string& name, int64_t begin, int64_t end,
                             std::span<float> out) const {
  const auto it = index_.find(name);
  if (it == index_.end()) return NotFound("'{}': no tensor '{}'", path_, Printable(name));
  const Bound& bound = bound_[it->second];
  const StoredTensor& stored = bound.stored;
  const StorageTraits& traits = Traits(stored.type);
  // A vector of permuted elements (a bias) is a matrix of one column to the permutation.
  const bool by_row = stored.shape.size() > 1 || bound.heads > 0;
  const int64_t rows = by_row ? stored.shape[0] : 1;
  const int64_t columns = Elements(stored.shape) / rows;
  if (stored.shape.size() == 1) {
    DSLA_CHECK(begin == 0 && end == 1);
    end = rows;
  }
  DSLA_CHECK(0 <= begin && begin <= end && end <= rows);
  DSLA_CHECK(static_cast<int64_t>(out.size()) == (end - begin) * columns);
  const auto row_bytes = static_cast<size_t>(columns / traits.block * traits.bytes);
  const auto row_values = static_cast<size_t>(columns);
  for (int64_t row = begin; row < end; ++row) {
    int64_t source = row;
    if (bound.heads > 0) {
      // Stored within a head of D rows: the pair (i, i + D/2) that RoPE rotates lies side by side.
      const int64_t D = rows / bound.heads, r = row % D;
      source = row - r + (r < D / 2 ? 2 * r : 2 * (r - D / 2) + 1);
    }
    const auto values = out.subspan(static_cast<size_t>(row - begin) * row_values, row_values);
    Dequantize(stored.type, stored.data.subspan(static_cast<size_t>(source) * row_bytes, row_bytes),
               values);
    if (!AllFinite(values)) {
      return DataLoss("'{}': tensor '{}' holds NaN or Inf", path_, Printable(stored.name));
    }
  }
  return Status::Ok();
}

Expected<std::string> StoredModel::Fingerprint() const {
  std::call_once(fingerprint_once_, [this] {
    Sha256 hash;
    hash.Update(CanonicalConfig(config_));
    for (size_t i = 0; i < infos_.size(); ++i) {
      hash.Update(
          fmt::format("{} {} {}\n", infos_[i].name, ShapeText(infos_[i].shape), infos_[i].type));
      HashSampled(bound_[i].stored.data, &hash);
    }
    fingerprint_ = hash.HexDigest();
  });
  return fingerprint_;
}

Expected<TokenizerData> StoredModel::CheckTokenizer(Expected<TokenizerData> data) const {
  if (!data.ok()) return data;
  const auto V = static_cast<size_t>(config_.V);
  if (data->tokens.size() > V) {
    return DataLoss("'{}': the tokenizer has {} tokens, the model's vocabulary {}", data->source,
                    data->tokens.size(), config_.V);
  }
  return data;
}

}  // namespace dsla
