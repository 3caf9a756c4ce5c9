// A device beside the host's CPU that holds a model and runs its steps: what HybridModel hands its
// work to, and what the CUDA part (src/model/cuda, a library of its own that is loaded when it is
// asked for, and calls nothing of the program that is not in a header) implements.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/status.h"
#include "cache/block_memory.h"
#include "format/adapter.h"
#include "format/config.h"
#include "model/placed_rows.h"
#include "ops/dsla/dsla.h"
#include "ops/linear/linear.h"
#include "ops/linear/packed_weight.h"
#include "ops/views.h"

namespace dsla {

// A whole tensor by its canonical name (format/model_file.h) as fp32; called from several threads.
using TensorReader = std::function<Status(const std::string& name, std::span<float> out)>;

// Runs `task` for every number below `tasks`, on several threads.
using ParallelRunner = std::function<void(int64_t tasks, const std::function<void(int64_t)>& task)>;

// PackWeight (ops/linear/packed_weight.h); called from several threads.
using WeightPacker =
    std::function<void(const PackedShape& shape, const float* weight, std::byte* to)>;

// What a device needs to know of a model to hold it.
struct DeviceModelSpec {
  ModelConfig config;
  WeightFormat weights = WeightFormat::kBF16;  // bf16, fp8, or int8 or int4, which `pack` makes
  WeightPacker pack;
  bool also_unpacked = false;       // also in bf16, if there is memory to spare
  const float* rope_cos = nullptr;  // [positions, D/2], on the host
  const float* rope_sin = nullptr;
  int64_t positions = 0;
  const Adapter* adapter = nullptr;  // null: level 0 only
  std::vector<DslaShape> shapes;     // [L] of the adapter's layers
  std::vector<DslaSlotLayout> layouts;
  std::vector<int> rank;  // [L] each layer's place in the ladder
};

// A cache pool as a device's kernels see it.
struct CacheViews {
  PagedKvView pages;
  DslaStateView slots;
};

// Rows whose logits are on the host, or the choices instead of those whose SequenceRows say how to
// choose; one of the two is null. logits: [rows.size(), V], may be changed; both are gone
// afterwards.
using DeviceLogitsVisitor =
    std::function<void(std::span<const LogitsRow> rows, float* logits, const TokenChoice* choices)>;

// Called once in a step, when the device has been told all of it and nothing is known of it yet:
// the time for what the host has to do meanwhile. Empty: nothing.
using LaunchedHook = std::function<void()>;

// What the device itself did wrong, such as an illegal access: it and all that it holds are lost.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A model on a device. Forward and Fold throw std::bad_alloc when its memory is used up, after
// which the step's results are lost but the model can go on, and DeviceError.
class DeviceModel {
 public:
  virtual ~DeviceModel() = default;

  // Runs the rows through all layers and visits the logits that were asked for.
  virtual void Forward(const CacheViews& cache, const PlacedRows& rows,
                       const DeviceLogitsVisitor& visit, const LaunchedHook& launched) = 0;
  // See HybridModel.
  virtual int most_choices() const = 0;
  virtual void Begin(const CacheViews& cache, const PlacedRows& rows) = 0;
  virtual void AwaitNearlyDone(double seconds) = 0;
  virtual void End(std::span<TokenChoice> choices) = 0;
  // Builds `slot` from the sequence's pages of this layer, of which there are some.
  virtual void Fold(const CacheViews& cache, const SequenceCache& sequence, int layer,
                    int32_t slot) = 0;

  // The same weights with another adapter.
  virtual Expected<std::unique_ptr<DeviceModel>> WithAdapter(const DeviceModelSpec& spec) const = 0;
  virtual int64_t weight_bytes(int level) const = 0;  // see HybridModel
  virtual int64_t step_bytes(int64_t rows) const = 0;
};

// What a device can do at best, measured.
struct DeviceLimits {
  double copy_bytes_per_second = 0;  // read and written, of a copy within it
  double gemm_flops = 0;             // of a large product in bf16
};

class Device {
 public:
  virtual ~Device() = default;
  virtual const std::string& name() const = 0;  // "cuda:0 (NVIDIA H100 80GB HBM3)"
  virtual BlockMemory& memory() = 0;
  virtual int64_t free_bytes() const = 0;
  virtual void Synchronize() = 0;  // until all that was begun is done
  virtual DeviceLimits Measure() = 0;
  // Whether weights in this format, of fewer bits than bf16, make steps of few rows faster than
  // bf16 does, and none slower.
  virtual bool Prefers(const ModelConfig&, WeightFormat) const { return false; }
  // kUnsupported if the device has no kernels for the model's dimensions; kResourceExhausted, with
  // the figures, if the weights do not fit.
  virtual Expected<std::unique_ptr<DeviceModel>> Load(const DeviceModelSpec& spec,
                                                      const TensorReader& read,
                                                      const ParallelRunner& parallel) = 0;
};

// "cuda" or "cuda:1". kInvalidArgument if that names no kind of device; kNotFound, with the reason,
// if there is none of that number, or this build has no part for it; kUnsupported or kUnavailable
// if it cannot be used.
Expected<std::shared_ptr<Device>> OpenDevice(const std::string& name);

}  // namespace dsla
