// The three parts of a layer's output joined: states, window, sinks; and the way back. A warp per
// query and head; a block has 64 times of one KV head.
#include "ops/training/cuda/training.cuh"

namespace dsla::cuda {
namespace {

constexpr float kEpsilon = 1e-6f;  // kDslaEpsilon of dsla.h
constexpr int kThreads = 256, kWarps = kThreads / 32;

template <int D>
struct Row {
  float2 x[kPairs<D>];

  __device__ __forceinline__ static Row Load(const __nv_bfloat16* at) {
    Row row;
#pragma unroll
    for (int i = 0; i < kPairs<D>; ++i) row.x[i] = LoadPair(at + PairAt(i));
    return row;
  }
  template <typename T>
  __device__ __forceinline__ void Store(T* at) const {
#pragma unroll
    for (int i = 0; i < kPairs<D>; ++i) StorePair(at + PairAt(i), x[i]);
  }
  // Adds w y.
  __device__ __forceinline__ void Add(float w, const Row& y) {
#pragma unroll
    for (int i = 0; i < kPairs<D>; ++i) x[i] = x[i] + w * y.x[i];
  }
  // The scalar product, in every lane.
  __device__ __forceinline__ float Dot(const Row& y) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPairs<D>; ++i) sum += x[i].x * y.x[i].x + x[i].y * y.x[i].y;
    return WarpSum(sum);
  }
  __device__ __forceinline__ static Row Zero() {
    Row row;
#pragma unroll
    for (int i = 0; i < kPairs<D>; ++i) row.x[i] = {0, 0};
    return row;
  }
};

template <int D>
__device__ __forceinline__ void AddTo(float* shared, float w, const Row<D>& y) {
  Row<D> sum;
#pragma unroll
  for (int i = 0; i < kPairs<D>; ++i) sum.x[i] = LoadPair(shared + PairAt(i)) + w * y.x[i];
  sum.Store(shared);
}

// Where a block's queries and their parts lie.
struct Place {
  int b, h, first;  // first: the time of the block's first row

  __device__ __forceinline__ explicit Place(const TrainingShape& s)
      : b(blockIdx.y / s.Hkv),
        h(blockIdx.y % s.Hkv),
        first(TrainingFirstRow(s) + blockIdx.x * kC) {}

  // Row (time, head of the group) of the states' output; -1: it has none.
  __device__ __forceinline__ int64_t StateRow(const TrainingShape& s, int time, int g) const {
    if (time < 0 || time >= s.chunks * kC) return -1;
    const int chunk = time / kC - (s.chunks - s.query_chunks);
    return ((static_cast<int64_t>(chunk) * gridDim.y + blockIdx.y) * s.G() + g) * kC + time % kC;
  }
};

// The states' own output and its denominator.
template <int D>
__device__ __forceinline__ Row<D> Linear(const TrainingShape& s, const float* states, int64_t row,
                                         float* den) {
  Row<D> lin = Row<D>::Zero();
  *den = 0;
  if (row < 0) return lin;
  const float* const at = states + row * s.E();
  *den = at[D];
#pragma unroll
  for (int i = 0; i < kPairs<D>; ++i) lin.x[i] = (1 / (*den + kEpsilon)) * LoadPair(at + PairAt(i));
  return lin;
}

__device__ __forceinline__ float Share(float claim, float lse, float den) {
  return den < kEpsilon ? 0 : 1 / (1 + __expf(lse - claim));
}

