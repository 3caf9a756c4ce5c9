// Copies that one lane starts, on compute capability 9.0: of contiguous bytes, or of tiles by a
// tensor map. A barrier in shared memory counts their bytes.
#pragma once

#include <cuda.h>

#include "ops/dsla/cuda/prefill.cuh"
#include "ops/dsla/cuda/warpgroup.cuh"

namespace dsla::cuda {

inline constexpr int kWidth = 128;  // D

// Of `chunks`: where tiles of 64 rows lie, [panel of 64 columns][row][column]: a copy leaves them
// as panels. Rows outside of the whole are zeros.
struct TileMaps {
  CUtensorMap q;               // both panels of a head
  CUtensorMap key, v, window;  // one panel; the window's result lies where the outputs go
  // e^{G-R} of a chunk and KV head: [block of channels][half of them][16 rows][their fragments],
  // where the workspace has the halves of the same rows side by side.
  CUtensorMap growth;
};
struct ChunksParams : PrefillParams {
  TileMaps maps;
};
ChunksParams WithMaps(const PrefillParams& p);

// Of `queries`: D is 64, so a panel is a head of the call's rows.
struct QueriesParams : PrefillParams {
  CUtensorMap q_map, k_map, v_map;
  CUtensorMap key_map, state_map;  // of 64 channels
};
QueriesParams WithHeadMaps(const PrefillParams& p);
// Of rows of D elements one behind the other, or of as many bytes: a tile is a panel of half a
// chunk's, rows in the order of fold.cuh.
CUtensorMap ChunkMapOf(const void* rows, int D);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// For ArriveExpecting by one lane.
__device__ __forceinline__ void InitCopyBarrier(uint64_t& barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(&barrier)) : "memory");
}

// True for one of a warp's lanes, which then starts copies. Not by its number: the compiler knows
// that what one elected lane does is uniform.
__device__ __forceinline__ bool Elect() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(elected)::"memory");
  return elected != 0;
}

// A phase ends when so many bytes have come, too.
__device__ __forceinline__ void Expect(uint64_t& barrier, int bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(&barrier)),
      "r"(bytes)
      : "memory");
}
__device__ __forceinline__ void ArriveExpecting(uint64_t& barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(&barrier)),
      "r"(bytes)
      : "memory");
}
__device__ __forceinline__ void CopyBulk(void* to, const void* from, int bytes, uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(SharedAddress(&barrier))
      : "memory");
}
// From row `row` of panel `panel` on.
__device__ __forceinline__ void CopyTile(void* to, const CUtensorMap& map, int row, int panel,
                                         uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%5, %2, %3}], [%4];" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(row), "r"(panel), "r"(SharedAddress(&barrier)), "r"(0)
      : "memory");
}
// A chunk's rows, from row `row` on, to a tile of so many panels.
template <int kPanels>
__device__ __forceinline__ void CopyChunk(uint4* to, const CUtensorMap& map, int row,
                                          uint64_t& barrier) {
  constexpr int kHalf = kChunk / 2;
#pragma unroll
  for (int i = 0; i < 2 * kPanels; ++i)
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%5, %2, %5, %5, %3}], [%4];" ::"r"(SharedAddress(to + i * (kHalf * 8))),
        "l"(&map), "r"(row + i % 2 * kHalf), "r"(i / 2), "r"(SharedAddress(&barrier)), "r"(0)
        : "memory");
}
__device__ __forceinline__ void CopyGrowth(void* to, const CUtensorMap& map, int block,
                                           uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%4, %4, %4, %2}], [%3];" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(block), "r"(SharedAddress(&barrier)), "r"(0)
      : "memory");
}

#endif

}  // namespace dsla::cuda
