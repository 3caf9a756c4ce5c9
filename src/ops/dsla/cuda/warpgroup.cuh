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
__device__ __forceinline__ void Pin(uint32_t (&x)[4]) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])::"memory");
#endif
}
template <int n>
__device__ __forceinline__ void Pin(uint32_t (&x)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) Pin(x[i]);
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

__device__ __forceinline__ void EndProducts() {
  CommitProducts();
  WaitProducts<0>();
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Of a part of a panel that begins so many bytes after an address: 16 columns (keys as B, queries
// as A) or 16 rows (values as B). Eight rows of 128 bytes, swizzled, and the next eight behind
// them. Of a transposed operand of more than 64 columns the next panel is so many bytes further.
__device__ __forceinline__ uint64_t PanelDescriptor(uint32_t address, int offset, int panel = 16) {
  return uint64_t{1 << 30 | 1024 / 16} << 32 | ((panel / 16 << 16) + (address >> 4) + offset / 16);
}

#define DSLA_FOUR(x, i) "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])
#define DSLA_SIXTEEN(x, i) \
  DSLA_FOUR(x, i), DSLA_FOUR(x, i + 1), DSLA_FOUR(x, i + 2), DSLA_FOUR(x, i + 3)
#define DSLA_FIRST_FOUR(x, i) "=f"(x[i][0]), "=f"(x[i][1]), "=f"(x[i][2]), "=f"(x[i][3])
#define DSLA_FIRST_SIXTEEN(x, i)                                               \
  DSLA_FIRST_FOUR(x, i), DSLA_FIRST_FOUR(x, i + 1), DSLA_FIRST_FOUR(x, i + 2), \
      DSLA_FIRST_FOUR(x, i + 3)

// 16 columns of the rows of `a` with as many of the rows of `b`; an operand that is transposed lies
// as rows of its inner dimension.
template <int kTransposedA = 0, int kTransposedB = 0>
__device__ __forceinline__ void WarpgroupMma(float (&c)[2][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, %10, %11;\n}"
      : DSLA_FOUR(c, 0), DSLA_FOUR(c, 1)
      : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB));
}
template <int kTransposedA = 0, int kTransposedB = 0>
__device__ __forceinline__ void WarpgroupMma(float (&c)[4][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, "
      "1, %18, %19;\n}"
      : DSLA_SIXTEEN(c, 0)
      : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB));
}
template <int kTransposedA = 0, int kTransposedB = 0>
__device__ __forceinline__ void WarpgroupMma(float (&c)[8][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, %34, "
      "%35;\n}"
      : DSLA_SIXTEEN(c, 0), DSLA_SIXTEEN(c, 4)
      : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB));
}
template <int kTransposedA = 0, int kTransposedB = 0>
__device__ __forceinline__ void WarpgroupMma(float (&c)[9][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35}, %36, "
      "%37, p, 1, 1, %38, %39;\n}"
      : DSLA_SIXTEEN(c, 0), DSLA_SIXTEEN(c, 4), DSLA_FOUR(c, 8)
      : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB));
}
template <int kTransposedA = 0, int kTransposedB = 0>
__device__ __forceinline__ void WarpgroupMma(float (&c)[16][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, "
      "%55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, %66, %67;\n}"
      : DSLA_SIXTEEN(c, 0), DSLA_SIXTEEN(c, 4), DSLA_SIXTEEN(c, 8), DSLA_SIXTEEN(c, 12)
      : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB));
}
template <int kTransposedA = 0, int kTransposedB = 0>
__device__ __forceinline__ void WarpgroupMma(float (&c)[32][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, "
      "%55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, "
      "%73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, "
      "%91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, "
      "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, "
      "%122, %123, %124, %125, %126, %127}, %128, %129, p, 1, 1, %130, %131;\n}"
      : DSLA_SIXTEEN(c, 0), DSLA_SIXTEEN(c, 4), DSLA_SIXTEEN(c, 8), DSLA_SIXTEEN(c, 12),
        DSLA_SIXTEEN(c, 16), DSLA_SIXTEEN(c, 20), DSLA_SIXTEEN(c, 24), DSLA_SIXTEEN(c, 28)
      : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB));
}
// A in registers.
template <int kTransposedB>
__device__ __forceinline__ void WarpgroupMma(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, "
      "%36, p, 1, 1, %37;\n}"
      : DSLA_SIXTEEN(c, 0), DSLA_SIXTEEN(c, 4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposedB));
}
// Three tiles that lie one behind the other.
template <int kTransposedB>
__device__ __forceinline__ void WarpgroupMma(float (&c)[8][4], float (&d)[1][4], float (&e)[8][4],
                                             const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n136k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, "
      "%55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67}, {%68, %69, %70, %71}, "
      "%72, p, 1, 1, %73;\n}"
      : DSLA_SIXTEEN(c, 0), DSLA_SIXTEEN(c, 4), DSLA_FOUR(d, 0), DSLA_SIXTEEN(e, 0),
        DSLA_SIXTEEN(e, 4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposedB));
}
template <int kTransposedB>
__device__ __forceinline__ void WarpgroupMma(float (&c)[16][4], const uint32_t (&a)[4],
                                             uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, "
      "%55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, %69;\n}"
      : DSLA_SIXTEEN(c, 0), DSLA_SIXTEEN(c, 4), DSLA_SIXTEEN(c, 8), DSLA_SIXTEEN(c, 12)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposedB));
}
// Operands of fp16.
__device__ __forceinline__ void WarpgroupMmaF16(float (&c)[4][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, "
      "0, 0;\n}"
      : DSLA_SIXTEEN(c, 0)
      : "l"(a), "l"(b));
}
__device__ __forceinline__ void WarpgroupMmaF16(float (&c)[8][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n}"
      : DSLA_SIXTEEN(c, 0), DSLA_SIXTEEN(c, 4)
      : "l"(a), "l"(b));
}
// c = a b, whatever was there.
__device__ __forceinline__ void FirstWarpgroupMmaF16(float (&c)[4][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, "
      "0, 0;\n}"
      : DSLA_FIRST_SIXTEEN(c, 0)
      : "l"(a), "l"(b));
}
#undef DSLA_SIXTEEN
#undef DSLA_FOUR
#undef DSLA_FIRST_SIXTEEN
#undef DSLA_FIRST_FOUR

