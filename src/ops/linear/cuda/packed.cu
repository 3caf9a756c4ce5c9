// Packed weights to bf16: bound by memory. A warp makes a unit, each lane what mma would take of
// it, 4 times 8 inputs of a feature, so that 4 lanes write 64 bytes side by side.
#include "base/check.h"
#include "ops/dsla/cuda/common.cuh"
#include "ops/linear/cuda/linear_cuda.h"
#include "ops/linear/cuda/packed.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct UnpackParams {
  const std::byte* from;  // of the first of the features
  __nv_bfloat16* to;
  int rows, in, units;  // of a tile
};

template <int bits>
__global__ void __launch_bounds__(kThreads) UnpackKernel(UnpackParams p) {
  constexpr int kPlanes = bits / 4;
  const int unit = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (unit >= p.units) return;
  const int64_t at = static_cast<int64_t>(blockIdx.y) * p.units + unit;
  const std::byte* const from = p.from + at * (kPlanes * kPlaneBytes + kUnitScaleBytes);
  uint4 planes[kPlanes];
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane)
    planes[plane] = __ldcs(reinterpret_cast<const uint4*>(from + plane * kPlaneBytes) + lane);
  const uint4 scales =
      __ldcs(reinterpret_cast<const uint4*>(from + kPlanes * kPlaneBytes) + lane / 4);
#pragma unroll
  for (int place = 0; place < 4; ++place) {
    const int row = blockIdx.y * kUnitFeatures + place % 2 * 8 + lane / 4;
    const int k = unit * kUnitInputs + place / 2 * 32 + lane % 4 * 8;
    uint32_t words[kPlanes];
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) words[plane] = Word(planes[plane], place);
    const float2 scale = Scale(Word(scales, place));
    uint32_t rounded[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 q = Two<bits>(words, i);
      rounded[i] = Pack(fmaf(q.x, scale.x, scale.y), fmaf(q.y, scale.x, scale.y));
    }
    if (row < p.rows && k < p.in)
      *reinterpret_cast<uint4*>(p.to + static_cast<int64_t>(row) * p.in + k) = {
          rounded[0], rounded[1], rounded[2], rounded[3]};
  }
}

}  // namespace

int UnpackWeight(const UnpackArgs& a, Stream stream) {
  const PackedShape shape{.out = a.out, .in = a.in, .bits = a.bits};
  DSLA_CHECK((a.bits == 8 || a.bits == 4) && a.in % 8 == 0 && a.begin % kUnitFeatures == 0);
  DSLA_CHECK(a.begin >= 0 && a.rows > 0 && a.begin + a.rows <= a.out);
  const UnpackParams p{
      static_cast<const std::byte*>(a.weight) + a.begin / kUnitFeatures * shape.tile_bytes(),
      static_cast<__nv_bfloat16*>(a.to), a.rows, a.in, static_cast<int>(shape.units())};
  const dim3 grid(static_cast<unsigned>(CeilDiv(p.units, kWarps)),
                  static_cast<unsigned>(CeilDiv(a.rows, kUnitFeatures)));
  (a.bits == 8 ? UnpackKernel<8> : UnpackKernel<4>)<<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace dsla::cuda
