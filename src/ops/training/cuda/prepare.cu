// From a layer's projections to the operands of its products: gates, their sums within a chunk,
// features, K~ and Q~. A block per chunk and KV head; a thread owns two channels of the key width
// and walks through the chunk's rows.
#include "ops/training/cuda/training.cuh"

namespace dsla::cuda {
namespace {

constexpr float kGateDivisor = 16;
constexpr int kRows = 8;  // of which a thread's loads are in flight together

__device__ __forceinline__ float LogGate(float z, float floor) {
  return fmaxf((fminf(z, 0.f) - log1pf(__expf(-fabsf(z)))) / kGateDivisor, floor);
}

// softmax(y), or [softmax(y), softmax(-y)], of one row by a warp; zeros for a row that is not
// there.
template <int D>
__device__ __forceinline__ void FeatureRow(const float* y, bool valid, bool two_sided,
                                           __nv_bfloat16* shared, __nv_bfloat16* global) {
  float2 row[kPairs<D>];
#pragma unroll
  for (int i = 0; i < kPairs<D>; ++i) row[i] = valid ? LoadPair(y + PairAt(i)) : make_float2(0, 0);
  for (int side = 0; side <= static_cast<int>(two_sided); ++side) {
    float max = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < kPairs<D>; ++i) max = fmaxf(max, fmaxf(row[i].x, row[i].y));
    max = WarpMax(max);
    float2 p[kPairs<D>];
#pragma unroll
    for (int i = 0; i < kPairs<D>; ++i) {
      p[i] = ExpPair(row[i] - make_float2(max, max));
      sum += p[i].x + p[i].y;
    }
    const float scale = valid ? 1 / WarpSum(sum) : 0;
#pragma unroll
    for (int i = 0; i < kPairs<D>; ++i) {
      StorePair(shared + side * D + PairAt(i), scale * p[i]);
      StorePair(global + side * D + PairAt(i), scale * p[i]);
      row[i] = -1.f * row[i];
    }
  }
}

template <int D>
__global__ void __launch_bounds__(256) PrepareKernel(TrainingPrepareArgs p) {
  extern __shared__ __nv_bfloat16 features[];  // [C, F]
  const TrainingShape& s = p.shape;
  const int K = s.K(), F = s.F, E = s.E(), G = s.G();
  const int c = blockIdx.x, b = blockIdx.y / s.Hkv, h = blockIdx.y % s.Hkv;
  const int64_t tile = static_cast<int64_t>(c) * gridDim.y + blockIdx.y;
  const int k = 2 * static_cast<int>(threadIdx.x), state = k / F, f = k - state * F;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int key0 = c * kC - s.key_at, query0 = c * kC - s.query_at;
  const auto is_key = [&](int j) { return key0 + j >= s.first_key && key0 + j < s.last_key; };
  const auto is_query = [&](int j) { return query0 + j >= 0 && query0 + j < s.T; };

  float* const a = p.out.a + tile * kC * K + k;
  float2 sum = {0, 0}, middle = {0, 0};
  const float2 bias = LoadPair(p.bias + h * K + k);
  const float* const z = p.z + ((static_cast<int64_t>(h) * s.B + b) * s.TK + key0) * K + k;
  for (int j0 = 0; j0 < kC; j0 += kRows) {
    float2 x[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      x[r] = is_key(j0 + r) ? LoadPair(z + static_cast<int64_t>(j0 + r) * K) : make_float2(0, 0);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      x[r] = x[r] + bias;
      x[r] = is_key(j0 + r)
                 ? make_float2(LogGate(x[r].x, s.gate_floor), LogGate(x[r].y, s.gate_floor))
                 : make_float2(0, 0);
      StorePair(a + (j0 + r) * K, x[r]);
      sum = sum + x[r];
    }
    if (j0 + kRows == kC / 2) middle = sum;
  }
  StorePair(p.out.enter + tile * K + k, ExpPair(middle));
  StorePair(p.out.leave + tile * K + k, ExpPair(sum - middle));

  auto* const phi_k = static_cast<__nv_bfloat16*>(p.out.phi_k) + tile * kC * F;
  for (int j = warp; j < kC; j += warps) {
    const int64_t row = (static_cast<int64_t>(h) * s.B + b) * s.TK + key0 + j;
    FeatureRow<D>(p.y_k + row * D, is_key(j), F == 2 * D, features + j * F, phi_k + j * F);
  }
  __syncthreads();
  auto* const keys = static_cast<__nv_bfloat16*>(p.out.k) + tile * kC * K + k;
  float2 offset = -1.f * middle;
  for (int j0 = 0; j0 < kC; j0 += kRows) {
    float2 x[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) x[r] = LoadPair(a + (j0 + r) * K);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      offset = offset + x[r];
      const float2 share = {-expm1f(x[r].x), -expm1f(x[r].y)};
      StorePair(keys + (j0 + r) * K,
                share * LoadPair(features + (j0 + r) * F + f) * ExpPair(-1.f * offset));
    }
  }
  auto* const ve = static_cast<__nv_bfloat16*>(p.out.ve) + tile * kC * E;
  const auto* const v = static_cast<const __nv_bfloat16*>(p.v) + b * p.v_batch + h * p.v_head;
  for (int i = threadIdx.x; i < kC * E / 8; i += blockDim.x) {
    const int j = i / (E / 8), d = i % (E / 8) * 8;
    uint4 value = {0, 0, 0, 0};
    if (is_key(j)) {
      if (d < D)
        value = *reinterpret_cast<const uint4*>(v + (key0 + j) * p.v_row + d);
      else
        value.x = 0x3f80;  // 1 in bf16
    }
    *reinterpret_cast<uint4*>(ve + j * E + d) = value;
  }

