// One new row per sequence, in two launches:
//   project  products with the adapter's matrices, 16 rows at a time: phi_q, phi_k, e^a - 1
//   update   states (read and written once) and window, the merge of both, and the row into ring
//            and sinks
// `update` has two forms, which give the same bits. Where there are tasks for all multiprocessors,
// as many blocks as these hold go from task to task, with a warp for each strand, and fetch ahead:
// memory always has something to do. Where there are few (compute capability 9.0), each has a
// cluster: a block for each strand, with a warp for each step.
#include <algorithm>

#include "base/check.h"
#include "ops/dsla/cuda/decode_merge.cuh"
#include "ops/dsla/cuda/decode_states.cuh"
#include "ops/dsla/cuda/decode_window.cuh"

namespace dsla::cuda {
namespace {

// Places for tiles that each warp has: 16 KB.
constexpr int Places(int D) { return 256 / D; }

template <int D, int kG, bool kSplit>
constexpr int SharedBytes(int warps) {
  return warps * (Places(D) * TileBytes(D) + sizeof(typename States<D, kG>::Shared)) +
         (kStrands + (kSplit ? warps : 0)) * sizeof(Sums<D, kG>);
}

// What a warp fetches: the tiles of steps [first, last) of a strand, task by task, in the order of
// their use.
template <int D>
struct Ahead {
  int strand, first, last, step, window_tile;

