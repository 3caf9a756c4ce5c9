#include "cli/serve_cost.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "base/files.h"
#include "cli/cost_file.h"
#include "eval/calibrate.h"

namespace dsla {
namespace {

namespace fs = std::filesystem;

// What the times depend on, besides the machine.
Expected<std::string> MeasuredWith(const LoadedModel& loaded) {
  DSLA_ASSIGN_OR_RETURN(const std::string fingerprint, loaded.file->Fingerprint());
  const ModelOptions& options = loaded.model->options();
  const AdapterInfo* adapter = loaded.model->adapter();
  return fmt::format("model {}, adapter {}, weights {}, cache {}, {}", fingerprint,
                     adapter != nullptr ? adapter->id : "none", Name(options.weights),
                     Name(options.kv_dtype), loaded.where());
}

std::string ProcessorName() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(std::min(line.find(':'), line.size()));
  }
  return "";
}

// Kernels, in the program and in the libraries beside it, change without the version while they are
// worked on.
std::string BuildOfProgram(const std::string& version) {
  std::string build = "dsla " + version;
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  for (const char* name : {"", "libdsla_cuda.so", "libdsla_gemm.so"}) {
    const fs::path file = *name == 0 ? program : program.parent_path() / name;
    if (!fs::exists(file, error)) continue;
    build += fmt::format(" {}@{}", fs::file_size(file, error),
                         fs::last_write_time(file, error).time_since_epoch().count());
  }
  return build;
}

CalibrateOptions LimitsOf(const LoadedModel& loaded, const CostOptions& options) {
  return {.memory_bytes = loaded.memory_bytes, .top_level = options.top_level};
}

Expected<CostModel> Measure(const LoadedModel& loaded, const CostOptions& options) {
  return Calibrate(loaded.ctx, *loaded.model, LimitsOf(loaded, options));
}

Status Named(const Status& status) {
  return Status(status.code(), fmt::format("--cost-model: {}", status.message()));
}

Expected<ServeCost> NamedCost(const LoadedModel& loaded, const CostOptions& options) {
  CostFile file{.path = options.file};
  DSLA_ASSIGN_OR_RETURN(file.measured_with, MeasuredWith(loaded));
  auto read = file.Read();
  if (read.ok()) return ServeCost{.model = std::move(*read), .file = file.path};
  if (read.status().code() == StatusCode::kInvalidArgument)
    return InvalidArgument("--cost-model: {}; remove it to measure anew", read.status().message());
  if (read.status().code() != StatusCode::kNotFound) return Named(read.status());
  if (const Status status = file.CheckWritable(); !status.ok()) return Named(status);
  DSLA_ASSIGN_OR_RETURN(CostModel model, Measure(loaded, options));
  if (const Status status = file.Write(model); !status.ok()) return Named(status);
  return ServeCost{.model = std::move(model), .measured = true, .file = file.path};
}

Expected<ServeCost> KeptCost(const LoadedModel& loaded, const CostOptions& options) {
  CostFile file;
  DSLA_ASSIGN_OR_RETURN(const std::string with, MeasuredWith(loaded));
  file.measured_with =
      fmt::format("{}, levels to {}, contexts to {}, simd {}, processor{}, {}", with,
                  options.top_level, LongestContext(*loaded.model, LimitsOf(loaded, options)),
                  options.simd, ProcessorName(), BuildOfProgram(options.version));
  file.path = KeptCostPath(file.measured_with, [](const char* name) { return std::getenv(name); });
  ServeCost cost;
  if (!file.path.empty()) {
    auto read = file.Read();
    if (read.ok()) return ServeCost{.model = std::move(*read), .file = file.path};
    if (read.status().code() != StatusCode::kNotFound) cost.problem = read.status().message();
  }
  DSLA_ASSIGN_OR_RETURN(cost.model, Measure(loaded, options));
  cost.measured = true;
  if (file.path.empty()) {
    cost.problem = "not kept: neither XDG_CACHE_HOME nor HOME is an absolute path";
    return cost;
  }
  Status kept = MakeDirectories(fs::path(file.path).parent_path());
  if (kept.ok()) kept = file.Write(cost.model);
  if (kept.ok()) {
    cost.file = file.path;
  } else {
    cost.problem = kept.message();
  }
  return cost;
}

}  // namespace

Expected<ServeCost> CostForServing(const LoadedModel& loaded, const CostOptions& options) {
  if (!options.file.empty()) return NamedCost(loaded, options);
  if (options.keep) return KeptCost(loaded, options);
  DSLA_ASSIGN_OR_RETURN(CostModel model, Measure(loaded, options));
  return ServeCost{.model = std::move(model), .measured = true};
}

}  // namespace dsla
