// Per chunk all that its queries need, for D 64 on compute capability 9.0: phi_q, Q~,
//   Q~ (e^R S) + tril(Q~ K~^T) V  over  Q~ (e^R z) + row sums of tril(Q~ K~^T),
// softmax attention over the window and the sinks, and the merge. In place of `window` and
// `output`, which do the same with the same sums.
//
// A block goes over chunks of a wave for a KV head, with a warpgroup for each query head of the
// group. One more warpgroup fetches for all of them what they multiply with, in stages, in the
// order in which they use it: blocks of 64 channels, sinks, tiles of the window, the first of which
// has the V that enters, too.
#include <algorithm>

#include "ops/dsla/cuda/queries_features.cuh"

namespace dsla::cuda {
namespace {

// Of a thread that fetches, and of one that computes: 4 times 128, as many as a launch has.
constexpr int kFetchRegisters = 56, kQueryRegisters = 152;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A warpgroup, with one query head; features of y and of -y where kSigns is 2.
template <int kHeads, int kSigns>
struct Queries {
  const PrefillParams& p;
  Head& own;
  int team, head;
  Mix mix;
  Turn<kHeads> at{};

  __device__ __forceinline__ Queries(const PrefillParams& p, int team)
      : p(p),
        own(HeadAt<kHeads>(team)),
        team(team),
        head(Shared().first_head + team),
        mix(p.layer, head) {}

  __device__ __forceinline__ static uint32_t Thread() { return ThreadIndex() % kTeam; }

  __device__ __forceinline__ const Stage& Take() const {
    Await(Shared().full[at.stage], at.turn);
    return StageAt<kHeads>(at.stage);
  }
  __device__ __forceinline__ void Release() {
    Arrive(Shared().empty[at.stage]);
    at.Next();
  }

  // From the order of mma's B fragments to rows of columns.
  __device__ __forceinline__ void CopyPhi() const {
    const uint32_t thread = Thread(), g = thread / 4 % 8, t = thread % 4;
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

  // Of a state: numerators, denominators in two columns, products with the keys of the chunk.
  struct Sums {
    float acc[1][kD / 8][4] = {}, norm[1][4] = {}, score[kChunk / 8][4] = {};
    __device__ __forceinline__ void Pin() {
      cuda::Pin(acc[0]);
      cuda::Pin(norm);
      cuda::Pin(score);
    }
    __device__ __forceinline__ void Scale(float by) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        norm[0][c] *= by;
#pragma unroll
        for (int j = 0; j < kD / 8; ++j) acc[0][j][c] *= by;
#pragma unroll
        for (int j = 0; j < kChunk / 8; ++j) score[j][c] *= by;
      }
    }
  };

  // A block of channels.
  __device__ __forceinline__ void AddBlock(Sums& sums, const uint32_t (&feature)[kD / 16][4]) {
    const Stage& stage = Take();
    const uint4* growth = stage.growth + Thread() / 32 * (kD * 2) + Thread() % 32;
    uint32_t a[kD / 16][4];
#pragma unroll
    for (int c = 0; c < kD / 16; ++c) {
      const uint4 e = growth[c * 32];
      a[c][0] = Product(feature[c][0], e.x);
      a[c][1] = Product(feature[c][1], e.y);
      a[c][2] = Product(feature[c][2], e.z);
      a[c][3] = Product(feature[c][3], e.w);
    }
    const uint32_t tiles = SharedAddress(&stage);
    Pin(a);
    sums.Pin();
    BeginProducts();
#pragma unroll
    for (int c = 0; c < kD / 16; ++c)
      WarpgroupMma<0>(sums.acc[0], sums.norm, sums.score, a[c], PanelDescriptor(tiles, c * 32));
    EndProducts();
    Pin(a);
    sums.Pin();
    Release();
  }

