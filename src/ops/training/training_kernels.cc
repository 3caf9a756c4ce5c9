#include "ops/training/training_kernels.h"

#include "base/shared_library.h"

namespace dsla {

const cuda::TrainingKernels* TrainingKernels() {
  static const cuda::TrainingKernels* const kernels = [] {
    const auto function = LibraryFunction("libdsla_cuda.so", cuda::kTrainingKernelsSymbol);
    using Get = const cuda::TrainingKernels* (*)();
    return function.ok() ? reinterpret_cast<Get>(*function)() : nullptr;
  }();
  return kernels;
}

}  // namespace dsla
