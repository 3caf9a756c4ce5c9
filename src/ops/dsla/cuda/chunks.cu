// The chunks of a segment, one after another, for one KV head and all or some of its query heads:
//   O = Q~ S^ + tril(Q~ K~^T) V,  denominator = Q~ (e^R z) + row sums of tril(Q~ K~^T),
// merged with the window's result; then S' = e^{L-R} (S^ + K~^T V), scaled by the next chunk's e^R.
// The states stay in registers: warp w has value columns [16 w, 16 w + 16) of all channels, held
// transposed, so that the accumulators are, once rounded, mma's B operand of the queries' product
// with them.
#include "ops/dsla/cuda/chunks.cuh"

namespace dsla::cuda {
namespace {

// A KV head's state [SF, D] and norm [SF] in the slot.
template <int D>
__device__ __forceinline__ float* StateOf(const Layer& l, int n, int h) {
  return reinterpret_cast<float*>(SlotBase(l, n) + l.at.state) + int64_t{h} * l.SF * D;
}
__device__ __forceinline__ float* NormOf(const Layer& l, int n, int h) {
  return reinterpret_cast<float*>(SlotBase(l, n) + l.at.norm) + int64_t{h} * l.SF;
}

// grid (Hkv x parts of a group of heads, segments)
template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::D == 128 ? 1 : 2)
    ChunksKernel(const __grid_constant__ PrefillParams p) {
  constexpr int D = S::D, kThreads = S::kThreads, kPieces = S::kPieces, kHalves = S::kHalves,
                kSF = S::kSF, kSteps = S::kSteps, kStages = S::kStages;
  constexpr bool kMayShareStates = S::kMayShareStates;
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<ChunksShared<S>*>(memory);
  const Layer& l = p.layer;
  const Work& work = shared.work;
  bool alone;  // its states come from the slot and return there, so one block does all of the heads
  int store;
  {
    const int h = blockIdx.x / p.head_parts, part = blockIdx.x % p.head_parts;
    const Segment s = SegmentOf(p, blockIdx.y);
    alone = p.cut.least == 0 || IsWhole(s);
    store = s.store;
    if (s.count < 0 || (alone && part > 0)) {
      AwaitPrevious();
      return;
    }
    const int parts = alone ? 1 : p.head_parts;
    // Only the last segment of a sequence, or a wave's chunks where there are no segments, end in
    // the slot; the scan writes it otherwise.
    if (threadIdx.x == 0)
      shared.work = {s.n,
                     s.e0,
                     s.at,
                     s.count,
                     s.lo,
                     s.hi,
                     l.pos[s.n],
                     l.row_start[s.n] + (s.e0 + l.W - l.pos[s.n]),
                     h,
                     h * l.G + part * l.G / parts,
                     h * l.G + (part + 1) * l.G / parts - 1,
                     part == 0 && (alone || (s.flags & kLast))};
    __syncthreads();
  }
  // Channels in all, and the first of this launch.
  const int SF = kMayShareStates ? l.SF : kSF, c0 = kMayShareStates ? p.state_part * kSF : 0;
  const auto channel_of = [&](int i) { return ((work.at + i) * l.Hkv + work.h) * SF + c0; };

  const auto fetch_queries = [&](int i, int head) {
    CopyTile<D, kThreads>(shared.q, p.q + work.row(i) * p.q_stride + head * D, p.q_stride,
                          work.lo(i), work.hi(i), ThisThread());
  };
  const auto fetch_phi = [&](int head) {
    const auto* from = reinterpret_cast<const uint4*>(l.weights.phi_q + int64_t{head} * D * D);
    for (int k = ThisThread(); k < D * D / 8; k += kThreads) CopyAsync(shared.phi + k, from + k);
  };
  const auto fetch_decay = [&](int i) {
    const int k = ThisThread();
    if (i < work.count && k < kSF / 2)
      CopyAsync(shared.decay[i % (kStages + 1)] + k, p.decay + channel_of(i) + 2 * k);
  };
  const auto fetch_keys = [&](int i) {
    if (i >= work.count) return;
    uint4 *key = shared.key[i % kStages], *v = shared.v[i % kStages];
    const __nv_bfloat16* from = p.key + int64_t{channel_of(i)} * kChunk;
    const int first = ThisThread();
    static_assert(kThreads / kPieces % 8 == 0);  // rows of a thread are swizzled alike
    key += Swizzle<kPieces>(first / kPieces, first % kPieces);
    from += 8 * first;
#pragma unroll
    for (int k = 0; k < kChunk * kSF / 8; k += kThreads) CopyAsync(key + k, from + 8 * k);
    const int e0 = work.e0 + i * kChunk;
    if (e0 >= work.pos)
      CopyTile<D, kThreads>(v, p.rows.v + (work.row(i) - l.W) * p.rows.v_stride + work.h * D,
                            p.rows.v_stride, max(work.lo(i), l.S - e0), work.hi(i), ThisThread());
    else
      CopyScattered<D, kThreads>(p, p.rows, v, {work.n, e0, work.lo(i), work.hi(i)}, work.h);
    fetch_decay(i + 1);
  };

  fetch_phi(work.first_head);
  fetch_queries(0, work.first_head);
  AwaitPrevious();
  AllowNext();
  fetch_decay(0);
  if constexpr (kStages == 2) fetch_keys(0);
  CommitCopies();

  // Accumulators: value column g (+ 8), channels 8 j + 2 t (+ 1).
  float acc[2 * kSteps][4];
  {
    const auto [lane, warp, g, t] = ThisPlace();
    const int64_t start_at = (int64_t{store} * l.Hkv + work.h) * SF + c0;
    // Written by 4 warps with D / 4 value columns each, 32 channels at a time.
    const float4* start = reinterpret_cast<const float4*>(p.start + start_at * D) +
                          (warp % kHalves * 4 * 4 + warp / kHalves) * 32 + lane;
#pragma unroll
    for (int j = 0; j < 2 * kSteps; ++j) {
      float4 x;
      if (alone) {
        const float* from =
            StateOf<D>(l, work.n, work.h) + int64_t{c0 + 8 * j + 2 * t} * D + 16 * warp + g;
        x = {from[0], from[D], from[8], from[D + 8]};
      } else {
        x = start[j / 4 * (8 * D) + j % 4 * 128];
      }
      acc[j][0] = x.x;
      acc[j][1] = x.y;
      acc[j][2] = x.z;
      acc[j][3] = x.w;
    }
    WaitCopies<0>();
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 2 * kSteps; ++j) {
      const float4 decay = shared.decay[0][4 * j + t];
      acc[j][0] *= decay.x;
      acc[j][1] *= decay.z;
      acc[j][2] *= decay.x;
      acc[j][3] *= decay.z;
    }
    for (int c = 32 * warp + lane; c < kSF; c += kThreads) {
      const float norm = alone ? NormOf(l, work.n, work.h)[c0 + c] : p.start_norm[start_at + c];
      shared.norm[c] = norm * reinterpret_cast<const float2*>(shared.decay[0])[c].x;
    }
  }

