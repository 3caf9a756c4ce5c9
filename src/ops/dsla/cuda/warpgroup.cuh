// Products of a warpgroup: 64 rows, 16 of them each warp's, with tiles in shared memory.
// Instructions of compute capability 9.0 (`wgmma`) where the code is for that alone, `mma`
// elsewhere.
//
// A tile of n rows lies as panels of 64 columns, one behind the other; a panel's rows are 128 bytes
// in the order of Swizzle<8>, which is the 128-byte swizzle of wgmma's descriptors. So a panel
// begins at a multiple of 1024 bytes. Accumulators and A operands have mma's layout, warp by warp.
#pragma once

#include "ops/dsla/cuda/mma.cuh"

namespace dsla::cuda {

// What was written to registers comes before the products that follow, and what is read of them or
// written to them again after those that came before: the compiler knows of no asynchronous use.
template <int n>
__device__ __forceinline__ void Pin(float (&x)[n][4]) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#pragma unroll
  for (int i = 0; i < n; ++i)
    asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
#endif
}
template <int n>
__device__ __forceinline__ void Pin(uint32_t (&x)[n][4]) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#pragma unroll
  for (int i = 0; i < n; ++i)
    asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])::"memory");
#endif
}

// Products between Begin and Commit are one group; Wait leaves at most `pending` groups under way.
__device__ __forceinline__ void BeginProducts() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void CommitProducts() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int pending>
__device__ __forceinline__ void WaitProducts() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#endif
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Of a part of a panel that begins so many bytes after an address: 16 columns (keys as B, queries
// as A) or 16 rows (values as B). Eight rows of 128 bytes, swizzled, and the next eight behind
// them; the other stride would be one between panels.
__device__ __forceinline__ uint64_t PanelDescriptor(uint32_t address, int offset) {
  return uint64_t{1 << 30 | 1024 / 16} << 32 | ((1 << 16) + (address >> 4) + offset / 16);
}

#define DSLA_FOUR(x, i) "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])
#define DSLA_SIXTEEN(x, i) \
  DSLA_FOUR(x, i), DSLA_FOUR(x, i + 1), DSLA_FOUR(x, i + 2), DSLA_FOUR(x, i + 3)

// 16 columns of the rows of `a` with as many of the rows of `b`.
__device__ __forceinline__ void WarpgroupMma(float (&c)[8][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
      "%9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
      "%27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n}"
      : DSLA_SIXTEEN(c, 0), DSLA_SIXTEEN(c, 4)
      : "l"(a), "l"(b));
}
__device__ __forceinline__ void WarpgroupMma(float (&c)[2][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, "
      "%9, p, 1, 1, 0, 0;\n}"
      : DSLA_FOUR(c, 0), DSLA_FOUR(c, 1)
      : "l"(a), "l"(b));
}
__device__ __forceinline__ void WarpgroupMma(float (&c)[4][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
      "%9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0;\n}"
      : DSLA_SIXTEEN(c, 0)
      : "l"(a), "l"(b));
}
// A in registers with 16 rows of `b`.
__device__ __forceinline__ void WarpgroupMma(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
      "%9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
      "%27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
      : DSLA_SIXTEEN(c, 0), DSLA_SIXTEEN(c, 4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef DSLA_SIXTEEN
#undef DSLA_FOUR

#endif

// A warp's finished copies are seen by the products of the warpgroups that it then meets.
__device__ __forceinline__ void PublishCopies() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// scores += q k^T: a tile of 64 rows, and kKeys rows from a multiple of 8 on of a tile of kRows.
// Between Begin and Commit; the scores are there after Wait.
template <int D, int kKeys, int kRows>
__device__ __forceinline__ void AddScores(float (&scores)[kKeys / 8][4], uint32_t q, uint32_t k) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#pragma unroll
  for (int c = 0; c < D / 16; ++c)
    WarpgroupMma(scores, PanelDescriptor(q, c / 4 * (64 * 128) + c % 4 * 32),
                 PanelDescriptor(k, c / 4 * (kRows * 128) + c % 4 * 32));
#else
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll 2  // more would have a register for every address
  for (int c = 0; c < D / 16; ++c) {
    uint32_t a[4];
    LoadMatrix(a, q + c / 4 * (64 * 128) +
                      16 * Swizzle<8>(16 * warp + lane % 16, 2 * (c % 4) + lane / 16));
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      uint32_t b[4];
      LoadMatrix(
          b, k + c / 4 * (kRows * 128) +
                 16 * Swizzle<8>(16 * j + lane % 8 + lane / 16 * 8, 2 * (c % 4) + lane / 8 % 2));
      Mma(scores[2 * j], a, b[0], b[1]);
      Mma(scores[2 * j + 1], a, b[2], b[3]);
    }
  }
#endif
}

// scores = q k^T, with such tiles.
template <int D, int kKeys, int kRows>
__device__ __forceinline__ void ScoreKeys(float (&scores)[kKeys / 8][4], uint32_t q, uint32_t k) {
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[i][j] = 0;
  Pin(scores);
  BeginProducts();
  AddScores<D, kKeys, kRows>(scores, q, k);
  CommitProducts();
  WaitProducts<0>();
  Pin(scores);
}

// acc += weights v, with such rows.
template <int D, int kKeys, int kRows>
__device__ __forceinline__ void AddValues(float (&acc)[D / 64][8][4],
                                          uint32_t (&weights)[kKeys / 16][4], uint32_t v) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#pragma unroll
  for (int panel = 0; panel < D / 64; ++panel) Pin(acc[panel]);
  Pin(weights);
  BeginProducts();
#pragma unroll
  for (int c = 0; c < kKeys / 16; ++c)
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel)
      WarpgroupMma(acc[panel], weights[c],
                   PanelDescriptor(v, panel * (kRows * 128) + c * (16 * 128)));
  CommitProducts();
  WaitProducts<0>();
#pragma unroll
  for (int panel = 0; panel < D / 64; ++panel) Pin(acc[panel]);
  Pin(weights);
#else
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < kKeys / 16; ++c)
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t b[4];
        LoadMatrixTransposed(
            b, v + panel * (kRows * 128) + 16 * Swizzle<8>(16 * c + lane % 16, 2 * j + lane / 16));
        Mma(acc[panel][2 * j], weights[c], b[0], b[1]);
        Mma(acc[panel][2 * j + 1], weights[c], b[2], b[3]);
      }
#endif
}

}  // namespace dsla::cuda