  // Numerators of what the states had before the chunk, denominators of both, and the weights of
  // the chunk's tokens.
  __device__ __forceinline__ void States(Sums& sums, float (&denominator)[2],
                                         uint32_t (&weights)[kChunk / 16][4], uint32_t q) {
    uint32_t feature[kSigns][kD / 16][4];
    Take();  // the queries are there, too
    {
      float y[kD / 8][4];
      ScoreKeys<kD, kD, kD>(y, q, SharedAddress(own.phi.pieces));
      MakeFeatures<kSigns>(feature, y, mix.last);
    }
#pragma unroll
    for (int sign = 0; sign < kSigns; ++sign) AddBlock(sums, feature[sign]);
    if (p.layer.states == 2) {
      sums.Scale(mix.ratio);
#pragma unroll
      for (int sign = 0; sign < kSigns; ++sign) AddBlock(sums, feature[sign]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) denominator[r] = sums.norm[0][2 * r] + sums.norm[0][2 * r + 1];
#pragma unroll
    for (int c = 0; c < kChunk / 16; ++c)
      MaskScores(weights[c], sums.score, c, Thread() / 32, Thread() % 32, denominator);
#pragma unroll
    for (int r = 0; r < 2; ++r) denominator[r] = QuadSum(denominator[r]);
  }

  // The first time of this warp's queries.
  __device__ __forceinline__ int Early(const Part& part) const {
    return part.chunk.e0 + p.layer.W + static_cast<int>(Thread() / 32 * 16);
  }

  // As window.cuh's. Rows that have a base are not looked through for a larger score unless a
  // weight is huge.
  template <int kKeys, typename MakeSeen>
  __device__ __forceinline__ static void Attend(Rows<kD>& rows, uint32_t q, const uint4* k,
                                                const uint4* v, int first, bool have_base,
                                                bool all_seen, const MakeSeen& seen) {
    constexpr float kHuge = 0x1p40f;
    const float scale = rsqrtf(static_cast<float>(kD)) * kLog2e;
    float score[kKeys / 8][4];
    ScoreKeys<kD, kKeys, kKeys>(score, q, SharedAddress(k));
    bool unseen[kKeys / 16] = {};
    if (!all_seen) HideUnseen(score, unseen, first, seen());
    uint32_t weights[kKeys / 16][4];
    float sum[2];
    for (bool raise = !have_base;; raise = true) {
      if (raise) RaiseBase(rows, score, scale);
      sum[0] = sum[1] = 0;
#pragma unroll
      for (int c = 0; c < kKeys / 16; ++c) {
        weights[c][0] = weights[c][1] = weights[c][2] = weights[c][3] = 0;
        if (__all_sync(~0u, unseen[c])) continue;  // a branch, not predicates
        Weigh(weights[c], sum, score[2 * c], score[2 * c + 1], scale, rows.base);
      }
      if (raise || !__any_sync(~0u, fmaxf(sum[0], sum[1]) > kHuge)) break;
    }
    rows.sum[0] += sum[0];
    rows.sum[1] += sum[1];
    AddValues<kD, kKeys, kKeys>(rows.acc, weights, SharedAddress(v));
  }

  __device__ __forceinline__ void Sinks(Rows<kD>& rows, const Part& part, uint32_t q) {
    const Layer& l = p.layer;
    const int early = Early(part);
    const Stage& stage = Take();
    for (int i = 0; i < l.S; i += kSinkGroup) {
      const int at = i / kSinkGroup * kSinkPieces<kD>;
      Attend<kSinkGroup>(rows, q, stage.key.pieces + at, stage.value.pieces + at, i, i > 0, false,
                         [&] { return Seen([&](int r) { return SeenOfSinks(l, early + r); }); });
    }
    Release();
  }

  __device__ __forceinline__ void Window(Rows<kD>& rows, const Part& part, uint32_t q) {
    const Layer& l = p.layer;
    const int early = Early(part), tiles = TilesOf(l);
    const Seen seen([&](int r) { return SeenOfWindow(l, early + r); });
    for (int i = 0; i < tiles; ++i) {
      const Stage& stage = Take();
      const int first = part.base + i * kChunk;
      const bool all_seen = first > early + 15 - l.W && first + kChunk - 1 <= early && first >= l.S;
      Attend<kChunk>(rows, q, stage.key.pieces, stage.value.pieces, first, i > 0 || l.S > 0,
                     all_seen, [&] { return seen; });
      Release();
    }
  }

  __device__ __forceinline__ void LoadClaims(float (&claim)[2], const Part& part) const {
    const int row = Thread() / 32 * 16 + Thread() % 32 / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (row + 8 * r >= part.chunk.lo && row + 8 * r < part.chunk.hi)
        claim[r] = p.claim[(part.row + row + 8 * r) * p.layer.H + head];
  }

  // The states' numerators, of which `share` is to be taken, with the window's.
  __device__ __forceinline__ static void Merge(float (&out)[kD / 8][4], float (&share)[2],
                                               const Rows<kD>& rows, const float (&denominator)[2],
                                               const float (&claim)[2]) {
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
          out[j][c] = share[r] * out[j][c] + window * rows.acc[0][j][c];
    }
  }

