#include "cli/cost_file.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/mapped_file.h"
#include "format/json.h"
#include "format/sha256.h"

namespace dsla {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxFileBytes = 1 << 20;
constexpr int kMaxDepth = 4;

}  // namespace

Expected<CostModel> CostFile::Read() const {
  std::error_code error;
  if (!fs::exists(path, error)) return NotFound("there is no '{}'", path);
  DSLA_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxFileBytes));
  DSLA_ASSIGN_OR_RETURN(const nlohmann::json json, ParseJson(text, path, kMaxDepth));
  const auto with = json.is_object() ? json.find("measured_with") : json.end();
  if (with == json.end() || !with->is_string() || !json.contains("cost_model"))
    return DataLoss("'{}' is not a file that dsla serve wrote", path);
  if (*with != measured_with) {
    return InvalidArgument("'{}' was measured with {}, which is not what is served: {}", path,
                           Printable(with->get<std::string>()), measured_with);
  }
  auto model = CostModel::FromJson(json["cost_model"].dump());
  if (!model.ok()) return DataLoss("'{}': {}", path, model.status().message());
  return model;
}

Status CostFile::CheckWritable() const {
  const std::string part = path + ".part";
  const bool opened = std::ofstream(part).is_open();
  if (!opened) return InvalidArgument("cannot write '{}': {}", path, std::strerror(errno));
  std::error_code error;
  fs::remove(part, error);
  return Status::Ok();
}

Status CostFile::Write(const CostModel& model) const {
  const nlohmann::json json{{"measured_with", measured_with},
                            {"cost_model", nlohmann::json::parse(model.ToJson())}};
  return WriteFileAtomically(path, json.dump(1) + "\n");
}

std::string KeptCostPath(const std::string& measured_with,
                         const std::function<const char*(const char*)>& environment) {
  const auto folder = [&](const char* name) {
    const char* value = environment(name);
    const fs::path path = value != nullptr ? value : "";
    return path.is_absolute() ? path : fs::path();
  };
  fs::path cache = folder("XDG_CACHE_HOME");
  if (cache.empty() && !folder("HOME").empty()) cache = folder("HOME") / ".cache";
  if (cache.empty()) return "";
  Sha256 hash;
  hash.Update(measured_with);
  return cache / "dsla" / fmt::format("cost-{}.json", hash.HexDigest().substr(0, 16));
}

}  // namespace dsla
