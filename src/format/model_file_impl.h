// What the two kinds of model files share; only model_file*.cc include it.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "format/dequant.h"
#include "format/gguf.h"
#include "format/model_file.h"

namespace dsla {

// A tensor as a file has it.
struct StoredTensor {
  std::string name;  // the file's own
  std::vector<int64_t> shape;
  StorageType type;
  std::span<const std::byte> data;
};

class StoredModel : public ModelFile {
 public:
  const ModelConfig& config() const override { return config_; }
  const std::string& path() const override { return path_; }
  const std::vector<TensorInfo>& tensors() const override { return infos_; }
  const TensorInfo* FindTensor(const std::string& name) const override;
  Status ReadRows(const std::string& name, int64_t begin, int64_t end,
                  std::span<float> out) const override;
  Expected<std::string> Fingerprint() const override;
  void ReleasePages() const override;
  std::string chat_template() const override { return chat_template_; }
  std::string tool_chat_template() const override {
    return tool_chat_template_.empty() ? chat_template_ : tool_chat_template_;
  }

 protected:
  // Binds every required tensor of config_ to one of `stored`, by name and shape. `file_name` gives
  // the file's name for a canonical one. Whatever is left over and not `ignored` is an error.
  Status Bind(std::vector<StoredTensor> stored,
              const std::function<std::string(const std::string&)>& file_name,
              const std::function<bool(const StoredTensor&)>& ignored);

  // ReadTokenizer's last step: no token may lie outside the embedding.
  Expected<TokenizerData> CheckTokenizer(Expected<TokenizerData> data) const;

  // Rows of q and k are stored in GGUF's order for the architecture "llama".
  bool permuted_qk_ = false;
  std::string path_;
  ModelConfig config_;
  std::string chat_template_, tool_chat_template_;

 private:
  struct Bound {
    StoredTensor stored;
    int heads = 0;  // > 0: rows are permuted within each of these heads
  };

  std::vector<TensorInfo> infos_;  // canonical order
  std::vector<Bound> bound_;       // the same order
  std::unordered_map<std::string, size_t> index_;
  mutable std::once_flag fingerprint_once_;
  mutable std::string fingerprint_;
};

Expected<std::unique_ptr<ModelFile>> OpenGgufModel(const std::string& path);
Expected<std::unique_ptr<ModelFile>> MakeGgufModel(GgufFile gguf);
Expected<std::unique_ptr<ModelFile>> OpenHfModel(const std::string& directory);

}  // namespace dsla
