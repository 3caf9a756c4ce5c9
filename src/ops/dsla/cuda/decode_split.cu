// A decode step of few rows, in one launch: a task has a warp for each step of each strand, in one
// block or (compute capability 9.0) in a cluster of two or four, and its features and gates are
// worked out by the same warps.
#include "ops/dsla/cuda/decode_merge.cuh"
#include "ops/dsla/cuda/decode_tiles.cuh"

namespace dsla::cuda {
namespace {

// Most warps of a block: what there are registers for.
constexpr int MaxWarps(int D, int G) { return D == 128 ? 8 : G > 4 ? 12 : 16; }

// Places for tiles that a warp has: most have three tiles at most.
constexpr int kPlaces = 2;
// Of claims and mailboxes.
constexpr int kStaticBytes = 64;

__device__ __forceinline__ int LogOf(int power) { return __ffs(power) - 1; }

// Of the block.
__device__ __forceinline__ int FirstStrand(const DecodeParams& p) {
  return p.own_strands < kStrands ? blockIdx.z * p.own_strands : 0;
}

// Products of one row with the matrices of a KV head, gates first, then phi_k, then phi_q. A block
// makes the parts that its own strands' states need; of the others' it has the sums of exponentials
// alone. Parts are dealt to the block's warps in turn.
template <int D, int kG>
struct Projection {
  const DecodeParams& p;
  const int h, gates;    // matrices of gates
  const int shift, all;  // log2 of the parts that a block has of a matrix; of all matrices
  int item;
  PartWeights<D> next;

  __device__ __forceinline__ Projection(const DecodeParams& p, int h, int warp)
      : p(p),
        h(h),
        gates(p.layer.SF / D),
        shift(LogOf(p.own_strands * (D / (kPartColumns * kStrands)))),
        all((gates + 1 + p.layer.G) << shift),
        item(warp) {
    LoadNext();
  }

  // `await_row` is called once, before anything of the row is read that the kernels before this one
  // leave: when only queries are left to be multiplied.
  template <typename AwaitRow>
  __device__ __forceinline__ void Run(const Task<D>& task, Projected<D, kG>& to, uint64_t* mailbox,
                                      const AwaitRow& await_row) {
    const Layer& l = p.layer;
    const int lane = threadIdx.x % 32;
    bool awaited = false;
#pragma unroll 1
    for (;;) {
      const int matrix = item >> shift, part = PartOf(item), head = matrix - gates - 1;
      if (!awaited && (head >= 0 || item >= all)) {
        await_row();
        awaited = true;
      }
      if (item >= all) return;
      const PartWeights<D> w[1] = {next};
      item += p.own_strands * p.steps;
      LoadNext();
      const int entering = Entering(l, task.t);
      const __nv_bfloat16* const row = head >= 0 ? p.q + task.n * p.q_stride + (h * l.G + head) * D
                                       : entering >= 0 ? EnteringKey(task)
                                                       : nullptr;
      uint32_t a[D / 16][4];
      const __nv_bfloat16* const rows[1] = {lane < 4 ? row : nullptr};
      LoadRows<D>(a, rows);
      float y[1][2][4] = {};
      if (matrix < gates) {
        const int position[1] = {max(entering, 0)};
        AddUnrotatedProducts<D>(y, a, position, l, w);
        PutGates(to, matrix, part, y[0], entering >= 0);
      } else {
        AddProducts<D>(y, a, w);
        PutFeatures(to, head < 0 ? l.G : head, part, y[0], mailbox);
      }
    }
  }

 private:
  __device__ __forceinline__ const __nv_bfloat16* EnteringKey(const Task<D>& task) const {
    const Layer& l = p.layer;  // in the ring's place that token t is going to take
    return l.W > 0 ? task.Rows(l.at.ring_k, l.W) + int64_t{task.newest} * D : task.NewKey(p);
  }
  __device__ __forceinline__ int PartOf(int item) const {
    const int i = item & ((1 << shift) - 1), own = i & (p.own_strands - 1);
    return (i >> LogOf(p.own_strands)) * kStrands + FirstStrand(p) + own;
  }
  __device__ __forceinline__ void LoadNext() {
    if (item >= all) return;
    const Layer& l = p.layer;
    const int matrix = item >> shift;
    const int job = matrix < gates    ? l.H + l.Hkv + h * gates + matrix
                    : matrix == gates ? l.H + h
                                      : h * l.G + matrix - gates - 1;
    next.Load(Matrix<D>(l, job), PartOf(item));
  }

  // Of the logits of a part, of which the first quad has the row.
  __device__ __forceinline__ void PutGates(Projected<D, kG>& to, int matrix, int part,
                                           const float (&y)[2][4], bool enters) const {
    const int lane = threadIdx.x % 32;
    const int channel = matrix * D + part * kPartColumns + lane % 4 * 2;
    const float* const bias = p.layer.weights.bias + h * p.layer.SF + channel;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int at = 8 * (c / 2) + c % 2;
      const float gate = GateMinusOne(y[c / 2][c % 2] + bias[at], p.layer.least_gate);
      if (lane < 4) to.gate[channel + at] = enters ? gate : 0.f;
    }
  }
  // The same; sums go to the mailbox of each block of the cluster, if there is one.
  __device__ __forceinline__ void PutFeatures(Projected<D, kG>& to, int m, int part,
                                              const float (&y)[2][4], uint64_t* mailbox) const {
    const int lane = threadIdx.x % 32, column = part * kPartColumns + lane % 4 * 2;
    for (int sign = 0; sign < p.layer.F / D; ++sign) {
      float e[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) e[c] = sign ? -y[c / 2][c % 2] : y[c / 2][c % 2];
      const PartSum sum = Exponentials(e);
      if (lane < 4) {
        float* const phi = to.phi[m] + sign * D + column;
        *reinterpret_cast<float2*>(phi) = {e[0], e[1]};
        *reinterpret_cast<float2*>(phi + 8) = {e[2], e[3]};
      }
      PartSum& at = to.parts[m][sign][part];
      if (mailbox == nullptr) {
        if (lane == 0) at = sum;
      } else if (lane < kStrands / p.own_strands) {
        Send(*mailbox, at.top, sum.top, lane);
        Send(*mailbox, at.sum, sum.sum, lane);
      }
    }
  }
};
template <int D>
__device__ __forceinline__ int PartBytes(const Layer& l) {
  return (l.G + 1) * (l.F / D) * (D / kPartColumns) * int{sizeof(PartSum)};
}

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
