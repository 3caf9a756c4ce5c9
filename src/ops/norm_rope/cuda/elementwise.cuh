// Arithmetic on a quad: 4 consecutive channels of a row, 16 bytes of fp32 or 8 of bf16.
#pragma once

#include "ops/dsla/cuda/mma.cuh"

namespace dsla::cuda {

__device__ __forceinline__ float4 Widen(uint2 x) {
  return {Low(x.x), High(x.x), Low(x.y), High(x.y)};
}
__device__ __forceinline__ uint2 Round(float4 x) { return {Pack(x.x, x.y), Pack(x.z, x.w)}; }
__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}
__device__ __forceinline__ float4 operator*(float4 a, float4 b) {
  return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w};
}

__device__ __forceinline__ float SiluTimes(float gate, float up) {
  return __fdividef(gate, 1 + Exp(-gate)) * up;
}
__device__ __forceinline__ float4 SiluTimes(float4 gate, float4 up) {
  return {SiluTimes(gate.x, up.x), SiluTimes(gate.y, up.y), SiluTimes(gate.z, up.z),
          SiluTimes(gate.w, up.w)};
}

}  // namespace dsla::cuda
