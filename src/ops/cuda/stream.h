// What the headers of all CUDA operators share. They can be included without a CUDA toolkit.
//
// Conventions of these operators: every pointer in an argument struct is a device pointer unless it
// is named host_*. Activations are bf16, statistics and residual sums fp32. Everything is enqueued
// on `stream`; nothing is allocated, nothing waits; results are run-to-run identical. A broken
// argument is our own bug and aborts (DSLA_CHECK); what the CUDA runtime reports at a launch is
// returned as the value of its cudaError_t, 0 being success.
#pragma once

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dsla::cuda {

using Stream = CUstream_st*;

#define DSLA_CUDA_EXPORT __attribute__((visibility("default")))

}  // namespace dsla::cuda