  __device__ __forceinline__ void WriteOut(const float (&out)[kD / 8][4], const Part& part,
                                           Tile<kD>& tile) const {
    const int thread = Thread(), lane = thread % 32, warp = thread / 32;
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
      if (l.W > 0) LoadClaims(claim, part);
      Sums sums;
      float denominator[2];
      uint32_t weights[kChunk / 16][4];
      States(sums, denominator, weights, q);
      float(&out)[1][kD / 8][4] = sums.acc;
      Rows<kD> rows;
      if (l.S > 0) Sinks(rows, part, q);
      AddValues<kD, kChunk, kChunk>(out, weights, SharedAddress(Take().value.pieces));
      float share[2] = {Reciprocal(denominator[0] + kDslaEpsilon),
                        Reciprocal(denominator[1] + kDslaEpsilon)};
      if (l.W > 0) {
        Window(rows, part, q);
        Merge(out[0], share, rows, denominator, claim);
      } else {
        Release();
#pragma unroll
        for (int j = 0; j < kD / 8; ++j)
#pragma unroll
          for (int c = 0; c < 4; ++c) out[0][j][c] *= share[c / 2];
      }
      WriteOut(out[0], part, tile);
      PublishCopies();  // copies in bulk write there next
      Arrive(Shared().q_empty[i % 2]);
    }
  }
};

#endif

// grid (KV heads times blocks that share one's group, runs of chunks), a warpgroup more than heads
template <int kHeads, int kSigns>
__global__ void __launch_bounds__((kHeads + 1) * kTeam, kHeads == 1 ? 2 : 1)
    QueriesKernel(const __grid_constant__ QueriesParams p) {
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
  if (thread < kStages<kHeads>) {
    InitBarrier(shared.full[thread], kTeam / 32);
    InitBarrier(shared.empty[thread], head_count * kTeam / 32);
  }
  if (thread < 2) InitBarrier(shared.q_empty[thread], head_count * kTeam / 32);
  for (int i = thread; i < kStages<kHeads> * 64; i += blockDim.x)
    StageAt<kHeads>(i / 64).norm[i % 64] = {};
  PublishCopies();
  const int count = __syncthreads_count(has_chunk);
  if (thread == 0) {
    shared.h = h;
    shared.first_head = h * l.G + head;
    shared.heads = head_count;
    shared.first = first;
    shared.count = count;
  }
  __syncthreads();
  const int team = __shfl_sync(~0u, thread / kTeam, 0);
  if (team == heads) {
    GiveUpRegisters<kFetchRegisters>();
    AwaitPrevious();
    if (count > 0) Fetcher<kHeads>(p).Run();
  } else if (team < head_count) {
    TakeRegisters<kQueryRegisters>();
    Queries<kHeads, kSigns>(p, team).Run();
  }
#else
  __trap();  // OnHopper says where it may be called
#endif
}

template <int kHeads, int kSigns>
void Launch(const PrefillParams& p, int parts, int heads, cudaStream_t stream) {
  const int processors = CurrentDevice().multiprocessors;
  // As few rounds of the multiprocessors as kMostChunks allows, all of one length.
  const int64_t blocks = processors * (kHeads == 1 ? 2 : 1);
  const int64_t work = int64_t{p.wave_chunks} * p.layer.Hkv * parts;
  const int64_t rounds = CeilDiv(work, blocks * kMostChunks),
                chunks = CeilDiv(work, blocks * rounds);
  const dim3 grid(p.layer.Hkv * parts, static_cast<unsigned>(CeilDiv(p.wave_chunks, chunks)));
  Start<QueriesKernel<kHeads, kSigns>>("queries", grid, (heads + 1) * kTeam, sizeof(Memory<kHeads>),
                                       WithHeadMaps(p), stream);
}

}  // namespace

void LaunchQueries(const PrefillParams& p, cudaStream_t stream) {
  const int parts = (p.layer.G + 2) / 3, heads = (p.layer.G + parts - 1) / parts;
  const bool both_signs = p.layer.F > kD;
  if (heads == 1)
    both_signs ? Launch<1, 2>(p, parts, heads, stream) : Launch<1, 1>(p, parts, heads, stream);
  else
    both_signs ? Launch<3, 2>(p, parts, heads, stream) : Launch<3, 1>(p, parts, heads, stream);
}

}  // namespace dsla::cuda
