// Per chunk all that its queries need, for D 64 on compute capability 9.0: phi_q, Q~,
//   Q~ (e^R S) + tril(Q~ K~^T) V  over  Q~ (e^R z) + row sums of tril(Q~ K~^T),
// softmax attention over the window and the sinks, and the merge. In place of `window` and
// `output`, which do the same with the same sums.
//
// A block goes over chunks of a wave for a KV head, with a warpgroup for each query head of the
// group. One more warpgroup fetches for all of them what they multiply with, in stages, in the
// order in which they use it: blocks of 64 channels, tiles of the window (the first of them has the
// V that enters, too), sinks.
#include <algorithm>

#include "ops/dsla/cuda/output.cuh"
#include "ops/dsla/cuda/queries.cuh"

namespace dsla::cuda {
namespace {

// Of a thread that fetches, and of one that computes: 4 times 128, as many as a launch has.
constexpr int kFetchRegisters = 56, kQueryRegisters = 152;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A warpgroup, with one query head.
struct Queries {
  const PrefillParams& p;
  Head& own;
  int team, head;
  LogMix log_mix;
  Turn at{};

  __device__ __forceinline__ Queries(const PrefillParams& p, int team)
      : p(p),
        own(HeadAt(team)),
        team(team),
        head(Shared().first_head + team),
        log_mix(p.layer, head) {}

  __device__ __forceinline__ const Stage& Take() const {
    Await(Shared().full[at.stage], at.turn);
    return StageAt(at.stage);
  }
  __device__ __forceinline__ void Release() {
    Arrive(Shared().empty[at.stage]);
    at.Next();
  }

  // From the order of mma's B fragments to rows of columns.
  __device__ __forceinline__ void CopyPhi() const {
    const int thread = ThreadIndex() % kTeam, g = thread / 4 % 8, t = thread % 4;
    const auto* from =
        reinterpret_cast<const uint4*>(p.layer.weights.phi_q + int64_t{head} * kD * kD) + thread;
    auto* to = reinterpret_cast<uint32_t*>(own.phi.pieces) + t;
#pragma unroll
    for (int c = 0; c < kD / 16; ++c) {
      const uint4 x = __ldg(from + c * kTeam);
      const int column = thread / 32 * 16 + g;
      to[4 * Swizzle<8>(column, 2 * c)] = x.x;
      to[4 * Swizzle<8>(column, 2 * c + 1)] = x.y;
      to[4 * Swizzle<8>(column + 8, 2 * c)] = x.z;
      to[4 * Swizzle<8>(column + 8, 2 * c + 1)] = x.w;
    }
  }

  // The states' output, and its denominators by row. Leaves the first tile of tokens in use.
  __device__ __forceinline__ void Linear(float (&acc)[1][kD / 8][4], float (&denominator)[2],
                                         uint32_t q) {
    const Layer& l = p.layer;
    Take();  // the queries are there, too
    float y[kD / 8][4], score[kChunk / 8][4] = {}, log_sum[2][2], norm[2] = {};
    ScoreKeys<kD, kD, kD>(y, q, SharedAddress(own.phi.pieces));
    LogSums<kD>(y, l.F > kD, log_sum);
    for (int i = 0; i < l.SF / kD; ++i) {
      const BlockOfFeatures features(i, l.F > kD, log_mix, log_sum);
      const Stage& stage = Take();
      const int thread = ThreadIndex() % kTeam;
      const uint4* growth = stage.part[1].pieces + thread / 32 * (kD * 2) + thread % 32;
      const auto* z = reinterpret_cast<const float2*>(Shared().norm[at.stage]) + thread % 4;
      uint32_t a[kD / 16][4];
#pragma unroll
      for (int c = 0; c < kD / 16; ++c)
        MakeQueries<kD>(a[c], y, c, features, growth[c * 32], z, norm);
      const uint32_t key = SharedAddress(stage.part[0].pieces);
      Pin(a);
      Pin(score);
      Pin(acc[0]);
      BeginProducts();
#pragma unroll
      for (int c = 0; c < kD / 16; ++c) {
        WarpgroupMma<0>(score, a[c], PanelDescriptor(key, c * 32));
        WarpgroupMma<0>(acc[0], a[c], PanelDescriptor(key, 2 * sizeof(Tile<kD>) + c * 32));
      }
      EndProducts();
      Pin(a);
      Pin(score);
      Pin(acc[0]);
      Release();
    }
    const Stage& stage = Take();
    const int thread = ThreadIndex() % kTeam;
    uint32_t weights[kChunk / 16][4];
#pragma unroll
    for (int c = 0; c < kChunk / 16; ++c)
      MaskScores(weights[c], score, c, thread / 32, thread % 32, norm);
    AddValues<kD, kChunk, kChunk>(acc, weights, SharedAddress(stage.part[1].pieces));
#pragma unroll
    for (int r = 0; r < 2; ++r) denominator[r] = QuadSum(norm[r]);
  }

