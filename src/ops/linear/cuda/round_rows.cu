// Rows of bf16 to e4m3. A block has a row, which it reads twice, the second time from a cache.
#include <cuda_fp8.h>

#include "base/check.h"
#include "ops/dsla/cuda/common.cuh"
#include "ops/linear/cuda/linear_cuda.h"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kLargest = 448;     // of e4m3
constexpr float kNothing = 1e-30f;  // an inverse of what is smaller may be infinite

struct RoundParams {
  const uint4* x;
  int64_t stride;  // of 8 numbers, as the pieces
  uint2* to;
  float* scale;
  int pieces;
};

__device__ __forceinline__ uint32_t Largest(uint32_t pair, uint32_t most) {
  const __nv_bfloat162 x = __habs2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  const __nv_bfloat162 y = __hmax2(x, *reinterpret_cast<const __nv_bfloat162*>(&most));
  return *reinterpret_cast<const uint32_t*>(&y);
}
__device__ __forceinline__ uint32_t Rounded(uint32_t low, uint32_t high, float inverse) {
  const auto two = [&](uint32_t pair) -> uint32_t {
    return __nv_cvt_float2_to_fp8x2({Low(pair) * inverse, High(pair) * inverse}, __NV_SATFINITE,
                                    __NV_E4M3);
  };
  return __byte_perm(two(low), two(high), 0x5140);
}

__global__ void __launch_bounds__(kThreads) RoundRowsKernel(RoundParams p) {
  AllowNext();
  AwaitPrevious();
  const uint4* const from = p.x + blockIdx.x * p.stride;
  uint32_t most = 0;
  for (int i = threadIdx.x; i < p.pieces; i += kThreads) {
    const uint4 x = from[i];
    most = Largest(x.w, Largest(x.z, Largest(x.y, Largest(x.x, most))));
  }
  __shared__ float of_warp[kThreads / 32];
  const int lane = threadIdx.x % 32;
  float largest = WarpMax(fmaxf(Low(most), High(most)));
  if (lane == 0) of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
  largest = WarpMax(of_warp[lane % (kThreads / 32)]);
  const float inverse = largest > kNothing ? kLargest / largest : 0;
  uint2* const to = p.to + static_cast<int64_t>(blockIdx.x) * p.pieces;
  for (int i = threadIdx.x; i < p.pieces; i += kThreads) {
    const uint4 x = from[i];
    to[RoundedPlace(8 * i) / 8] = {Rounded(x.x, x.y, inverse), Rounded(x.z, x.w, inverse)};
  }
  if (threadIdx.x == 0) p.scale[blockIdx.x] = largest / kLargest;
}

bool Aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

int RoundRows(const RoundRowsArgs& a, Stream stream) {
  DSLA_CHECK(a.T >= 0 && a.in > 0 && a.in % kRoundedInputs == 0 && a.x_stride % 8 == 0);
  if (a.T == 0) return cudaSuccess;
  DSLA_CHECK(a.x && a.to && a.scale && Aligned16(a.x) && Aligned16(a.to));
  const RoundParams p{static_cast<const uint4*>(a.x), a.x_stride / 8, static_cast<uint2*>(a.to),
                      a.scale, a.in / 8};
  StartEarly(RoundRowsKernel, dim3(static_cast<unsigned>(a.T)), kThreads, p, stream);
  return cudaGetLastError();
}

}  // namespace dsla::cuda
