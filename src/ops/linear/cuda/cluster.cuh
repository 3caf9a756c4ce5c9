// Blocks of a cluster (compute capability 9.0) read one another's shared memory. Elsewhere a block
// is alone.
#pragma once

#include <cstdint>

namespace dsla::cuda {

// Waits for all threads of the cluster, and what they wrote to shared memory is seen.
__device__ __forceinline__ void SyncCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
#endif
}

// Waits until no thread of the cluster reads another block's shared memory any more, which ends
// with its block. It orders no writes, which would wait for those to global memory.
__device__ __forceinline__ void LeaveCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.relaxed;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
#endif
}

// What block `rank` of the cluster has at the address that is `shared` here.
__device__ __forceinline__ float4 LoadFromBlock(uint32_t shared, int rank) {
  float4 x{};
#if __CUDA_ARCH__ >= 900
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(there)
               : "memory");
#endif
  return x;
}

}  // namespace dsla::cuda