template <int D>
__global__ void __launch_bounds__(kThreads) MergeKernel(TrainingMergeArgs p) {
  const TrainingShape& s = p.shape;
  const Place place(s);
  const int G = s.G();
  const auto* const k =
      static_cast<const __nv_bfloat16*>(p.k) + place.b * p.k_batch + place.h * p.k_head;
  const auto* const v =
      static_cast<const __nv_bfloat16*>(p.v) + place.b * p.v_batch + place.h * p.v_head;
  for (int item = UniformWarp(); item < kC * G; item += kWarps) {
    const int time = place.first + item / G, g = item % G, t = time - s.query_at;
    if (t < 0 || t >= s.T) continue;
    const int head = place.h * G + g;
    const int64_t row = (static_cast<int64_t>(place.b) * s.T + t) * s.H + head;
    float den;
    Row<D> out = Linear<D>(s, p.states, place.StateRow(s, time, g), &den);
    if (s.window > 0) {
      const int64_t lse_at = (static_cast<int64_t>(place.b) * s.H + head) * s.T + t;
      const float own = p.window_lse[lse_at];
      const auto* const at = static_cast<const __nv_bfloat16*>(p.window_out) + row * D;
      Row<D> win = Row<D>::Load(at);
      // A sink behind the window is seen beside it; before, the window has it.
      const int behind = min(s.sinks, s.TK - s.T + t - s.window + 1);
      float lse = own;
      if (behind > 0) {
        const Row<D> q = Row<D>::Load(static_cast<const __nv_bfloat16*>(p.q) + row * D);
        float max = own, sum = 1;
        for (int j = 0; j < behind; ++j) {
          const float score = q.Dot(Row<D>::Load(k + j * p.k_row)) * rsqrtf(D);
          const float top = fmaxf(max, score), keep = __expf(max - top), add = __expf(score - top);
#pragma unroll
          for (int i = 0; i < kPairs<D>; ++i) win.x[i] = keep * win.x[i];
          win.Add(add, Row<D>::Load(v + j * p.v_row));
          sum = sum * keep + add, max = top;
        }
        lse = max + __logf(sum);
#pragma unroll
        for (int i = 0; i < kPairs<D>; ++i) win.x[i] = (1 / sum) * win.x[i];
      }
      win.Store(static_cast<__nv_bfloat16*>(p.joined) + row * D);
      if (threadIdx.x % 32 == 0) p.joined_lse[lse_at] = lse;
      const float w = Share(p.claim[row], lse, den);
#pragma unroll
      for (int i = 0; i < kPairs<D>; ++i) out.x[i] = win.x[i] + w * (out.x[i] - win.x[i]);
    }
    out.Store(static_cast<__nv_bfloat16*>(p.out) + row * D);
  }
}