  const int query_chunk = c - (s.chunks - s.query_chunks);
  if (query_chunk < 0) return;
  for (int g = 0; g < G; ++g) {
    const int64_t head = (static_cast<int64_t>(query_chunk) * gridDim.y + blockIdx.y) * G + g;
    auto* const phi_q = static_cast<__nv_bfloat16*>(p.out.phi_q) + head * kC * F;
    __syncthreads();
    for (int j = warp; j < kC; j += warps) {
      const int64_t row = (static_cast<int64_t>(h * G + g) * s.B + b) * s.T + query0 + j;
      FeatureRow<D>(p.y_q + row * D, is_query(j), F == 2 * D, features + j * F, phi_q + j * F);
    }
    __syncthreads();
    auto* const queries = static_cast<__nv_bfloat16*>(p.out.q) + head * kC * K + k;
    const float mix = p.mix[(h * G + g) * s.states + state];
    offset = -1.f * middle;
    for (int j0 = 0; j0 < kC; j0 += kRows) {
      float2 x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) x[r] = LoadPair(a + (j0 + r) * K);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        offset = offset + x[r];
        StorePair(queries + (j0 + r) * K,
                  mix * (LoadPair(features + (j0 + r) * F + f) * ExpPair(offset)));
      }
    }
  }
}

// A warp's row: the gradient of FeatureRow's y from that of its features, which the states' halves
// of `d` [K] add up to.
template <int D>
__device__ __forceinline__ void FeatureRowGradient(const float* d, const __nv_bfloat16* phi, int F,
                                                   int states, __nv_bfloat16* d_y) {
  float2 result[kPairs<D>];
#pragma unroll
  for (int i = 0; i < kPairs<D>; ++i) result[i] = {0, 0};
  for (int side = 0; side < F / D; ++side) {
    float2 p[kPairs<D>], weighted[kPairs<D>];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPairs<D>; ++i) {
      const int f = side * D + PairAt(i);
      float2 x = LoadPair(d + f);
      if (states == 2) x = x + LoadPair(d + F + f);
      p[i] = LoadPair(phi + f);
      weighted[i] = p[i] * x;
      sum += weighted[i].x + weighted[i].y;
    }
    sum = WarpSum(sum);
#pragma unroll
    for (int i = 0; i < kPairs<D>; ++i) {
      const float2 part = weighted[i] - sum * p[i];
      result[i] = side == 0 ? part : result[i] - part;
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs<D>; ++i) StorePair(d_y + PairAt(i), result[i]);
}

