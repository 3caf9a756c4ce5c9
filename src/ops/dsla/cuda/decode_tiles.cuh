// How a warp of a decode step comes by its tiles: places in shared memory, filled ahead of use.
#pragma once

#include "ops/dsla/cuda/decode_states.cuh"
#include "ops/dsla/cuda/decode_window.cuh"

namespace dsla::cuda {

// A warp's places. A tile's copies are a group; past the last tile groups are empty, so that the
// same wait fits.
template <int D, int kCount>
struct Places {
  static constexpr int kUnits = TileBytes(D) / 16;  // of a place
  uint4* tiles;
  unsigned filled = 0;  // so far

  // The place that is to be filled next, which is that of the oldest tile, or the i-th after it.
  __device__ __forceinline__ uint4* At(int i) const {
    return tiles + (filled + i) % kCount * kUnits;
  }
  __device__ __forceinline__ void Filled() {
    CommitCopies();
    ++filled;
  }
  // For the kTiles oldest ones.
  template <int kTiles>
  __device__ __forceinline__ void Await() const {
    WaitCopies<kCount - kTiles>();
    __syncwarp();
  }
};

// The window's tile `tile` of a step and, as far as there are any, those that are worked on
// together with it; returns how many there were.
template <int D, int kG, int kCount>
__device__ __forceinline__ int AddTiles(const DecodeParams& p, const Task<D>& task,
                                        Window<D, kG>& window, const Places<D, kCount>& places,
                                        int tile) {
  constexpr int kJoint = JointTiles(D);
  const int stride = kStrands * p.steps;
  const int used = kJoint > 1 && tile + stride < p.tiles ? kJoint : 1;
  places.template Await<kJoint>();
  const uint4* joint[kJoint];  // in place of a tile that is not there the one before it
#pragma unroll
  for (int j = 0; j < kJoint; ++j) joint[j] = places.At(j < used ? j : 0);
  window.Add(p, task, joint, tile * kTile, stride * kTile);
  __syncwarp();  // all lanes are done with the places
  return used;
}

// Of a block, but for what `split` alone has.
template <int D, int kG>
constexpr int SharedBytes(int warps, int places, int sums) {
  return warps * (places * TileBytes(D) + int{sizeof(typename States<D, kG>::Shared)}) +
         sums * int{sizeof(Sums<D, kG>)};
}

template <auto kKernel>
void SetShared(int bytes) {
  AllowShared<kKernel>(bytes);
  PreferShared<kKernel>();
}

}  // namespace dsla::cuda