  for (int item = 0;;) {  // chunk and head in one register
    const int i = item >> 8, head = work.first_head + (item & 255);
    const bool last_head = head == work.last_head, more = i + 1 < work.count;
    WaitCopies<0>();
    __syncthreads();  // the queries are there, and all of the chunk before has been read
    if (l.W > 0)
      CopyTile<D, kThreads>(shared.window, p.out + (work.row(i) * l.H + head) * D, int64_t{l.H} * D,
                            work.lo(i), work.hi(i), ThisThread());
    CommitCopies();
    if (head == work.first_head) fetch_keys(kStages == 2 ? i + 1 : i);
    CommitCopies();

    ProjectQueries(p, shared, reinterpret_cast<const uint4*>(p.growth) + int64_t{channel_of(i)} * 8,
                   head);
    if (last_head && more)
      for (int k = ThisThread(); k < kSF; k += kThreads)
        PrefetchToL2(p.growth + int64_t{channel_of(i + 1) + k} * (kChunk / 2));
    if constexpr (kStages == 1) WaitCopies<0>();
    __syncthreads();  // Q~ and K~ are there
    if (!last_head) {
      fetch_queries(i, head + 1);
      fetch_phi(head + 1);
    } else if (more) {
      fetch_queries(i + 1, work.first_head);
      if (head != work.first_head) fetch_phi(work.first_head);
    }
    CommitCopies();
    const uint32_t key = SharedAddress(shared.key[i % kStages]);

    const auto [lane, warp, g, t] = ThisPlace();
    // What the rows `lane` and `lane + 32` take from the window, and what came before.
    float lse[2] = {}, claim[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane + 32 * r;
      if (l.W == 0 || row < work.lo(i) || row >= work.hi(i)) continue;
      lse[r] = p.lse[work.part(i, l.H, head) + row];
      claim[r] = p.claim[(work.row(i) + row) * l.H + head];
    }

    if (last_head) {  // e^R z of the next chunk, whose e^R takes the place of this one's
      float2* decay = reinterpret_cast<float2*>(shared.decay[i % (kStages + 1)]);
      const auto* next = reinterpret_cast<const float2*>(shared.decay[(i + 1) % (kStages + 1)]);
      for (int c = 32 * warp + lane; c < kSF; c += kThreads) {
        const float* sums = p.key_sum + int64_t{channel_of(i) - c0} * 4 + c0 + c;
        const float sum = (sums[0] + sums[SF]) + (sums[2 * SF] + sums[3 * SF]);
        const float end = decay[c].y, begin = more ? next[c].x : 1.f;
        shared.norm[c] = (shared.norm[c] + sum) * end * begin;
        decay[c].x = begin;
      }
    }

    MultiplyScores(shared, key);
    WaitCopies<kStages == 2 ? 2 : 1>();
    __syncthreads();  // A and the window's result are there

    float2 weight[2];  // of rows `lane` and `lane + 32`: the states' over the denominator, window's
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float denominator = 0;
#pragma unroll
      for (int k = 0; k < 2 * kHalves; ++k) denominator += shared.denominator[k][lane + 32 * r];
      if constexpr (kMayShareStates) {
        float* before = p.partial_norm + work.part(i, l.H, head) + lane + 32 * r;
        if (p.state_part > 0) denominator += *before;
        if (p.state_part + 1 < p.state_parts && warp == 0) *before = denominator;
      }
      float w = 1;
      if (l.W > 0) w = denominator < kDslaEpsilon ? 0.f : 1 / (1 + Exp(lse[r] - claim[r]));
      weight[r] = {w / (denominator + kDslaEpsilon), 1 - w};
    }
    float out[4][2][4] = {};
    const uint32_t v = SharedAddress(shared.v[i % kStages]);
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      uint32_t b[4];
      LoadMatrixTransposed(b, v + 16 * Swizzle<kPieces>(16 * k + lane % 16, 2 * warp + lane / 16));
#pragma unroll
      for (int m = k; m < 4; ++m) {
        const uint4 score = shared.score[(m * 4 + k) * 32 + lane];
        const uint32_t a[4] = {score.x, score.y, score.z, score.w};
        Mma(out[m][0], a, b[0], b[1]);
        Mma(out[m][1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const float(&even)[4] = acc[2 * k], (&odd)[4] = acc[2 * k + 1];
      const uint32_t b[4] = {Pack(even[0], even[1]), Pack(odd[0], odd[1]), Pack(even[2], even[3]),
                             Pack(odd[2], odd[3])};
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const uint4 query = shared.query[(k * 4 + m) * 32 + lane];
        const uint32_t a[4] = {query.x, query.y, query.z, query.w};
        Mma(out[m][0], a, b[0], b[1]);
        Mma(out[m][1], a, b[2], b[3]);
      }
    }
    if (last_head) {
      uint32_t a[kChunk / 16][4];  // V^T
#pragma unroll
      for (int f = 0; f < kChunk / 16; ++f)
        LoadMatrixTransposed(a[f], v + 16 * Swizzle<kPieces>(16 * f + lane % 8 + lane / 16 * 8,
                                                             2 * warp + lane / 8 % 2));
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const int c = k % (D / 16), block = k / (D / 16) * (kChunk * D * 2);
#pragma unroll
        for (int f = 0; f < kChunk / 16; ++f) {
          uint32_t keys[4];
          LoadMatrixTransposed(
              keys, key + block + 16 * Swizzle<kPieces>(16 * f + lane % 16, 2 * c + lane / 16));
          Mma(acc[2 * k], a[f], keys[0], keys[1]);
          Mma(acc[2 * k + 1], a[f], keys[2], keys[3]);
        }
#pragma unroll
        for (int j = 2 * k; j < 2 * k + 2; ++j) {
          const float4 decay = shared.decay[i % (kStages + 1)][4 * j + t];
          acc[j][0] = acc[j][0] * decay.y * decay.x;
          acc[j][1] = acc[j][1] * decay.w * decay.z;
          acc[j][2] = acc[j][2] * decay.y * decay.x;
          acc[j][3] = acc[j][3] * decay.w * decay.z;
        }
      }
    }

