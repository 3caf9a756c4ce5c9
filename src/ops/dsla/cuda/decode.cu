// One new row per sequence, in two launches:
//   project  products with the adapter's matrices, 16 rows at a time: phi_q, phi_k, e^a - 1
//   update   states (read and written once) and window, the merge of both, and the row into ring
//            and sinks
// `update` has two forms, which give the same bits. Where there are several tasks for each
// multiprocessor, as many blocks as these hold go from task to task, with a warp for each strand,
// and fetch ahead: memory always has something to do. Where there are fewer, a task is split: it
// has a warp for each step of each strand, in one block or (compute capability 9.0) in a cluster of
// two or four.
#include <algorithm>
#include <type_traits>

#include "base/check.h"
#include "ops/dsla/cuda/decode_merge.cuh"
#include "ops/dsla/cuda/decode_states.cuh"
#include "ops/dsla/cuda/decode_window.cuh"

namespace dsla::cuda {
namespace {

// Places for tiles that each warp has: 16 KB, or, where a split task needs no more of them, two.
constexpr int Places(int D) { return 256 / D; }

// Most warps of a block whose tasks are split: what there are registers for.
constexpr int MaxSplitWarps(int D, int G) { return D == 128 ? 8 : G > 4 ? 12 : 16; }

template <int D, int kG>
constexpr int SharedBytes(int warps, int places, int sums) {
  return warps * (places * TileBytes(D) + int{sizeof(typename States<D, kG>::Shared)}) +
         sums * int{sizeof(Sums<D, kG>)};
}

// What a warp fetches: the tiles of steps [first, last) of a strand, task by task, in the order of
// their use.
template <int D>
struct Ahead {
  int strand, first, last, step, window_tile;

