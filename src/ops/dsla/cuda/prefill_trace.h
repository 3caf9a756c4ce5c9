// A look into the chunked form for benchmarks: a function that is called after each launch.
#pragma once

#include "ops/cuda/stream.h"

namespace dsla::cuda {

using LaunchTrace = void (*)(const char* kernel, Stream stream, void* context);

// For Prefill and Fold on this thread; null for none. Not for a stream that is being captured.
DSLA_CUDA_EXPORT void SetLaunchTrace(LaunchTrace trace, void* context);

void Trace(const char* kernel, Stream stream);

}  // namespace dsla::cuda