  __device__ __forceinline__ void Window(Rows<kD>& rows, const Part& part, uint32_t q) {
    const Layer& l = p.layer;
    const float scale = rsqrtf(static_cast<float>(kD)) * kLog2e;
    // The first time of this warp's queries.
    const int early = part.chunk.e0 + l.W + ThreadIndex() % kTeam / 32 * 16;
    const int tiles = TilesOf(l);
    for (int i = 0; i < tiles; ++i) {
      const Stage& stage = Take();
      const int first = part.base + i * kChunk;
      const bool all_seen = first > early + 15 - l.W && first + kChunk - 1 <= early && first >= l.S;
      Attend<kD, kChunk, kChunk>(rows, q, SharedAddress(stage.part[0].pieces),
                                 SharedAddress(stage.part[1].pieces), scale, first, all_seen,
                                 [&](int r) { return SeenOfWindow(l, early + r); });
      Release();
    }
    if (l.S == 0) return;
    const Stage& stage = Take();
    for (int i = 0; i < l.S; i += kSinkGroup) {
      const int at = i / kSinkGroup * kSinkPieces<kD>;
      Attend<kD, kSinkGroup, kSinkGroup>(rows, q, SharedAddress(stage.part[0].pieces + at),
                                         SharedAddress(stage.part[1].pieces + at), scale, i, false,
                                         [&](int r) { return SeenOfSinks(l, early + r); });
    }
    Release();
  }

  __device__ __forceinline__ void WriteOut(const float (&out)[kD / 8][4], const Part& part,
                                           Tile<kD>& tile) const {
    const int thread = ThreadIndex() % kTeam, lane = thread % 32, warp = thread / 32;
    const uint32_t to =
        SharedAddress(tile.pieces) + 16 * Swizzle<8>(16 * warp + lane % 16, lane / 16);
    Barrier<kTeam>(team);  // the queries have been read
#pragma unroll
    for (int c = 0; c < kD / 16; ++c) {
      const float(&even)[4] = out[2 * c], (&odd)[4] = out[2 * c + 1];
      const uint32_t x[4] = {Pack(even[0], even[1]), Pack(even[2], even[3]), Pack(odd[0], odd[1]),
                             Pack(odd[2], odd[3])};
      StoreMatrix(to ^ (32 * c), x);
    }
    __syncwarp();
    const int first = 16 * warp + lane / 8;
    auto* rows = reinterpret_cast<uint4*>(p.out + (part.row * p.layer.H + head) * kD) + lane % 8;
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      const int row = first + i;
      if (row >= part.chunk.lo && row < part.chunk.hi)
        rows[int64_t{row} * p.layer.H * (kD / 8)] = tile.pieces[Swizzle<8>(row, lane % 8)];
    }
  }

