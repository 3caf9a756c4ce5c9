// Finds the kernels of training_cuda.h.
#pragma once

#include "ops/training/training_cuda.h"

namespace dsla {

// The table of libdsla_cuda.so, which lies beside the program or where the system looks; null where
// it is not there, as in a build without a CUDA toolkit. Looked for once; thread-safe.
const cuda::TrainingKernels* TrainingKernels();

}  // namespace dsla
