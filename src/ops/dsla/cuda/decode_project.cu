// The products of a decode step with the adapter's matrices: phi_q, phi_k and gates, for `whole`.
#include "ops/dsla/cuda/decode_project.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRowTile = 16;

// grid (matrices in the order of PackedWeights, row tiles). A warp has D / 4 columns.
template <int D>
__global__ void __launch_bounds__(kThreads) ProjectKernel(const __grid_constant__ DecodeParams p) {
  constexpr int kParts = D / 64;  // of a warp
  __shared__ PartSum parts[2][kRowTile][D / kPartColumns];
  const Layer& l = p.layer;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int blocks = l.SF / D, job = blockIdx.x, row0 = blockIdx.y * kRowTile;
  const bool is_query = job < l.H, is_gate = job >= l.H + l.Hkv;
  const int head = is_query ? job : is_gate ? (job - l.H - l.Hkv) / blocks : job - l.H;
  const int block = is_gate ? (job - l.H - l.Hkv) % blocks : 0;

  // Weights do not depend on the rows: all of them are under way before the rows arrive.
  PartWeights<D> w[kParts];
#pragma unroll
  for (int j = 0; j < kParts; ++j) w[j].Load(Matrix<D>(l, job), warp * kParts + j);

  // In this order: `whole` then starts when all before this call has ended, so that it may read
  // slots, rings and states at once.
  AwaitPrevious();
  AllowNext();
  const __nv_bfloat16* from[2];
  int entering[2], position[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int n = row0 + g + 8 * i;
    from[i] = nullptr;
    entering[i] = -1;
    position[i] = 0;
    if (n >= l.N || l.slots[n] < 0) continue;
    const int pos = l.pos[n];
    entering[i] = Entering(l, pos);
    position[i] = max(entering[i], 0);
    if (is_query)
      from[i] = p.q + n * p.q_stride + head * D;
    else if (entering[i] >= 0)  // in the ring's place that token t is going to take
      from[i] = l.W > 0 ? RowOf<D>(l, p.rows, n, head, pos - l.W).k
                        : p.rows.k + n * p.rows.k_stride + head * D;
  }
  uint32_t a[D / 16][4];
  LoadRows<D>(a, from);
  const auto column_of = [&](int j, int c) {
    return (warp * kParts + j) * kPartColumns + 8 * (c / 2) + 2 * t + c % 2;
  };
  float y[kParts][2][4] = {};
  if (is_gate) {
    AddUnrotatedProducts<D>(y, a, position, l, w);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = row0 + g + 8 * i;
      if (n >= l.N || l.slots[n] < 0) continue;
#pragma unroll
      for (int j = 0; j < kParts; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int f = block * D + column_of(j, c);
          const float x = y[j][c / 2][2 * i + c % 2] + l.weights.bias[head * l.SF + f];
          p.gate[(int64_t{n} * l.Hkv + head) * l.SF + f] =
              entering[i] < 0 ? 0.f : GateMinusOne(x, l.least_gate);
        }
    }
    return;
  }

  AddProducts<D>(y, a, w);
  // Softmax of y and, where there are twice as many features, of -y.
  const int signs = l.F / D;
  float e[2][2][kParts][4];  // [sign][row]
#pragma unroll
  for (int sign = 0; sign < 2; ++sign) {
    if (sign == signs) break;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float x = y[j][c / 2][2 * i + c % 2];
          e[sign][i][j][c] = sign ? -x : x;
        }
        const PartSum sum = Exponentials(e[sign][i][j]);
        if (t == 0) parts[sign][g + 8 * i][warp * kParts + j] = sum;
      }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int n = row0 + g + 8 * i;
    if (n >= l.N || l.slots[n] < 0) continue;
    float* phi = is_query ? p.phi_q + (int64_t{n} * l.H + head) * l.F
                          : p.phi_k + (int64_t{n} * l.Hkv + head) * l.F;
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
      if (sign == signs) break;
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const float share = ShareOf<D>(parts[sign][g + 8 * i], warp * kParts + j);
#pragma unroll
        for (int c = 0; c < 4; c += 2)
          *reinterpret_cast<float2*>(phi + sign * D + column_of(j, c)) = {
              __fmul_rn(e[sign][i][j][c], share), __fmul_rn(e[sign][i][j][c + 1], share)};
      }
    }
  }
}

template <int D>
void Launch(const DecodeParams& p, cudaStream_t stream) {
  const Layer& l = p.layer;
  const dim3 jobs(l.H + l.Hkv + l.Hkv * (l.SF / D), (l.N + kRowTile - 1) / kRowTile);
  PreferShared<ProjectKernel<D>>();
  StartEarly(ProjectKernel<D>, jobs, kThreads, p, stream);
}

}  // namespace

void LaunchProject(const DecodeParams& p, int D, cudaStream_t stream) {
  D == 64 ? Launch<64>(p, stream) : Launch<128>(p, stream);
}

}  // namespace dsla::cuda
