#include "cache/block_memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

namespace dsla {
namespace {

class HostBlockMemory : public BlockMemory {
 public:
  Expected<std::byte*> Reserve(int64_t bytes) override {
    void* p = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      return ResourceExhausted("cannot map {} bytes of cache memory: {}", bytes,
                               std::strerror(errno));
    }
    // Pages of a sequence are read in long runs; huge pages save most of the address translation.
    ::madvise(p, bytes, MADV_HUGEPAGE);
    return static_cast<std::byte*>(p);
  }
  void Release(std::byte* begin, int64_t bytes) override { ::munmap(begin, bytes); }
  void Back(std::byte*, int64_t) override {}  // at the first touch
  void GiveBack(std::byte* block, int64_t bytes) override {
    ::madvise(block, bytes, MADV_DONTNEED);
  }
  void Copy(std::span<const BlockCopy> copies, int64_t bytes) override {
    for (const BlockCopy& copy : copies)
      std::memcpy(copy.to, copy.from, static_cast<size_t>(bytes));
  }
  void Zero(std::span<std::byte* const> blocks, int64_t bytes) override {
    for (std::byte* const block : blocks) std::memset(block, 0, static_cast<size_t>(bytes));
  }
};

}  // namespace

BlockMemory& HostMemory() {
  static HostBlockMemory memory;
  return memory;
}

}  // namespace dsla
