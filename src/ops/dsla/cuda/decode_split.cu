// A decode step of few rows, in one launch: a task has a warp for each step of each strand, in one
// block or (compute capability 9.0) in a cluster of two or four, and its features and gates are
// worked out by the same warps.
#include "ops/dsla/cuda/decode_split_project.cuh"
#include "ops/dsla/cuda/decode_tiles.cuh"

namespace dsla::cuda {
namespace {

// Most warps of a block: what there are registers for.
constexpr int MaxWarps(int D, int G) { return D == 128 ? 8 : G > 4 ? 12 : 16; }

// Places for tiles that a warp has: most have three tiles at most.
constexpr int kPlaces = 2;
// Of claims and mailboxes.
constexpr int kStaticBytes = 64;

// What a warp does: one step of one strand. Worked out anew wherever one is made, as BlockMemory
// is, so that it need not be kept in registers.
struct Role {
  int warp, step, own, strand;  // own: the strand among the block's

  __device__ __forceinline__ explicit Role(const DecodeParams& p)
      : warp(Warp()),
        step(warp >> LogOf(p.own_strands)),
        own(warp & (p.own_strands - 1)),
        strand(FirstStrand(p) + own) {}
  __device__ __forceinline__ bool HasStates(const DecodeParams& p) const {
    return step < p.state_steps;
  }
  __device__ __forceinline__ int StateTile() const { return kStrands * step + strand; }
};

// A block's shared memory after the places of its warps.
template <int D, int kG>
struct BlockMemory {
  Sums<D, kG>* sums;  // of the own strands' steps
  typename States<D, kG>::Shared* states;
  Sums<D, kG>* mail;  // of all strands, where a cluster has the task
  Projected<D, kG>* projected;
  typename States<D, kG>::Slot* slots;  // of all threads, out of the way of the window's registers

  __device__ __forceinline__ BlockMemory(const DecodeParams& p, uint4* shared) {
    const int warps = p.own_strands * p.steps;
    sums = reinterpret_cast<Sums<D, kG>*>(shared +
                                          Fresh(warps * kPlaces * Places<D, kPlaces>::kUnits));
    states = reinterpret_cast<typename States<D, kG>::Shared*>(sums + warps);
    mail = reinterpret_cast<Sums<D, kG>*>(states + warps);
    projected =
        reinterpret_cast<Projected<D, kG>*>(p.own_strands < kStrands ? mail + kStrands : mail);
    slots = reinterpret_cast<typename States<D, kG>::Slot*>(projected + 1);
  }
};

// Grid (Hkv, N, kStrands / own_strands), a cluster along z, own_strands * steps warps.
template <int D, int kG>
__global__ void __launch_bounds__(32 * MaxWarps(D, kG), 1)
    SplitKernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(256) uint4 shared[];
  __shared__ float claims[kG];
  __shared__ uint64_t sums_mailbox, parts_mailbox;
  const Layer& l = p.layer;
  const int n = blockIdx.y, h = blockIdx.x;
  const bool in_cluster = p.own_strands < kStrands;
  const Role role(p);

  // What does not depend on the kernels before this one is read before they have ended: weights,
  // the step's tables and, as dsla_cuda.h says, the slot.
  AllowNext();
  Projection<D, kG> projection(p, h, role.warp);
  const int slot = l.slots[n], pos = l.pos[n];
  if ((slot | pos) < 0) {  // who waits for this grid also relies on what it would have waited for
    AwaitPrevious();
    return;
  }
  const Task<D> task(l, n, h, slot, pos, l.W > 0 ? pos % l.W : 0);
  if (in_cluster) {
    OpenMailbox(sums_mailbox, MailBytes<D>(l.G));
    OpenMailbox(parts_mailbox, PartBytes<D>(l));
    TellOpenMailboxes();
  }

  Places<D, kPlaces> places{shared + role.warp * kPlaces * Places<D, kPlaces>::kUnits};
  const int stride = kStrands * p.steps;
  // The window's tiles, then that of the states.
  const auto fetch = [&](int count, bool rows) {
    const Role anew(p);
#pragma unroll 1
    for (; count > 0; --count) {
      const int tile =
          FirstWindowTile(p, anew.strand, anew.step) + static_cast<int>(places.filled) * stride;
      if (tile < p.tiles)
        FetchKeys(p, task, places.At(0), tile * kTile, rows);
      else if (tile < p.tiles + stride && anew.HasStates(p))
        FetchStates(l, task, places.At(0), anew.StateTile());
      places.Filled();
    }
  };
  fetch(kPlaces, false);
  if (l.W == 0) AwaitPrevious();  // the new token enters the states

