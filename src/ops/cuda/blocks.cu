// Copies bound by memory: every thread has several pieces of 16 bytes under way.
#include <algorithm>

#include "base/check.h"
#include "ops/cuda/blocks.h"

namespace dsla::cuda {
namespace {

constexpr int kThreads = 256, kPieces = 8;  // of a thread
constexpr size_t kMost = 240;               // of a launch: parameters of 4 KiB hold them

struct CopyParams {
  int64_t pieces;  // of a copy
  DeviceCopy copies[kMost];
};

// grid (parts of a copy, copies)
__global__ void __launch_bounds__(kThreads) CopyKernel(const __grid_constant__ CopyParams p) {
  const DeviceCopy& copy = p.copies[blockIdx.y];
  const auto* const from = static_cast<const uint4*>(copy.from);
  auto* const to = static_cast<uint4*>(copy.to);
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kPieces) + threadIdx.x;
  uint4 pieces[kPieces] = {};
  if (from != nullptr) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (const int64_t at = first + i * kThreads; at < p.pieces) pieces[i] = __ldcs(from + at);
  }
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
    if (const int64_t at = first + i * kThreads; at < p.pieces) to[at] = pieces[i];
}

bool Aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace

int CopyOnDevice(std::span<const DeviceCopy> copies, int64_t bytes, Stream stream) {
  DSLA_CHECK(bytes >= 0 && bytes % 16 == 0);
  if (bytes == 0) return cudaSuccess;
  CopyParams p;
  p.pieces = bytes / 16;
  const auto parts = static_cast<unsigned>((p.pieces - 1) / (kThreads * kPieces) + 1);
  for (; !copies.empty(); copies = copies.subspan(std::min(copies.size(), kMost))) {
    const size_t count = std::min(copies.size(), kMost);
    for (size_t i = 0; i < count; ++i) {
      DSLA_CHECK(copies[i].to != nullptr && Aligned(copies[i].to) && Aligned(copies[i].from));
      p.copies[i] = copies[i];
    }
    CopyKernel<<<dim3(parts, static_cast<unsigned>(count)), kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace dsla::cuda
