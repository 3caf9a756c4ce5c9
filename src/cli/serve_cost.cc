#include "cli/serve_cost.h"

#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>

#include "base/files.h"
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

Expected<MeasuredCost> Measure(const LoadedModel& loaded, const CostOptions& options) {
  DSLA_ASSIGN_OR_RETURN(CostModel model,
                        Calibrate(loaded.ctx, *loaded.model, LimitsOf(loaded, options)));
  return MeasuredCost{.model = std::move(model),
                      .usual = {},
                      .measured_at = std::time(nullptr),
                      .source = CostSource::kMeasured};
}

ServeCost Taken(CostFile file, CostRecord record, CostSource source) {
  record.cost.source = source;
  return {.cost = std::move(record.cost),
          .file = std::move(file),
          .named = source == CostSource::kFile};
}

Status Named(const Status& status) {
  return Status(status.code(), fmt::format("--cost-model: {}", status.message()));
}

Expected<ServeCost> NamedCost(const LoadedModel& loaded, const CostOptions& options) {
  CostFile file{.path = options.file};
  DSLA_ASSIGN_OR_RETURN(file.measured_with, MeasuredWith(loaded));
  auto read = file.Read();
  if (read.ok()) return Taken(file, *std::move(read), CostSource::kFile);
  if (read.status().code() == StatusCode::kInvalidArgument)
    return InvalidArgument("--cost-model: {}; remove it to measure anew", read.status().message());
  if (read.status().code() != StatusCode::kNotFound) return Named(read.status());
  if (const Status status = file.CheckWritable(); !status.ok()) return Named(status);
  DSLA_ASSIGN_OR_RETURN(MeasuredCost cost, Measure(loaded, options));
  if (const Status status = file.Write({.cost = cost}); !status.ok()) return Named(status);
  return ServeCost{.cost = std::move(cost), .file = file, .named = true};
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
  Expected<CostRecord> before = file.Read();
  if (before.ok() && !before->doubted) return Taken(file, *std::move(before), CostSource::kKept);
  if (before.ok()) {
    cost.problem = fmt::format("measured anew: steps took other times than '{}' says", file.path);
  } else if (before.status().code() != StatusCode::kNotFound) {
    cost.problem = before.status().message();
  }
  DSLA_ASSIGN_OR_RETURN(cost.cost, Measure(loaded, options));
  if (before.ok())
    cost.cost.usual = FactorsBy(cost.cost.model, before->cost.model, *before->doubted);
  if (file.path.empty()) {
    cost.problem = "not kept: neither XDG_CACHE_HOME nor HOME is an absolute path";
    return cost;
  }
  Status kept = MakeDirectories(fs::path(file.path).parent_path());
  if (kept.ok()) kept = file.Write({.cost = cost.cost});
  if (kept.ok()) {
    cost.file = std::move(file);
  } else {
    cost.problem = kept.message();
  }
  return cost;
}

}  // namespace

Expected<ServeCost> CostForServing(const LoadedModel& loaded, const CostOptions& options) {
  if (!options.file.empty()) return NamedCost(loaded, options);
  if (options.keep) return KeptCost(loaded, options);
  DSLA_ASSIGN_OR_RETURN(MeasuredCost cost, Measure(loaded, options));
  return ServeCost{.cost = std::move(cost)};
}

std::string DoubtCost(const ServeCost& cost, const CostFactors& factors) {
  if (cost.file.path.empty()) return "another start measures anew";
  if (cost.named) return fmt::format("remove '{}' to measure anew", cost.file.path);
  const Status status = cost.file.Doubt(cost.cost.model, factors);
  if (status.ok())
    return fmt::format("the next start measures anew what '{}' says", cost.file.path);
  return fmt::format("{}; remove it to measure anew", status.message());
}

}  // namespace dsla
