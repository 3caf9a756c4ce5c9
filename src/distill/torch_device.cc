#include "distill/torch_device.h"

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <dlfcn.h>

#include <charconv>
#include <filesystem>

namespace dsla::distill {
namespace {

// Null if libtorch's CUDA part is loaded, else why not.
Status LoadCudaPart(const std::string& name) {
  Dl_info cpu_part{};
  if (::dladdr(reinterpret_cast<void*>(&at::globalContext), &cpu_part) == 0)
    return Error(StatusCode::kUnavailable, "device '{}': libtorch's folder is unknown", name);
  const auto folder = std::filesystem::path(cpu_part.dli_fname).parent_path();
  // Never closed: the operators that it registers must stay.
  if (::dlopen((folder / "libtorch_cuda.so").c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr)
    return Error(StatusCode::kUnavailable, "device '{}': no CUDA part of libtorch ({})", name,
                 ::dlerror());
  return Status::Ok();
}

}  // namespace

Expected<c10::Device> OpenDevice(const std::string& name) {
  if (name == "cpu") return c10::Device(c10::kCPU);
  int index = 0;
  bool known = name == "cuda";
  if (name.starts_with("cuda:")) {
    const char* const end = name.data() + name.size();
    const auto [rest, error] = std::from_chars(name.data() + 5, end, index);
    known = error == std::errc() && rest == end && index >= 0 && index < 128;
  }
  if (!known) return InvalidArgument("device '{}' is not one of cpu, cuda, cuda:N", name);
  DSLA_RETURN_IF_ERROR(LoadCudaPart(name));
  const int devices = at::hasCUDA() ? static_cast<int>(at::getNumGPUs()) : 0;
  if (index >= devices)
    return Error(StatusCode::kUnavailable, "device '{}': there are {} GPUs", name, devices);
  at::globalContext().lazyInitDevice(c10::kCUDA);
  at::globalContext().setAllowBF16ReductionCuBLAS(false);  // bf16 products sum in fp32
  return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index));
}

int64_t FreeMemory(c10::Device device) {
  return static_cast<int64_t>(at::accelerator::getMemoryInfo(device.index()).first);
}

}  // namespace dsla::distill