// kSinkGradients: of the sinks' keys and values, too.
template <int D, bool kSinkGradients>
__global__ void __launch_bounds__(kThreads) MergeBackwardKernel(TrainingMergeBackwardArgs p) {
  extern __shared__ float shared[];  // [kWarps, sinks, 2 D]: each warp's sum for keys, for values
  const TrainingShape& s = p.shape;
  const Place place(s);
  const int G = s.G(), lane = threadIdx.x % 32, warp = UniformWarp();
  const auto* const k =
      static_cast<const __nv_bfloat16*>(p.k) + place.b * p.k_batch + place.h * p.k_head;
  const auto* const v =
      static_cast<const __nv_bfloat16*>(p.v) + place.b * p.v_batch + place.h * p.v_head;
  float* const of_sinks = shared + warp * s.sinks * 2 * D;
  if constexpr (kSinkGradients) {
    for (int j = 0; j < 2 * s.sinks; ++j) Row<D>::Zero().Store(of_sinks + j * D);
  }

  for (int item = warp; item < kC * G; item += kWarps) {
    const int time = place.first + item / G, g = item % G, t = time - s.query_at;
    const int64_t state_row = place.StateRow(s, time, g);
    const int head = place.h * G + g;
    const int64_t row = (static_cast<int64_t>(place.b) * s.T + t) * s.H + head;
    const bool valid = t >= 0 && t < s.T;
    Row<D> d = Row<D>::Zero();
    float d_den = 0;
    if (valid) {
      float den;
      const Row<D> lin = Linear<D>(s, p.states, state_row, &den);
      const Row<D> d_out = Row<D>::Load(static_cast<const __nv_bfloat16*>(p.d_out) + row * D);
      float w = 1;
      if (s.window > 0) {
        const int64_t lse_at = (static_cast<int64_t>(place.b) * s.H + head) * s.T + t;
        const float lse = p.joined_lse[lse_at];
        const Row<D> win = Row<D>::Load(static_cast<const __nv_bfloat16*>(p.joined) + row * D);
        w = Share(p.claim[row], lse, den);
        const float d_claim = (d_out.Dot(lin) - d_out.Dot(win)) * w * (1 - w);
        if (lane == 0) p.d_claim[row] = d_claim;
        // FlashAttention takes bf16: what it gets is what the rest goes by, too.
        Row<D> d_win;
#pragma unroll
        for (int i = 0; i < kPairs<D>; ++i)
          d_win.x[i] = __bfloat1622float2(__float22bfloat162_rn((1 - w) * d_out.x[i]));
        d_win.Store(static_cast<__nv_bfloat16*>(p.d_window) + row * D);
        // dS = p (dp - delta) with delta = d_win . win - d lse, and d lse = -d claim.
        const float size = d_win.Dot(d_win);
        Row<D> shifted = win;
        if (size > 0) shifted.Add(d_claim / size, d_win);
        shifted.Store(static_cast<__nv_bfloat16*>(p.shifted) + row * D);
        const int behind = min(s.sinks, s.TK - s.T + t - s.window + 1);
        if (p.d_q != nullptr) {
          Row<D> d_q = Row<D>::Zero();
          if (behind > 0) {
            const Row<D> q = Row<D>::Load(static_cast<const __nv_bfloat16*>(p.q) + row * D);
            const float delta = d_win.Dot(win) + d_claim;
            for (int j = 0; j < behind; ++j) {
              const Row<D> key = Row<D>::Load(k + j * p.k_row);
              const float share = __expf(q.Dot(key) * rsqrtf(D) - lse);
              const float d_score =
                  share * (d_win.Dot(Row<D>::Load(v + j * p.v_row)) - delta) * rsqrtf(D);
              d_q.Add(d_score, key);
              if constexpr (kSinkGradients) {
                AddTo(of_sinks + 2 * j * D, d_score, q);
                AddTo(of_sinks + (2 * j + 1) * D, share, d_win);
              }
            }
          }
          d_q.Store(static_cast<__nv_bfloat16*>(p.d_q) + row * D);
        }
      }
      const float scale = w / (den + kEpsilon);
      d.Add(scale, d_out);
      d_den = -d.Dot(lin);
    }
    if (state_row < 0) continue;
    auto* const to = static_cast<__nv_bfloat16*>(p.d_states) + state_row * s.E();
    d.Store(to);
    if (lane < 4) StorePair(to + D + 2 * lane, make_float2(lane == 0 ? d_den : 0, 0));
  }

  if constexpr (kSinkGradients) {
    __syncthreads();
    const int size = s.sinks * 2 * D;
    float* const to =
        p.d_sinks + (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * size;
    for (int i = threadIdx.x; i < size; i += kThreads) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared[w * size + i];
      to[i] = sum;
    }
  }
}

}  // namespace

int TrainingMerge(const TrainingMergeArgs& p, Stream stream) {
  const dim3 grid(TrainingMergeBlocks(p.shape), p.shape.B * p.shape.Hkv);
  const auto kernel = p.shape.D == 64 ? MergeKernel<64> : MergeKernel<128>;
  kernel<<<grid, kThreads, 0, stream>>>(p);
  return Launched();
}

int TrainingMergeBackward(const TrainingMergeBackwardArgs& p, Stream stream) {
  const dim3 grid(TrainingMergeBlocks(p.shape), p.shape.B * p.shape.Hkv);
  const bool sinks = p.d_sinks != nullptr;
  const auto kernel =
      p.shape.D == 64 ? (sinks ? MergeBackwardKernel<64, true> : MergeBackwardKernel<64, false>)
                      : (sinks ? MergeBackwardKernel<128, true> : MergeBackwardKernel<128, false>);
  const int bytes = sinks ? kWarps * p.shape.sinks * 2 * p.shape.D * 4 : 0;
  AllowShared(kernel, bytes);
  kernel<<<grid, kThreads, bytes, stream>>>(p);
  return Launched();
}

}  // namespace dsla::cuda