  __device__ __forceinline__ Ahead(int strand, int first, int last)
      : strand(strand), first(first), last(last) {
    Begin();
  }
  __device__ __forceinline__ void Begin() {
    step = first;
    window_tile = kStrands * step + strand;
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
    window_tile = kStrands * ++step + strand;
    return step == last;
  }
};

// Whole tasks: grid (blocks), kStrands warps. Split: grid (tasks, 1, kStrands), a cluster along z,
// `steps` warps.
template <int D, int kG, bool kSplit>
__global__ void __launch_bounds__(32 * (kSplit ? kMaxSteps : kStrands), kSplit    ? 1
                                                                        : D == 64 ? 3
                                                                                  : 2)
    UpdateKernel(const __grid_constant__ DecodeParams p) {
  constexpr int kPlaces = Places(D), kPlaceUnits = TileBytes(D) / 16;
  extern __shared__ __align__(256) uint4 shared[];
  __shared__ float claims[kG];
  __shared__ uint64_t mailbox;
  const Layer& l = p.layer;
  const int lane = threadIdx.x % 32, warp = Warp(), warps = kSplit ? p.steps : kStrands;
  const int strand = kSplit ? blockIdx.z : warp;
  const int first = kSplit ? warp : 0, last = kSplit ? warp + 1 : p.steps;

  // Lane i has slot and position of the block's i-th task.
  const int mine = blockIdx.x + lane * gridDim.x;
  int slot = -1, pos = -1;
  if (mine < l.N * l.Hkv) {
    slot = l.slots[mine / l.Hkv];
    pos = l.pos[mine / l.Hkv];
  }
  unsigned tasks = __ballot_sync(~0u, (slot | pos) >= 0);
  if (tasks == 0) return;
  const auto task_of = [&](unsigned mask) {
    const int i = __ffs(mask) - 1;
    return Task<D>(l, blockIdx.x + i * gridDim.x, __shfl_sync(~0u, slot, i),
                   __shfl_sync(~0u, pos, i));
  };
  if (kSplit) OpenMailbox(mailbox, MailBytes<D>(l.G));

  uint4* const places = shared + warp * kPlaces * kPlaceUnits;
  auto* const strands = reinterpret_cast<Sums<D, kG>*>(shared + warps * kPlaces * kPlaceUnits);
  auto* const steps = strands + kStrands;  // of this strand, if split
  Sums<D, kG>& sums = kSplit ? steps[warp] : strands[warp];
  auto& states_shared = reinterpret_cast<typename States<D, kG>::Shared*>(
      strands + kStrands + (kSplit ? warps : 0))[warp];

  // A tile's copies are a group; past the last tile groups are empty, so that the same wait fits.
  Ahead<D> ahead(strand, first, last);
  unsigned ahead_tasks = tasks;
  Task<D> ahead_task = task_of(tasks);
  const auto fetch = [&](int place) {
    if (ahead_tasks && ahead.Fetch(p, ahead_task, places + place * kPlaceUnits)) {
      ahead.Begin();
      ahead_tasks &= ahead_tasks - 1;
      if (ahead_tasks) ahead_task = task_of(ahead_tasks);
    }
    CommitCopies();
  };
#pragma unroll 1
  for (int i = 0; i < kPlaces; ++i) fetch(i);
  int place = 0;
  const auto await_tile = [&] {
    WaitCopies<kPlaces - 1>();
    __syncwarp();
  };
  const auto next_tile = [&] {
    __syncwarp();  // all lanes are done with this one
    fetch(place);
    place = (place + 1) % kPlaces;
  };

#pragma unroll 1
  for (bool awaited = false; tasks; tasks &= tasks - 1) {
    const Task<D> task = task_of(tasks);
    const int64_t query = int64_t{task.n} * l.H + task.h * l.G;
    Window<D, kG> window;
    if (l.W > 0) {
      window.LoadQueries(p, task);
      if (threadIdx.x < l.G) claims[threadIdx.x] = p.claim[query + threadIdx.x];
    }
#pragma unroll 1
    for (int step = first; step < last; ++step) {
      const bool has_states = step < p.state_steps;
      const int state_tile = kStrands * step + strand;
      States<D, kG> states;
      if (awaited && has_states) states.Load(p, task, state_tile);
      if (l.W > 0 && (step == first || state_tile < p.tiles)) {
        window.Begin();
#pragma unroll 1
        for (int tile = state_tile; tile < p.tiles; tile += kStrands * p.steps) {
          await_tile();
          window.Add(p, task, places + place * kPlaceUnits, tile * kTile);
          next_tile();
        }
        window.End(p, sums, step == first);
      }
      if (!awaited) {
        AwaitPrevious();  // from here on `project` has ended
        AllowNext();
        awaited = true;
        if (has_states) states.Load(p, task, state_tile);
      }
      if (has_states) {
        await_tile();
        states.Update(l, task, state_tile, places + place * kPlaceUnits, states_shared, sums,
                      step == first);
        next_tile();
      }
    }
    __syncthreads();
    if (kSplit) {
      AwaitOpenMailbox();
      SendStrand(p, steps, strand, strands[strand], mailbox);
      if (strand > 0) return;
      AwaitMail(mailbox);
    }
    for (int i = threadIdx.x; i < l.G * D; i += 32 * warps)
      p.out[query * D + i] =
          __float2bfloat16_rn(Merge(strands, i / D, i % D, l.W > 0, claims[i / D]));
    StoreRow(p, task);
    if (!kSplit) __syncthreads();  // the next task's sums take the place of these
  }
}

template <int D, int kG, bool kSplit>
void SetShared(int bytes) {
  const auto kernel = UpdateKernel<D, kG, kSplit>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  PreferShared(kernel);
}

template <int D, int kG>
int LaunchUpdate(const DecodeParams& p, cudaStream_t stream) {
  int device = 0, major = 0, multiprocessors = 0, most_shared = 0, blocks = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int tasks = p.layer.N * p.layer.Hkv, split_bytes = SharedBytes<D, kG, true>(p.steps);
  if (major >= 9 && tasks <= multiprocessors && split_bytes <= most_shared) {
    SetShared<D, kG, true>(split_bytes);
    StartEarly(UpdateKernel<D, kG, true>, dim3(tasks, 1, kStrands), 32 * p.steps, p, stream,
               static_cast<size_t>(split_bytes), kStrands);
    return cudaGetLastError();
  }
  constexpr int kBytes = SharedBytes<D, kG, false>(kStrands);
  SetShared<D, kG, false>(kBytes);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, UpdateKernel<D, kG, false>, 32 * kStrands,
                                                kBytes);
  // A block has 32 tasks at most.
  blocks = std::max(std::min(tasks, blocks * multiprocessors), (tasks + 31) / 32);
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

int Ceil(int a, int b) { return (a + b - 1) / b; }

// Counts floats, or hands out addresses when `base` is set; each part 256-byte aligned.
struct Carver {
  float* base = nullptr;
  int64_t used = 0;
  float* Take(int64_t n) {
    float* at = base + used;
    used += (n + 63) / 64 * 64;
    return at;
  }
};

int64_t Carve(const DslaShape& s, int N, float* base, DecodeParams* p) {
  Carver c{base};
  p->phi_q = c.Take(int64_t{N} * s.H * s.F);
  p->phi_k = c.Take(int64_t{N} * s.Hkv * s.F);
  p->gate = c.Take(int64_t{N} * s.Hkv * s.SF());
  return c.used * 4;
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
  p.tiles = Ceil(p.keys, kTile);
  p.state_steps = a.shape.SF() / (kStrands * kTile);
  p.steps = std::max(p.state_steps, std::min(kMaxSteps, Ceil(p.tiles, 2 * kStrands)));
  DSLA_CHECK(p.steps <= kMaxSteps);
  DSLA_CHECK(Carve(a.shape, a.rows.N, static_cast<float*>(a.workspace), &p) <= a.workspace_bytes);
  LaunchProject(p, a.shape.D, stream);
  return a.shape.D == 128 ? LaunchUpdate<128>(p, stream) : LaunchUpdate<64>(p, stream);
}

}  // namespace dsla::cuda
