// What every sub-command that runs a model shares: the options that say which model, and what is
// loaded from them.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/exec.h"
#include "base/status.h"
#include "cache/cache_pool.h"
#include "cli/device_choice.h"
#include "format/adapter.h"
#include "format/chat/chat_template.h"
#include "format/model_file.h"
#include "format/tokenizer/tokenizer.h"
#include "model/hybrid_model.h"

namespace dsla {

struct ModelArgs {
  std::string model;    // empty: the default model
  std::string adapter;  // empty: the shipped adapter where it fits; "none": no adapter
  std::string weights = "auto";
  std::string kv = "bf16";
  int context = 0;     // 0: the model's
  std::string memory;  // cache budget, such as 512M; empty: one sequence of the whole context
  int threads = 0;     // 0: all cores
  std::string device = "auto";
  std::string simd = "auto";
  bool random_weights = false;  // `model` is a config.json

  void AddTo(CLI::App& app);
};

// A model ready to run. Members are in the order in which they depend on each other; replicas share
// what they can.
struct LoadedModel {
  std::shared_ptr<ModelFile> file;
  std::shared_ptr<Tokenizer> tokenizer;
  std::shared_ptr<HybridModel> model;
  std::unique_ptr<Workspace> workspace;
  ExecContext ctx;
  int64_t memory_bytes = 0;  // cache budget
  double load_seconds = 0;

  std::string where() const;  // "cuda:0 (NVIDIA H100 80GB HBM3)" or "2 threads"
  Expected<CachePool> NewPool() const {
    return CachePool::Create(model->cache_geometry(), memory_bytes, model->memory());
  }
};

// The value of --kv: fp32, bf16 or int8.
inline constexpr const char* kKvHelp = "how cached K and V are held: bf16, fp32 or int8";
Expected<DType> ParseKvType(const std::string& value);

// `sequences`: how many full contexts the default cache budget is for; `step_rows`: the largest
// step that will be run. kResourceExhausted where --memory asks for more than a device has beside
// it.
Expected<LoadedModel> LoadModel(const ModelArgs& args, int sequences = 1, int step_rows = 512,
                                const DeviceOpener& open = OpenDevice);

// A model for each of several engines. args.device may name several GPUs (device_choice.h): then
// they are loaded side by side, from one file and in one format; `replicas` is their number or 0.
// On the CPU `replicas` (0: one) share the model, and args.threads. All have the same memory_bytes:
// of a GPU what --memory says or the least that is to be had, of the CPU all that they are to
// share.
Expected<std::vector<LoadedModel>> LoadReplicas(const ModelArgs& args, int replicas, int sequences,
                                                int step_rows,
                                                const DeviceOpener& open = OpenDevice);

// The model and adapter that are used when none is named: in the project's .venv and models/, found
// from the binary's place.
Expected<std::string> DefaultModelPath();
std::string ShippedAdapterPath();

// The adapter that `args` mean for `file`: a named one must fit; the shipped one is taken where its
// fingerprint fits. Null: none. The model that LoadModel loads keeps its own form of it alone.
Expected<std::shared_ptr<const Adapter>> OpenAdapter(const ModelArgs& args, const ModelFile& file);

// "512M", "2G", "1.5GiB", "65536" -> bytes. Powers of 1024.
Expected<int64_t> ParseBytes(const std::string& text);
std::string FormatBytes(int64_t bytes);

// Prints the status's one line to standard error and returns the exit code for it: 2 for what the
// caller can mend.
int Fail(const Status& status);

}  // namespace dsla
