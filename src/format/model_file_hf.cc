// A model in a Hugging Face directory: config.json, model.safetensors (or shards and their index),
// tokenizer.json.
#include <sys/stat.h>

#include <map>
#include <set>
#include <utility>

#include "base/mapped_file.h"
#include "format/json.h"
#include "format/model_file_impl.h"
#include "format/safetensors.h"

namespace dsla {
namespace {

using nlohmann::json;

constexpr size_t kMaxConfigBytes = size_t{16} << 20;      // tens of kB in practice
constexpr size_t kMaxTokenizerBytes = size_t{256} << 20;  // 33 MB for the largest known
constexpr size_t kMaxIndexBytes = size_t{64} << 20;

bool Exists(const std::string& path) {
  struct stat info {};
  return ::stat(path.c_str(), &info) == 0;
}

// A shard's name must be a plain name, so that an index cannot reach outside its directory.
bool IsPlainFileName(const std::string& name) {
  return !name.empty() && name[0] != '.' && name.find('/') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

bool EndsWith(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

class HfModel final : public StoredModel {
 public:
  static Expected<std::unique_ptr<ModelFile>> Open(const std::string& directory) {
    auto model = std::make_unique<HfModel>();
    model->path_ = directory;
    DSLA_RETURN_IF_ERROR(model->Init());
    return std::unique_ptr<ModelFile>(std::move(model));
  }

  const char* format() const override { return "safetensors"; }

  Expected<TokenizerData> ReadTokenizer() const override {
    const std::string path = Path("tokenizer.json");
    DSLA_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxTokenizerBytes));
    DSLA_ASSIGN_OR_RETURN(TokenizerData data, ParseTokenizerJson(text, path));
    // special_tokens_map.json only repeats names that tokenizer_config.json has; it stands in where
    // that is missing.
    for (const char* name : {"tokenizer_config.json", "special_tokens_map.json"}) {
      const std::string config_path = Path(name);
      if (!Exists(config_path)) continue;
      DSLA_ASSIGN_OR_RETURN(const std::string config, ReadTextFile(config_path, kMaxConfigBytes));
      DSLA_RETURN_IF_ERROR(ApplyTokenizerConfig(config, config_path, &data));
      break;
    }
    return CheckTokenizer(std::move(data));
  }

 private:
  std::string Path(const std::string& name) const {
    return path_ + (EndsWith(path_, "/") ? "" : "/") + name;
  }

  Status Init() {
    const std::string config_path = Path("config.json");
    if (!Exists(config_path)) return NotFound("'{}': no config.json in the directory", path_);
    DSLA_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(config_path, kMaxConfigBytes));
    DSLA_ASSIGN_OR_RETURN(config_, ParseHfConfig(text, config_path));
    config_.name = config_.name.empty() ? DirectoryName() : Printable(config_.name);
    if (const std::string path = Path("generation_config.json"); Exists(path)) {
      DSLA_ASSIGN_OR_RETURN(const std::string generation, ReadTextFile(path, kMaxConfigBytes));
      DSLA_RETURN_IF_ERROR(MergeGenerationConfig(generation, path, &config_));
    }
    DSLA_RETURN_IF_ERROR(ReadChatTemplate());
    return ReadTensors();
  }

  std::string DirectoryName() const {
    std::string path = path_;
    while (path.size() > 1 && path.back() == '/') path.pop_back();
    return path.substr(path.find_last_of('/') + 1);
  }

