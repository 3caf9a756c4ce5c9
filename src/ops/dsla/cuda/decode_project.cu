// The products of a decode step with the adapter's matrices: phi_q, phi_k and gates.
#include "ops/dsla/cuda/decode.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRowTile = 16;

// The fragments of A of 16 rows, or nothing: rows `a` and `b` are this lane's two.
template <int D>
__device__ __forceinline__ void LoadRows(uint32_t (&f)[D / 16][4], const __nv_bfloat16* a,
                                         const __nv_bfloat16* b, int t) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const int c = 16 * k + 2 * t;
    f[k][0] = a ? *reinterpret_cast<const uint32_t*>(a + c) : 0;
    f[k][1] = b ? *reinterpret_cast<const uint32_t*>(b + c) : 0;
    f[k][2] = a ? *reinterpret_cast<const uint32_t*>(a + c + 8) : 0;
    f[k][3] = b ? *reinterpret_cast<const uint32_t*>(b + c + 8) : 0;
  }
}

// The row of K of the entering token: the ring's place that token t is going to take.
template <int D>
__device__ __forceinline__ const __nv_bfloat16* EnteringKey(const DecodeParams& p, int n, int h,
                                                            int t) {
  if (p.layer.W > 0) return RowOf<D>(p.layer, p.rows, n, h, t - p.layer.W).k;
  return p.rows.k + n * p.rows.k_stride + h * D;
}

// grid (matrices in the order of PackedWeights, row tiles). A warp has D / 4 columns.
template <int D>
__global__ void __launch_bounds__(kThreads) ProjectKernel(const __grid_constant__ DecodeParams p) {
  constexpr int kTiles = D / 64;  // of 16 columns per warp
  __shared__ float row_stat[4][kWarps][kRowTile];
  const Layer& l = p.layer;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int blocks = l.SF / D, job = blockIdx.x, row0 = blockIdx.y * kRowTile;
  const bool is_query = job < l.H, is_gate = job >= l.H + l.Hkv;
  const int head = is_query ? job : is_gate ? (job - l.H - l.Hkv) / blocks : job - l.H;
  const int block = is_gate ? (job - l.H - l.Hkv) % blocks : 0;

  // Weights do not depend on the rows: all of them are under way before the rows arrive.
  uint4 b[D / 16][kTiles];
  const uint4* tiles = reinterpret_cast<const uint4*>(l.weights.phi_q + int64_t{job} * D * D);
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      b[k][j] = __ldg(tiles + (k * (D / 16) + warp * kTiles + j) * 32 + lane);

  // In this order: `update` then starts when all before this call has ended, so that it may read
  // slots, rings and states at once.
  AwaitPrevious();
  AllowNext();
  const __nv_bfloat16* from[2];
  int entering[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int n = row0 + g + 8 * i;
    from[i] = nullptr;
    entering[i] = -1;
    if (n >= l.N || l.slots[n] < 0) continue;
    const int pos = l.pos[n];
    entering[i] = Entering(l, pos);
    if (is_query)
      from[i] = p.q + n * p.q_stride + head * D;
    else if (entering[i] >= 0)
      from[i] = EnteringKey<D>(p, n, head, pos);
  }
  uint32_t a[D / 16][4];
  LoadRows<D>(a, from[0], from[1], t);
  float acc[2 * kTiles][4] = {};
  if (is_gate) {  // RoPE undone in fp32; the product with the rest makes up for rounding to bf16
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
      uint32_t hi[2][4], lo[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int s = entering[i % 2] < 0 ? 0 : entering[i % 2];
        const int64_t at = int64_t{s} * (D / 2) + 16 * k + 2 * t + 8 * (i / 2);
        const float2 cos = *reinterpret_cast<const float2*>(l.cos + at);
        const float2 sin = *reinterpret_cast<const float2*>(l.sin + at);
        const float x0 = Low(a[k][i]), x1 = High(a[k][i]);
        const float y0 = Low(a[k + D / 32][i]), y1 = High(a[k + D / 32][i]);
        const float u0 = x0 * cos.x + y0 * sin.x, u1 = x1 * cos.y + y1 * sin.y;
        const float w0 = y0 * cos.x - x0 * sin.x, w1 = y1 * cos.y - x1 * sin.y;
        hi[0][i] = Pack(u0, u1);
        lo[0][i] = Pack(u0 - Low(hi[0][i]), u1 - High(hi[0][i]));
        hi[1][i] = Pack(w0, w1);
        lo[1][i] = Pack(w0 - Low(hi[1][i]), w1 - High(hi[1][i]));
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const uint4 w = b[k + half * (D / 32)][j];
          Mma(acc[2 * j], hi[half], w.x, w.y);
          Mma(acc[2 * j + 1], hi[half], w.z, w.w);
          Mma(acc[2 * j], lo[half], w.x, w.y);
          Mma(acc[2 * j + 1], lo[half], w.z, w.w);
        }
    }
#pragma unroll
    for (int j = 0; j < 2 * kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = row0 + g + 8 * (i / 2);
        if (n >= l.N || l.slots[n] < 0) continue;
        const int f = block * D + warp * (D / 4) + 8 * j + 2 * t + i % 2;
        const float x = acc[j][i] + l.weights.bias[head * l.SF + f];
        p.gate[(int64_t{n} * l.Hkv + head) * l.SF + f] =
            entering[i / 2] < 0 ? 0.f : GateMinusOne(x, l.least_gate);
      }
    return;
  }

