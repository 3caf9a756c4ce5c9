#include "cli/device_choice.h"

#include <algorithm>
#include <set>

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

constexpr std::string_view kAll = "cuda:all";

Status OfDeviceOption(const std::string& device, const Status& status) {
  return Status(status.code(), fmt::format("--device {}: {}", device, status.message()));
}

Expected<std::vector<std::shared_ptr<Device>>> OpenAll(const DeviceOpener& open) {
  std::vector<std::shared_ptr<Device>> devices;
  while (true) {
    auto device = open(fmt::format("cuda:{}", devices.size()));
    if (device.status().code() == StatusCode::kNotFound && !devices.empty()) return devices;
    if (!device.ok()) return OfDeviceOption(std::string(kAll), device.status());
    devices.push_back(*std::move(device));
  }
}

std::vector<std::string> SplitAtCommas(const std::string& text) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
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
  return OfDeviceOption(wish.device, device.status());
}

bool NamesSeveralDevices(const std::string& device) {
  return device == kAll || device.find(',') != std::string::npos;
}

Expected<std::vector<std::shared_ptr<Device>>> OpenDevices(const std::string& device,
                                                           const DeviceOpener& open) {
  if (device == kAll) return OpenAll(open);
  std::vector<std::shared_ptr<Device>> devices;
  std::set<std::string> names;
  const std::vector<std::string> parts = SplitAtCommas(device);
  for (const std::string& part : parts) {
    if (!part.starts_with("cuda:") || part == kAll)
      return InvalidArgument("--device {}: '{}' is not one of several GPUs, cuda:N", device, part);
  }
  for (const std::string& part : parts) {
    auto opened = open(part);
    if (!opened.ok()) return OfDeviceOption(part, opened.status());
    if (!names.insert((*opened)->name()).second)
      return InvalidArgument("--device {}: has {} twice", device, part);
    devices.push_back(*std::move(opened));
  }
  return devices;
}

std::string KindOf(const Device& device) {
  const std::string& name = device.name();
  const size_t begin = name.find('('), end = name.rfind(')');
  if (begin == std::string::npos || end == std::string::npos || end < begin) return name;
  return name.substr(begin + 1, end - begin - 1);
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
