// dsla inspect: what a model or adapter holds, its ladder, and what a sequence costs in memory at
// each level.
#include <fmt/ranges.h>

#include <cstdio>
#include <nlohmann/json.hpp>
#include <numeric>

#include "cli/commands.h"
#include "cli/model_args.h"
#include "engine/prompt.h"
#include "eval/cost.h"

namespace dsla {
namespace {

struct InspectArgs {
  ModelArgs model;
  std::string path;
  bool tensors = false;
  bool json = false;
};

// Bytes of one sequence's cache at one level.
struct LevelMemory {
  int level;
  int64_t per_token;  // that grows with the context
  int64_t fixed;      // states, windows and sinks
};

struct Inspection {
  const ModelFile* file = nullptr;
  std::shared_ptr<const Adapter> adapter;
  std::string fingerprint;
  int64_t parameters = 0, stored_bytes = 0;
  std::string chat_template;  // name, or why there is none
  std::vector<LevelMemory> levels;
  std::vector<int64_t> slot_bytes;  // by layer
  std::vector<int64_t> break_even;  // by layer, tokens
  int64_t kv_token = 0;             // bytes of one token in one softmax layer
};

Inspection Inspect(const ModelFile& file, std::shared_ptr<const Adapter> adapter, DType kv_dtype) {
  Inspection result;
  result.file = &file;
  result.adapter = std::move(adapter);
  const ModelConfig& c = file.config();
  for (const TensorInfo& tensor : file.tensors()) {
    result.parameters +=
        std::accumulate(tensor.shape.begin(), tensor.shape.end(), int64_t{1}, std::multiplies<>());
    result.stored_bytes += tensor.bytes;
  }
  if (file.chat_template().empty()) {
    result.chat_template = "none";
  } else {
    const auto chosen = ChoosePromptTemplate(file.chat_template());
    result.chat_template = chosen.ok() ? NameOf(*chosen) : "cannot be evaluated";
  }
  result.kv_token = 2 * c.Hkv * KvRowBytes(kv_dtype, c.D);
  result.levels.push_back({0, c.L * result.kv_token, 0});
  if (result.adapter == nullptr) return result;
  const BoundAdapter bound = BindAdapter(c, *result.adapter, WeightFormat::kBF16, kv_dtype);
  for (const DslaLayer& layer : bound.layers) {
    result.slot_bytes.push_back(MakeSlotLayout(layer.shape).bytes);
    result.break_even.push_back((result.slot_bytes.back() + result.kv_token - 1) / result.kv_token);
  }
  int64_t fixed = 0;
  for (int rank = 0; rank < c.L; ++rank) {
    fixed += result.slot_bytes[result.adapter->ladder[rank]];
    result.levels.push_back({rank + 1, (c.L - rank - 1) * result.kv_token, fixed});
  }
  return result;
}

nlohmann::json ToJson(const Inspection& inspection, bool tensors) {
  const ModelConfig& c = inspection.file->config();
  nlohmann::json json = {{"path", inspection.file->path()},
                         {"format", inspection.file->format()},
                         {"name", c.name},
                         {"architecture", c.architecture},
                         {"parameters", inspection.parameters},
                         {"stored_bytes", inspection.stored_bytes},
                         {"fingerprint", inspection.fingerprint},
                         {"layers", c.L},
                         {"width", c.C},
                         {"query_heads", c.H},
                         {"kv_heads", c.Hkv},
                         {"head_dim", c.D},
                         {"ffn", c.ffn},
                         {"vocabulary", c.V},
                         {"context", c.max_position},
                         {"sliding_window", c.sliding_window},
                         {"tied_embeddings", c.tied_embeddings},
                         {"chat_template", inspection.chat_template}};
  for (const auto& [name, value] : c.sampling.Given()) json["sampling"][name] = value;
  if (inspection.adapter != nullptr) {
    const Adapter& adapter = *inspection.adapter;
    json["adapter"] = {{"id", adapter.id},
                       {"base_name", adapter.base_name},
                       {"base_fingerprint", adapter.base_fingerprint},
                       {"ladder", adapter.ladder},
                       {"top_level", adapter.top_level},
                       {"break_even_tokens", inspection.break_even}};
  }
  for (const LevelMemory& level : inspection.levels) {
    json["levels"].push_back({{"level", level.level},
                              {"bytes_per_token", level.per_token},
                              {"fixed_bytes", level.fixed}});
  }
  if (tensors) {
    for (const TensorInfo& tensor : inspection.file->tensors()) {
      json["tensors"].push_back({{"name", tensor.name},
                                 {"shape", tensor.shape},
                                 {"type", tensor.type},
                                 {"bytes", tensor.bytes}});
    }
  }
  return json;
}

void PrintModel(const Inspection& inspection) {
  const ModelConfig& c = inspection.file->config();
  std::map<std::string, int> types;
  for (const TensorInfo& tensor : inspection.file->tensors()) ++types[tensor.type];
  std::string type_list;
  for (const auto& [type, count] : types)
    type_list += fmt::format("{}{} {}", type_list.empty() ? "" : ", ", count, type);
  fmt::print("model          {}\n", c.name);
  fmt::print("file           {} ({}, {})\n", inspection.file->path(), inspection.file->format(),
             FormatBytes(inspection.stored_bytes));
  fmt::print(
      "architecture   {}: {} layers, width {}, {} query heads and {} KV heads of {}, MLP {}\n",
      c.architecture, c.L, c.C, c.H, c.Hkv, c.D, c.ffn);
  fmt::print("parameters     {:.1f} M in {} tensors ({}){}\n",
             static_cast<double>(inspection.parameters) / 1e6, inspection.file->tensors().size(),
             type_list, c.tied_embeddings ? ", embeddings tied" : "");
  fmt::print("vocabulary     {}; context {} tokens{}\n", c.V, c.max_position,
             c.sliding_window > 0 ? fmt::format(", sliding window {}", c.sliding_window) : "");
  fmt::print("chat template  {}\n", inspection.chat_template);
  std::string sampling;
  for (const auto& [name, value] : c.sampling.Given())
    sampling += fmt::format("{}{} {:.6g}", sampling.empty() ? "" : ", ", name, value);
  fmt::print("sampling       {}\n", sampling.empty() ? "no advice" : sampling);
  fmt::print("fingerprint    {}\n", inspection.fingerprint);
}

void PrintAdapter(const Inspection& inspection) {
  const Adapter& adapter = *inspection.adapter;
  const AdapterLayer& first = adapter.layers.front();
  fmt::print("\nadapter        {} for {}\n", adapter.id, adapter.base_name);
  fmt::print(
      "layers as DSLA {} state(s) of {} features, window {}, sinks {}, low-rank deltas of rank "
      "{}\n",
      first.states, first.features, first.window, first.sinks, first.rank);
  fmt::print("ladder         {}\n", fmt::join(adapter.ladder, " "));
  fmt::print("top level      {} of {} (tier economy)\n", adapter.top_level, adapter.ladder.size());
  const auto [low, high] =
      std::minmax_element(inspection.break_even.begin(), inspection.break_even.end());
  fmt::print("break-even     a converted layer is smaller than its KV cache from {} tokens on\n",
             *low == *high ? fmt::format("{}", *low) : fmt::format("{} to {}", *low, *high));
}

void PrintMemory(const Inspection& inspection, const std::string& kv) {
  const int context = inspection.file->config().max_position;
  fmt::print("\ncache of one sequence ({}; whole pages come on top)\n", kv);
  fmt::print("level   per token       fixed   at 1024   at {:<6}  of level 0\n", context);
  const int64_t base = inspection.levels.front().per_token * context;
  std::vector<int> shown = {0};
  const int L = static_cast<int>(inspection.levels.size()) - 1;
  for (int quarter = 1; quarter <= 4; ++quarter) shown.push_back(L * quarter / 4);
  if (inspection.adapter != nullptr) shown.push_back(inspection.adapter->top_level);
  std::sort(shown.begin(), shown.end());
  shown.erase(std::unique(shown.begin(), shown.end()), shown.end());
  for (const int level : shown) {
    const LevelMemory& row = inspection.levels[level];
    const int64_t full = row.fixed + row.per_token * context;
    fmt::print("{:5} {:>11} {:>11} {:>9} {:>10}  {:>8.0f}%\n", level, FormatBytes(row.per_token),
               FormatBytes(row.fixed), FormatBytes(row.fixed + row.per_token * 1024),
               FormatBytes(full), 100.0 * static_cast<double>(full) / static_cast<double>(base));
  }
}

Status Inspect(InspectArgs args) {
  // A safetensors file by itself is an adapter; everything else is a model.
  if (args.path.ends_with(".safetensors")) {
    args.model.adapter = args.path;
  } else if (!args.path.empty()) {
    args.model.model = args.path;
  }
  std::string path = args.model.model;
  if (path.empty()) {
    DSLA_ASSIGN_OR_RETURN(path, DefaultModelPath());
  }
  DSLA_ASSIGN_OR_RETURN(const DType kv_type, ParseKvType(args.model.kv));
  DSLA_ASSIGN_OR_RETURN(const auto file, ModelFile::Open(path));
  DSLA_ASSIGN_OR_RETURN(auto adapter, OpenAdapter(args.model, *file));
  Inspection inspection = Inspect(*file, std::move(adapter), kv_type);
  DSLA_ASSIGN_OR_RETURN(inspection.fingerprint, file->Fingerprint());
  if (args.json) {
    fmt::print("{}\n", ToJson(inspection, args.tensors).dump(2));
    return Status::Ok();
  }
  PrintModel(inspection);
  if (inspection.adapter != nullptr) PrintAdapter(inspection);
  PrintMemory(inspection, args.model.kv);
  if (args.tensors) {
    fmt::print("\n");
    for (const TensorInfo& tensor : file->tensors()) {
      fmt::print("{:<48} {:<6} [{}]\n", tensor.name, tensor.type, fmt::join(tensor.shape, ", "));
    }
  }
  return Status::Ok();
}

}  // namespace

void AddInspect(CLI::App& app, Command& chosen) {
  auto args = std::make_shared<InspectArgs>();
  CLI::App& command = *app.add_subcommand(
      "inspect", "show what a model or adapter holds and what each level costs in memory");
  command.footer(
      "Examples:\n"
      "  dsla inspect                            (the default model and its adapter)\n"
      "  dsla inspect models/smollm2-135m-instruct.dsla.safetensors\n"
      "  dsla inspect llama.gguf --tensors");
  const auto group = "Inspect";
  command
      .add_option("PATH", args->path,
                  "a model (GGUF file or directory), or an adapter (.safetensors)")
      ->group(group);
  command.add_flag("--tensors", args->tensors, "list every tensor")->group(group);
  command.add_flag("--json", args->json, "print one JSON object")->group(group);
  const auto model = "Model";
  command
      .add_option("-m,--model", args->model.model,
                  "the model that an adapter PATH belongs to [default: SmolLM2-135M-Instruct]")
      ->type_name("PATH")
      ->group(model);
  command
      .add_option(
          "-a,--adapter", args->model.adapter,
          "adapter file, or 'none' [default: the shipped one, where it belongs to the model]")
      ->type_name("PATH")
      ->group(model);
  command.add_option("--kv", args->model.kv, kKvHelp)
      ->type_name("TYPE")
      ->capture_default_str()
      ->group(model);
  command.callback([args, &chosen] {
    chosen = [args] {
      const Status status = Inspect(*args);
      return status.ok() ? 0 : Fail(status);
    };
  });
}

}  // namespace dsla