#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      Mma(acc[2 * j], a[k], b[k][j].x, b[k][j].y);
      Mma(acc[2 * j + 1], a[k], b[k][j].z, b[k][j].w);
    }
  // Softmax of y and of -y over the row, which lies in the quads of four warps.
  float top[2][2], sum[2][2] = {};  // [sign][row]
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    top[0][i] = top[1][i] = -INFINITY;
#pragma unroll
    for (int j = 0; j < 2 * kTiles; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        top[0][i] = fmaxf(top[0][i], acc[j][2 * i + c]);
        top[1][i] = fmaxf(top[1][i], -acc[j][2 * i + c]);
      }
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
      top[sign][i] = QuadMax(top[sign][i]);
      if (t == 0) row_stat[sign][warp][g + 8 * i] = top[sign][i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w)
        top[sign][i] = fmaxf(top[sign][i], row_stat[sign][w][g + 8 * i]);
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float y = acc[j][2 * i + c];
          sum[sign][i] += Exp((sign ? -y : y) - top[sign][i]);
        }
      sum[sign][i] = QuadSum(sum[sign][i]);
      if (t == 0) row_stat[2 + sign][warp][g + 8 * i] = sum[sign][i];
    }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int n = row0 + g + 8 * i;
    if (n >= l.N || l.slots[n] < 0) continue;
    float* phi = is_query ? p.phi_q + (int64_t{n} * l.H + head) * l.F
                          : p.phi_k + (int64_t{n} * l.Hkv + head) * l.F;
    for (int sign = 0; sign < l.F / D; ++sign) {
      float all = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) all += row_stat[2 + sign][w][g + 8 * i];
      const float scale = 1 / all, m = sign ? top[1][i] : top[0][i];
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
        const float y0 = acc[j][2 * i], y1 = acc[j][2 * i + 1];
        const float2 x{Exp((sign ? -y0 : y0) - m) * scale, Exp((sign ? -y1 : y1) - m) * scale};
        *reinterpret_cast<float2*>(phi + sign * D + warp * (D / 4) + 8 * j + 2 * t) = x;
      }
    }
  }
}

template <int D>
void Launch(const DecodeParams& p, cudaStream_t stream) {
  const Layer& l = p.layer;
  const dim3 jobs(l.H + l.Hkv + l.Hkv * (l.SF / D), (l.N + kRowTile - 1) / kRowTile);
  PreferShared(ProjectKernel<D>);
  StartEarly(ProjectKernel<D>, jobs, kThreads, p, stream);
}

}  // namespace

void LaunchProject(const DecodeParams& p, int D, cudaStream_t stream) {
  D == 64 ? Launch<64>(p, stream) : Launch<128>(p, stream);
}

}  // namespace dsla::cuda
