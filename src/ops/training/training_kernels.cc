#include "ops/training/training_kernels.h"

#include <dlfcn.h>

#include <filesystem>

namespace dsla {
namespace {

namespace fs = std::filesystem;
constexpr char kLibrary[] = "libdsla_cuda.so";

void* Open() {
  std::error_code error;
  fs::path folder = fs::read_symlink("/proc/self/exe", error).parent_path();
  // Beside the program, or, for a program of the build tree, where the build leaves it.
  for (; folder.has_relative_path(); folder = folder.parent_path()) {
    for (const fs::path& place : {folder / kLibrary, folder / "src/ops/cuda" / kLibrary})
      if (fs::exists(place, error)) return ::dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  return ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
}

}  // namespace

const cuda::TrainingKernels* TrainingKernels() {
  static const cuda::TrainingKernels* const kernels = [] {
    void* const library = Open();  // stays loaded
    using Get = const cuda::TrainingKernels* (*)();
    const auto get = library == nullptr
                         ? nullptr
                         : reinterpret_cast<Get>(::dlsym(library, cuda::kTrainingKernelsSymbol));
    return get == nullptr ? nullptr : get();
  }();
  return kernels;
}

}  // namespace dsla