  __device__ __forceinline__ Ahead(const DecodeParams& p, int strand, int first, int last)
      : strand(strand), first(first), last(last) {
    Begin(p);
  }
  __device__ __forceinline__ void Begin(const DecodeParams& p) {
    step = first;
    window_tile = FirstWindowTile(p, strand, step);
  }
  // The next tile; returns whether it was the task's last.
  __device__ __forceinline__ bool Fetch(const DecodeParams& p, const Task<D>& task, uint4* to) {
    if (window_tile < p.tiles) {
      FetchKeys(p, task, to, window_tile * kTile);
      window_tile += kStrands * p.steps;
      if (window_tile < p.tiles || step < p.state_steps) return false;
    } else {
      FetchStates(p.layer, task, to, kStrands * step + strand);
    }
    window_tile = FirstWindowTile(p, strand, ++step);
    return step == last;
  }
};

// Whole tasks: grid (blocks), kStrands warps. Split: grid (tasks, 1, kStrands / own_strands), a
// cluster along z, own_strands * steps warps.
template <int D, int kG, bool kSplit>
__global__ void __launch_bounds__(32 * (kSplit ? MaxSplitWarps(D, kG) : kStrands), kSplit    ? 1
                                                                                   : D == 64 ? 3
                                                                                             : 2)
    UpdateKernel(const __grid_constant__ DecodeParams p) {
  constexpr int kPlaces = Places(D), kJoint = JointTiles(D), kPlaceUnits = TileBytes(D) / 16;
  extern __shared__ __align__(256) uint4 shared[];
  __shared__ float claims[kG];
  __shared__ uint64_t mailbox;
  const Layer& l = p.layer;
  const int lane = threadIdx.x % 32, warp = Warp();
  const int places = kSplit && kPlaces > 2 ? p.places : kPlaces;
  const int own_strands = kSplit ? p.own_strands : kStrands, sums_of_strand = kSplit ? p.steps : 1;
  const int warps = own_strands * sums_of_strand;
  const bool in_cluster = kSplit && own_strands < kStrands;
  const int first = kSplit ? warp / own_strands : 0, last = kSplit ? first + 1 : p.steps;
  const int own = warp - first * own_strands;
  const int strand = (in_cluster ? blockIdx.z * own_strands : 0) + own;

  // Lane i has what there is to know of the block's i-th task: divisions are made once.
  const int mine = blockIdx.x + lane * gridDim.x, row = mine / l.Hkv;
  int slot = -1, pos = -1;
  if (row < l.N) {
    slot = l.slots[row];
    pos = l.pos[row];
  }
  const int newest = l.W > 0 ? pos % l.W : 0;
  unsigned tasks = __ballot_sync(~0u, (slot | pos) >= 0);
  if (tasks == 0) {  // who waits for this grid also relies on what it would have waited for
    AwaitPrevious();
    return;
  }
  const auto task_of = [&](unsigned mask) {
    const int i = __ffs(mask) - 1, n = __shfl_sync(~0u, row, i);
    return Task<D>(l, n, blockIdx.x + i * gridDim.x - n * l.Hkv, __shfl_sync(~0u, slot, i),
                   __shfl_sync(~0u, pos, i), __shfl_sync(~0u, newest, i));
  };
  if (in_cluster) OpenMailbox(mailbox, MailBytes<D>(l.G));

  uint4* const tiles = shared + warp * places * kPlaceUnits;
  auto* const all_sums = reinterpret_cast<Sums<D, kG>*>(shared + warps * places * kPlaceUnits);
  Sums<D, kG>& sums = all_sums[own * sums_of_strand + (kSplit ? first : 0)];
  auto* const states_shared = reinterpret_cast<typename States<D, kG>::Shared*>(all_sums + warps);
  auto* const mail = reinterpret_cast<Sums<D, kG>*>(states_shared + warps);  // of all strands

  // A tile's copies are a group; past the last tile groups are empty, so that the same wait fits.
  Ahead<D> ahead(p, strand, first, last);
  unsigned ahead_tasks = tasks;
  int place = 0;
  const auto fetch = [&] {
    if (ahead_tasks && ahead.Fetch(p, task_of(ahead_tasks), tiles + place * kPlaceUnits)) {
      ahead.Begin(p);
      ahead_tasks &= ahead_tasks - 1;
    }
    CommitCopies();
    place = (place + 1) & (places - 1);
  };
  const auto await_tiles = [&]<int kTiles>(std::integral_constant<int, kTiles>) {
    places == 2 ? WaitCopies<2 - kTiles>() : WaitCopies<kPlaces - kTiles>();
    __syncwarp();
  };

  Task<D> task = task_of(tasks);
  Window<D, kG> window;
  States<D, kG> states;
  bool awaited = false;
  constexpr int kNone = -1;
  int step = first, tile = kNone;  // tile: the window's next one in this step, once that has begun
  for (int used = places;;) {      // in each turn tiles of the window or of states
#pragma unroll 1
    for (; used > 0; --used) fetch();  // into places that are free, by code that is there once
    if (step == last) {
      const int64_t query = int64_t{task.n} * l.H + task.h * l.G;
      NewRow<D> new_row;
      new_row.Load(p, task);
      __syncthreads();
      if (in_cluster) {
        AwaitOpenMailbox();
        SendStrands(p, all_sums, mail, mailbox);
        if (blockIdx.z > 0) return;
        AwaitMail(mailbox);
      }
      const auto* const merged = in_cluster ? mail : all_sums;
      for (int i = threadIdx.x; i < l.G * D; i += 32 * warps)
        p.out[query * D + i] = __float2bfloat16_rn(
            Merge(p, merged, in_cluster ? 1 : sums_of_strand, i / D, i % D, claims[i / D]));
      new_row.Store(p, task);
      tasks &= tasks - 1;
      if (tasks == 0) return;
      __syncthreads();  // the next task's sums take the place of these
      task = task_of(tasks);
      step = first;
    }
    const bool has_states = step < p.state_steps, begins = kSplit || step == first;
    const int state_tile = kStrands * step + strand;
    if (tile == kNone) {
      if (begins && l.W > 0) {
        window.LoadQueries(p, task);
        const int64_t query = int64_t{task.n} * l.H + task.h * l.G;
        if (threadIdx.x < l.G) claims[threadIdx.x] = p.claim[query + threadIdx.x];
      }
      tile = FirstWindowTile(p, strand, step);
      window.Begin();
      if (has_states) states.LoadSlot(p, task, state_tile);
      if (has_states && awaited) states.LoadProjected(p, task, state_tile);
    }
    if (tile < p.tiles) {
      await_tiles(std::integral_constant<int, kJoint>());
      const int stride = kStrands * p.steps;
      used = kJoint > 1 && tile + stride < p.tiles ? kJoint : 1;
      const uint4* joint[kJoint];  // in place of a tile that is not there the one before it
#pragma unroll
      for (int j = 0; j < kJoint; ++j)
        joint[j] = tiles + ((place + (j < used ? j : 0)) & (places - 1)) * kPlaceUnits;
      window.Add(p, task, joint, tile * kTile, stride * kTile);
      tile += kJoint * stride;
      __syncwarp();  // all lanes are done with the places
      continue;
    }
    if (l.W > 0 && (begins || FirstWindowTile(p, strand, step) < p.tiles))
      window.End(p, sums, begins);
    if (!awaited) {
      AwaitPrevious();  // from here on `project` has ended
      AllowNext();
      awaited = true;
      if (has_states) states.LoadProjected(p, task, state_tile);
    }
    if (has_states) {
      await_tiles(std::integral_constant<int, 1>());
      states.Update(l, task, state_tile, tiles + place * kPlaceUnits, states_shared[warp], sums,
                    begins);
      used = 1;
      __syncwarp();
    }
    ++step;
    tile = kNone;
  }
}

template <int D, int kG, bool kSplit>
void SetShared(int bytes) {
  const auto kernel = UpdateKernel<D, kG, kSplit>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  PreferShared(kernel);
}

// Blocks that go from task to task: as many as the GPU holds, but a block has 32 tasks at most.
template <int D, int kG>
int Blocks(int tasks, int multiprocessors, int bytes) {
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, UpdateKernel<D, kG, false>, 32 * kStrands,
                                                bytes);
  return std::max(std::min(tasks, blocks * multiprocessors), (tasks + 31) / 32);
}

// Blocks for a task that is split, or 0 where it had better not be.
template <int D, int kG>
int SplitBlocks(const DecodeParams& p, int major, int multiprocessors, const auto& fits) {
  const Layer& l = p.layer;
  const int tasks = l.N * l.Hkv, bytes = (2 * l.SF + p.keys) * D * 4;  // read and written
  // Where a task is small, a cluster's start and its messages cost more than they save.
  if (major >= 9 && bytes >= 128 * 1024)
    for (int blocks = kStrands; blocks > 1; blocks /= 2)
      if (tasks * blocks <= multiprocessors && fits(blocks)) return blocks;
  return tasks <= multiprocessors && fits(1) ? 1 : 0;
}

template <int D, int kG>
int LaunchUpdate(DecodeParams p, cudaStream_t stream) {
  int device = 0, major = 0, multiprocessors = 0, most_shared = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int tasks = p.layer.N * p.layer.Hkv;
  int warps = 0, bytes = 0;
  const auto fits = [&](int blocks) {
    p.own_strands = kStrands / blocks;
    warps = p.own_strands * p.steps;
    for (p.places = Places(D); p.places >= 2; p.places /= 2) {
      bytes = SharedBytes<D, kG>(warps, p.places, warps + (blocks > 1 ? kStrands : 0));
      if (bytes <= most_shared) return warps <= MaxSplitWarps(D, kG);
    }
    return false;
  };
  const int split = SplitBlocks<D, kG>(p, major, multiprocessors, fits);
  if (split > 0) {
    SetShared<D, kG, true>(bytes);
    StartEarly(UpdateKernel<D, kG, true>, dim3(tasks, 1, split), 32 * warps, p, stream,
               static_cast<size_t>(bytes), split);
    return cudaGetLastError();
  }
  constexpr int kBytes = SharedBytes<D, kG>(kStrands, Places(D), kStrands);
  SetShared<D, kG, false>(kBytes);
  const int blocks = Blocks<D, kG>(tasks, multiprocessors, kBytes);
  StartEarly(UpdateKernel<D, kG, false>, dim3(blocks), 32 * kStrands, p, stream,
             static_cast<size_t>(kBytes));
  return cudaGetLastError();
}
template <int D>
int LaunchUpdate(const DecodeParams& p, cudaStream_t stream) {
  switch (p.layer.G) {
    case 1:
      return LaunchUpdate<D, 1>(p, stream);
    case 2:
      return LaunchUpdate<D, 2>(p, stream);
    case 3:
      return LaunchUpdate<D, 3>(p, stream);
    case 4:
      return LaunchUpdate<D, 4>(p, stream);
    default:
      return LaunchUpdate<D, kMaxGroup>(p, stream);
  }
}

int64_t Carve(const DslaShape& s, int N, void* base, DecodeParams* p) {
  Carver c{static_cast<std::byte*>(base)};
  p->phi_q = c.Take<float>(int64_t{N} * s.H * s.F);
  p->phi_k = c.Take<float>(int64_t{N} * s.Hkv * s.F);
  p->gate = c.Take<float>(int64_t{N} * s.Hkv * s.SF());
  return c.used;
}

}  // namespace

