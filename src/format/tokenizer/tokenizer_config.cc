#include "format/tokenizer/json_reader.h"
#include "format/tokenizer/tokenizer_data.h"
#include "format/tokenizer/vocabulary.h"

namespace dsla {
namespace {

// A token is written as its text, or as an object with the text and its flags.
Expected<std::optional<int32_t>> FindToken(const JsonObject& config, const char* key,
                                           const TokenizerData& data) {
  Status status;
  const nlohmann::json& value = config.Raw(key);
  if (value.is_null()) return std::optional<int32_t>();
  const std::string text =
      value.is_object() ? config.Object(key).String("content") : config.String(key);
  for (size_t id = 0; id < data.tokens.size(); ++id) {
    if (data.tokens[id] == text) return std::optional<int32_t>(static_cast<int32_t>(id));
  }
  return DataLoss("{}: {} {} is not in the vocabulary", config.where(), key, Quoted(text));
}

}  // namespace

Status ApplyTokenizerConfig(std::string_view text, const std::string& path_for_messages,
                            TokenizerData* data) {
  DSLA_ASSIGN_OR_RETURN(const nlohmann::json root, ReadJson(text, path_for_messages));
  Status status;
  const JsonObject config(root, path_for_messages, &status);
  for (const auto& [key, id] :
       {std::pair{"bos_token", &data->bos_id}, std::pair{"eos_token", &data->eos_id},
        std::pair{"pad_token", &data->pad_id}}) {
    auto found = FindToken(config, key, *data);
    DSLA_RETURN_IF_ERROR(status);
    if (!found.ok()) return found.status();
    if (*found) *id = *found;
  }
  // Of the classes in use, Llama's alone lets these two flags overrule what tokenizer.json says.
  const std::string tokenizer_class = config.String("tokenizer_class", "");
  if (tokenizer_class.starts_with("LlamaTokenizer")) {
    if (config.Has("add_bos_token") && data->bos_id) {
      data->prefix.clear();
      if (config.Bool("add_bos_token", false)) data->prefix.push_back(*data->bos_id);
    }
    if (config.Has("add_eos_token") && data->eos_id) {
      data->suffix.clear();
      if (config.Bool("add_eos_token", false)) data->suffix.push_back(*data->eos_id);
    }
  }
  return status;
}

}  // namespace dsla
