#include "base/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace dsla {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
// Address space only: pages that are never written are never there.
constexpr int64_t kBlockBytes = int64_t{64} << 20;

int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

Arena::~Arena() {
  for (const Block& block : blocks_) ::munmap(block.data, static_cast<size_t>(block.size));
}

void* Arena::Take(int64_t bytes) {
  constexpr int64_t kAlign = 64;
  const std::lock_guard lock(mutex_);
  bytes = RoundUp(bytes, kAlign);
  for (Block& block : blocks_) {
    if (block.size - block.used < bytes) continue;
    std::byte* p = block.data + block.used;
    block.used += bytes;
    return p;
  }
  const int64_t size = std::max(kBlockBytes, RoundUp(bytes, kHugePage));
  // One huge page more than needed, cut to a block that starts at a huge page's boundary.
  void* p = ::mmap(nullptr, static_cast<size_t>(size + kHugePage), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  auto* const start = static_cast<std::byte*>(p);
  auto* const aligned =
      start + (RoundUp(reinterpret_cast<intptr_t>(p), kHugePage) - reinterpret_cast<intptr_t>(p));
  if (aligned != start) ::munmap(start, static_cast<size_t>(aligned - start));
  ::munmap(aligned + size, static_cast<size_t>(start + kHugePage - aligned));
  // Without huge pages (a container may forbid them) it is memory all the same.
  static_cast<void>(::madvise(aligned, static_cast<size_t>(size), MADV_HUGEPAGE));
  blocks_.push_back({aligned, size, bytes});
  return aligned;
}

}  // namespace dsla