// The way back. Rows are walked from the chunk's end, so that the sums over later rows that the
// gates' gradient is made of run along; tiles of kRows rows go through shared memory to the warps
// that know whole rows.
template <int D>
__global__ void __launch_bounds__(256, D == 64 ? 2 : 1) GradientKernel(TrainingGradientArgs p) {
  extern __shared__ float shared[];
  const TrainingShape& s = p.shape;
  const int K = s.K(), F = s.F, G = s.G(), threads = blockDim.x;
  float* const tile = shared;               // [kRows, K]
  float* const mixes = shared + kRows * K;  // [G, threads]
  const int c = blockIdx.x, b = blockIdx.y / s.Hkv, h = blockIdx.y % s.Hkv;
  const int64_t at = static_cast<int64_t>(c) * gridDim.y + blockIdx.y;
  const int k = 2 * static_cast<int>(threadIdx.x), state = k / F, f = k - state * F;
  const int warp = threadIdx.x / 32, warps = threads / 32, lane = threadIdx.x % 32;
  const int key0 = c * kC - s.key_at, query0 = c * kC - s.query_at;
  const auto is_key = [&](int j) { return key0 + j >= s.first_key && key0 + j < s.last_key; };
  const auto is_query = [&](int j) { return query0 + j >= 0 && query0 + j < s.T; };
  const int query_chunk = c - (s.chunks - s.query_chunks);
  const int64_t query_at = static_cast<int64_t>(query_chunk) * gridDim.y + blockIdx.y;

  const float* const a = p.in.a + at * kC * K + k;
  float2 sum = {0, 0}, middle = {0, 0};
  for (int j = 0; j < kC; ++j) {
    sum = sum + LoadPair(a + j * K);
    if (j == kC / 2 - 1) middle = sum;
  }
  float2 offset = sum - middle, later = {0, 0};
  for (int g = 0; g < G; ++g) mixes[g * threads + threadIdx.x] = 0;
  const float2 d_sums = LoadPair(p.d_sums + at * K + k);
  const auto* const keys = static_cast<const __nv_bfloat16*>(p.in.k) + at * kC * K + k;
  const auto* const phi_k = static_cast<const __nv_bfloat16*>(p.in.phi_k) + at * kC * F;
  const float* const d_k2 = p.d_k2 + at * kC * K + k;
  const float* const d_k1 = query_chunk >= 0 ? p.d_k1 + query_at * kC * K + k : nullptr;
  const int64_t key_row = (static_cast<int64_t>(h) * s.B + b) * s.TK + key0;

  for (int j0 = kC - kRows; j0 >= 0; j0 -= kRows) {
    float2 gate[kRows], rise[kRows], moved[kRows], d_k[kRows];
#pragma unroll
    for (int r = kRows - 1; r >= 0; --r) {
      gate[r] = LoadPair(a + (j0 + r) * K);
      d_k[r] = LoadPair(d_k2 + (j0 + r) * K);
      if (d_k1 != nullptr) d_k[r] = d_k[r] + LoadPair(d_k1 + (j0 + r) * K);
      moved[r] = -1.f * (LoadPair(keys + (j0 + r) * K) * d_k[r]);
    }
#pragma unroll
    for (int r = kRows - 1; r >= 0; --r) {
      rise[r] = ExpPair(offset);
      offset = offset - gate[r];
    }
    for (int g = 0; query_chunk >= 0 && g < G; ++g) {
      const int64_t head = query_at * G + g;
      const auto* const phi = static_cast<const __nv_bfloat16*>(p.in.phi_q) + head * kC * F;
      const int64_t first = (head * kC + j0) * K + k;
      const auto* const q = static_cast<const __nv_bfloat16*>(p.in.q) + first;
      const float mix = p.mix[(h * G + g) * s.states + state];
      float d_mix = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float2 d = LoadPair(p.d_q1 + first + r * K) + LoadPair(p.d_q2 + first + r * K);
        moved[r] = moved[r] + LoadPair(q + r * K) * d;
        d = d * rise[r];
        const float2 by_mix = d * LoadPair(phi + (j0 + r) * F + f);
        d_mix += by_mix.x + by_mix.y;
        StorePair(tile + r * K + k, mix * d);
      }
      mixes[g * threads + threadIdx.x] += d_mix;
      __syncthreads();
      for (int r = warp; r < kRows; r += warps) {
        if (!is_query(j0 + r)) continue;
        const int64_t row = (static_cast<int64_t>(h * G + g) * s.B + b) * s.T + query0 + j0 + r;
        FeatureRowGradient<D>(tile + r * K, phi + (j0 + r) * F, F, s.states,
                              static_cast<__nv_bfloat16*>(p.d_y_q) + row * D);
      }
      __syncthreads();
    }
#pragma unroll
    for (int r = kRows - 1; r >= 0; --r) {
      later = later + moved[r];
      const float2 share = {-expm1f(gate[r].x), -expm1f(gate[r].y)};  // 1 - e^a
      const float2 d = {d_k[r].x / rise[r].x, d_k[r].y / rise[r].y};
      const float2 phi = LoadPair(phi_k + (j0 + r) * F + f);
      const float2 d_gate = later + d_sums - (make_float2(1, 1) - share) * (phi * d);
      if (is_key(j0 + r)) {
        // e^{16 a} = sigmoid(z), so d a / d z = -expm1(16 a) / 16; nothing passes the floor.
        const auto slope = [&](float x) {
          return x <= s.gate_floor ? 0.f : -expm1f(kGateDivisor * x) / kGateDivisor;
        };
        StorePair(p.d_z + (key_row + j0 + r) * K + k,
                  make_float2(slope(gate[r].x), slope(gate[r].y)) * d_gate);
      }
      StorePair(tile + r * K + k, share * d);
    }
    __syncthreads();
    for (int r = warp; r < kRows; r += warps) {
      if (!is_key(j0 + r)) continue;
      FeatureRowGradient<D>(tile + r * K, phi_k + (j0 + r) * F, F, s.states,
                            static_cast<__nv_bfloat16*>(p.d_y_k) + (key_row + j0 + r) * D);
    }
    __syncthreads();
  }
  if (query_chunk < 0) return;
  // A warp's channels are of one state.
  for (int g = 0; g < G; ++g) {
    const float x = WarpSum(mixes[g * threads + threadIdx.x]);
    if (lane == 0) tile[g * warps + warp] = x;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < G * s.states; i += threads) {
    const int g = i / s.states, each = warps / s.states;
    float x = 0;
    for (int w = 0; w < each; ++w) x += tile[g * warps + i % s.states * each + w];
    p.d_mix[query_at * G * s.states + i] = x;
  }
}

void CheckShape(const TrainingShape& s) {
  DSLA_CHECK(TrainingTakes(s.D, s.F, s.states, s.sinks) && s.H % s.Hkv == 0);
}

}  // namespace

int TrainingPrepare(const TrainingPrepareArgs& p, Stream stream) {
  const TrainingShape& s = p.shape;
  CheckShape(s);
  const auto kernel = s.D == 64 ? PrepareKernel<64> : PrepareKernel<128>;
  const int bytes = kC * s.F * 2;
  AllowShared(kernel, bytes);
  kernel<<<dim3(s.chunks, s.B * s.Hkv), s.K() / 2, bytes, stream>>>(p);
  return Launched();
}

int TrainingGradients(const TrainingGradientArgs& p, Stream stream) {
  const TrainingShape& s = p.shape;
  CheckShape(s);
  const auto kernel = s.D == 64 ? GradientKernel<64> : GradientKernel<128>;
  const int bytes = (kRows * s.K() + s.G() * s.K() / 2) * 4;
  AllowShared(kernel, bytes);
  kernel<<<dim3(s.chunks, s.B * s.Hkv), s.K() / 2, bytes, stream>>>(p);
  return Launched();
}

}  // namespace dsla::cuda
