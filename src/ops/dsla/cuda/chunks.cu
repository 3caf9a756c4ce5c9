// The chunks of a segment, one after another, for one KV head and the query heads of its group:
//   O = Q~ S^ + tril(Q~ K~^T) V,  denominator = Q~ (e^R z) + row sums of tril(Q~ K~^T),
// merged with the window's result; then S' = e^{L-R} (S^ + K~^T V). For compute capability 9.0.
//
// Two warpgroups have the states (chunks.cuh) and make the outputs, transposed too. A third makes
// what they multiply them with (chunks_queries.cuh).
#include "ops/dsla/cuda/chunks_queries.cuh"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 3 * kTeam;
// Of a thread with states, and of one without: three times 168, as many as a launch has.
constexpr int kStateRegisters = 200, kQueryRegisters = 104;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int kChannels>
struct States {
  const ChunksParams& p;
  ChunksShared<kChannels>& s;
  const Work& work;

  __device__ __forceinline__ States(const ChunksParams& p, ChunksShared<kChannels>& s)
      : p(p), s(s), work(s.work) {}

  // This team's panels of the window's result, and with a chunk's first head of V. Without a window
  // zeros, as of rows that there are not.
  __device__ __forceinline__ void Fetch(const Item& item) const {
    const int thread = ThreadIndex(), team = thread / kTeam;
    const int warp = __shfl_sync(~0u, thread % kTeam / 32, 0);
    uint64_t& barrier = s.tile_full[team];
    const bool values = item.head == 0 && work.whole(item.i);
    if (warp == 1 && Elect()) {
      ArriveExpecting(barrier, (values ? 2 : 1) * kPanelBytes);
      CopyTile(s.out[team], p.maps.window, p.layer.W > 0 ? work.row(item.i) : p.total_rows,
               2 * (work.h * p.layer.G + item.head) + team, barrier);
    } else if (warp == 2 && values && Elect()) {
      CopyTile(s.v[team], p.maps.v, work.v0 + item.i * kChunk, 2 * work.h + team, barrier);
    }
    if (item.head > 0 || values) return;
    FetchValues<kTeam>(p, s.v[team], work.chunk(item.i), work.h, team, thread % kTeam);
    CommitCopies();
  }