int64_t DecodeWorkspaceBytes(const DslaShape& shape, int N) {
  DecodeParams unused;
  return Carve(shape, N, nullptr, &unused);
}

int Decode(const DslaCudaArgs& a, Stream stream) {
  if (a.rows.N == 0) return cudaSuccess;
  CheckShape(a.shape, a.layout, a.states);
  DSLA_CHECK(a.shape.G() <= kMaxGroup);
  DSLA_CHECK(a.T == a.rows.N && a.rows.pos && a.slots && a.q && a.k && a.v && a.out);
  DSLA_CHECK(a.weights.packed && a.weights.mix && a.weights.rope_cos && a.weights.rope_sin);
  DSLA_CHECK(a.shape.window == 0 || a.claim);
  DSLA_CHECK(a.q_stride % 8 == 0 && a.k_stride % 8 == 0 && a.v_stride % 8 == 0);
  DecodeParams p;
  p.layer = MakeLayer(a);
  p.rows = {static_cast<const __nv_bfloat16*>(a.k), static_cast<const __nv_bfloat16*>(a.v),
            a.k_stride, a.v_stride};
  p.q = static_cast<const __nv_bfloat16*>(a.q);
  p.q_stride = a.q_stride;
  p.claim = a.claim;
  p.out = static_cast<__nv_bfloat16*>(a.out);
  p.keys = a.shape.window + a.shape.sinks;
  p.tiles = static_cast<int>(CeilDiv(p.keys, kTile));
  p.state_steps = a.shape.SF() / (kStrands * kTile);
  const auto window_steps = static_cast<int>(CeilDiv(p.tiles, 2 * kStrands));
  p.steps = std::max(p.state_steps, std::min(kMaxSteps, window_steps));
  DSLA_CHECK(p.steps <= kMaxSteps);
  DSLA_CHECK(Carve(a.shape, a.rows.N, a.workspace, &p) <= a.workspace_bytes);
  LaunchProject(p, a.shape.D, stream);
  return a.shape.D == 128 ? LaunchUpdate<128>(p, stream) : LaunchUpdate<64>(p, stream);
}

}  // namespace dsla::cuda