// compute-sanitizer's racecheck takes what one lane says to be done for that lane's work alone, so
// for it (DSLA_ALL_LANES_ARRIVE) all say it.
#ifdef DSLA_ALL_LANES_ARRIVE
inline constexpr int kArrivingLanes = 32;
#else
inline constexpr int kArrivingLanes = 1;
#endif

// Barriers in shared memory between warps of different tasks. A phase ends when `arrivals` warps
// have arrived; what they did before is seen by those that have awaited it. Phases count from 0;
// only the last one and the one before can be awaited, so their parity will do.
__device__ __forceinline__ void InitBarrier(uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(&barrier)),
               "r"(arrivals * kArrivingLanes)
               : "memory");
}
// By all lanes of a warp. No branch: products may be under way, and the compiler would have them
// end before one.
__device__ __forceinline__ void Arrive(uint64_t& barrier) {
  __syncwarp();
  asm volatile(
      "{\n.reg .pred p;\nsetp.lt.u32 p, %1, %2;\n"
      "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(SharedAddress(&barrier)),
      "r"(threadIdx.x % 32), "n"(kArrivingLanes)
      : "memory");
}
__device__ __forceinline__ void Await(uint64_t& barrier, int phase) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(SharedAddress(&barrier)), "r"(phase & 1)
        : "memory");
  } while (done == 0);
}

// Registers of each of the warpgroup's threads from here on.
template <int count>
__device__ __forceinline__ void GiveUpRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

__device__ __forceinline__ void StoreMatrix(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void StoreMatrixTransposed(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

#endif

// A warp's finished copies are seen by the products of the warpgroups that it then meets.
__device__ __forceinline__ void PublishCopies() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// scores = q k^T: a tile of 64 rows, and kKeys rows from a multiple of 8 on of a tile of kRows, of
// bf16 or with kF16 of fp16. Under way, and there after Wait and Pin.
template <int D, int kKeys, int kRows, bool kF16 = false>
__device__ __forceinline__ void StartScores(float (&scores)[kKeys / 8][4], uint32_t q, uint32_t k) {
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[i][j] = 0;
  Pin(scores);
  BeginProducts();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    const uint64_t a = PanelDescriptor(q, c / 4 * (64 * 128) + c % 4 * 32);
    const uint64_t b = PanelDescriptor(k, c / 4 * (kRows * 128) + c % 4 * 32);
    if constexpr (kF16)
      WarpgroupMmaF16(scores, a, b);
    else
      WarpgroupMma(scores, a, b);
  }
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
      Mma<kF16>(scores[2 * j], a, b[0], b[1]);
      Mma<kF16>(scores[2 * j + 1], a, b[2], b[3]);
    }
  }
#endif
  CommitProducts();
}
template <int D, int kKeys, int kRows, bool kF16 = false>
__device__ __forceinline__ void ScoreKeys(float (&scores)[kKeys / 8][4], uint32_t q, uint32_t k) {
  StartScores<D, kKeys, kRows, kF16>(scores, q, k);
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
      WarpgroupMma<1>(acc[panel], weights[c],
                      PanelDescriptor(v, panel * (kRows * 128) + c * (16 * 128)));
  EndProducts();
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
