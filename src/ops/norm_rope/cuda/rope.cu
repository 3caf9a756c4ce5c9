// What stands between the projections and attention, in one pass over q, k and v: bias, head norm,
// rotation, and the write of K and V to their pages.
#include "base/check.h"
#include "ops/dsla/cuda/common.cuh"
#include "ops/norm_rope/cuda/norm_rope_cuda.h"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 128;
// A lane owns 8 channels of a head's first half and the 8 that they are paired with. Lanes of a
// head: D / 16, rounded up to a power of two.
constexpr int kOwn = 8;

struct RopeParams {
  RopeKvArgs a;
  int lanes;
};

// Channels [at, at + n) of a row, n <= 8. kVector: n is 8 and they are aligned.
template <bool kVector>
__device__ __forceinline__ void Load(float (&x)[kOwn], const __nv_bfloat16* from, int n) {
  if constexpr (kVector) {
    const uint4 y = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[2 * i] = Low(words[i]), x[2 * i + 1] = High(words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) x[i] = i < n ? __bfloat162float(from[i]) : 0.f;
  }
}
template <bool kVector>
__device__ __forceinline__ void Load(float (&x)[kOwn], const float* from, int n) {
  if constexpr (kVector) {
    const float4 a = reinterpret_cast<const float4*>(from)[0],
                 b = reinterpret_cast<const float4*>(from)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) x[i] = i < n ? from[i] : 0.f;
  }
}
template <bool kVector>
__device__ __forceinline__ void Store(__nv_bfloat16* to, const float (&x)[kOwn], int n) {
  if constexpr (kVector) {
    *reinterpret_cast<uint4*>(to) = {Pack(x[0], x[1]), Pack(x[2], x[3]), Pack(x[4], x[5]),
                                     Pack(x[6], x[7])};
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (i < n) to[i] = __float2bfloat16_rn(x[i]);
  }
}

// A row's heads are spread over blockIdx.y and the block's groups of `lanes` lanes.
template <bool kVector>
__global__ void __launch_bounds__(kThreads) RopeKernel(RopeParams p) {
  const RopeKvArgs& a = p.a;
  AllowNext();
  const int t = blockIdx.x, position = a.positions[t];
  if (position < 0) {  // who waits for this grid also relies on what it would have waited for
    AwaitPrevious();
    return;
  }
  const int half = a.D / 2, heads = a.H + 2 * a.Hkv;
  const int lane = threadIdx.x % p.lanes, groups = kThreads / p.lanes;
  const int d = lane * kOwn;
  // Below kOwn only in the scalar form and in lanes beyond the head.
  const int own = kVector ? (d < half ? kOwn : 0) : max(0, min(kOwn, half - d));

  __nv_bfloat16 *page_k = nullptr, *page_v = nullptr;  // head 0 of this token
  if (a.softmax_rows && t < *a.softmax_rows) {
    const int32_t page =
        a.tables.pages[a.tables.page_start[a.sequence[t]] + position / a.kv.page_size];
    const int64_t at =
        page * a.kv.page_stride + static_cast<int64_t>(position % a.kv.page_size) * a.D;
    page_k = static_cast<__nv_bfloat16*>(a.kv.k) + at;
    page_v = static_cast<__nv_bfloat16*>(a.kv.v) + at;
  }
  float cos[kOwn] = {}, sin[kOwn] = {};
  if (own > 0) {
    Load<kVector>(cos, a.rope_cos + static_cast<int64_t>(position) * half + d, own);
    Load<kVector>(sin, a.rope_sin + static_cast<int64_t>(position) * half + d, own);
  }
  AwaitPrevious();

  // All lanes of a warp go round equally often, for the shuffles.
  for (int first = blockIdx.y * groups; first < heads; first += gridDim.y * groups) {
    const int h = first + static_cast<int>(threadIdx.x) / p.lanes;
    const bool is_v = h >= a.H + a.Hkv, is_k = !is_v && h >= a.H;
    const bool active = own > 0 && h < heads && (!is_v || page_v || a.bias);
    const int64_t column = static_cast<int64_t>(h) * a.D + d;
    __nv_bfloat16* x =
        static_cast<__nv_bfloat16*>(a.qkv) + static_cast<int64_t>(t) * heads * a.D + column;
    float u[kOwn] = {}, v[kOwn] = {};
    if (active) {
      Load<kVector>(u, x, own);
      Load<kVector>(v, x + half, own);
      if (a.bias) {
        float bias_u[kOwn], bias_v[kOwn];
        Load<kVector>(bias_u, a.bias + column, own);
        Load<kVector>(bias_v, a.bias + column + half, own);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) u[i] += bias_u[i], v[i] += bias_v[i];
      }
    }
    if (a.q_norm || a.k_norm) {
      float squares = 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) squares += u[i] * u[i] + v[i] * v[i];
      for (int i = p.lanes / 2; i > 0; i /= 2) squares += __shfl_xor_sync(~0u, squares, i);
      const float* weight = is_v ? nullptr : is_k ? a.k_norm : a.q_norm;
      if (active && weight) {
        const float scale = 1 / sqrtf(squares / static_cast<float>(a.D) + a.eps);
        float weight_u[kOwn], weight_v[kOwn];
        Load<kVector>(weight_u, weight + d, own);
        Load<kVector>(weight_v, weight + d + half, own);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          u[i] = u[i] * scale * weight_u[i];
          v[i] = v[i] * scale * weight_v[i];
        }
      }
    }
    if (!active) continue;
    if (!is_v) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float turned = u[i] * cos[i] - v[i] * sin[i];
        v[i] = v[i] * cos[i] + u[i] * sin[i];
        u[i] = turned;
      }
    }
    if (!is_v || a.bias) {
      Store<kVector>(x, u, own);
      Store<kVector>(x + half, v, own);
    }
    if (page_k && h >= a.H) {
      const int64_t head = is_v ? h - a.H - a.Hkv : h - a.H;
      __nv_bfloat16* to = (is_v ? page_v : page_k) + head * a.kv.page_size * a.D + d;
      Store<kVector>(to, u, own);
      Store<kVector>(to + half, v, own);
    }
  }
}

}  // namespace

