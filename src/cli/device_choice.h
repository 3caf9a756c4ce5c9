// Which device a model is loaded on, and in which weights, as the options say.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "format/config.h"
#include "model/device.h"

namespace dsla {

struct DeviceWish {
  std::string device;                          // auto, cpu, cuda, cuda:N
  WeightFormat weights = WeightFormat::kBF16;  // as small as keeps what the file holds, or named
  bool chooses_weights = false;                // --weights auto: bf16 is as good
};

using DeviceOpener = std::function<Expected<std::shared_ptr<Device>>(const std::string& name)>;

// How that is done.
struct DeviceSteps {
  DeviceOpener open;  // OpenDevice
  // Loads the model; null: on the CPU.
  std::function<Status(const std::shared_ptr<Device>& device, WeightFormat weights)> load;
  std::function<void(const std::string& line)> say;  // why not the device that comes first
};

// With `auto` the first GPU that the model can be loaded on, by number, or the CPU.
Status LoadOnDevice(const DeviceWish& wish, const ModelConfig& config, const DeviceSteps& steps);

// Whether --device means several devices, or as many as there are: "cuda:0,cuda:1", "cuda:all".
bool NamesSeveralDevices(const std::string& device);
// Those, each once and in the order given.
Expected<std::vector<std::shared_ptr<Device>>> OpenDevices(const std::string& device,
                                                           const DeviceOpener& open);

// What a device is, whichever of its kind: "NVIDIA H200" of "cuda:1 (NVIDIA H200)".
std::string KindOf(const Device& device);

// Whether the cache that --memory asks for, `given` as it was written, is there beside what the
// device holds and the `step_bytes` that its steps will take.
Status CheckCacheMemory(const Device& device, int64_t step_bytes, const std::string& given,
                        int64_t bytes);

}  // namespace dsla
