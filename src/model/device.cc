#include "model/device.h"

#include <dlfcn.h>

#include <charconv>

#include "base/shared_library.h"

namespace dsla {

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
    return NotFound("no NVIDIA driver: {}", ::dlerror());
  const auto open = LibraryFunction("libdsla_cuda_model.so", "DslaOpenCudaDevice");
  if (!open.ok()) return NotFound("{}", open.status().message());
  std::shared_ptr<Device> device;
  Status status;
  reinterpret_cast<void (*)(int, std::shared_ptr<Device>*, Status*)> (*open)(index, &device,
                                                                             &status);
  if (!status.ok()) return status;
  return device;
}

}  // namespace dsla
