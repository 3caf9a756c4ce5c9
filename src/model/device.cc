#include "model/device.h"

#include <dlfcn.h>

#include <charconv>
#include <filesystem>

namespace dsla {
namespace {

namespace fs = std::filesystem;
constexpr char kCudaLibrary[] = "libdsla_cuda_model.so";

// Beside the program, where the build and an installation leave it; else where the system looks.
void* OpenCudaLibrary() {
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error).parent_path();
  const fs::path places[] = {program / kCudaLibrary, program / "src/model/cuda" / kCudaLibrary};
  for (const fs::path& place : places) {
    if (fs::exists(place, error)) return ::dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  return ::dlopen(kCudaLibrary, RTLD_NOW | RTLD_LOCAL);
}

}  // namespace

Expected<std::shared_ptr<Device>> OpenDevice(const std::string& name) {
  constexpr std::string_view kCuda = "cuda";
  int index = 0;
  std::string_view rest = name;
  bool known = rest.starts_with(kCuda);
  if (known) {
    rest.remove_prefix(kCuda.size());
    if (!rest.empty()) {
      const char* end = rest.data() + rest.size();
      const auto [stop, code] = std::from_chars(rest.data() + 1, end, index);
      known = rest[0] == ':' && code == std::errc() && stop == end && index >= 0;
    }
  }
  if (!known) return InvalidArgument("not one of auto, cpu, cuda, cuda:N");
  // First what is there only with a GPU: our own part brings libraries of half a gigabyte along.
  if (::dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL) == nullptr)
    return Error(StatusCode::kUnavailable, "no NVIDIA driver: {}", ::dlerror());
  void* library = OpenCudaLibrary();  // stays loaded
  if (library == nullptr) {
    return Error(StatusCode::kUnavailable, "the CUDA part cannot be loaded: {}", ::dlerror());
  }
  using Open = void (*)(int, std::shared_ptr<Device>*, Status*);
  const auto open = reinterpret_cast<Open>(::dlsym(library, "DslaOpenCudaDevice"));
  if (open == nullptr) {
    return Error(StatusCode::kUnavailable, "'{}' is not of this build", kCudaLibrary);
  }
  std::shared_ptr<Device> device;
  Status status;
  open(index, &device, &status);
  if (!status.ok()) return status;
  return device;
}

}  // namespace dsla
