#include "format/text_file.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/mapped_file.h"

namespace dsla {

Status ForEachText(const std::string& path, const TextVisitor& visit) {
  DSLA_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  const std::string_view all(reinterpret_cast<const char*>(file.bytes().data()),
                             file.bytes().size());
  if (!path.ends_with(".jsonl")) return visit(all, fmt::format("'{}'", path)).status();
  int64_t line_number = 0;
  for (size_t begin = 0; begin < all.size();) {
    const size_t end = std::min(all.find('\n', begin), all.size());
    const std::string_view line = all.substr(begin, end - begin);
    begin = end + 1;
    ++line_number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    const std::string where = fmt::format("'{}' line {}", path, line_number);
    if (!json.is_object() || !json.contains("text") || !json["text"].is_string())
      return DataLoss("{}: not a JSON object with a string \"text\"", where);
    DSLA_ASSIGN_OR_RETURN(const bool more,
                          visit(json["text"].get_ref<const std::string&>(), where));
    if (!more) break;
  }
  return Status::Ok();
}

}  // namespace dsla
