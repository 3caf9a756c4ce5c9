#include "cli/cost_file.h"

#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/files.h"
#include "base/mapped_file.h"
#include "format/json.h"
#include "format/sha256.h"

namespace dsla {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxFileBytes = 1 << 20;
constexpr int kMaxDepth = 4;
constexpr int64_t kLastSecond = 253402300799;  // of the year 9999, the last that a date can say
constexpr std::pair<const char*, double CostFactors::*> kFactors[] = {
    {"prefill", &CostFactors::prefill},
    {"decode", &CostFactors::decode},
    {"fold", &CostFactors::fold}};

// The measured times by the predicted ones of work can be anything positive.
Expected<CostFactors> FactorsFrom(const nlohmann::json& json, const char* key) {
  CostFactors factors;
  for (const auto& [name, member] : kFactors) {
    const auto it = json.is_object() ? json.find(name) : json.end();
    const double value = it != json.end() && it->is_number() ? it->get<double>() : 0;
    if (!std::isfinite(value) || value <= 0)
      return DataLoss("'{}' has no factor of '{}'", key, name);
    factors.*member = value;
  }
  return factors;
}

nlohmann::json JsonOf(const CostFactors& factors) {
  nlohmann::json json;
  for (const auto& [name, member] : kFactors) json[name] = factors.*member;
  return json;
}

Expected<CostRecord> RecordFrom(const nlohmann::json& json) {
  CostRecord record;
  DSLA_ASSIGN_OR_RETURN(record.cost.model, CostModel::FromJson(json["cost_model"].dump()));
  if (const auto it = json.find("measured_at"); it != json.end()) {
    if (!it->is_number_integer() || *it < 0 || *it > kLastSecond)
      return DataLoss("'measured_at' is not a time in seconds");
    record.cost.measured_at = it->get<int64_t>();
  }
  if (const auto it = json.find("usual"); it != json.end()) {
    DSLA_ASSIGN_OR_RETURN(record.cost.usual, FactorsFrom(*it, "usual"));
  }
  if (const auto it = json.find("doubted"); it != json.end()) {
    DSLA_ASSIGN_OR_RETURN(record.doubted, FactorsFrom(*it, "doubted"));
  }
  return record;
}

}  // namespace

Expected<CostRecord> CostFile::Read() const {
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
  auto record = RecordFrom(json);
  if (!record.ok()) return DataLoss("'{}': {}", path, record.status().message());
  return record;
}

Status CostFile::CheckWritable() const {
  const std::string part = path + ".part";
  const bool opened = std::ofstream(part).is_open();
  if (!opened) return InvalidArgument("cannot write '{}': {}", path, std::strerror(errno));
  std::error_code error;
  fs::remove(part, error);
  return Status::Ok();
}

Status CostFile::Write(const CostRecord& record) const {
  nlohmann::json json{{"measured_with", measured_with},
                      {"measured_at", record.cost.measured_at},
                      {"cost_model", nlohmann::json::parse(record.cost.model.ToJson())},
                      {"usual", JsonOf(record.cost.usual)}};
  if (record.doubted) json["doubted"] = JsonOf(*record.doubted);
  return WriteFileAtomically(path, json.dump(1) + "\n");
}

Status CostFile::Doubt(const CostModel& model, const CostFactors& factors) const {
  auto record = Read();
  if (!record.ok() || record->doubted || record->cost.model.ToJson() != model.ToJson())
    return Status::Ok();
  record->doubted = factors;
  return Write(*record);
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
