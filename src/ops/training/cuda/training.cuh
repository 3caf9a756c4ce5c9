// What the training kernels share: pairs of bf16, a row of features.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "base/check.h"
#include "ops/dsla/cuda/mma.cuh"
#include "ops/training/training_cuda.h"

namespace dsla::cuda {

inline constexpr int kC = kTrainingChunk;

__device__ __forceinline__ float2 LoadPair(const __nv_bfloat16* at) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(at));
}
__device__ __forceinline__ float2 LoadPair(const float* at) {
  return *reinterpret_cast<const float2*>(at);
}
__device__ __forceinline__ void StorePair(__nv_bfloat16* at, float2 x) {
  *reinterpret_cast<__nv_bfloat162*>(at) = __float22bfloat162_rn(x);
}
__device__ __forceinline__ void StorePair(float* at, float2 x) {
  *reinterpret_cast<float2*>(at) = x;
}
__device__ __forceinline__ float2 operator+(float2 x, float2 y) { return {x.x + y.x, x.y + y.y}; }
__device__ __forceinline__ float2 operator-(float2 x, float2 y) { return {x.x - y.x, x.y - y.y}; }
__device__ __forceinline__ float2 operator*(float2 x, float2 y) { return {x.x * y.x, x.y * y.y}; }
__device__ __forceinline__ float2 operator*(float x, float2 y) { return {x * y.x, x * y.y}; }
__device__ __forceinline__ float2 ExpPair(float2 x) { return {__expf(x.x), __expf(x.y)}; }

// The warp's number, as a value that the compiler knows to be the same in all of its lanes.
__device__ __forceinline__ int UniformWarp() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
}

// A warp's row of D numbers: lane l holds pairs 2 l + 64 i.
template <int D>
inline constexpr int kPairs = D / 64;
__device__ __forceinline__ int PairAt(int i) { return 2 * (threadIdx.x % 32) + 64 * i; }

inline int Launched() { return static_cast<int>(cudaGetLastError()); }

// More dynamic shared memory than a kernel has by default has to be asked for.
template <typename Kernel>
void AllowShared(Kernel kernel, int bytes) {
  if (bytes > 48 * 1024)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

int TrainingPrepare(const TrainingPrepareArgs&, Stream);
int TrainingScan(const TrainingScanArgs&, Stream);
int TrainingCausal(const TrainingCausalArgs&, Stream);
int TrainingMerge(const TrainingMergeArgs&, Stream);
int TrainingMergeBackward(const TrainingMergeBackwardArgs&, Stream);
int TrainingScanBackward(const TrainingScanBackwardArgs&, Stream);
int TrainingGradients(const TrainingGradientArgs&, Stream);
int TrainingRope(const TrainingRopeArgs&, Stream);
int TrainingSwiGlu(const TrainingSwiGluArgs&, Stream);
int TrainingSwiGluBackward(const TrainingSwiGluArgs&, Stream);
int TrainingKl(const TrainingKlArgs&, Stream);
int TrainingErrorSums(const TrainingErrorArgs&, Stream);
int TrainingErrorGradient(const TrainingErrorArgs&, Stream);

}  // namespace dsla::cuda
