// What kernels that read packed weights (packed_weight.h) share.
#pragma once

#include <cuda_fp16.h>

#include "ops/dsla/cuda/mma.cuh"
#include "ops/linear/packed_weight.h"

namespace dsla::cuda {

// A group's d and m.
__device__ __forceinline__ float2 Scale(uint32_t dm) {
  return __half22float2(*reinterpret_cast<const __half2*>(&dm));
}

__device__ __forceinline__ uint32_t Word(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// Inputs 2 i and 2 i + 1 of a word of a plane, 128 + q or 2048 + 16 q in bf16: 4 bits under the
// exponent for which they are the last places.
__device__ __forceinline__ uint32_t TwoWithOffset(uint32_t word, int i, int plane) {
  uint32_t two;  // a & b | c, which two constants would keep from being one instruction
  asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;"
      : "=r"(two)
      : "r"(word >> (4 * i)), "r"(plane == 0 ? 0x43004300 : 0x45004500));
  return two;
}
// Numbers 0 and 1, or 2 and 3, of four of e4m3 in RoundRows' order (0, 2, 1, 3), in bf16: of its
// exponent they have the last 4 bits, so they are 2^-120 of what they should be.
__device__ __forceinline__ uint32_t TwoOfE4m3(uint32_t four, int second) {
  const uint32_t high = second ? four : four << 8;
  const uint32_t small = (high & 0x80008000) | (high >> 4 & 0x07F007F0);
  const __nv_bfloat162 two =
      __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&small), __float2bfloat162_rn(0x1p120f));
  return *reinterpret_cast<const uint32_t*>(&two);
}

// The sum of a weight's offsets, and of q's.
template <int bits>
inline constexpr float kOffset = bits == 4 ? 128 : 128 + 2048 + 128;

// q of inputs 2 i and 2 i + 1, of a word of each plane.
template <int bits>
__device__ __forceinline__ float2 Two(const uint32_t (&planes)[bits / 4], int i) {
  const uint32_t low = TwoWithOffset(planes[0], i, 0);
  if constexpr (bits == 4) return {Low(low) - kOffset<4>, High(low) - kOffset<4>};
  const uint32_t high = TwoWithOffset(planes[bits / 4 - 1], i, 1);
  return {Low(low) + (Low(high) - kOffset<8>), High(low) + (High(high) - kOffset<8>)};
}

// Inputs 4 quad to 4 quad + 3 of a feature, in fp32.
template <int bits>
__device__ __forceinline__ float4 PackedQuad(const void* weight, int in, int64_t feature,
                                             int quad) {
  const PackedShape shape{.out = 0, .in = in, .bits = bits};
  const auto* const unit = reinterpret_cast<const uint32_t*>(
      static_cast<const std::byte*>(weight) + feature / kUnitFeatures * shape.tile_bytes() +
      4 * quad / kUnitInputs * shape.unit_bytes());
  const int g = feature % 8, t = quad % 8 / 2;
  const int place = 4 * quad % kUnitInputs / 32 * 2 + feature % kUnitFeatures / 8;
  uint32_t words[bits / 4];
#pragma unroll
  for (int plane = 0; plane < bits / 4; ++plane)
    words[plane] = unit[plane * (kPlaneBytes / 4) + 4 * (4 * g + t) + place];
  const float2 scale = Scale(unit[bits / 4 * (kPlaneBytes / 4) + 4 * g + place]);
  const float2 a = Two<bits>(words, quad % 2 * 2), b = Two<bits>(words, quad % 2 * 2 + 1);
  return {fmaf(a.x, scale.x, scale.y), fmaf(a.y, scale.x, scale.y), fmaf(b.x, scale.x, scale.y),
          fmaf(b.y, scale.x, scale.y)};
}

}  // namespace dsla::cuda
