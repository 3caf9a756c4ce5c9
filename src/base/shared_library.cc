#include "base/shared_library.h"

#include <dlfcn.h>

#include <algorithm>
#include <filesystem>

namespace dsla {
namespace {

namespace fs = std::filesystem;

bool IsBelow(const fs::path& path, const fs::path& folder) {
  return std::mismatch(folder.begin(), folder.end(), path.begin(), path.end()).first ==
         folder.end();
}

}  // namespace

std::string BesideProgram(const std::string& name) {
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error).parent_path();
  const fs::path build_folder = fs::weakly_canonical(DSLA_BINARY_DIR, error);  // as the former
  if (fs::exists(program / name, error)) return program / name;
  // Tests and benchmarks lie in folders below it.
  if (IsBelow(program, build_folder) && fs::exists(build_folder / name, error))
    return build_folder / name;
  return name;
}

Expected<void*> LibraryFunction(const std::string& library, const char* function) {
  void* const handle = ::dlopen(BesideProgram(library).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr)
    return Error(StatusCode::kUnavailable,
                 "'{}', which belongs beside the program, cannot be loaded: {}", library,
                 ::dlerror());
  void* const address = ::dlsym(handle, function);
  if (address == nullptr)
    return Error(StatusCode::kUnavailable, "'{}' has no {}: it is not of this build", library,
                 function);
  return address;
}

}  // namespace dsla