  States<D, kG> states;
  if (role.HasStates(p)) states.LoadSlot(p, task, role.StateTile());
  Window<D, kG> window;
  const int first_tile = FirstWindowTile(p, role.strand, role.step);
  int new_tile = 0;  // which of this warp's tiles has the new token
  while (new_tile < kPlaces && (first_tile + new_tile * stride) != task.Taken(l) / kTile)
    ++new_tile;
  const bool brings_new = l.W > 0 && new_tile < kPlaces;
  Projected<D, kG>& projected = *BlockMemory<D, kG>(p, shared).projected;
  const int mixes = l.G * l.states;
  if (threadIdx.x < mixes) projected.mix[threadIdx.x] = l.mix[h * mixes + threadIdx.x];
  if (in_cluster) AwaitOpenMailboxes();
  projection.Run(task, projected, in_cluster ? &parts_mailbox : nullptr, [&] {
    AwaitPrevious();
    if (l.W == 0) return;
    if (brings_new) {
      FetchNewKey(p, task, places.At(new_tile));
      CommitCopies();
    }
    if (threadIdx.x < l.G) claims[threadIdx.x] = p.claim[n * l.H + h * l.G + threadIdx.x];
  });
  if (brings_new) WaitCopies<0>();
  if (Role(p).HasStates(p)) BlockMemory<D, kG>(p, shared).slots[threadIdx.x] = states.slot;
  __syncthreads();  // features and gates are there

  if (l.W > 0) window.LoadQueries(p, task);
  window.Begin();
  for (int tile = first_tile; tile < p.tiles; tile += JointTiles(D) * stride)
    fetch(AddTiles(p, task, window, places, tile), true);
  const BlockMemory<D, kG> at(p, shared);
  const Role anew(p);
  Sums<D, kG>& sums = at.sums[anew.own * p.steps + anew.step];
  if (l.W > 0) window.End(p, sums, true);
  if (anew.HasStates(p)) {
    if (in_cluster) AwaitMail(parts_mailbox);
    states.slot = at.slots[threadIdx.x];
    states.LoadProjected(l, anew.StateTile(), *at.projected);
    places.template Await<1>();
    states.Update(l, task, anew.StateTile(), places.At(0), at.states[anew.warp], sums, true);
  }

  NewRow<D> new_row;
  new_row.Load(p, task);
  __syncthreads();
  if (in_cluster) {
    SendStrands(p, at.sums, at.mail, sums_mailbox);
    if (blockIdx.z > 0) return;
    AwaitMail(sums_mailbox);
  }
  StoreOutputs(p, task, in_cluster ? at.mail : at.sums, in_cluster ? 1 : p.steps, claims);
  new_row.Store(p, task);
}

// How a task is split, if it can be.
template <int D, int kG>
struct Cut {
  int blocks, warps = 0, bytes = 0;

  // Also tells `p`.
  bool Fits(DecodeParams& p) {
    p.own_strands = kStrands / blocks;
    warps = p.own_strands * p.steps;
    if (warps > MaxWarps(D, kG)) return false;
    bytes = SharedBytes<D, kG>(warps, kPlaces, warps + (blocks > 1 ? kStrands : 0)) +
            int{sizeof(Projected<D, kG>)} + 32 * warps * int{sizeof(typename States<D, kG>::Slot)};
    return bytes + kStaticBytes <= CurrentDevice().most_shared;
  }
};

// Of 0 blocks where a task had better not be split.
template <int D, int kG>
Cut<D, kG> CutOf(DecodeParams& p) {
  const Layer& l = p.layer;
  const Device& device = CurrentDevice();
  const int tasks = l.N * l.Hkv, bytes = (2 * l.SF + p.keys) * D * 4;  // read and written
  // Where a task is small, a cluster's start and its messages cost more than they save; and four
  // blocks are faster than two only where they leave half of the multiprocessors free.
  const bool clusters = device.major >= 9 && bytes >= 128 * 1024;
  const bool four = 2 * tasks * kStrands <= device.multiprocessors;
  for (const int blocks : {four ? 4 : 2, four ? 2 : 4, 1}) {
    Cut<D, kG> cut{blocks};
    if (blocks > 1 && !clusters) continue;
    if (tasks * blocks <= device.multiprocessors && cut.Fits(p)) return cut;
  }
  return {0};
}

template <int D, int kG>
bool Launch(DecodeParams& p, cudaStream_t stream) {
  const Cut<D, kG> cut = CutOf<D, kG>(p);
  if (cut.blocks == 0) return false;
  SetShared<SplitKernel<D, kG>>(cut.bytes);
  StartEarly(SplitKernel<D, kG>, dim3(p.layer.Hkv, p.layer.N, cut.blocks), 32 * cut.warps, p,
             stream, static_cast<size_t>(cut.bytes), cut.blocks);
  return true;
}

}  // namespace

bool LaunchSplit(DecodeParams p, int D, cudaStream_t stream) {
  bool launched = false;
  ForGroup(p.layer.G, [&]<int kG>(std::integral_constant<int, kG>) {
    launched = D == 64 ? Launch<64, kG>(p, stream) : Launch<128, kG>(p, stream);
  });
  return launched;
}

}  // namespace dsla::cuda