  // chat_template.jinja wins, as in transformers; tokenizer_config.json has a string or a list of
  // named templates, of which "default" is the one for plain chat and "tool_use" the one with
  // tools.
  Status ReadChatTemplate() {
    if (const std::string path = Path("chat_template.jinja"); Exists(path)) {
      DSLA_ASSIGN_OR_RETURN(chat_template_, ReadTextFile(path, kMaxConfigBytes));
      return Status::Ok();
    }
    const std::string path = Path("tokenizer_config.json");
    if (!Exists(path)) return Status::Ok();
    DSLA_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxConfigBytes));
    DSLA_ASSIGN_OR_RETURN(const json object, ParseJson(text, path));
    const auto it = object.find("chat_template");
    if (it == object.end() || it->is_null()) return Status::Ok();
    if (it->is_string()) {
      chat_template_ = it->get<std::string>();
      return Status::Ok();
    }
    if (!it->is_array()) return DataLoss("'{}': chat_template is not a string", path);
    for (const json& entry : *it) {
      if (!entry.is_object() || !entry.contains("name") || !entry.contains("template") ||
          !entry["name"].is_string() || !entry["template"].is_string()) {
        return DataLoss("'{}': an entry of chat_template has no name and template", path);
      }
      if (entry["name"] == "default") chat_template_ = entry["template"].get<std::string>();
      if (entry["name"] == "tool_use") tool_chat_template_ = entry["template"].get<std::string>();
    }
    return Status::Ok();
  }

  Status ReadTensors() {
    if (const std::string single = Path("model.safetensors"); Exists(single)) {
      DSLA_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(single));
      files_.push_back(std::move(file));
    } else if (const std::string index = Path("model.safetensors.index.json"); Exists(index)) {
      DSLA_RETURN_IF_ERROR(OpenShards(index));
    } else {
      return NotFound("'{}': no model.safetensors and no model.safetensors.index.json", path_);
    }
    std::vector<StoredTensor> stored;
    for (const SafetensorsFile& file : files_) {
      for (const SafetensorsTensor& tensor : file.tensors()) {
        const auto type = StorageTypeFromSafetensors(tensor.dtype);
        if (!type) {
          return Unsupported("'{}': tensor '{}' is {} (supported: F32, F16, BF16)", file.path(),
                             Printable(tensor.name), tensor.dtype);
        }
        stored.push_back({tensor.name, tensor.shape, *type, tensor.data});
      }
    }
    return Bind(
        std::move(stored), [](const std::string& name) { return name; },
        [this](const StoredTensor& tensor) { return Ignored(tensor); });
  }

  // Copies of what the config says already.
  bool Ignored(const StoredTensor& tensor) const {
    if (EndsWith(tensor.name, ".rotary_emb.inv_freq")) return true;
    return config_.tied_embeddings && tensor.name == "lm_head.weight" &&
           tensor.shape == std::vector<int64_t>{config_.V, config_.C};
  }

  Status OpenShards(const std::string& index_path) {
    DSLA_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(index_path, kMaxIndexBytes));
    DSLA_ASSIGN_OR_RETURN(const json index, ParseJson(text, index_path));
    const auto map = index.find("weight_map");
    if (map == index.end() || !map->is_object()) {
      return DataLoss("'{}': no weight_map", index_path);
    }
    std::map<std::string, std::set<std::string>> shards;  // file -> tensors
    for (const auto& item : map->items()) {
      const std::string file = item.value().is_string() ? item.value().get<std::string>() : "";
      if (!IsPlainFileName(file)) {
        return DataLoss("'{}': tensor '{}' is in '{}', which is not the name of a file beside it",
                        index_path, Printable(item.key()), Printable(file));
      }
      shards[file].insert(item.key());
    }
    for (auto& [name, tensors] : shards) {
      DSLA_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(Path(name)));
      for (const SafetensorsTensor& tensor : file.tensors()) {
        if (tensors.erase(tensor.name) == 0) {
          return DataLoss("'{}': tensor '{}' is not listed in the index for this file", file.path(),
                          Printable(tensor.name));
        }
      }
      if (!tensors.empty()) {
        return DataLoss("'{}': tensor '{}' of the index is missing", file.path(),
                        Printable(*tensors.begin()));
      }
      files_.push_back(std::move(file));
    }
    return Status::Ok();
  }

  std::vector<SafetensorsFile> files_;
};

}  // namespace

Expected<std::unique_ptr<ModelFile>> OpenHfModel(const std::string& directory) {
  return HfModel::Open(directory);
}

}  // namespace dsla
