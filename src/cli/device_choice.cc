#include "cli/device_choice.h"

#include <algorithm>

namespace dsla {
namespace {

// Bf16 is faster on most devices; where it does not fit, fewer bits may.
Status Load(const DeviceWish& wish, const ModelConfig& config, const DeviceSteps& steps,
            const std::shared_ptr<Device>& device) {
  const bool in_bf16 = wish.chooses_weights && wish.weights != WeightFormat::kBF16 &&
                       !device->Prefers(config, wish.weights);
  if (!in_bf16) return steps.load(device, wish.weights);
  const Status status = steps.load(device, WeightFormat::kBF16);
  if (status.code() != StatusCode::kResourceExhausted) return status;
  return steps.load(device, wish.weights);
}

// Whether another device may be better.
bool IsOfDevice(const Status& status) {
  switch (status.code()) {
    case StatusCode::kUnsupported:
    case StatusCode::kResourceExhausted:
    case StatusCode::kUnavailable:
    case StatusCode::kInternal:
      return true;
    default:
      return false;
  }
}

Status LoadOnAny(const DeviceWish& wish, const ModelConfig& config, const DeviceSteps& steps) {
  std::string passed_over;
  const auto tell = [&](const std::string& where) {
    if (!passed_over.empty()) steps.say(fmt::format("{}; running on {}", passed_over, where));
  };
  for (int index = 0;; ++index) {
    const auto device = steps.open(fmt::format("cuda:{}", index));
    if (device.status().code() == StatusCode::kNotFound) break;
    const Status status = device.ok() ? Load(wish, config, steps, *device) : device.status();
    if (status.ok()) tell((*device)->name());
    if (!IsOfDevice(status)) return status;
    passed_over += fmt::format("{}{}", passed_over.empty() ? "" : "; ", status.message());
  }
  if (wish.weights == WeightFormat::kFp8) {
    return Unsupported("--weights fp8 takes a GPU of compute capability 9.0: {}",
                       passed_over.empty() ? "there is no GPU" : passed_over);
  }
  tell("the CPU");
  return steps.load(nullptr, wish.weights);
}

}  // namespace

Status LoadOnDevice(const DeviceWish& wish, const ModelConfig& config, const DeviceSteps& steps) {
  if (wish.device == "cpu") return steps.load(nullptr, wish.weights);
  if (wish.device == "auto") return LoadOnAny(wish, config, steps);
  const auto device = steps.open(wish.device);
  if (device.ok()) return Load(wish, config, steps, *device);
  return Status(device.status().code(),
                fmt::format("--device {}: {}", wish.device, device.status().message()));
}

Status CheckCacheMemory(const Device& device, int64_t step_bytes, const std::string& given,
                        int64_t bytes) {
  const int64_t free = std::max<int64_t>(0, device.free_bytes() - step_bytes);
  if (bytes <= free) return Status::Ok();
  return ResourceExhausted(
      "--memory: {} are {} bytes, and {} are free on {} beside the weights and what steps take",
      given, bytes, free, device.name());
}

}  // namespace dsla