  // Rows and columns of a warp's part of `out`: piece i of 4 of this lane's.
  struct OutPiece {
    uint4* shared;
    __nv_bfloat16* global;
    bool valid;
  };
  __device__ __forceinline__ OutPiece out_piece(const StatePlace& at, const Item& item,
                                                int i) const {
    const int lane = 4 * at.g + at.t;
    const int row = lane / 2 + 16 * i, c = 2 * at.warp + lane % 2;
    const Chunk chunk = work.chunk(item.i);
    const int64_t head = work.h * p.layer.G + item.head;
    return {s.out[at.team] + Swizzle<kPanelPieces>(row, c),
            p.out + (int64_t{work.row(item.i) + row} * p.layer.H + head) * kWidth + 64 * at.team +
                8 * c,
            row >= chunk.lo && row < chunk.hi};
  }
  // From O^T: the merge with the window's result, and to memory.
  __device__ __forceinline__ void WriteOut(const float (&o)[kChunk / 8][4], const Item& item,
                                           int k) const {
    const StatePlace at(ThreadIndex());
    const int lane = 4 * at.g + at.t;
    const auto* weights = reinterpret_cast<const float4*>(s.weight[k % 2]) + at.t;
    const uint32_t tile =
        SharedAddress(s.out[at.team]) +
        16 * Swizzle<kPanelPieces>(lane % 8 + lane / 16 * 8, 2 * at.warp + lane / 8 % 2);
#pragma unroll
    for (int m = 0; m < kChunk / 16; ++m) {
      const uint32_t place = tile + m * (16 * 128);
      uint32_t x[4];
      LoadMatrixTransposed(x, place);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 w = weights[4 * (2 * m + i)];  // of two tokens
        const float(&from)[4] = o[2 * m + i];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          uint32_t& to = x[2 * i + r];
          to = Pack(w.x * from[2 * r] + w.y * Low(to), w.z * from[2 * r + 1] + w.w * High(to));
        }
      }
      StoreMatrixTransposed(place, x);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const OutPiece piece = out_piece(at, item, i);
      // No branch, which the compiler would have the products under way end before.
      const uint4 x = *piece.shared;
      asm volatile(
          "{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.v4.b32 [%1], {%2, %3, %4, "
          "%5};\n}" ::"r"(static_cast<int>(piece.valid)),
          "l"(piece.global), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
          : "memory");
    }
  }

  // O^T += S^T Q~^T, with S^ = e^R S, after the chunk before's e^{L-R}, made on the way if this is
  // the chunk's first head. Two k steps at a time, of which no product is under way when the
  // states of the next are read: to the compiler these are the product that made them.
  __device__ __forceinline__ void AddStates(float (&o)[kChunk / 8][4],
                                            float (&acc)[kChannels / 8][4], int k,
                                            const Item& item) const {
    const float4* decay = s.decay[item.i % 2] + ThreadIndex() % 4;
    const uint32_t query = SharedAddress(s.query[k % 2]);
#pragma unroll
    for (int u = 0; u < kChannels / 32; ++u) {
      if (item.head == 0) {
#pragma unroll
        for (int j = 4 * u; j < 4 * u + 4; ++j) {
          // Not by the product of both: that could be too small for fp32.
          const float4 d = decay[4 * j];
          acc[j][0] = acc[j][0] * d.x * d.z;
          acc[j][1] = acc[j][1] * d.y * d.w;
          acc[j][2] = acc[j][2] * d.x * d.z;
          acc[j][3] = acc[j][3] * d.y * d.w;
        }
      }
      uint32_t a[2][4];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float(&even)[4] = acc[4 * u + 2 * c], (&odd)[4] = acc[4 * u + 2 * c + 1];
        a[c][0] = Pack(even[0], even[1]);
        a[c][1] = Pack(even[2], even[3]);
        a[c][2] = Pack(odd[0], odd[1]);
        a[c][3] = Pack(odd[2], odd[3]);
      }
      Pin(a);
      Pin(o);
      BeginProducts();
#pragma unroll
      for (int c = 0; c < 2; ++c)
        WarpgroupMma<0>(o, a[c],
                        PanelDescriptor(query, u / 2 * kPanelBytes + (u % 2 * 2 + c) * 32));
      EndProducts();
      Pin(a);
      Pin(o);
    }
  }

  // Issues S^T += V^T K~: this warpgroup's panel of V, all panels of K~.
  static __device__ __forceinline__ void AddKeys(float (&acc)[kChannels / 8][4], uint32_t v,
                                                 uint32_t key) {
#pragma unroll
    for (int c = 0; c < kChunk / 16; ++c)
      WarpgroupMma<1, 1>(acc, PanelDescriptor(v, c * (16 * 128)),
                         PanelDescriptor(key, c * (16 * 128), kKeyPanelBytes));
  }

  // An item's output; then, with the last of a chunk, its keys into the states.
  template <bool kLastHead>
  __device__ __forceinline__ void Attend(float (&acc)[kChannels / 8][4], const Item& item,
                                         int k) const {
    const int team = __shfl_sync(~0u, ThreadIndex() / kTeam, 0);
    const uint32_t v = SharedAddress(s.v[team]), score = SharedAddress(s.score);
    float o[kChunk / 8][4] = {};
    Await(s.query_full[k % 2], Parity(k));
    AddStates(o, acc, k, item);
    Arrive(s.query_free[k % 2]);
    Await(s.tile_full[team], k);
    if (item.head == 0 && !work.whole(item.i)) {
      WaitCopies<0>();
      PublishCopies();
      Barrier<kTeam>(team);  // V is there
    }
    Await(s.score_full, k % 2);
    Pin(acc);
    Pin(o);
    BeginProducts();
#pragma unroll
    for (int c = 0; c < kChunk / 16; ++c)
      WarpgroupMma<1, 0>(o, PanelDescriptor(v, c * (16 * 128)), PanelDescriptor(score, c * 32));
    CommitProducts();
    if constexpr (kLastHead) {
      AddKeys(acc, v, SharedAddress(s.key) + KeyRow(item.i) * 128);
      CommitProducts();
      WaitProducts<1>();
    } else {
      WaitProducts<0>();
    }
    Pin(o);
    Arrive(s.score_free);
    WriteOut(o, item, k);
    PublishCopies();  // before the next window's result is copied to the same place
    if constexpr (kLastHead) {
      WaitProducts<0>();
      Pin(acc);
      Arrive(s.key_free[item.i % 2]);
      if (item.i + 1 == work.count) return;
    }
    Barrier<kTeam>(team);  // V and the window's result have been read
    Fetch(item.Next(p.layer.G));
  }

  __device__ __forceinline__ void Run() const {
    const Layer& l = p.layer;
    AwaitPrevious();
    AllowNext();
    Fetch({0, 0});
    float acc[kChannels / 8][4];
    const auto slot = [&] {
      return reinterpret_cast<float*>(SlotBase(l, work.n) + l.at.state) +
             int64_t{work.h} * kChannels * kWidth;
    };
    LoadStates<kChannels>(acc, StatePlace(ThreadIndex()), work.alone ? slot() : nullptr,
                          p.start + (int64_t{work.store} * l.Hkv + work.h) * kChannels * kWidth);
    int k = 0;
    for (int i = 0;; ++i) {
      for (int head = 0; head + 1 < l.G; ++head) Attend<false>(acc, {i, head}, k++);
      Attend<true>(acc, {i, l.G - 1}, k++);
      if (i + 1 == work.count) break;
    }
    if (!work.ends) return;
    Await(s.query_full[k % 2], Parity(k));
    const StatePlace at(ThreadIndex());
    const float4* decay = s.decay[work.count % 2] + at.t;
#pragma unroll
    for (int j = 0; j < kChannels / 8; ++j) {
      const float4 d = decay[4 * j];
      acc[j][0] *= d.x;
      acc[j][1] *= d.y;
      acc[j][2] *= d.x;
      acc[j][3] *= d.y;
    }
    StoreStates<kChannels>(acc, at, slot());
  }
};

