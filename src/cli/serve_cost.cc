#include "cli/serve_cost.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/mapped_file.h"
#include "eval/calibrate.h"
#include "format/json.h"

namespace dsla {
namespace {

constexpr size_t kMaxFileBytes = 1 << 20;
constexpr int kMaxDepth = 4;

// What the times depend on, besides the machine.
Expected<std::string> MeasuredWith(const LoadedModel& loaded) {
  DSLA_ASSIGN_OR_RETURN(const std::string fingerprint, loaded.file->Fingerprint());
  const ModelOptions& options = loaded.model->options();
  const AdapterInfo* adapter = loaded.model->adapter();
  return fmt::format("model {}, adapter {}, weights {}, cache {}, {}", fingerprint,
                     adapter != nullptr ? adapter->id : "none", Name(options.weights),
                     Name(options.kv_dtype), loaded.where());
}

Expected<CostModel> ReadCost(const std::string& path, const std::string& with) {
  DSLA_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxFileBytes));
  DSLA_ASSIGN_OR_RETURN(const nlohmann::json json, ParseJson(text, path, kMaxDepth));
  const auto measured = json.is_object() ? json.find("measured_with") : json.end();
  if (measured == json.end() || !measured->is_string() || !json.contains("cost_model"))
    return DataLoss("--cost-model: '{}' is not a file that dsla serve wrote", path);
  if (*measured != with) {
    return InvalidArgument(
        "--cost-model: '{}' was measured with {}, which is not what is served: {}; remove it to "
        "measure anew",
        path, Printable(measured->get<std::string>()), with);
  }
  auto model = CostModel::FromJson(json["cost_model"].dump());
  if (!model.ok()) return DataLoss("--cost-model: '{}': {}", path, model.status().message());
  return model;
}

std::string PartOf(const std::string& path) { return path + ".part"; }

Status CannotWrite(const std::string& path, const std::string& why) {
  return InvalidArgument("--cost-model: cannot write '{}': {}", path, why);
}

// Said before the time that measuring takes.
Status CheckWritable(const std::string& path) {
  const bool opened = std::ofstream(PartOf(path)).is_open();
  if (!opened) return CannotWrite(path, std::strerror(errno));
  std::error_code error;
  std::filesystem::remove(PartOf(path), error);
  return Status::Ok();
}

// Whole or not at all: a server that is started beside this one may read it.
Status WriteCost(const CostModel& model, const std::string& with, const std::string& path) {
  const nlohmann::json json{{"measured_with", with},
                            {"cost_model", nlohmann::json::parse(model.ToJson())}};
  const std::string temporary = PartOf(path);
  std::ofstream file(temporary);
  file << json.dump(1) << '\n';
  file.close();
  std::error_code error;
  if (file.good()) std::filesystem::rename(temporary, path, error);
  if (file.good() && !error) return Status::Ok();
  const std::string why = error ? error.message() : std::strerror(errno);
  std::filesystem::remove(temporary, error);
  return CannotWrite(path, why);
}

}  // namespace

Expected<ServeCost> CostForServing(const LoadedModel& loaded, int top_level,
                                   const std::string& path) {
  std::string with;
  if (!path.empty()) {
    DSLA_ASSIGN_OR_RETURN(with, MeasuredWith(loaded));
    std::error_code error;
    if (std::filesystem::exists(path, error)) {
      DSLA_ASSIGN_OR_RETURN(CostModel model, ReadCost(path, with));
      return ServeCost{.model = std::move(model), .measured = false};
    }
    DSLA_RETURN_IF_ERROR(CheckWritable(path));
  }
  DSLA_ASSIGN_OR_RETURN(CostModel model,
                        Calibrate(loaded.ctx, *loaded.model,
                                  {.memory_bytes = loaded.memory_bytes, .top_level = top_level}));
  if (!path.empty()) DSLA_RETURN_IF_ERROR(WriteCost(model, with, path));
  return ServeCost{.model = std::move(model), .measured = true};
}

}  // namespace dsla