  __device__ __forceinline__ void Run() {
    const Layer& l = p.layer;
    CopyPhi();
    PublishCopies();
    Barrier<kTeam>(team);
    AwaitPrevious();
    AllowNext();
    for (int i = 0; i < Shared().count; ++i) {
      const Part& part = Shared().part[i];
      Tile<kD>& tile = own.q[i % 2];
      const uint32_t q = SharedAddress(tile.pieces);
      float claim[2] = {};
      if (l.W > 0) {
        const int row = ThreadIndex() % kTeam / 32 * 16 + ThreadIndex() % 32 / 4;
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (row + 8 * r >= part.chunk.lo && row + 8 * r < part.chunk.hi)
            claim[r] = p.claim[(part.row + row + 8 * r) * l.H + head];
      }
      float out[1][kD / 8][4] = {}, denominator[2];
      Linear(out, denominator, q);
      float share[2] = {Reciprocal(denominator[0] + kDslaEpsilon),
                        Reciprocal(denominator[1] + kDslaEpsilon)};
      if (l.W > 0) {
        Rows<kD> rows;
        Window(rows, part, q);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float all = QuadSum(rows.sum[r]);
          const float lse = (rows.base[r] + Log2(all)) * kLn2;
          const float states = StatesShare(denominator[r], lse, claim[r]);
          const float window = (1 - states) * Reciprocal(all);
          share[r] *= states;
#pragma unroll
          for (int j = 0; j < kD / 8; ++j)
#pragma unroll
            for (int c = 2 * r; c < 2 * r + 2; ++c)
              out[0][j][c] = share[r] * out[0][j][c] + window * rows.acc[0][j][c];
        }
      } else {
        Release();
#pragma unroll
        for (int j = 0; j < kD / 8; ++j)
#pragma unroll
          for (int c = 0; c < 4; ++c) out[0][j][c] *= share[c / 2];
      }
      WriteOut(out[0], part, tile);
      Arrive(Shared().q_empty[i % 2]);
    }
  }
};

#endif

// grid (KV heads times blocks that share one's group, runs of chunks), a warpgroup more than heads
template <int kHeads>
__global__ void __launch_bounds__((kHeads + 1) * kTeam, kHeads == 1 ? 2 : 1)
    QueriesKernel(const __grid_constant__ PrefillParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const Layer& l = p.layer;
  Control& shared = Shared();
  const int heads = blockDim.x / kTeam - 1, thread = threadIdx.x;
  const int parts = gridDim.x / l.Hkv, h = blockIdx.x / parts, head = blockIdx.x % parts * heads;
  const int chunks = (p.wave_chunks + gridDim.y - 1) / gridDim.y, first = blockIdx.y * chunks;
  const int head_count = min(heads, l.G - head);
  bool has_chunk = thread < chunks && first + thread < p.wave_chunks;
  if (has_chunk) {
    const Chunk chunk = ChunkOf(p, first + thread);
    has_chunk = chunk.n >= 0;
    if (has_chunk) shared.part[thread] = Part(p, chunk, h, kD);
  }
  if (thread < kMostStages) {
    InitBarrier(shared.full[thread], kTeam / 32);
    InitBarrier(shared.empty[thread], head_count * kTeam / 32);
  }
  if (thread < 2) InitBarrier(shared.q_empty[thread], head_count * kTeam / 32);
  const int count = __syncthreads_count(has_chunk);
  if (thread == 0) {
    shared.h = h;
    shared.first_head = h * l.G + head;
    shared.heads = head_count;
    shared.first = first;
    shared.count = count;
    shared.stages = kPlaces<kHeads> - heads;
  }
  __syncthreads();
  const int team = __shfl_sync(~0u, thread / kTeam, 0);
  if (team == heads) {
    GiveUpRegisters<kFetchRegisters>();
    AwaitPrevious();
    if (count > 0) Fetcher(p).Run();
  } else if (team < head_count) {
    TakeRegisters<kQueryRegisters>();
    Queries(p, team).Run();
  }
#else
  __trap();  // OnHopper says where it may be called
#endif
}

template <int kHeads>
void Launch(const PrefillParams& p, int parts, int heads, cudaStream_t stream) {
  const int processors = CurrentDevice().multiprocessors;
  // As few rounds of the multiprocessors as kMostChunks allows, all of one length.
  const int64_t blocks = processors * (kHeads == 1 ? 2 : 1);
  const int64_t work = int64_t{p.wave_chunks} * p.layer.Hkv * parts;
  const int64_t rounds = CeilDiv(work, blocks * kMostChunks),
                chunks = CeilDiv(work, blocks * rounds);
  const dim3 grid(p.layer.Hkv * parts, static_cast<unsigned>(CeilDiv(p.wave_chunks, chunks)));
  Start<QueriesKernel<kHeads>>("queries", grid, (heads + 1) * kTeam,
                               sizeof(Control) + kPlaces<kHeads> * sizeof(Stage), p, stream);
}

}  // namespace

void LaunchQueries(const PrefillParams& p, cudaStream_t stream) {
  const int parts = (p.layer.G + 2) / 3, heads = (p.layer.G + parts - 1) / parts;
  heads == 1 ? Launch<1>(p, parts, heads, stream) : Launch<3>(p, parts, heads, stream);
}

}  // namespace dsla::cuda
