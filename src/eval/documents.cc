#include "eval/documents.h"

#include <nlohmann/json.hpp>

#include "base/mapped_file.h"

namespace dsla {
namespace {

// The document's tokens if it is long enough, cut to max_tokens.
Status AddDocument(std::string_view text, const Tokenizer& tokenizer,
                   const DocumentOptions& options, std::vector<std::vector<int32_t>>& documents) {
  DSLA_ASSIGN_OR_RETURN(std::vector<int32_t> ids,
                        tokenizer.Encode(text, {.add_bos = false, .parse_special = false}));
  if (static_cast<int64_t>(ids.size()) < options.min_tokens) return Status::Ok();
  if (options.max_tokens > 0 && static_cast<int64_t>(ids.size()) > options.max_tokens)
    ids.resize(options.max_tokens);
  documents.push_back(std::move(ids));
  return Status::Ok();
}

}  // namespace

Expected<std::vector<std::vector<int32_t>>> ReadDocuments(const std::string& path,
                                                          const Tokenizer& tokenizer,
                                                          const DocumentOptions& options) {
  DSLA_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  const std::string_view all(reinterpret_cast<const char*>(file.bytes().data()),
                             file.bytes().size());
  std::vector<std::vector<int32_t>> documents;
  const auto full = [&] {
    return options.max_docs > 0 && static_cast<int>(documents.size()) >= options.max_docs;
  };
  if (!path.ends_with(".jsonl")) {
    DSLA_RETURN_IF_ERROR(AddDocument(all, tokenizer, options, documents));
  } else {
    int line_number = 0;
    for (size_t begin = 0; begin < all.size() && !full();) {
      const size_t end = std::min(all.find('\n', begin), all.size());
      const std::string_view line = all.substr(begin, end - begin);
      begin = end + 1;
      ++line_number;
      if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
      const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
      if (!json.is_object() || !json.contains("text") || !json["text"].is_string()) {
        return DataLoss("'{}' line {}: not a JSON object with a string \"text\"", path,
                        line_number);
      }
      DSLA_RETURN_IF_ERROR(
          AddDocument(json["text"].get_ref<const std::string&>(), tokenizer, options, documents));
    }
  }
  if (documents.empty()) {
    return InvalidArgument("'{}' has no document of at least {} tokens", path, options.min_tokens);
  }
  return documents;
}

}  // namespace dsla