int RopeKv(const RopeKvArgs& a, Stream stream) {
  DSLA_CHECK(a.T >= 0 && a.H > 0 && a.Hkv > 0);
  DSLA_CHECK(a.D > 0 && a.D % 2 == 0 && a.D <= 32 * 2 * kOwn);
  if (a.T == 0) return cudaSuccess;
  DSLA_CHECK(a.qkv && a.positions && a.rope_cos && a.rope_sin);
  bool aligned = a.D % (2 * kOwn) == 0;
  if (a.softmax_rows) {
    DSLA_CHECK(a.sequence && a.tables.page_start && a.tables.pages && a.kv.k && a.kv.v);
    DSLA_CHECK(a.kv.page_size > 0 && a.kv.Hkv == a.Hkv && a.kv.D == a.D);
    DSLA_CHECK(a.kv.dtype == DType::kBF16);
    aligned = aligned && a.kv.page_stride % kOwn == 0;
  }
  for (const void* p : {static_cast<const void*>(a.qkv), static_cast<const void*>(a.bias),
                        static_cast<const void*>(a.q_norm), static_cast<const void*>(a.k_norm),
                        static_cast<const void*>(a.rope_cos), static_cast<const void*>(a.rope_sin),
                        static_cast<const void*>(a.kv.k), static_cast<const void*>(a.kv.v)})
    aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  RopeParams p{a, 1};
  while (p.lanes * 2 * kOwn < a.D) p.lanes *= 2;
  // Few rows: a head per group of lanes, so that all is under way at once. Many: a block per row,
  // which loads the angles once.
  const int groups = kThreads / p.lanes, spread = (a.H + 2 * a.Hkv + groups - 1) / groups;
  const dim3 grid(a.T, a.T <= 128 ? spread : 1);
  if (aligned)
    StartEarly(RopeKernel<true>, grid, kThreads, p, stream);
  else
    StartEarly(RopeKernel<false>, grid, kThreads, p, stream);
  return cudaGetLastError();
}

}  // namespace dsla::cuda
