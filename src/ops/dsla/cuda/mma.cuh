// Thin wrappers of the PTX that the kernels use (sm_80 and later), and conversions to bf16 and
// fp16.
// Fragment layouts are those of mma.m16n8k16: lane = 4 g + t; A holds (g, 2t), (g + 8, 2t),
// (g, 2t + 8), (g + 8, 2t + 8), two columns each; C holds (g, 2t), (g, 2t + 1), (g + 8, 2t), ...
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace dsla::cuda {

// Operands of bf16, or with kF16 of fp16.
template <bool kF16 = false>
__device__ __forceinline__ void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (kF16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void LoadMatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void LoadMatrixTransposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Of 8 x 8 values of bf16: a lane has (g, 2t) and (g, 2t + 1).
__device__ __forceinline__ uint32_t Transposed(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// 16 bytes to shared memory; zeros, without reading, if not `valid`.
__device__ __forceinline__ void CopyAsync(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
// The line is on its way to the L2 cache.
__device__ __forceinline__ void PrefetchToL2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// At most `pending` of this thread's groups are still under way.
template <int pending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// To write 16 columns of a row of an accumulator, 8 bytes a lane and 32 together: of a lane's words
// `low` (columns 2t, 2t + 1) and `high` (8 more), and its neighbour's, those that lie side by side.
// They are the row's words from RowWord(t) on.
__device__ __forceinline__ uint2 RowWords(uint32_t low, uint32_t high, int t) {
  const uint32_t other = __shfl_xor_sync(~0u, t % 2 ? low : high, 1);
  return t % 2 ? make_uint2(other, high) : make_uint2(low, other);
}
__device__ __forceinline__ int RowWord(int t) { return t % 2 * 4 + t / 2 * 2; }

// Waits for all of the block's `threads` threads with this `id`, 0 to 3. Barriers are used by name:
// one that only a register knows would have a kernel hold all 16.
template <int threads>
__device__ __forceinline__ void Barrier(int id) {
  if (id == 0)
    asm volatile("bar.sync 1, %0;" ::"n"(threads) : "memory");
  else if (id == 1)
    asm volatile("bar.sync 2, %0;" ::"n"(threads) : "memory");
  else if (id == 2)
    asm volatile("bar.sync 3, %0;" ::"n"(threads) : "memory");
  else
    asm volatile("bar.sync 4, %0;" ::"n"(threads) : "memory");
}

__device__ __forceinline__ uint32_t Pack(float lo, float hi) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&x);
}
__device__ __forceinline__ float Low(uint32_t x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float High(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
// To fp16. What is larger than its largest number, 65504, becomes that.
__device__ __forceinline__ uint32_t PackHalf(float lo, float hi) {
  uint32_t x;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(hi), "f"(lo));
  return x;
}
// Of two bf16. Exact from 2^-17 to 65504; under that fp16 has steps of 2^-24.
__device__ __forceinline__ uint32_t HalfOf(uint32_t x) { return PackHalf(Low(x), High(x)); }

// About two units in the last place. Results under 2^-126 become 0: used only where those are
// nothing beside what they are added to (decays, which may be that small and matter, are products
// instead).
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
__device__ __forceinline__ float Exp(float x) { return Exp2(x * kLog2e); }
// Of a normal number.
__device__ __forceinline__ float Log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Of a normal number whose inverse is one.
__device__ __forceinline__ float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Programmatic dependent launch (compute capability 9.0): a kernel may start while the one before
// it in the stream still runs. AllowNext lets the next one start; AwaitPrevious waits until all
// kernels before this one have ended and their writes are seen. Both do nothing elsewhere.
__device__ __forceinline__ void AllowNext() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void AwaitPrevious() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Such that what follows from it is worked out again in each turn of a loop: kept in registers
// between turns it would be more than there are.
__device__ __forceinline__ uint32_t Fresh(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
// The thread's index, read once more: nothing of it stays in registers.
__device__ __forceinline__ uint32_t ThreadAgain() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
__device__ __forceinline__ int ThreadIndex() { return static_cast<int>(Fresh(threadIdx.x)); }

// Over the four lanes that share a row of a fragment.
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}
__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}

// Place of the 16-byte piece c of row `row` in a tile of rows of kPieces pieces, so that the eight
// rows that one ldmatrix reads lie in different banks.
template <int kPieces>
__device__ __forceinline__ int Swizzle(int row, int c) {
  static_assert(kPieces == 4 || kPieces == 8 || kPieces == 16);
  return row * kPieces + (kPieces == 4 ? c ^ ((row >> 1) & 3) : c ^ (row & 7));
}

}  // namespace dsla::cuda
