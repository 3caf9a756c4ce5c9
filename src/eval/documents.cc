#include "eval/documents.h"

#include "format/text_file.h"

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
  std::vector<std::vector<int32_t>> documents;
  DSLA_RETURN_IF_ERROR(
      ForEachText(path, [&](std::string_view text, const std::string&) -> Expected<bool> {
        DSLA_RETURN_IF_ERROR(AddDocument(text, tokenizer, options, documents));
        return options.max_docs <= 0 || static_cast<int>(documents.size()) < options.max_docs;
      }));
  if (documents.empty()) {
    return InvalidArgument("'{}' has no document of at least {} tokens", path, options.min_tokens);
  }
  return documents;
}

}  // namespace dsla