    WriteRows(p, shared, out, weight, i, head, {lane, warp, g, t});
    if (last_head && !more) break;
    item = last_head ? (i + 1) << 8 : item + 1;
  }

  if (!work.ends) return;
  const auto [lane, warp, g, t] = ThisPlace();
#pragma unroll
  for (int j = 0; j < 2 * kSteps; ++j) {
    float* to = StateOf<D>(l, work.n, work.h) + int64_t{c0 + 8 * j + 2 * t} * D + 16 * warp + g;
    to[0] = acc[j][0];
    to[D] = acc[j][1];
    to[8] = acc[j][2];
    to[D + 8] = acc[j][3];
  }
  for (int c = 32 * warp + lane; c < kSF; c += kThreads)
    NormOf(l, work.n, work.h)[c0 + c] = shared.norm[c];
}

template <int D, int kStates, int kSigns, int kStages>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  using S = ChunksShape<D, kStates, kSigns, kStages>;
  const dim3 grid(p.layer.Hkv * p.head_parts, p.wave_segments);
  Start<ChunksKernel<S>>("chunks", grid, S::kThreads, sizeof(ChunksShared<S>), p, stream);
}

// Whether a block may have so much shared memory.
bool HasRoom(size_t bytes) {
  int device = 0, room = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return static_cast<size_t>(room) >= bytes;
}

}  // namespace

void LaunchChunks(const PrefillParams& p, int D, cudaStream_t stream) {
  const bool signs = p.layer.F > D;
  if (p.layer.states > p.state_parts) {
    if (D == 64)
      signs ? Launch<64, 2, 2, 1>(p, stream) : Launch<64, 2, 1, 2>(p, stream);
    else
      HasRoom(sizeof(ChunksShared<ChunksShape<128, 2, 1, 2>>)) ? Launch<128, 2, 1, 2>(p, stream)
                                                               : Launch<128, 2, 1, 1>(p, stream);
  } else if (D == 64) {
    signs ? Launch<64, 1, 2, 2>(p, stream) : Launch<64, 1, 1, 2>(p, stream);
  } else {
    signs ? Launch<128, 1, 2, 1>(p, stream) : Launch<128, 1, 1, 2>(p, stream);
  }
}

}  // namespace dsla::cuda