#endif

// grid (Hkv, segments)
template <int kChannels>
__global__ void __launch_bounds__(kThreads, 1)
    ChunksKernel(const __grid_constant__ ChunksParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::byte memory[];
  auto& s = *reinterpret_cast<ChunksShared<kChannels>*>(memory);
  const Segment segment = SegmentOf(p, blockIdx.y);
  if (segment.count < 0) {
    AwaitPrevious();
    return;
  }
  if (threadIdx.x == 0) {
    const Layer& l = p.layer;
    const bool alone = p.segment == 0 || IsWhole(segment);
    const int row_start = l.row_start[segment.n], pos = l.pos[segment.n];
    const int h = blockIdx.x, row0 = row_start + (segment.e0 + l.W - pos);
    const int64_t part = int64_t{segment.at} * l.Hkv + h;
    s.work = {segment.n,
              segment.e0,
              segment.at,
              segment.count,
              segment.lo,
              segment.hi,
              h,
              segment.store,
              alone,
              alone || (segment.flags & kLast),
              row0,
              row_start + (segment.e0 - pos),
              max(pos, l.S),
              reinterpret_cast<const float4*>(p.decay) + part * (kChannels / 2),
              reinterpret_cast<const float2*>(p.key_sum) + part * (2 * kChannels),
              p.lse + (int64_t{segment.at} * l.H + h * l.G) * kChunk,
              p.claim + int64_t{row0} * l.H + h * l.G};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      InitBarrier(s.query_full[i], kTeam / 32);
      InitBarrier(s.query_free[i], 2 * kTeam / 32);
      InitBarrier(s.key_free[i], 2 * kTeam / 32);
    }
    InitBarrier(s.score_full, kTeam / 32);
    InitBarrier(s.score_free, 2 * kTeam / 32);
    InitCopyBarrier(s.q_full);
    InitCopyBarrier(s.growth_full);
    InitCopyBarrier(s.key_full);
#pragma unroll
    for (int team = 0; team < 2; ++team) InitCopyBarrier(s.tile_full[team]);
    PublishCopies();  // the barriers, to the copies
  }
  __syncthreads();
  if (__shfl_sync(~0u, threadIdx.x / kTeam, 0) == 2) {
    GiveUpRegisters<kQueryRegisters>();
    Queries<kChannels>(p, s).Run();
  } else {
    TakeRegisters<kStateRegisters>();
    States<kChannels>(p, s).Run();
  }
#else
  __trap();  // OnHopper says where it may be called
#endif
}

template <int kChannels>
void Launch(const PrefillParams& p, cudaStream_t stream) {
  Start<ChunksKernel<kChannels>>("chunks", dim3(p.layer.Hkv, p.wave_segments), kThreads,
                                 sizeof(ChunksShared<kChannels>), WithMaps(p), stream);
}

}  // namespace

void LaunchChunks(const PrefillParams& p, cudaStream_t stream) {
  p.layer.states == 2 ? Launch<256>(p, stream) : Launch<128>(p, stream);
}

}  // namespace dsla::cuda
