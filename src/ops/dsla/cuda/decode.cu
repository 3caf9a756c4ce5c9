// One new row per sequence. Where there are several (row, KV head)s for each multiprocessor, two
// launches:
//   project  products with the adapter's matrices, 16 rows at a time: phi_q, phi_k, e^a - 1
//   whole    states (read and written once) and window, the merge of both, and the row into ring
//            and sinks. As many blocks as the GPU holds go from task to task, with a warp for each
//            strand, and fetch ahead: memory always has something to do.
// Where there are fewer, one (decode_split.cu). Both give the same bits.
#include <algorithm>

#include "base/check.h"
#include "ops/dsla/cuda/decode_merge.cuh"
#include "ops/dsla/cuda/decode_tiles.cuh"

namespace dsla::cuda {
namespace {

// Places for tiles that a warp has: 16 KB.
template <int D>
constexpr int kPlaces = 256 / D;

// What a warp fetches: the tiles of a strand, task by task, in the order of their use.
template <int D>
struct Ahead {
  int strand, step, window_tile;

  __device__ __forceinline__ Ahead(const DecodeParams& p, int strand) : strand(strand) { Begin(p); }
  __device__ __forceinline__ void Begin(const DecodeParams& p) {
    step = 0;
    window_tile = FirstWindowTile(p, strand, step);
  }
  // The next tile; returns whether it was the task's last.
  __device__ __forceinline__ bool Fetch(const DecodeParams& p, const Task<D>& task, uint4* to) {
    if (window_tile < p.tiles) {
      FetchKeys(p, task, to, window_tile * kTile, true);
      window_tile += kStrands * p.steps;
      if (window_tile < p.tiles || step < p.state_steps) return false;
    } else {
      FetchStates(p.layer, task, to, kStrands * step + strand);
    }
    window_tile = FirstWindowTile(p, strand, ++step);
    return step == p.steps;
  }
};

// Grid (blocks), kStrands warps.
template <int D, int kG>
__global__ void __launch_bounds__(32 * kStrands, D == 64 ? 3 : 2)
    WholeKernel(const __grid_constant__ DecodeParams p) {
  constexpr int kUnits = Places<D, kPlaces<D>>::kUnits;
  extern __shared__ __align__(256) uint4 shared[];
  __shared__ float claims[kG];
  const Layer& l = p.layer;
  const int lane = threadIdx.x % 32, strand = Warp();

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

  Places<D, kPlaces<D>> places{shared + strand * kPlaces<D> * kUnits};
  auto* const all_sums = reinterpret_cast<Sums<D, kG>*>(shared + kStrands * kPlaces<D> * kUnits);
  Sums<D, kG>& sums = all_sums[strand];
  auto* const states_shared =
      reinterpret_cast<typename States<D, kG>::Shared*>(all_sums + kStrands);

  Ahead<D> ahead(p, strand);
  unsigned ahead_tasks = tasks;
  const auto fetch = [&] {
    if (ahead_tasks && ahead.Fetch(p, task_of(ahead_tasks), places.At(0))) {
      ahead.Begin(p);
      ahead_tasks &= ahead_tasks - 1;
    }
    places.Filled();
  };

  Task<D> task = task_of(tasks);
  Window<D, kG> window;
  States<D, kG> states;
  bool awaited = false;
  constexpr int kNone = -1;
  int step = 0, tile = kNone;      // tile: the window's next one in this step, once that has begun
  for (int used = kPlaces<D>;;) {  // in each turn tiles of the window or of states
#pragma unroll 1
    for (; used > 0; --used) fetch();  // into places that are free, by code that is there once
    if (step == p.steps) {
      NewRow<D> new_row;
      new_row.Load(p, task);
      __syncthreads();
      StoreOutputs(p, task, all_sums, 1, claims);
      new_row.Store(p, task);
      tasks &= tasks - 1;
      if (tasks == 0) return;
      __syncthreads();  // the next task's sums take the place of these
      task = task_of(tasks);
      step = 0;
    }
    const bool has_states = step < p.state_steps, begins = step == 0;
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
      used = AddTiles(p, task, window, places, tile);
      tile += JointTiles(D) * kStrands * p.steps;
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
      places.template Await<1>();
      states.Update(l, task, state_tile, places.At(0), states_shared[strand], sums, begins);
      used = 1;
      __syncwarp();
    }
    ++step;
    tile = kNone;
  }
}

// As many blocks as the GPU holds, which is asked once by each thread for the device in use, but a
// block has 32 tasks at most.
template <int D, int kG>
int Blocks(int tasks, int bytes) {
  thread_local int known = -1, blocks = 0;
  int device = 0;
  cudaGetDevice(&device);
  if (device != known) {
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, WholeKernel<D, kG>, 32 * kStrands,
                                                  bytes);
    known = device;
  }
  return std::max(std::min(tasks, blocks * CurrentDevice().multiprocessors), (tasks + 31) / 32);
}

template <int D, int kG>
void LaunchWhole(const DecodeParams& p, cudaStream_t stream) {
  constexpr int kBytes = SharedBytes<D, kG>(kStrands, kPlaces<D>, kStrands);
  SetShared<WholeKernel<D, kG>>(kBytes);
  const int blocks = Blocks<D, kG>(p.layer.N * p.layer.Hkv, kBytes);
  StartEarly(WholeKernel<D, kG>, dim3(blocks), 32 * kStrands, p, stream,
             static_cast<size_t>(kBytes));
}
template <int D>
void LaunchWhole(const DecodeParams& p, cudaStream_t stream) {
  ForGroup(p.layer.G,
           [&]<int kG>(std::integral_constant<int, kG>) { LaunchWhole<D, kG>(p, stream); });
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
  if (LaunchSplit(p, a.shape.D, stream)) return cudaGetLastError();
  LaunchProject(p, a.shape.D, stream);
  a.shape.D == 128 ? LaunchWhole<128>(p, stream) : LaunchWhole<64>(p, stream);
  return cudaGetLastError();
}

}  // namespace dsla::cuda
